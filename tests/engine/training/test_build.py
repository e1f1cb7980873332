"""What a run needs before its first step: every setting arrives in the model and in the state."""

from typing import Any

import pytest
import torch

from simmim.command_line import load
from simmim.config.sections import Config, KernelsConfig, MaskConfig
from simmim.distributed import World
from simmim.errors import RunError
from simmim.pretrain import build_model
from simmim.training import build
from simmim.training.build import build_state, check_backends, prepare_model
from simmim.training.optim import parameter_groups
from small_run import CPU


def config_of(*flags: str) -> Config:
    return load(["smoke", "--data.path=x", *flags])


def test_the_seed_gives_the_first_weights() -> None:
    drawn = {}
    for seed in (1, 2, 1):
        model = build_model(config_of(f"--seed={seed}"), CPU)
        weight = next(p for p in model.parameters() if p.dim() > 1).detach()
        assert torch.equal(weight, drawn.setdefault(seed, weight))
        torch.rand(3)
    assert not torch.equal(drawn[1], drawn[2])


def test_a_model_computes_as_configured() -> None:
    plain = build_model(config_of(), CPU)
    assert not plain.encoder.activation_checkpointing
    flags = ["--train.activation_checkpointing=true", "--kernels.backend=reference",
             "--kernels.attention=native", "--train.channels_last=true"]  # fmt: skip
    config = config_of(*flags)
    model = prepare_model(build_model(config_of(), CPU), config, CPU)
    assert model.encoder.activation_checkpointing
    assert model.encoder.backends == type(model.encoder.backends)("reference", "native")
    images = [p for p in model.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
    assert images
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in images)
    assert not any(
        p.is_contiguous(memory_format=torch.channels_last)
        for p in plain.parameters()
        if p.dim() == 4 and min(p.shape[1:]) > 1
    )


@pytest.mark.parametrize("chosen", [True, False])
def test_a_state_is_built_as_configured(monkeypatch: pytest.MonkeyPatch, chosen: bool) -> None:
    asked: list[dict[str, Any]] = []
    wrapped = torch.nn.Identity()

    def wrap(model: Any, world: World, **given: Any) -> Any:
        asked.append(given)
        return wrapped

    monkeypatch.setattr(build, "wrap", wrap)
    flag = str(chosen).lower()
    config = config_of(
        f"--train.sync_batch_norm={flag}", f"--train.compile={not chosen}".lower(),
        "--train.steps=0", "--train.epochs=2", "--optim.lr=0.25",
    )  # fmt: skip
    model, mask = build_model(config, CPU), MaskConfig(unit=16)
    loss_of: Any = object()
    state = build_state(
        model, config, 80, World(0, 1, CPU),
        parameter_groups=lambda m: parameter_groups(m, 0.5), loss_of=loss_of,
        ema_decay=0.75, mask=mask,
    )  # fmt: skip
    told = {"sync_batch_norm": chosen, "compile": not chosen, "for_graph": chosen}
    assert asked == [told]  # by default a graph is wanted of what is not compiled
    assert (state.model, state.wrapped, state.loss_of) == (model, wrapped, loss_of)
    assert (state.ema_decay, state.mask) == (0.75, mask)
    assert state.averaged is not None
    assert state.schedule.total_steps == 20  # two epochs of 80 images in batches of 8
    assert [group["weight_decay"] for group in state.optimizer.param_groups] == [0.5, 0.0]
    assert state.optimizer.param_groups[0]["lr"] == 0.25


def test_backends_that_cannot_run_are_refused_by_their_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from simmim.backbone.build import PRESETS

    class Backend:
        def __init__(self, name: str, *reasons: str) -> None:
            self.name, self.reasons = name, list(reasons)

        def reasons_against(self, x: torch.Tensor) -> list[str]:
            return self.reasons

    plain, cosine = PRESETS["swin_tiny"], PRESETS["swinv2_tiny"]
    here: Any = [Backend("reference"), Backend("xformers"), Backend("triton", "no GPU", "old")]
    monkeypatch.setattr(build, "ATTENTION_BACKENDS", here)
    monkeypatch.setattr(build, "COSINE_BACKENDS", here[:1])
    check_backends(KernelsConfig(backend="reference", attention="xformers"), plain, CPU)
    check_backends(KernelsConfig(), cosine, CPU)
    for chosen, spec, message in (
        (KernelsConfig(backend="triton"), plain, "kernels.backend=triton cannot run: no GPU; old"),
        (KernelsConfig(attention="triton"), plain, "kernels.attention=triton cannot run: no GPU"),
        (KernelsConfig(attention="xformers"), cosine, "kernels.attention=xformers cannot run the"),
    ):
        with pytest.raises(RunError, match=message):
            check_backends(chosen, spec, CPU)
