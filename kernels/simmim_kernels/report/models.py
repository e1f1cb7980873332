"""Shapes of the models that people train, as the ops see them."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """Shapes of a model whose ops are reported.

    Attributes:
        name: of the model, its image size and window.
        batch: images per step on one GPU.
        tokens: tokens of an image where they are masked.
        width: channels of these tokens.
        head_width: channels of the encoder's output, which the prediction head reads.
        cells: side of the square grid of the encoder's output.
        stride: pixels of the image along one cell.
    """

    name: str
    batch: int
    tokens: int
    width: int
    head_width: int
    cells: int
    stride: int

    @property
    def side(self) -> int:
        """Rows and columns of pixels."""
        return self.cells * self.stride

    @property
    def units(self) -> int:
        """Rows and columns of mask units, which are 32 pixels wide."""
        return self.side // 32

    @property
    def hidden_share(self) -> float:
        """Hidden units over all: six tenths, rounded up to whole units."""
        return math.ceil(self.units**2 * 0.6) / self.units**2

    @property
    def hidden_pixels(self) -> int:
        """Hidden values of a batch, of all three channels."""
        return int(self.batch * 3 * self.side**2 * self.hidden_share)

    @property
    def sign_bytes(self) -> int:
        """Bytes that hold the signs of the errors of a batch: 16 pixels in a word of four bytes."""
        return self.batch * 3 * self.side**2 // 16 * 4


MODELS = (
    Model("swin_base_192_w6", 64, tokens=2304, width=128, head_width=1024, cells=6, stride=32),
    Model("swin_large_192_w12", 64, tokens=2304, width=192, head_width=1536, cells=6, stride=32),
    Model("vit_base_224", 64, tokens=196, width=768, head_width=768, cells=14, stride=16),
)


@dataclass(frozen=True)
class Block:
    """A transformer block of a model, of which the passes between matrix products are reported.

    Attributes:
        model: its name, and the stage if it is not the first.
        batch: images per step on one GPU.
        tokens: tokens of an image.
        width: channels.
        hidden: channels inside the MLP.
        scaled: with LayerScale and stochastic depth.
    """

    model: str
    batch: int
    tokens: int
    width: int
    hidden: int
    scaled: bool = False


BLOCKS = (
    Block("swin_base_192_w6", 64, 2304, 128, 512),
    Block("swin_base_192_w6_stage_3", 64, 144, 512, 2048),
    Block("swin_large_192_w12", 64, 2304, 192, 768),
    Block("vit_base_224", 64, 197, 768, 3072, scaled=True),
)


POST_NORM_BLOCKS = (
    Block("swinv2_base_192_w12", 64, 2304, 128, 512, scaled=True),
    Block("swinv2_base_192_w12_stage_3", 64, 144, 512, 2048, scaled=True),
)


@dataclass(frozen=True)
class Attention:
    """Attention of one block of a model.

    Attributes:
        model: its name, and the stage if it is not the first.
        batch: images per step on one GPU.
        side: rows and columns of tokens.
        num_heads: heads, each 32 or 64 wide.
        head_width: channels of a head.
        window: rows and columns of a window.
        shift: of the windows.
        biased: with a learned bias of positions.
        cosine: by cosines of q and k.
    """

    model: str
    batch: int
    side: tuple[int, int]
    num_heads: int
    head_width: int
    window: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    biased: bool = True
    cosine: bool = False


ATTENTIONS = (
    Attention("swin_base_192_w6", 64, (48, 48), 4, 32, (6, 6), (3, 3)),
    Attention("swin_base_192_w6_stage_3", 64, (12, 12), 16, 32, (6, 6)),
    Attention("swin_large_192_w12", 64, (48, 48), 6, 32, (12, 12), (6, 6)),
    Attention("swin_large_192_w12_stage_3", 64, (12, 12), 24, 32, (12, 12)),
    Attention("vit_base_224", 64, (1, 197), 12, 64, (1, 197), biased=False),
    Attention("swinv2_base_192_w12", 64, (48, 48), 4, 32, (12, 12), (6, 6), cosine=True),
    Attention("swinv2_base_192_w6", 64, (48, 48), 4, 32, (6, 6), (3, 3), cosine=True),
)


@dataclass(frozen=True)
class Merge:
    """The merging between two stages of a model, without its matrix products.

    Attributes:
        model: its name, and the stage before the merging if it is not the first.
        batch: images per step on one GPU.
        side: tokens along one side of the stage's square grid.
        width: channels of these tokens.
    """

    model: str
    batch: int
    side: int
    width: int


MERGES = (
    Merge("swin_base_192_w6", 64, 48, 128),
    Merge("swin_base_192_w6_stage_3", 64, 12, 512),
    Merge("swin_large_192_w12", 64, 48, 192),
)
