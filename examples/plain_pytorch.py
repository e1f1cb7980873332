"""Pre-train in a loop of your own: python examples/plain_pytorch.py PHOTOS [--section.key=value …].

The losses are those of `simmim pretrain smoke --data.path=PHOTOS …`, whose loop does more: it
resumes, takes several devices and fp16, skips bad steps, draws pictures.
`simmim.save_pretrained(model, "FOLDER")` keeps the weights.
"""

import sys
from contextlib import closing

from torch.nn.utils import clip_grad_norm_

from simmim import distributed
from simmim.command_line import load
from simmim.data.build import make_loader
from simmim.data.open import open_source
from simmim.errors import ConfigError, RunError, from_setting
from simmim.method.build import find_method
from simmim.pretrain import build_model
from simmim.training import precision
from simmim.training.optim import build_optimizer
from simmim.training.schedule import resolve_schedule
from simmim.training.step import seed_step


def train(photos="", *flags):
    config = load(["smoke", f"--data.path={photos}", *flags])  # or another recipe, or a TOML file
    world = distributed.init(config.device)
    with from_setting("data.path"):  # for the message where there are no photos
        source = open_source(config.data.path)
    schedule = resolve_schedule(config, len(source.names))
    method, model = find_method(config), build_model(config, world.device)
    optimizer = build_optimizer(model, config.optim, method.parameter_groups(model))
    loader = make_loader(config, source, world, method.view())
    with closing(loader.steps(0, schedule.total_steps)) as steps:
        for step, batches in enumerate(steps):  # a batch for each accumulation step
            seed_step(config.seed, step, world)  # for stochastic depth
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate_of(group, step)
            losses = []
            for batch in batches:  # uint8 images and their ids, from which the method draws masks
                with precision.autocast(world.device, config.train.precision):
                    losses.append(method.loss(model, batch) / len(batches))
                losses[-1].backward()
            clip_grad_norm_(model.parameters(), config.train.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step + 1}  loss {sum(losses).item():.9g}")


if __name__ == "__main__":
    try:
        train(*sys.argv[1:])
    except (ConfigError, RunError) as error:
        raise SystemExit(f"error: {error}") from None
