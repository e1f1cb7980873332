"""The published parameter groups, and the optimiser of a run."""

from collections import defaultdict

import torch
from torch import nn

from simmim.backbone.vit import ViT
from simmim.config.sections import OptimConfig
from simmim.model.classifier import Classifier
from simmim.model.image_model import ImageModel

# Parameters of a Swin that the published fine-tuning does not decay; it decays those of a ViT.
POSITION_PARAMETERS = ("relative_position_bias_table", "cpb_mlp", "logit_scale")


def decays(
    name: str, parameter: nn.Parameter, model: ImageModel, decay_position_tables: bool
) -> bool:
    """Whether weight decay applies to a parameter, as in the published pre-training.

    One-dimensional parameters, biases and those in the encoder's own list are exempt (Swin:
    absolute position and mask token; ViT: position and class token, but not the mask token).
    """
    if parameter.ndim == 1 or name.endswith(".bias"):
        return False
    if name.removeprefix("encoder.") in model.encoder.no_decay:
        return False
    return decay_position_tables or not any(word in name for word in POSITION_PARAMETERS)


def parameter_groups(
    model: ImageModel, weight_decay: float, *, decay_position_tables: bool = True
) -> list[dict[str, object]]:
    """Two groups, one decayed and one not, each {"params", "names", "weight_decay"}.

    Source: microsoft/SimMIM optimizer.py (get_pretrain_param_groups). Its rule that should exempt
    relative position tables never matches, so published models decay them; set
    `decay_position_tables=False` to exempt them.
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


def finetune_groups(
    model: Classifier,
    weight_decay: float,
    layer_decay: float,
    *,
    decay_position_tables: bool = False,
) -> list[dict[str, object]]:
    """Groups of parameters that share layer and decay, from the first layer to the head.

    Each is {"params", "names", "weight_decay", "lr_scale"}; lr_scale is layer_decay^(last - layer).

    Source: microsoft/SimMIM optimizer.py (get_finetune_param_groups).
    """
    last = model.encoder.num_layers + 1
    groups: dict[tuple[int, bool], list[str]] = defaultdict(list)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        exempt = (
            not decay_position_tables
            and not isinstance(model.encoder, ViT)
            and any(word in name for word in POSITION_PARAMETERS)
        )
        decay = not exempt and decays(name, parameter, model, True)
        groups[layer_of(name, model), decay].append(name)
    return [
        {
            "params": [parameters[name] for name in names],
            "names": names,
            "weight_decay": weight_decay if decay else 0.0,
            "lr_scale": layer_decay ** (last - layer),
        }
        for (layer, decay), names in sorted(groups.items())
    ]


def layer_of(name: str, model: ImageModel) -> int:
    """The layer of a parameter, as layer-wise decay counts; see `Encoder.layer_of`."""
    if not name.startswith("encoder."):
        return model.encoder.num_layers + 1
    return model.encoder.layer_of(name.removeprefix("encoder."))


def build_optimizer(
    model: ImageModel, config: OptimConfig, groups: list[dict[str, object]] | None = None
) -> torch.optim.Optimizer:
    """Build a run's optimiser; it is fused, so it can skip a step on the device (see step.py).

    Args:
        model: the model whose parameters train.
        config: the configuration of the optimiser.
        groups: groups of parameters; None takes those of pre-training.
    """
    groups = groups or parameter_groups(
        model, config.weight_decay, decay_position_tables=config.decay_position_tables
    )
    if config.name == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        sgd = torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True
        )
        # torch leaves a fresh buffer unwritten when its first step is skipped; zero is what the
        # first step starts from
        held = [parameter for group in sgd.param_groups for parameter in group["params"]]
        for parameter in held if config.momentum else ():
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    on_cuda = next(model.parameters()).device.type == "cuda"
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
        capturable=on_cuda,  # by a CUDA graph
    )
