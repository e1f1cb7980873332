"""The README's code for other people's training loops, run as it stands there.

Each block takes the place of code in microsoft/SimMIM, transformers or lightly, and must give that
code's loss and gradients. Nothing is downloaded: the models are tiny and random or golden.
"""

import functools
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from numerics import INDEX, assert_close_to, gradient_rows, load_golden, with_prefix
from simmim import load_model
from simmim.backbone.layers import Backends
from simmim.backbone.swin import PatchEmbed, Swin, SwinSpec, SwinStage
from simmim.backbone.vit import ViT

README = Path(__file__).parents[2] / "README.md"
HEADING = "## Use the ops in your own training loop"
PUBLISHED, TRANSFORMERS, LIGHTLY = range(3)

KINDS = ("pretrain-swin", "pretrain-vit")
MODELS = [n for n, f in INDEX.items() if f["kind"] in KINDS and f["system"] == "microsoft/SimMIM"]

# warnings of the packages themselves
third_party = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def blocks() -> list[str]:
    _, _, section = README.read_text(encoding="utf-8").partition(HEADING + "\n")
    section = section.split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)


def run_block(number: int, **given: Any) -> dict[str, Any]:
    """Run a block with the names that it needs; return the names that it sets."""
    module = ModuleType(f"readme_block_{number}")
    module.__file__ = str(README)
    vars(module).update(given)
    sys.modules[module.__name__] = module  # transformers 5.0 looks there for a model's source
    exec(compile(blocks()[number], f"README.md, block {number}", "exec"), vars(module))
    return vars(module)


@functools.cache
def torchvision_problem() -> str | None:
    """Why an installed torchvision cannot be imported; transformers and lightly then fail too."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        # PyPI's torchvision wants CUDA libraries, which the CPU wheel of torch leaves out
        return f"torchvision does not import beside torch {torch.__version__}: {error}"
    return None


def imported(package: str, version: str) -> ModuleType:
    """Import the package, or skip the test and say why."""
    if problem := torchvision_problem():
        pytest.skip(problem)
    return pytest.importorskip(package, version, reason=f"{package} ≥ {version} is not installed")


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(
    ours: nn.Module, loss: Callable[[], Tensor], other: nn.Module, other_loss: Callable[[], Tensor]
) -> None:
    """Assert equal loss and equal gradients under equal names, up to float32 rounding."""
    torch.manual_seed(7)  # for stochastic depth and dropout
    expected_loss = other_loss()
    expected = gradients(other, expected_loss)
    torch.manual_seed(7)
    actual_loss = loss()
    actual = gradients(ours, actual_loss)
    torch.testing.assert_close(actual_loss, expected_loss, rtol=2e-6, atol=1e-7)
    assert actual.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name],
            gradient,
            rtol=1e-4,
            atol=1e-6 * largest,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_the_section_has_its_blocks() -> None:
    found = blocks()
    assert len(found) == 3
    assert "models.simmim" in found[PUBLISHED]
    assert "transformers" in found[TRANSFORMERS]
    assert "lightly" in found[LIGHTLY]


# microsoft/SimMIM is no package: its classes' attributes and calling conventions around our layers.


class TokenPatchEmbed(PatchEmbed):
    """image → [B, L, D]."""

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(image).flatten(2).mT)


class TokenStage(SwinStage):
    """[B, L, D] → [B, L', D']."""

    def __init__(self, spec: SwinSpec, stage: int) -> None:
        super().__init__(spec, stage, [0.0] * spec.depths[stage])
        self.resolution = spec.resolution(stage)

    def forward(self, tokens: Tensor) -> Tensor:
        grid = tokens.unflatten(1, self.resolution)
        return super().forward(grid, False, Backends("reference", "reference")).flatten(1, 2)


def published_module() -> ModuleType:
    """A `models.simmim` whose classes are fresh, for the README's block to change."""

    class SwinTransformerForSimMIM(Swin):
        def __init__(self, spec: SwinSpec) -> None:
            super().__init__(spec)
            self.ape = spec.absolute_position
            self.patch_embed = TokenPatchEmbed(spec)
            self.pos_drop = nn.Dropout(0.0)
            self.layers = nn.ModuleList(TokenStage(spec, i) for i in range(len(spec.depths)))

        def forward(self, image: Tensor, mask: Tensor) -> Tensor:
            tokens = self.patch_embed(image)
            blend = mask.flatten(1)[..., None].to(tokens.dtype)
            tokens = (1.0 - blend) * tokens + blend * self.mask_token
            if self.ape:
                tokens = tokens + self.absolute_pos_embed
            tokens = self.pos_drop(tokens)
            for stage in self.layers:
                tokens = stage(tokens)
            grid = self.spec.resolution(len(self.layers) - 1)
            return self.norm(tokens).movedim(1, 2).unflatten(2, grid)

    class VisionTransformerForSimMIM(ViT):
        def forward(self, image: Tensor, mask: Tensor) -> Tensor:
            return super().forward(image, mask.bool())

    class SimMIM(nn.Module):
        def __init__(self, encoder: nn.Module, encoder_stride: int) -> None:
            super().__init__()
            self.encoder, self.encoder_stride = encoder, encoder_stride
            self.patch_size, self.in_chans = encoder.spec.patch_size, encoder.spec.channels
            self.decoder = nn.Sequential(
                nn.Conv2d(encoder.num_features, self.in_chans * encoder_stride**2, 1),
                nn.PixelShuffle(encoder_stride),
            )

        def forward(self, image: Tensor, mask: Tensor) -> Tensor:
            error = (image - self.decoder(self.encoder(image, mask))).abs()
            hidden = torch.kron(mask, mask.new_ones(self.patch_size, self.patch_size))[:, None]
            return (error * hidden).sum() / (hidden.sum() + 1e-5) / self.in_chans

    module = ModuleType("models.simmim")
    for published_class in (SwinTransformerForSimMIM, VisionTransformerForSimMIM, SimMIM):
        setattr(module, published_class.__name__, published_class)
    return module


