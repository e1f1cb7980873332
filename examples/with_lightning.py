"""Pre-train under Lightning: python examples/with_lightning.py PHOTOS [--section.key=value …].

The losses are those of `simmim pretrain RECIPE --data.path=PHOTOS …`, on any number of devices and
after a resume. `simmim recipes` lists the recipes; those of other methods run as well.
"""

import argparse

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from simmim.command_line import load
from simmim.errors import ConfigError, RunError
from simmim.lightning_adapters import MethodDataModule, MethodModule

PRECISIONS = {"float32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


class PrintLoss(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.is_global_zero and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            print(f"step {trainer.global_step}  loss {trainer.callback_metrics['loss']:.9g}")


def train(photos, recipe, devices, resume, flags):
    config = load([recipe, f"--data.path={photos}", *flags])
    data = MethodDataModule(config)
    module = MethodModule(config, data.schedule)
    trainer = Trainer(
        accelerator=config.device,
        devices=devices,
        strategy="auto" if devices == 1 else "ddp",
        max_steps=data.schedule.total_steps,
        accumulate_grad_batches=config.train.accumulation_steps,
        precision=PRECISIONS[config.train.precision],
        use_distributed_sampler=False,  # every process takes its own part of the order
        default_root_dir=config.output,
        callbacks=[PrintLoss(), ModelCheckpoint(every_n_train_steps=10, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, ckpt_path=resume)
    if trainer.is_global_zero:
        module.save_weights(f"{config.output}/model.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("photos", help="folder of images, or of .tar shards")
    parser.add_argument("--recipe", default="smoke", help="or a TOML file")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--resume", metavar="CHECKPOINT", help="a .ckpt file of Lightning")
    options, flags = parser.parse_known_args()
    try:
        train(flags=flags, **vars(options))
    except (ConfigError, RunError) as error:
        raise SystemExit(f"error: {error}") from None
