"""Pre-train transformers' Swin with its Trainer: python examples/hugging_face_trainer.py PHOTOS.

It does what transformers' run_mim.py does, with our collator's crops and masks and our op's loss.
It needs transformers 5 and accelerate. The weights in runs/hugging_face have transformers' own
layout, which `simmim convert`, `simmim features` and other commands read. The Trainer of
transformers 5.24 does not resume a Swin's attention weights (its issue 43701): train without a
break, or resume with a later release.
"""

import sys

from torch.nn.init import trunc_normal_
from torch.utils.data import Dataset
from transformers import (
    SwinConfig,
    SwinForMaskedImageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.models.swin.modeling_swin import SwinMaskedImageModelingOutput

from simmim.data.open import open_source
from simmim.errors import DataError
from simmim.hugging_face import MaskCollator
from simmim_kernels import linear_masked_l1_loss


class Photos(Dataset):
    """Encoded images of a folder or of .tar shards; `datasets` gives such examples too."""

    def __init__(self, path):
        self.source = open_source(path)

    def __len__(self):
        return len(self.source.names)

    def __getitem__(self, number):
        return {"image": self.source.read(number), "id": number}


class SwinForSimMIM(SwinForMaskedImageModeling):
    """Its parent's loss and gradients; the head runs only where pixels are hidden."""

    def __init__(self, config):
        super().__init__(config)
        # The parent's token of zeros has no variance, and a layer norm divides its gradient by the
        # deviation: the first gradients would be a thousand times those that follow.
        trunc_normal_(self.swin.embeddings.mask_token, std=config.initializer_range)

    def forward(self, pixel_values, bool_masked_pos):
        hidden = self.swin(pixel_values, bool_masked_pos=bool_masked_pos).last_hidden_state
        stride, head = self.config.encoder_stride, self.decoder[0]
        features = hidden.unflatten(1, (pixel_values.shape[2] // stride, -1))  # [B, h, w, D]
        mask = bool_masked_pos.bool().view(-1, *self.swin.embeddings.patch_grid)
        loss = linear_masked_l1_loss(features, head.weight, head.bias, pixel_values, mask, stride)
        return SwinMaskedImageModelingOutput(loss=loss)


class Epochs(TrainerCallback):
    """Tells the collator which epoch begins, so that every epoch has other crops and masks."""

    def __init__(self, collator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.set_epoch(int(state.epoch))


def make_trainer(path, output="runs/hugging_face", steps=20):
    """A Trainer for a tiny Swin; `from_pretrained` goes on from published weights instead."""
    config = SwinConfig(
        image_size=64, embed_dim=16, depths=[1, 2], num_heads=[2, 4], window_size=4,
        encoder_stride=8,
        initializer_range=0.2,  # about 1/√width; the default of 0.02 is for widths near a thousand
    )  # fmt: skip
    collator = MaskCollator(config.image_size, config.patch_size, mask_unit=16, mask_ratio=0.6)
    arguments = TrainingArguments(
        output_dir=output,
        per_device_train_batch_size=8,
        max_steps=steps,
        learning_rate=1e-2,
        warmup_steps=5,
        weight_decay=0.05,
        max_grad_norm=5.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,  # the collator wants image and id
        label_names=["bool_masked_pos"],
    )
    return Trainer(
        SwinForSimMIM(config),
        arguments,
        data_collator=collator,
        train_dataset=Photos(path),
        callbacks=[Epochs(collator)],
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    try:
        trainer = make_trainer(sys.argv[1])
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    trainer.train()  # prints the loss of every step
    trainer.save_model()