def published(name: str, module: ModuleType) -> nn.Module:
    """The stand-in with a golden file's weights."""
    entry, tensors = load_golden(name)
    ours = load_model(with_prefix(tensors, "weights/"))
    swin = entry["kind"] == "pretrain-swin"
    architecture = module.SwinTransformerForSimMIM if swin else module.VisionTransformerForSimMIM
    encoder = architecture(ours.encoder.spec)
    model = module.SimMIM(encoder, entry["config"]["encoder_stride"])
    model.load_state_dict(ours.state_dict())
    return model


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`models.simmim` after the README's first block ran."""
    module = published_module()
    monkeypatch.setitem(sys.modules, "models", ModuleType("models"))
    monkeypatch.setitem(sys.modules, "models.simmim", module)
    run_block(PUBLISHED)
    return module


@pytest.mark.parametrize("name", MODELS)
def test_published_code_keeps_the_golden_loss_and_gradients(name: str, patched: ModuleType) -> None:
    entry, tensors = load_golden(name)
    model = published(name, patched)
    image, tolerance = tensors["input/image"], entry["tolerance"]
    features = model.encoder(image, tensors["input/mask"])
    assert_close_to(features, tensors["expect/z"], tolerance["forward"], "features")
    reconstruction = model.decoder(features)
    expected = tensors["expect/reconstruction"]
    assert_close_to(reconstruction, expected, tolerance["forward"], "reconstruction")
    model.decoder.register_forward_pre_hook(lambda *_: pytest.fail("the whole head ran"))
    uneven = model(image, tensors["input/mask_uneven"])
    assert_close_to(uneven, tensors["expect/loss_uneven"], tolerance["loss"], "loss_uneven")
    loss = model(image, tensors["input/mask"])
    assert_close_to(loss, tensors["expect/loss"], tolerance["loss"], "loss")
    actual = gradients(model, loss)
    whole, rows = with_prefix(tensors, "grad/"), with_prefix(tensors, "grad_rows/")
    assert actual.keys() == whole.keys() | rows.keys()
    actual |= {key: gradient_rows(actual[key]) for key in rows}
    expected = whole | rows
    for key, gradient in expected.items():
        if key.endswith("attn.qkv.bias"):  # its key part is rounding noise
            allowed = tolerance["grad of attn.qkv.bias"]["atol"]
        else:
            allowed = tolerance["grad"]["of_tensor_max"] * gradient.abs().max()
            allowed = allowed + tolerance["grad"]["atol"]
        assert (actual[key] - gradient).abs().max() <= allowed, key


