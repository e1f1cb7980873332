"""The cost of SimSiam's own parts beside a training step: distortion of two views, and the loss.

    python bench/simsiam.py --model resnet50

It times in turns: a training step of the whole module on views that are ready; the distortion of
both views of its images; and the negative cosine of equally many projections, forward and backward.
Where torchvision imports, its transforms on Pillow images are timed as well, which apply the same
operations to one image after another. On a CPU it counts processor time.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from PIL import Image

from simmim.backbone.build import build_encoder, find_preset
from simmim.config.sections import OptimConfig
from simmim.data.distortion import Distortion, distort, draw
from simmim.method.simsiam import SimSiam, negative_cosine
from simmim.training.optim import build_optimizer, parameter_groups


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="resnet50", help="preset (default: %(default)s)")
    add("--batch", type=int, default=8, help="images of the step (default: %(default)s)")
    add("--width", type=int, default=2048, help="of the projections (default: %(default)s)")
    add("--steps", type=int, default=7, help="timed turns (default: %(default)s)")
    add("--device", default="cpu", help="(default: %(default)s)")
    options = parser.parse_args()
    sides = make_sides(options.model, options.batch, options.width, options.device)
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(options.steps + 1):
        for name, side in sides.items():
            begin = clock()
            side()
            if options.device == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first turn is the warm-up
                seconds[name].append(clock() - begin)
    step = statistics.median(seconds["step"])
    for name, values in seconds.items():
        median = statistics.median(values)
        share = f"{median / step:.3%} of the step"
        print(f"{name:<28} {1e3 * median / options.batch:10.3f} ms/image  {share}")
    return 0


def make_sides(name: str, batch: int, width: int, device: str) -> dict[str, Callable[[], object]]:
    """What is timed, by the name that is printed."""
    torch.manual_seed(0)
    spec = find_preset(name)
    model = SimSiam(build_encoder(spec), projector_width=width).to(
        device, memory_format=torch.channels_last
    )
    optimizer = build_optimizer(model, OptimConfig(), parameter_groups(model, 1e-4))
    crops = torch.randint(0, 256, (batch, *spec.image_size, 3), dtype=torch.uint8, device=device)
    views = crops.permute(0, 3, 1, 2)
    ids = torch.arange(batch, device=device)
    epochs, distortion = torch.zeros_like(ids), Distortion()
    z, p = (torch.randn(batch, width, device=device, requires_grad=True) for _ in range(2))

    def step() -> None:
        model(views, views).backward()
        optimizer.step()
        optimizer.zero_grad()

    def distort_both() -> None:
        for view in (0, 1):
            distort(crops, draw(ids, epochs, view, 0, distortion), distortion.blur_sigma[1])

    def loss() -> None:
        negative_cosine(p, p, z, z).backward()
        p.grad = None

    sides: dict[str, Callable[[], object]] = {
        "step": step,
        "distortion, both views": distort_both,
        "negative cosine": loss,
    }
    pillow = torchvision_distortion(distortion)
    if pillow is not None:
        photos = [Image.fromarray(crop.cpu().numpy()) for crop in crops]
        sides["the same in Pillow"] = lambda: [pillow(photo) for photo in photos for _ in (0, 1)]
    return sides


def torchvision_distortion(distortion: Distortion) -> Callable[[Image.Image], Image.Image] | None:
    """The same operations of torchvision on one image; None if torchvision does not import."""
    try:
        from torchvision import transforms
    except (ImportError, RuntimeError):
        return None
    from PIL import ImageFilter

    jitter, grey = transforms.ColorJitter(*distortion.jitter), transforms.RandomGrayscale(1.0)

    def run(photo: Image.Image) -> Image.Image:
        if random.random() < distortion.jitter_probability:
            photo = jitter(photo)
        if random.random() < distortion.grey:
            photo = grey(photo)
        if random.random() < distortion.blur:
            photo = photo.filter(ImageFilter.GaussianBlur(random.uniform(*distortion.blur_sigma)))
        return photo

    return run


if __name__ == "__main__":
    raise SystemExit(main())
