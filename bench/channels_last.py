"""A SimMIM training step of a ConvNet in channels-last and in contiguous memory format.

    python bench/channels_last.py --model resnet50

It first checks that both formats give the same loss and gradients, then times them in turns and
prints the medians. On a CPU it counts the processor time of one thread, which other work on the
machine hardly changes; on a GPU it uses the clock.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor

from simmim import SimMIM
from simmim.backbone.build import find_preset
from simmim.config.sections import OptimConfig
from simmim.training.optim import build_optimizer, parameter_groups

FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


class Step:
    """A model in one memory format, its optimiser, and the images that it trains on."""

    def __init__(self, name: str, layout: str, batch: int, device: str, bf16: bool) -> None:
        torch.manual_seed(0)
        spec = find_preset(name)
        self.model = SimMIM(spec.build()).to(device, memory_format=FORMATS[layout])
        groups = parameter_groups(self.model, 0.05)
        self.optimizer = build_optimizer(self.model, OptimConfig(), groups)
        generator = torch.Generator().manual_seed(1)
        shape = (batch, *spec.image_size, spec.channels)
        image = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        self.image = image.permute(0, 3, 1, 2).contiguous(memory_format=FORMATS[layout]).to(device)
        units = [side // 32 for side in spec.image_size]
        self.mask = (torch.rand(batch, *units, generator=generator) < 0.6).to(device)
        self.device, self.bf16 = device, bf16

    def gradients(self) -> Tensor:
        """Run the forward and the backward pass; returns the loss."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            loss = self.model(self.image, self.mask)
        loss.backward()
        return loss.detach()

    def seconds(self) -> float:
        """Make one step; returns its time."""
        clock = time.process_time if self.device == "cpu" else time.perf_counter
        self._wait()
        begin = clock()
        self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        return clock() - begin

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def check_equal(steps: list[Step]) -> None:
    """Raise AssertionError unless the losses and the gradients of both formats agree."""
    losses = [step.gradients() for step in steps]
    norms = []
    for step in steps:
        norms.append(torch.stack([p.grad.norm() for p in step.model.parameters()]).norm())
        step.optimizer.zero_grad()
    tolerance = 2e-2 if steps[0].bf16 else 1e-3
    torch.testing.assert_close(losses[0], losses[1], rtol=tolerance, atol=0)
    torch.testing.assert_close(norms[0], norms[1], rtol=tolerance, atol=0)


def main() -> None:
    """Print a line for every precision."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="resnet50", help="preset (default: %(default)s)")
    add("--batch", type=int, default=8, help="images of a step (default: %(default)s)")
    add("--steps", type=int, default=7, help="timed steps of each (default: %(default)s)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    for precision in ("float32", "bf16"):
        bf16 = precision == "bf16"
        steps = [Step(options.model, f, options.batch, options.device, bf16) for f in FORMATS]
        check_equal(steps)
        times: list[list[float]] = [[], []]
        for _ in range(options.steps):
            for step, seconds in zip(steps, times):
                seconds.append(step.seconds())
        contiguous, last = (statistics.median(seconds) for seconds in times)
        print(
            f"{options.model}, batch {options.batch}, {precision}: contiguous {contiguous:.3f} s, "
            f"channels-last {last:.3f} s, ratio {contiguous / last:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
