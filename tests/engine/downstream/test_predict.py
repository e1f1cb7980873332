"""Predictions: the model's own answers, for whatever holds an image."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simmim import cli
from simmim.backbone.build import build_encoder
from simmim.backbone.vit import ViTSpec
from simmim.downstream import predict as module
from simmim.downstream.evaluate import evaluation_view
from simmim.downstream.predict import Prediction, classify, open_images, predict
from simmim.method.simmim import SimMIM
from simmim.model.classifier import Classifier
from simmim.model.weights_file import save_weights

SPEC = ViTSpec(image_size=(32, 48), patch_size=16, embed_dim=16, depth=1, num_heads=2)
CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
EXIF_ORIENTATION = 0x0112


def make_classifier(channels: int = 3, classes: tuple[str, ...] = CLASSES) -> Classifier:
    torch.manual_seed(5)
    spec = ViTSpec(**{**SPEC.__dict__, "channels": channels})
    model = Classifier(build_encoder(spec), classes)
    with torch.no_grad():
        model.head.weight.normal_()
    return model.eval()


def make_picture(width: int = 90, height: int = 70, seed: int = 1) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def probabilities(model: Classifier, path: Path) -> torch.Tensor:
    """Of one file, the short way."""
    image = torch.from_numpy(evaluation_view(model)(path.read_bytes()))[None]
    with torch.no_grad():
        return model(image).softmax(1)[0]


def assert_same(found: list[Prediction], expected: torch.Tensor, count: int = 5) -> None:
    order = expected.argsort(descending=True)[:count].tolist()
    assert [p.index for p in found] == order
    assert [p.label for p in found] == [CLASSES[i] for i in order]
    assert [p.probability for p in found] == pytest.approx(expected[order].tolist(), rel=1e-4)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven files of one picture each: sizes, modes, depth and rotation differ."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    make_picture(90, 70).save(folder / "a.png")
    make_picture(33, 200).convert("L").save(folder / "b-grey.png")
    make_picture(64, 64).convert("RGBA").save(folder / "c-alpha.png")
    make_picture(64, 40).convert("P").save(folder / "d-palette.png")
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    make_picture(80, 50).save(folder / "e-rotated.jpg", exif=exif, quality=95)
    values = np.asarray(make_picture(50, 60).convert("L")).astype(np.uint16) * 257
    Image.fromarray(values).save(folder / "f-16-bit.png")
    make_picture(200, 31).convert("CMYK").save(folder / "deep" / "g.jpg", quality=95)
    return folder


def test_files_of_all_kinds_in_one_batch(photos: Path) -> None:
    model = make_classifier()
    files = sorted(photos.rglob("*.*"))
    assert len(files) == 7
    model.train()
    found = predict(model, files, top_k=3)
    assert model.training
    model.eval()
    firsts = set()
    for file, answer in zip(files, found, strict=True):
        assert_same(answer, probabilities(model, file), 3)
        firsts.add(answer[0].index)
    assert len(firsts) > 1  # else a mix-up could not be seen
    # the same from a folder, from shards, in smaller batches, in another process
    with tarfile.open(photos.parent / "shard.tar", "w") as archive:
        for file in files:
            archive.add(file, arcname=file.relative_to(photos))
    for images, options in [
        (photos, {}),
        (str(photos.parent / "shard.tar"), {"batch_size": 2}),
        ([photos / "a.png", photos], {"batch_size": 3, "workers": 1}),
    ]:
        again = predict(model, images, **options)
        again = again[1:] if isinstance(images, list) else again
        assert len(again) == 7
        for answer in again:
            assert len(answer) == 5
        tops = sorted((a[0].index, round(a[0].probability, 4)) for a in again)
        assert tops == sorted((a[0].index, round(a[0].probability, 4)) for a in found)


def test_images_in_memory(photos: Path) -> None:
    model = make_classifier()
    files = sorted(photos.rglob("*.*"))
    expected = [probabilities(model, file) for file in files]
    opened = [Image.open(file) for file in files]
    for answer, wanted in zip(predict(model, opened), expected, strict=True):
        assert_same(answer, wanted)
    for image in opened:
        image.close()

    picture = np.asarray(make_picture(90, 70))
    grey = np.asarray(make_picture(33, 200).convert("L"))
    tensor = torch.from_numpy(picture.copy()).permute(2, 0, 1)
    images: list[Any] = [
        files[0],
        picture,
        tensor,
        torch.stack([tensor, tensor]),
        picture[None],
        grey,
        grey[:, :, None],
        np.asarray(make_picture(64, 64).convert("RGBA")),
    ]
    found = predict(model, images)
    assert len(found) == 9
    by_name = {file.name: wanted for file, wanted in zip(files, expected)}
    for answer in found[:6]:
        assert_same(answer, by_name["a.png"])
    for answer in found[6:8]:
        assert_same(answer, by_name["b-grey.png"])
    assert_same(found[8], by_name["c-alpha.png"])
    assert predict(model, picture) == predict(model, [picture])
    assert predict(model, []) == []
    # the model normalises bytes as the view does: a picture of its own size goes straight in
    model.margin = 1.0
    fitting = np.asarray(make_picture(48, 32))
    with torch.no_grad():
        straight = model(torch.from_numpy(fitting.copy()).permute(2, 0, 1)[None]).softmax(1)[0]
    assert_same(predict(model, fitting)[0], straight)


def test_many_channels() -> None:
    model = make_classifier(channels=6)
    model.margin = 1.0
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 6), dtype=np.uint8)
    with torch.no_grad():
        straight = model(torch.from_numpy(image).permute(2, 0, 1)[None]).softmax(1)[0]
    assert_same(predict(model, image)[0], straight)
    with pytest.raises(ValueError, match=r"image 0: not a readable image \(5 channels instead of"):
        predict(model, image[:, :, :5])


def test_a_picture_that_cannot_be_read(photos: Path) -> None:
    data = (photos / "a.png").read_bytes()
    (photos / "a.png").write_bytes(data[: len(data) // 2])
    with (
        Image.open(photos / "a.png") as image,  # which reads no further than the header
        pytest.raises(ValueError, match="image 1: not a readable image"),
    ):
        predict(make_classifier(), [make_picture(), image])


def test_top_k() -> None:
    model = make_classifier()
    image = make_picture()
    assert [len(predict(model, image, top_k=k)[0]) for k in (1, 7, 100)] == [1, 7, 7]
    assert sum(p.probability for p in predict(model, image, top_k=7)[0]) == pytest.approx(1.0)
    assert len(predict(make_classifier(classes=("one",)), image)[0]) == 1
    with pytest.raises(ValueError, match="top_k=0"):
        predict(model, image, top_k=0)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), dtype=np.float32), "image 0: values of type float32; give uint8"),
        (torch.zeros(3, 8, 8), "image 0: values of type float32"),
        (torch.zeros(8, 8, dtype=torch.uint8), r"tensor of shape \[8, 8\] is no \[C, H, W\]"),
        (np.zeros((8, 0, 3), dtype=np.uint8), r"shape \[8, 0, 3\]"),
        (np.zeros(8, dtype=np.uint8), r"shape \[8\]"),
        (3, "image 0: int is no path"),
        ("no.jpg", "no.jpg: no such file or folder"),
    ],
)
def test_what_is_no_image(image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict(make_classifier(), image)
    with pytest.raises(ValueError, match=r"image 1: values of type bool"):
        predict(make_classifier(), [make_picture(), np.ones((2, 2), dtype=bool)])


def test_models_without_a_head(tmp_path: Path) -> None:
    model = SimMIM(build_encoder(SPEC))
    with pytest.raises(ValueError, match="a SimMIM has no class head; `simmim finetune`"):
        predict(model, make_picture())  # type: ignore[arg-type]
    save_weights(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: .* `simmim finetune` makes"):
        predict(tmp_path / "model.safetensors", make_picture())


def test_an_answer_that_is_not_finite() -> None:
    model = make_classifier()
    with torch.no_grad():
        model.head.weight[2] = float("inf")
    with pytest.raises(ValueError, match="image 0: the model's answer is not finite in float32"):
        predict(model, make_picture())


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["predict", *map(str, arguments), "--device=cpu"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def strictly(line: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    line.encode("ascii")
    row: dict[str, Any] = json.loads(line, parse_constant=refuse)
    json.dumps(row, ensure_ascii=False).encode("utf-8")  # no lone surrogates
    return row


def test_json(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_classifier(classes=('a "quoted" class\n', "caf\u00e9", *CLASSES[2:]))
    save_weights(model, tmp_path / "model.safetensors")
    weird = os.fsencode(photos / 'new\nline "q" \u00e9') + b"\xff.png"
    shutil.copy(photos / "a.png", weird)
    (photos / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    code, out, err = run(capsys, tmp_path / "model.safetensors", photos, "--json", "--top-k=7")
    assert code == 1
    assert "simmim: error: 1 of 9 images could not be classified\n" in err
    rows = [strictly(line) for line in out.splitlines()]
    assert len(rows) == 9
    by_name = {row["image"]: row for row in rows}
    assert f'{photos}/new\nline "q" \u00e9\\udcff.png' in by_name
    broken = by_name.pop(f"{photos}/broken.jpg")
    assert "not a readable image" in broken["error"]
    assert set(broken) == {"image", "error"}
    for row in by_name.values():
        assert len(row["predictions"]) == 7
        assert {p["label"] for p in row["predictions"]} == set(model.classes)
        assert all(model.classes[p["index"]] == p["label"] for p in row["predictions"])
        assert sum(p["probability"] for p in row["predictions"]) == pytest.approx(1, abs=1e-5)
    top = by_name[f"{photos}/a.png"]["predictions"][0]
    assert top["index"] == int(probabilities(model, photos / "a.png").argmax())


def test_table(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_classifier()
    save_weights(model, tmp_path / "model.safetensors")
    (tmp_path / "[red]x\x1b[31m.png").write_bytes((photos / "a.png").read_bytes())
    (tmp_path / "z.jpg").write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        code, out, err = run(
            capsys, "model.safetensors", "z.jpg", "[red]x\x1b[31m.png", "photos/a.png", "--top-k=2"
        )
    assert code == 1
    assert err.splitlines() == [
        "simmim: error: z.jpg: not a readable image (the file is empty)",
        "simmim: error: 1 of 3 images could not be classified",
    ]
    best = probabilities(model, photos / "a.png").sort(descending=True)
    lines = out.splitlines()
    assert len(lines) == 5
    first, second = (
        [CLASSES[int(best.indices[n])], f"{float(best.values[n]):.4f}"] for n in (0, 1)
    )
    assert lines[1].split() == ["[red]x\\x1b[31m.png", *first]
    assert lines[2].split() == second
    assert lines[3].split() == ["photos/a.png", *first]


def test_what_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_weights(SimMIM(build_encoder(SPEC)), tmp_path / "simmim.safetensors")
    save_weights(make_classifier(), tmp_path / "model.safetensors")
    make_picture().save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    picture, model = tmp_path / "a.png", tmp_path / "model.safetensors"
    for arguments, message in [
        ((tmp_path / "simmim.safetensors", picture), "`simmim finetune` makes"),
        ((tmp_path / "no", picture), "no: no such file or folder"),
        ((model, picture, tmp_path / "b.png"), "b.png: no such file or folder"),
        ((model, tmp_path / "empty"), "empty: no image"),
    ]:
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("simmim: error: ")
        assert message in err
        assert err.count("\n") == 1


def test_every_option_reaches_the_pass(monkeypatch: pytest.MonkeyPatch, photos: Path) -> None:
    given: list[Any] = []
    real = module.one_pass

    def noted(source: Any, view: Any, world: Any, **named: Any) -> Any:
        given.append((view.pixels.value_range, named["batch_size"], named["workers"]))
        return real(source, view, world, **{**named, "workers": 0})

    monkeypatch.setattr(module, "one_pass", noted)
    model = make_classifier()
    predict(model, photos, batch_size=3, workers=2, value_range=(0, 255))
    predict(model, photos)
    # in memory, images are decoded here; of a source, by as many processes as is best
    list(classify(model, open_images([str(photos)])))
    assert given == [((0, 255), 3, 2), (None, 64, 0), (None, 64, -1)]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_the_model_computes_in_the_type_that_is_asked(precision: str, dtype: torch.dtype) -> None:
    model, seen = make_classifier(), list[torch.dtype]()
    model.head.register_forward_hook(lambda _module, _inputs, out: seen.append(out.dtype))
    (answer,) = predict(model, make_picture(), precision=precision)
    assert seen == [dtype]
    assert all(isinstance(p.probability, float) for p in answer)


def test_answers_come_in_the_order_of_the_images_with_broken_ones_among_them(
    tmp_path: Path,
) -> None:
    model = make_classifier()
    for number in range(5):
        make_picture(seed=number).save(tmp_path / f"{number}.png")
    for number in (0, 3):
        (tmp_path / f"{number}.png").write_bytes(b"")
    files = [str(tmp_path / f"{number}.png") for number in (4, 0, 1, 3, 2)]
    for batch_size in (1, 2, 5):
        source = open_images(files)
        found = list(classify(model, source, batch_size=batch_size, workers=0, top_k=7))
        assert [sample for sample, _ in found] == [0, 1, 2, 3, 4]
        for place, number in ((0, 4), (2, 1), (4, 2)):
            answer = found[place][1]
            assert not isinstance(answer, str)
            assert_same(answer, probabilities(model, tmp_path / f"{number}.png"), 7)
        assert [found[place][1] for place in (1, 3)] == [
            "not a readable image (the file is empty)"
        ] * 2
    with pytest.raises(ValueError, match=r"0\.png: not a readable image"):
        predict(model, files)


def test_images_are_named_by_their_place(tmp_path: Path) -> None:
    make_picture().save(tmp_path / "a.png")
    (tmp_path / "folder").mkdir()
    make_picture().save(tmp_path / "folder" / "b.png")
    picture = np.zeros((4, 4, 3), np.uint8)
    parts: list[Any] = [tmp_path / "folder", picture, np.stack([picture] * 2), tmp_path / "a.png"]
    source = module.join_sources([module._open(part, n) for n, part in enumerate(parts)])
    assert list(source.names) == [
        f"{tmp_path}/folder/b.png",
        "image 1",
        "image 2[0]",
        "image 2[1]",
        f"{tmp_path}/a.png",
    ]
    assert source.read(4) == (tmp_path / "a.png").read_bytes()
    assert source.read(0) == (tmp_path / "folder" / "b.png").read_bytes()


def test_the_published_number_of_answers_is_five() -> None:
    assert len(predict(make_classifier(), make_picture())[0]) == 5


def test_values_beyond_8_bits_are_kept() -> None:
    def read(image: Any) -> Any:
        return np.load(io.BytesIO(module._encode(image)))

    wide = Image.fromarray(np.array([[-5, 70000], [300, 65535]], dtype=np.int32))
    assert read(wide).tolist() == [[0, 65535], [300, 65535]]
    deep = Image.fromarray(np.array([[1, 65535]], dtype=np.uint16))
    assert (read(deep).dtype, read(deep).tolist()) == (np.uint16, [[1, 65535]])
    real = Image.fromarray(np.array([[0.25, -1.5]], dtype=np.float32))
    assert read(real).tolist() == [[0.25, -1.5]]


def test_pictures_in_memory_of_too_many_pixels_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", 12)
    module._encode(np.zeros((3, 4, 3), np.uint8))
    with pytest.raises(OSError, match="5×3 pixels, more than 12"):
        module._encode(np.zeros((3, 5, 3), np.uint8))


def test_paths_may_begin_at_home_and_images_may_come_as_a_tuple(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make_picture().save(tmp_path / "a.png")
    model = make_classifier()
    one, other = predict(model, ("~/a.png", make_picture()))
    assert one == other
