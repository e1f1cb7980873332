"""Parameter groups as published, and the optimiser over them."""

import torch
from torch import nn

from simmim.config import OptimConfig
from simmim.method.simmim import SimMIM


def decays(name: str, parameter: nn.Parameter, model: SimMIM, decay_position_tables: bool) -> bool:
    """Whether weight decay applies to a parameter, as in the published pre-training.

    Exempt are one-dimensional parameters, biases and the encoder's own list (Swin: absolute
    position and mask token; ViT: position and class token, but not the mask token).
    """
    if parameter.ndim == 1 or name.endswith(".bias"):
        return False
    if name.removeprefix("encoder.") in model.encoder.no_decay:
        return False
    return decay_position_tables or not name.endswith("relative_position_bias_table")


def parameter_groups(
    model: SimMIM, weight_decay: float, *, decay_position_tables: bool = True
) -> list[dict[str, object]]:
    """Two groups, decayed and not, each {"params", "names", "weight_decay"}.

    Source: microsoft/SimMIM optimizer.py (get_pretrain_param_groups). Its rule that should exempt
    relative position tables never matches, so published models decay them; set
    `decay_position_tables=False` for what was meant.
    """
    groups: list[dict[str, object]] = []
    for decay in (True, False):
        named = [
            (name, parameter)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
            and decays(name, parameter, model, decay_position_tables) == decay
        ]
        groups.append(
            {
                "params": [parameter for _, parameter in named],
                "names": [name for name, _ in named],
                "weight_decay": weight_decay if decay else 0.0,
            }
        )
    return groups


def build_optimizer(model: SimMIM, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser of a run; fused, so that it can skip a step on the device (see step.py)."""
    groups = parameter_groups(
        model, config.weight_decay, decay_position_tables=config.decay_position_tables
    )
    if config.name == "sgd":
        nesterov = config.momentum > 0
        sgd = torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True
        )
        # torch leaves a fresh buffer unwritten when its first step is skipped; zero is what the
        # first step starts from
        for parameter in model.parameters() if nesterov else ():
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