@pytest.mark.parametrize("name", MODELS)
def test_published_code_keeps_the_step_of_its_plain_form(name: str, patched: ModuleType) -> None:
    _, tensors = load_golden(name)
    image, mask = tensors["input/image"], tensors["input/mask"]
    plain, fast = published(name, published_module()), published(name, patched)
    assert plain.state_dict().keys() == fast.state_dict().keys()
    assert_same_step(fast, lambda: fast(image, mask), plain, lambda: plain(image, mask))


def test_published_code_under_ddp(patched: ModuleType, tmp_path: Path) -> None:
    _, tensors = load_golden(MODELS[0])
    image, mask = tensors["input/image"], tensors["input/mask"]
    plain, fast = published(MODELS[0], published_module()), published(MODELS[0], patched)
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(fast)
        assert_same_step(fast, lambda: wrapped(image, mask), plain, lambda: plain(image, mask))
    finally:
        torch.distributed.destroy_process_group()


class TestTransformers:
    pytestmark = third_party

    @pytest.fixture
    def transformers(self) -> ModuleType:
        return imported("transformers", "5.0")

    @pytest.fixture
    def namespace(self, transformers: ModuleType) -> dict[str, Any]:
        """The names that the second block sets, after its own step."""
        config = transformers.SwinConfig(
            image_size=64,
            embed_dim=16,
            depths=[2, 1, 1],
            num_heads=[1, 2, 2],
            window_size=4,
            encoder_stride=16,
        )
        images, ids = torch.randn(3, 3, 64, 64), torch.tensor([5, 2, 900])
        return run_block(TRANSFORMERS, config=config, images=images, ids=ids, epoch=4)

    def test_own_step(self, namespace: dict[str, Any]) -> None:
        parameters = dict(namespace["model"].named_parameters())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters.values())
        assert parameters["decoder.0.weight"].grad.abs().max() > 0

    def test_mask(self, namespace: dict[str, Any]) -> None:
        mask = namespace["mask"]
        assert mask.shape == (3, 16, 16)
        units = mask.unflatten(2, (2, 8)).unflatten(1, (2, 8))  # [B, 2, 8, 2, 8]
        assert torch.equal(units.all(4).all(2), units.any(4).any(2))
        assert units.any(4).any(2).flatten(1).sum(1).tolist() == [3, 3, 3]  # ceil(4 · 0.6)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
    def test_equals_the_parent_class(
        self, transformers: ModuleType, namespace: dict[str, Any], dtype: torch.dtype
    ) -> None:
        model, images = namespace["model"].train(), namespace["images"]
        with torch.no_grad():
            for parameter in model.parameters():  # the mask token begins as zeros
                parameter.add_(0.02 * torch.randn_like(parameter))
        parent = transformers.SwinForMaskedImageModeling(model.config).train()
        parent.load_state_dict(model.state_dict())
        mask = namespace["mask"].flatten(1).to(dtype)
        assert_same_step(
            model,
            lambda: model(images, mask).loss,
            parent,
            lambda: parent(images, bool_masked_pos=mask).loss,
        )

    def test_checkpoint_of_the_parent_class(
        self, transformers: ModuleType, namespace: dict[str, Any], tmp_path: Path
    ) -> None:
        model, images, mask = (namespace[k] for k in ("model", "images", "mask"))
        parent = transformers.SwinForMaskedImageModeling(model.config).eval()
        parent.save_pretrained(tmp_path)
        loaded = namespace["SwinForSimMIM"].from_pretrained(tmp_path).eval()
        with torch.no_grad():
            expected = parent(images, bool_masked_pos=mask.flatten(1)).loss
            actual = loaded(pixel_values=images, bool_masked_pos=mask.flatten(1)).loss
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=0)


