"""Models as folders: saved, loaded, and exchanged with a Hub that is a folder too."""

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import simmim
from recorded_calls import record
from simmim.backbone.build import build_encoder
from simmim.backbone.swin import SwinSpec
from simmim.backbone.vit import ViTSpec
from simmim.config.values import config_class
from simmim.errors import RunError
from simmim.method.build import find_method, methods
from simmim.method.simmim import SimMIM
from simmim.model.classifier import Classifier
from simmim.model.image_model import ImageModel
from simmim.sharing import hub as module
from simmim.sharing.hub import load_encoder, load_model, push_to_hub
from simmim.sharing.model_folder import FILES, save_pretrained

SWIN = SwinSpec(
    image_size=(32, 32), patch_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4
)
VIT = ViTSpec(image_size=(32, 32), patch_size=16, embed_dim=16, depth=1, num_heads=2)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_simmim() -> SimMIM:
    return SimMIM(build_encoder(SWIN), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)).eval()


def make_classifier() -> Classifier:
    return Classifier(build_encoder(VIT), ("cat", "dog"), margin=1.25).eval()


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if huggingface_hub were not installed."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Any:
    """huggingface_hub, which must not reach out."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    import_module("huggingface_hub.constants")  # loaded on demand, and patched below
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return huggingface_hub


def cached(cache: Path, name: str, model: ImageModel) -> Path:
    """A repository as huggingface_hub keeps it once it is downloaded."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    save_pretrained(model, snapshot)
    return snapshot


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("make", [make_simmim, make_classifier])
def test_a_folder_needs_no_hub(make: Callable[[], ImageModel], tmp_path: Path) -> None:
    model = make()
    assert save_pretrained(model, tmp_path / "out") == tmp_path / "out"
    loaded = load_model(tmp_path / "out")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert loaded.encoder.spec == model.encoder.spec
    assert torch.equal(loaded.mean, model.mean)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
    if isinstance(loaded, Classifier):
        assert (loaded.classes, loaded.margin) == (("cat", "dog"), 1.25)
    assert type(load_model(str(tmp_path / "out"))) is type(model)
    if isinstance(loaded, SimMIM):
        larger = load_model(tmp_path / "out", image_size=64)
        assert larger.encoder.spec.image_size == (64, 64)


@pytest.mark.usefixtures("no_hub")
def test_one_line_without_the_package(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"user/model: no such folder .* 'simmim\[hub\]'$"):
        load_model("user/model")
    save_pretrained(make_simmim(), tmp_path)
    with pytest.raises(RunError, match=r"'simmim\[hub\]'$"):
        push_to_hub(tmp_path, "user/model")


