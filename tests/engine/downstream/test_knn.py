"""Weighted nearest neighbours: against brute force, cut into any pieces; and the command."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from simmim.backbone.build import build_encoder
from simmim.backbone.vit import ViTSpec
from simmim.commands import knn as command
from simmim.downstream.knn import find_nearest, score_neighbours, vote
from simmim.method.simmim import SimMIM
from simmim.model import weights_file


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def brute_force(
    bank: Tensor,
    bank_labels: NDArray[np.int64],
    queries: Tensor,
    labels: NDArray[np.int64],
    k: int,
    temperature: float,
) -> tuple[float, float]:
    """Top-1 and top-5, one image and one neighbour at a time, in float64."""
    a, b = queries.double().numpy(), bank.double().numpy()
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    b /= np.linalg.norm(b, axis=1, keepdims=True)
    right = [0, 0]
    for query, label in zip(a, labels):
        similarity = (b * query).sum(1)
        votes: dict[int, float] = defaultdict(float)
        for neighbour in sorted(range(len(b)), key=lambda n: (-similarity[n], n))[:k]:
            votes[int(bank_labels[neighbour])] += np.exp(similarity[neighbour] / temperature)
        answers = sorted(votes, key=lambda c: (-votes[c], c))
        right[0] += answers[0] == label
        right[1] += label in answers[:5]
    return right[0] / len(labels), right[1] / len(labels)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize(("num_queries", "num_bank"), [(1, 1), (7, 13), (512, 32768)])
def test_scores_are_those_of_brute_force(
    temperature: float, num_queries: int, num_bank: int
) -> None:
    draw = np.random.default_rng(0)
    bank_labels, labels = draw.integers(0, 12, 97), draw.integers(0, 12, 40)
    places = draw.normal(size=(12, 8))
    bank = torch.tensor(places[bank_labels] + 1.5 * draw.normal(size=(97, 8)))
    queries = torch.tensor(places[labels] + 1.5 * draw.normal(size=(40, 8)))
    done: list[int] = []
    found = score_neighbours(
        bank,
        bank_labels,
        queries,
        labels,
        (20, 1, 3, 5000),
        temperature=temperature,
        num_queries=num_queries,
        num_bank=num_bank,
        advance=done.append,
    )
    assert sum(done) == 40
    assert [score.k for score in found] == [1, 3, 20, 97]
    for score in found:
        expected = brute_force(bank, bank_labels, queries, labels, score.k, temperature)
        assert (score.top1, score.top5) == expected
    assert found[0].top1 == found[0].top5
    assert 0.2 < found[2].top1 < found[2].top5 < 1


@pytest.mark.parametrize("num_bank", [1, 3, 4, 100])
def test_equally_near_images_come_by_number(num_bank: int) -> None:
    # along the axes: their similarities are exact
    kinds = torch.tensor([[3.0, 0.0], [-5.0, 0.0], [0.0, -2.0], [0.0, 0.0]])
    bank = kinds[torch.tensor([1, 0, 2, 0, 3, 1, 0, 2])]
    found = find_nearest(bank, torch.tensor([[6.0, 0.0]]), 8, num_bank=num_bank)
    assert found.index.tolist() == [[1, 3, 6, 2, 4, 7, 0, 5]]
    torch.testing.assert_close(
        found.similarity, torch.tensor([[1.0, 1, 1, 0, 0, 0, -1, -1]]), rtol=0, atol=1e-6
    )
    # where not all of the equal ones are taken, those of the lowest numbers are
    for k in (1, 2, 4, 5, 7):
        some = find_nearest(bank, torch.tensor([[6.0, 0.0]]), k, num_bank=num_bank)
        assert some.index.tolist() == [[1, 3, 6, 2, 4, 7, 0, 5][:k]]


def test_similarities_survive_the_sorting_bit_for_bit() -> None:
    bank, queries = torch.randn(300, 16), torch.randn(50, 16)
    found = find_nearest(bank, queries, 30, num_bank=300)
    exact = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(bank).T
    assert torch.equal(found.similarity, exact.gather(1, found.index))
    assert torch.equal(found.similarity, exact.topk(30).values)


def test_classes_of_equal_votes_come_by_number() -> None:
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    queries = torch.tensor([[1.0, 0.0]])
    for labels, right in ((np.array([4, 2, 0]), 2), (np.array([2, 4, 0]), 2)):
        for answer in (0, 2, 4):
            (score,) = score_neighbours(bank, labels, queries, np.array([answer]), [2])
            assert score.top1 == float(answer == right)
            # class 0 has no vote, and is not among the best five
            assert score.top5 == float(answer != 0)


def test_votes_do_not_overflow() -> None:
    similarity = torch.tensor([[1.0, 0.9, 0.9], [-0.1, -0.2, -1.0]])
    votes = vote(similarity, torch.tensor([[1, 0, 0], [0, 1, 1]]), 2, temperature=0.0005)
    assert votes.isfinite().all()
    assert votes.argmax(1).tolist() == [1, 0]
    even = vote(similarity, torch.tensor([[1, 0, 0], [0, 1, 1]]), 2, temperature=100.0)
    assert even.argmax(1).tolist() == [0, 1]


def test_a_bank_of_float16_votes_nearly_alike() -> None:
    draw = np.random.default_rng(3)
    labels = draw.integers(0, 4, 200)
    places = draw.normal(size=(4, 8)) * 3
    features = torch.tensor(places[labels] + draw.normal(size=(200, 8))).float()
    for dtype in (torch.float32, torch.float16):
        (score,) = score_neighbours(
            features[50:].to(dtype), labels[50:], features[:50].to(dtype), labels[:50], [5]
        )
        assert score.top1 > 0.9


def test_what_cannot_vote_is_refused() -> None:
    one, label = torch.ones(1, 2), np.zeros(1, dtype=np.int64)
    with pytest.raises(ValueError, match=r"k=\[0, 5\]: choose numbers of at least 1"):
        score_neighbours(one, label, one, label, [0, 5])
    with pytest.raises(ValueError, match="temperature=0: choose one above 0"):
        score_neighbours(one, label, one, label, [1], temperature=0)
    with pytest.raises(ValueError, match="1 images and a bank of 0"):
        score_neighbours(one[:0], label[:0], one, label, [1])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve images of each of two colours in class folders, and a model."""
    draw = np.random.default_rng(0)
    for name, colour in {"green": (30, 180, 60), "red": (200, 40, 40)}.items():
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for number in range(12):
            pixels = np.array(colour) + draw.integers(-30, 31, (20, 24, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    spec = ViTSpec(image_size=(16, 16), patch_size=8, embed_dim=8, depth=2, num_heads=2)
    weights_file.save_weights(SimMIM(build_encoder(spec)), tmp_path / "model.safetensors")
    return tmp_path


def call(data: Path, *arguments: str) -> int:
    return command.main(
        [
            str(data / "model.safetensors"),
            f"--train={data / 'data'}",
            "--workers=0",
            "--device=cpu",
            *arguments,
        ]
    )


def test_command(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = data / "out"
    arguments = ["--holdout=8", "--k=1,5,40", "--layers=1,output", f"--output={out}"]
    assert call(data, *arguments) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == "nearest neighbours, 2 classes: 16 images vote on 8"
    assert lines[1].split() == ["layer", "k", "top-1", "top-5"]
    assert [line.split()[-3:-1] for line in lines[2:5]] == [
        ["1", "100.00%"],
        ["5", "100.00%"],
        ["16", "100.00%"],
    ]
    assert lines[5].split() == ["output", "1", "100.00%", "100.00%"]
    assert "k=40 is more than the 16 training images: all vote" in captured.err
    found = json.loads((out / "knn.json").read_text())
    assert found["temperature"] == 0.07
    assert found["val"] == {"source": f"{data / 'data'} (held out)", "images": 8}
    assert [(s["layer"], s["k"], s["top1"]) for s in found["scores"]] == [
        (layer, k, 1.0) for layer in ("block 1", "output") for k in (1, 5, 16)
    ]
    assert call(data, *arguments) == 2
    assert f"{out / 'knn.json'} exists" in capsys.readouterr().err
    assert call(data, *arguments, "--overwrite", "--batch-size=3") == 0


@pytest.mark.parametrize("flag", ["--k=0", "--k=a", "--k=1,,2", "--temperature=0"])
def test_command_refuses_wrong_numbers(
    data: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(data, flag)
    assert stopped.value.code == 2
    assert flag.partition("=")[0] in capsys.readouterr().err


def test_help_says_what_neighbours_are_worth(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert "no fair measure of a SimMIM encoder" in capsys.readouterr().out
