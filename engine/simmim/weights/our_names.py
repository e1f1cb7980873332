"""Names of a model's parameters here: every other layout is converted to these, and from them.

They are those of an official pre-training checkpoint: `encoder.…` for the encoder, beside it
`decoder.…` of a masked model, `head.…` and `fc_norm.…` of a classifier.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

State = dict[str, Tensor]

PREFIX = "encoder."

# Parts of a model that stand beside its encoder.
HEADS = ("head.", "fc_norm.", "decoder.")

# What other programs save beside parameters, and what follows from the architecture.
BUFFERS = ("relative_position_index", "attn_mask", "relative_coords_table")


class Converted(NamedTuple):
    """A checkpoint of another program under our names."""

    state: State
    """Name → tensor."""
    hints: dict[str, Any]
    """What names and shapes do not tell, as arguments of `simmim.weights.architecture.infer_spec`;
    None tells nothing.
    """
    metadata: dict[str, Any]
    """classes, mean and std, where the file tells them, and "dropped": names of the file that have
    no place here.
    """


def kind_of(state: Mapping[str, Any]) -> str:
    """The kind of model that has these names: "simmim", "classifier" or "encoder"."""
    if "decoder.0.weight" in state:
        return "simmim"
    return "classifier" if "head.weight" in state else "encoder"


def masking_names(state: Mapping[str, Any], kind: str) -> list[str]:
    """The names that a library without masked models has no place for: mask token and decoder.

    Args:
        state: under our names.
        kind: of the library's model; where that is "encoder", the norm of the mean goes too.
    """
    parts = ("decoder.", f"{PREFIX}mask_token") + (("fc_norm.",) if kind == "encoder" else ())
    return [name for name in state if name.startswith(parts)]


def count_numbers(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that `pattern` finds as its group at the start of a name."""
    matches = [re.match(pattern, name) for name in names]
    return 1 + max((int(match[1]) for match in matches if match), default=-1)