def test_what_is_here_is_not_asked_of_the_hub(
    offline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(name: str, **options: Any) -> str:
        asked.append(name)
        return str(tmp_path / "nothing")

    monkeypatch.setattr(offline, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    save_pretrained(make_classifier(), tmp_path / "user" / "model")
    for here in ("user/model", tmp_path / "user" / "model", "user/model/model.safetensors"):
        assert isinstance(load_model(here), Classifier)
    state = make_simmim().state_dict()
    assert isinstance(load_model(state), SimMIM)
    for place in ("user/model", tmp_path, state, "my.pth"):
        with pytest.raises(ValueError, match="is not on the Hub, and has no revision v1"):
            load_model(place, revision="v1")
    for missing in (Path("runs/mine"), "mine.pth", "mine.safetensors", "runs/mine.bin"):
        with pytest.raises(ValueError, match=rf"^{missing}: no such file or folder$"):
            load_model(missing)
    assert asked == []
    with pytest.raises(ValueError, match=r"user/another: has no model\.safetensors"):
        load_model("user/another")
    assert asked == ["user/another"]


def test_saved_files(tmp_path: Path) -> None:
    model = make_classifier()
    save_pretrained(model, tmp_path / "out")
    with pytest.raises(ValueError, match=r"model\.safetensors exists; choose another folder or"):
        save_pretrained(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["classes"] == ["cat", "dog"]
    assert config["margin"] == 1.25
    with torch.no_grad():
        model.head.bias.fill_(3.0)
    save_pretrained(model, tmp_path / "out", overwrite=True)
    loaded = load_model(tmp_path / "out")
    assert isinstance(loaded, Classifier)
    assert loaded.head.bias.tolist() == [3.0, 3.0]
    assert not [p for p in (tmp_path / "out").iterdir() if p.name not in FILES]


def make_of(method: str) -> ImageModel:
    """A model of any method, of its default settings."""
    settings = methods()[method].Settings(name=method)
    config = config_class(type(settings))(method=settings)
    return find_method(config).build(build_encoder(VIT)).eval()


@pytest.mark.parametrize("method", sorted(methods()))
def test_the_public_names_take_every_method(
    offline: Any, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_of(method)
    folder = simmim.save_pretrained(model, tmp_path / "out")
    with pytest.raises(ValueError, match="exists"):
        simmim.save_pretrained(model, folder)
    simmim.save_pretrained(model, folder, overwrite=True)
    monkeypatch.setattr(offline, "snapshot_download", lambda name, **options: str(folder))
    for loaded in (simmim.load_model(folder), simmim.load_model("user/name")):
        assert type(loaded) is type(model)
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
    encoder = simmim.load_encoder("user/name")
    assert type(encoder) is ImageModel
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(encoder.encode(image), model.encode(image))
    # the card's code is the same for every method, for this folder and for the name
    (line,) = (row for row in (folder / "README.md").read_text().splitlines() if "load_" in row)
    assert line == 'model = simmim.load_model(".")  # this folder, or its name on the Hub'


def test_the_card_of_an_encoder_names_what_loads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simmim.save_pretrained(load_encoder(make_simmim().state_dict()), tmp_path)
    assert 'model = simmim.load_encoder(".")' in (tmp_path / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    assert simmim.load_encoder(".").encoder.spec == SWIN
    with pytest.raises(ValueError, match="an encoder without decoder or class head"):
        simmim.load_model(".")


def test_from_the_cache(offline: Any, tmp_path: Path) -> None:
    model = make_simmim()
    snapshot = cached(tmp_path / "cache", "user/model", model)
    # what else lies there is not looked at
    (snapshot / "pytorch_model.bin").write_bytes(b"\x80\x04 a pickle")
    loaded = load_model("user/model", cache_dir=tmp_path / "cache")
    assert isinstance(loaded, SimMIM)
    assert torch.equal(loaded.decoder[0].weight, model.decoder[0].weight)
    assert load_model("user/model", cache_dir=tmp_path / "cache", revision=COMMIT)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises((ValueError, RunError), match="user/model: ") as found:
        load_model("user/model", cache_dir=tmp_path / "cache")
    assert "\n" not in str(found.value)


def test_offline_and_unknown(offline: Any, tmp_path: Path) -> None:
    for name in ("user/nobody", "nobody"):
        with pytest.raises(RunError) as found:
            load_model(name, cache_dir=tmp_path)
        assert str(found.value) == (
            f"{name}: no such folder here, not downloaded before, and the Hub cannot be reached "
            "(or HF_HUB_OFFLINE is set)"
        )
    for name in ("runs/mine/again", "/no/such", "~nobody/x", "a b/c", "", "../up"):
        with pytest.raises(ValueError, match=r"no such (file or )?folder"):
            load_model(name or "missing folder", cache_dir=tmp_path)


def test_only_safetensors_are_downloaded(
    offline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    save_pretrained(make_classifier(), tmp_path / "repository")

    def download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(tmp_path / "repository")

    monkeypatch.setattr(offline, "snapshot_download", download)
    load_model("user/model", revision="v2", token="hf_x")
    assert asked[0]["name"] == "user/model"
    assert asked[0]["revision"] == "v2"
    assert asked[0]["token"] == "hf_x"
    assert asked[0]["allow_patterns"] == ["model.safetensors", "config.json", "README.md"]
    (tmp_path / "repository" / "model.safetensors").rename(tmp_path / "repository" / "model.bin")
    with pytest.raises(ValueError, match=r"user/model: has no model\.safetensors, and nothing"):
        load_model("user/model")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RepositoryNotFoundError", "no such model on the Hub, or a private one"),
        ("GatedRepoError", "asks you to accept terms"),
        ("RevisionNotFoundError", "has no revision v9 on the Hub"),
        ("HfHubHTTPError", "the Hub: 503 Server Error"),
    ],
)
def test_what_the_hub_answers(
    offline: Any, kind: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refused(getattr(offline.errors, kind)):  # type: ignore[misc]
        def __init__(self) -> None:
            Exception.__init__(self, "503 Server Error\nfor url: …")

        def __str__(self) -> str:
            return "503 Server Error\nfor url: …"

    def download(name: str, **options: Any) -> str:
        raise Refused

    monkeypatch.setattr(offline, "snapshot_download", download)
    with pytest.raises((ValueError, RunError)) as found:
        load_model("user/model", revision="v9")
    assert str(found.value).startswith("user/model: ")
    assert message in str(found.value)
    assert "\n" not in str(found.value)


def test_push(offline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Address(str):
        repo_id = "someone/model"

    class Api:
        def __init__(self, **options: Any) -> None:
            calls.append(("api", options))

        def create_repo(self, name: str, **options: Any) -> Address:
            calls.append(("create", {"name": name, **options}))
            return Address("https://hub/someone/model")

        def upload_folder(self, **options: Any) -> SimpleNamespace:
            calls.append(("upload", options))
            return SimpleNamespace()

    monkeypatch.setattr(offline, "HfApi", Api)
    with pytest.raises(ValueError, match=r"has no model\.safetensors; `simmim export` makes"):
        push_to_hub(tmp_path, "model")
    save_pretrained(make_simmim(), tmp_path)
    with pytest.raises(ValueError, match="a b: no name on the Hub"):
        push_to_hub(tmp_path, "a b")
    assert calls == []
    assert push_to_hub(tmp_path, "model", private=True, token="t") == "https://hub/someone/model"
    assert calls[0] == ("api", {"token": "t", "library_name": "simmim"})
    assert calls[1] == ("create", {"name": "model", "private": True, "exist_ok": True})
    upload = calls[2][1]
    assert upload["repo_id"] == "someone/model"
    assert upload["folder_path"] == tmp_path
    assert upload["allow_patterns"] == list(FILES)


def test_push_offline(offline: Any, tmp_path: Path) -> None:
    save_pretrained(make_simmim(), tmp_path)
    with pytest.raises(RunError, match="user/model: ") as found:
        push_to_hub(tmp_path, "user/model", token="t")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(("load", "own"), [(load_model, {"norm_target": 7}), (load_encoder, {})])
def test_every_argument_of_loading_arrives(
    load: Callable[..., Any],
    own: dict[str, Any],
    offline: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    asked: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(tmp_path)

    monkeypatch.setattr(offline, "snapshot_download", download)
    (tmp_path / "model.safetensors").write_bytes(b"")
    read = record(monkeypatch, module.load, load.__name__, lambda **given: "model")
    facts = {"num_heads": 3, "window_size": 5, "qk_scale": 0.5}
    hub = {"revision": "v2", "token": "secret", "cache_dir": tmp_path / "cache"}
    assert load("user/name", 96, **own, **hub, **facts) == "model"
    assert load("user/name") == "model"
    default = {"norm_target": None} if own else {}
    assert read == [
        {"path_or_state_dict": tmp_path / "model.safetensors", "image_size": 96} | own | facts,
        {"path_or_state_dict": tmp_path / "model.safetensors", "image_size": None} | default,
    ]
    fixed = {"name": "user/name", "library_name": "simmim"}
    fixed |= {"allow_patterns": ["model.safetensors", "config.json", "README.md"]}
    assert asked == [
        fixed | hub,
        fixed | {"revision": None, "token": None, "cache_dir": None},
    ]


def test_a_file_here_is_loaded_with_every_argument(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    read = record(monkeypatch, module.load, "load_model")
    load_model("~/mine", (64, 96), norm_target=5, num_heads=2)
    load_model({"a": torch.zeros(1)})
    assert read[0] == {
        "path_or_state_dict": tmp_path / "mine",
        "image_size": (64, 96),
        "norm_target": 5,
        "num_heads": 2,
    }
    assert list(read[1]["path_or_state_dict"]) == ["a"]


def test_every_argument_of_uploading_arrives(
    offline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    class Api:
        def __init__(self, **options: Any) -> None:
            calls.append(options)

        def create_repo(self, name: str, **options: Any) -> Any:
            calls.append({"name": name, **options})
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, **options: Any) -> None:
            calls.append(options)

    monkeypatch.setattr(offline, "HfApi", Api)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in FILES[:3]:
        (tmp_path / name).write_text("")
    push_to_hub("~", "model", revision="branch", message="words", token="secret")
    push_to_hub(tmp_path, "model")
    fixed = {"repo_id": "me/model", "folder_path": tmp_path, "allow_patterns": list(FILES)}
    create = {"name": "model", "private": False, "exist_ok": True}
    assert calls == [
        {"token": "secret", "library_name": "simmim"},
        create,
        fixed | {"revision": "branch", "commit_message": "words"},
        {"token": None, "library_name": "simmim"},
        create,
        fixed | {"revision": None, "commit_message": "Upload a model of simmim"},
    ]


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "README.md"])
def test_a_folder_that_is_not_whole_is_not_uploaded(
    missing: str, offline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "HfApi", None)  # which no call may reach
    for name in FILES[:3]:
        (tmp_path / name).write_text("")
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=f"has no {missing}; `simmim export` makes such a folder"):
        push_to_hub(tmp_path, "user/model")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("HFValidationError", "no such folder here, and no name on the Hub"),
        ("LocalEntryNotFoundError", "not downloaded before, and the Hub cannot be reached"),
        ("OfflineModeIsEnabled", "not downloaded before, and the Hub cannot be reached"),
        (None, "the Hub: OSError"),
    ],
)
def test_why_an_upload_failed(
    kind: str | None, message: str, offline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base: Any = getattr(offline.errors, kind) if kind else OSError
    failure = type("OSError", (base,), {"__init__": lambda self: None, "__str__": lambda self: ""})

    def fail(**options: Any) -> None:
        raise failure

    monkeypatch.setattr(offline, "HfApi", fail)
    for name in FILES[:3]:
        (tmp_path / name).write_text("")
    wrong = ValueError if kind == "HFValidationError" else RunError
    with pytest.raises(wrong, match=message) as found:
        push_to_hub(tmp_path, "user/model")
    assert str(found.value).startswith("user/model: ")