class PlainLightly(nn.Module):
    """The step of lightly's examples/pytorch/simmim.py for a given mask, on its own functions."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        from lightly.models import modules, utils

        self.utils, self.patch_size = utils, vit.patch_size
        self.backbone = modules.MaskedVisionTransformerTorchvision(vit=vit)
        self.decoder = nn.Linear(vit.hidden_dim, 3 * vit.patch_size**2)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        patches = mask.flatten(1).nonzero()[:, 1].view(len(images), -1)
        encoded = self.backbone.encode(images, idx_mask=patches + 1)  # 0 is the class token
        predictions = self.decoder(self.utils.get_at_index(encoded, patches + 1))
        targets = self.utils.patchify(images, self.patch_size)
        return F.l1_loss(predictions, self.utils.get_at_index(targets, patches))


class TestLightly:
    pytestmark = third_party

    @pytest.fixture(scope="class")
    def torchvision(self) -> ModuleType:
        imported("lightly", "1.6")
        import torchvision

        return torchvision

    @pytest.fixture
    def vit(self, torchvision: ModuleType) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            return torchvision.models.VisionTransformer(
                image_size=56, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64
            )

        return build

    def test_equals_the_example(self, vit: Callable[[], nn.Module]) -> None:
        namespace = run_block(LIGHTLY)
        plain, fast = PlainLightly(vit()), namespace["SimMIM"](vit())
        with torch.no_grad():
            plain.backbone.mask_token.normal_()
        assert plain.state_dict().keys() == fast.state_dict().keys()
        fast.load_state_dict(plain.state_dict())
        images, ids = torch.randn(4, 3, 56, 56), torch.tensor([3, 1, 4, 1_281_166])
        mask = namespace["random_patch_mask"](4, (7, 7), ratio=0.75, seed=0, ids=ids, epoch=2)
        assert_same_step(
            fast, lambda: fast(images, ids, epoch=2), plain, lambda: plain(images, mask)
        )

    @pytest.mark.usefixtures("torchvision")
    @pytest.mark.parametrize("side", [2, 5, 7, 14, 16])
    def test_hides_as_many_patches(self, side: int) -> None:
        from lightly.models import utils

        mask = run_block(LIGHTLY)["random_patch_mask"](3, (side, side), ratio=0.75, seed=0)
        _, theirs = utils.random_token_mask((3, side**2 + 1), mask_ratio=0.75)
        assert mask.flatten(1).sum(1).tolist() == [theirs.shape[1]] * 3

    @pytest.mark.usefixtures("torchvision")
    def test_preprocess_serves_timm(self) -> None:
        timm = imported("timm", "1.0")
        from lightly.models.modules import MaskedVisionTransformerTIMM

        vit = timm.models.vision_transformer.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2
        )
        plain = MaskedVisionTransformerTIMM(vit=vit).eval()
        ours = {"preprocess": run_block(LIGHTLY)["Backbone"].preprocess}
        fast = type("Backbone", (MaskedVisionTransformerTIMM,), ours)(vit=vit).eval()
        with torch.no_grad():
            plain.mask_token.normal_()
        fast.load_state_dict(plain.state_dict())
        images, mask = torch.randn(2, 3, 32, 32), torch.rand(2, 16) < 0.75
        actual = fast.encode(images, mask=mask)
        expected = plain.encode(images, mask=F.pad(mask, (1, 0)))  # the class token stays
        torch.testing.assert_close(actual, expected)
