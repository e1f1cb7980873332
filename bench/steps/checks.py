"""Checks that all rows of bench/throughput.py compute the same loss and gradients."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from bench.peers.peer import Mismatch
from bench.steps.engine_row import EngineRow, engine_loss, raise_zero_norms
from bench.steps.images import Images
from bench.steps.row import Row
from simmim.backbone.build import build_encoder
from simmim.config.sections import Config
from simmim.method.build import find_method
from simmim.method.simsiam import SimSiamMethod

# A batch norm over two images has almost no gradient, so SimSiam is checked on more.
CHECK_BATCH, CHECK_BATCH_VIEWS = 2, 8
LOSS_RTOL, GRADIENT_RTOL, LOW_PRECISION_RTOL = 1e-4, 1e-3, 3e-2


def check_equal(base: EngineRow, row: Row) -> tuple[float, float]:
    """Copy our weights into the row, and compare its loss and gradients with ours.

    The comparison is in float32 on two images. For SimSiam it is in float64 on eight pairs of
    views, because batch norms over nearly equal features amplify rounding. After that the losses
    alone are compared in the dtype that is timed.

    Returns:
        The error of the loss (see `loss_error`), and of the worst gradient: the norm of the
        difference relative to the norm of our gradient.

    Raises:
        Mismatch: loss or gradients differ by more than rounding can explain.
    """
    config, model = base.config, base.model
    if row.spec != base.spec:
        torch.manual_seed(config.seed)
        model = raise_zero_norms(
            find_method(config).build(build_encoder(row.spec)).to(base.device).train()
        )
    if row.model is not model:
        row.load(model.state_dict())
    pairs_of_views = isinstance(base.method, SimSiamMethod)
    count = CHECK_BATCH_VIEWS if pairs_of_views else CHECK_BATCH
    images = checked = Images.make(count, model, config)
    if pairs_of_views:
        model.double(), row.model.double()
        checked = Images.make(count, model, config)  # normalised in float64 as well
        first, second = checked.ready
        checked = replace(checked, ready=(first.double(), second.double()))
    ours, our_gradients = _gradients(model, engine_loss(model, checked, config, "float32"))
    theirs, their_gradients = _gradients(row.model, row.forward(checked, "float32"))
    model.float(), row.model.float()
    error = loss_error(theirs, ours, config)
    if not error <= LOSS_RTOL:
        raise Mismatch(f"{row.name}: loss {theirs:.7g}, ours {ours:.7g}: off by {error:.2g}")
    worst = _worst_gradient_error(row, our_gradients, their_gradients)
    dtype = config.train.precision
    if dtype != "float32":
        with torch.no_grad():
            ours = float(engine_loss(model, images, config, dtype))
            theirs = float(row.forward(images, dtype))
        if not loss_error(theirs, ours, config) <= LOW_PRECISION_RTOL:
            raise Mismatch(f"{row.name}: loss in {dtype} {theirs:.5g}, ours {ours:.5g}")
    return error, worst


def _worst_gradient_error(
    row: Row, our_gradients: dict[str, Tensor], their_gradients: dict[str, Tensor]
) -> float:
    worst, worst_name = 0.0, ""
    for pair in row.pairs:
        if not pair.compared:
            continue
        expected, actual = pair.take(our_gradients).double(), their_gradients.get(pair.theirs)
        if actual is None:
            raise Mismatch(f"{row.name}: {pair.theirs} has no gradient, ours has one")
        error = float((actual - expected).norm() / expected.norm().clamp(min=1e-30))
        if not error <= worst:  # NaN is the worst
            worst, worst_name = error, pair.theirs
    if not worst <= GRADIENT_RTOL:
        raise Mismatch(f"{row.name}: gradient of {worst_name} is off by {worst:.2g} of its norm")
    return worst


def check_compiled(row: Row, plain: Row, images: Images) -> None:
    """Compare the loss of a compiled row with that of the row that it compiles.

    Raises:
        Mismatch: the losses differ by more than rounding can explain.
    """
    # with gradients on, because torch.compile makes another graph without them
    dtype = row.config.train.precision
    ours, theirs = (float(r.forward(images, dtype).detach()) for r in (plain, row))
    if not loss_error(theirs, ours, row.config) <= LOW_PRECISION_RTOL:
        raise Mismatch(f"{row.name}: loss {theirs:.5g}, not compiled {ours:.5g}")


def loss_error(theirs: float, ours: float, config: Config) -> float:
    """Difference of two losses: relative, except for SimSiam, whose cosines may be near 0."""
    scale = 1.0 if config.method.name == SimSiamMethod.name else abs(ours)
    return abs(theirs - ours) / scale


def _gradients(model: nn.Module, loss: Tensor) -> tuple[float, dict[str, Tensor]]:
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), gradients
