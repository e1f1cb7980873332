"""Whole steps: equal to the reference's, repeatable to the bit, and without a wait."""

from typing import Any

import torch

from bench.gpu_stages.stage import Emit, config_of, is_tiny, values_are_real
from bench.steps.engine_row import EngineRow
from bench.steps.images import Images
from simmim.training.graphed_steps import GraphedSteps
from simmim.training.step import TrainState, train_step

MODELS = ("swin_base", "swinv2_base", "vit_base")
STEPS = 6


def run(emit: Emit, seconds: float) -> None:
    """Emit, for every model, the errors beside float32, and what of two runs differs.

    Raises:
        RuntimeError: a step is less exact than twice the reference's, or differs when repeated.
    """
    wrong = []
    for model in MODELS[:1] if is_tiny() else MODELS:
        found = look_at(model, 4 if is_tiny() else 32)
        emit("step", model=model, **found)
        if not found["as_exact_as_the_reference"] or found["differing_weights"]:
            wrong.append(model)
    if wrong and values_are_real():
        raise RuntimeError(f"not exact, or not repeatable: {', '.join(wrong)}")


def look_at(model: str, batch: int) -> dict[str, Any]:
    """Errors of the first losses and gradient norms, and how far two equal runs agree."""
    losses, weights = {}, {}
    runs = {
        "ours": {}, "again": {}, "graph": {"cuda_graph": "on"}, "reference": {},
        "float32": {"precision": "float32"},
    }  # fmt: skip
    for name, options in runs.items():
        row, images = build(model, batch, options)
        if name in ("reference", "float32"):
            row = row.through_references(name)
        losses[name], weights[name] = train(row.run, images, name == "graph")
    # losses of the first step are of equal weights; later ones show that nothing drifts
    error = {
        name: (torch.tensor(losses[name]) - torch.tensor(losses["float32"])).norm().item()
        for name in ("ours", "reference")
    }
    differing = [
        key for other in ("again", "graph") for key in weights["ours"]
        if not torch.equal(weights["ours"][key], weights[other][key])
    ]  # fmt: skip
    return {
        "losses": losses,
        "error": error,
        "as_exact_as_the_reference": error["ours"] <= 2 * error["reference"] + 1e-5,
        "differing_weights": len(differing),
    }


def build(model: str, batch: int, options: dict[str, Any]) -> tuple[EngineRow, Images]:
    """The same model and images for every run."""
    torch.manual_seed(0)
    config = config_of(model, batch, **options)
    row = EngineRow("ours", config, torch.device("cuda", 0))
    return row, Images.make(batch, row.model, config)


def train(
    state: TrainState, images: Images, graphed: bool
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of some steps, and the weights after them; a wait in a later step raises."""
    make_step: Any = GraphedSteps(state, print)
    if not graphed:
        make_step = lambda batches: train_step(state, batches)  # noqa: E731
    metrics = []
    for number in range(STEPS):
        watched = number == STEPS - 1
        torch.cuda.set_sync_debug_mode("error" if watched else "default")
        try:
            metrics.append(make_step([images.batch]).loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [float(loss) for loss in metrics], {
        key: value.clone() for key, value in state.model.state_dict().items()
    }
