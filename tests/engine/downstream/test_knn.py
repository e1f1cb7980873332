"""Weighted nearest neighbours: against brute force, cut into any pieces."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from simmim.downstream import knn
from simmim.downstream.knn import Nearest, nearest_in_pieces, score_neighbours, vote

pytestmark = pytest.mark.usefixtures("one_thread")


def find_nearest(bank: Tensor, queries: Tensor, k: int, num_bank: int) -> Nearest:
    parts = [part for _, part in nearest_in_pieces(bank, queries, k, num_bank=num_bank)]
    return Nearest(
        torch.cat([part.similarity for part in parts]), torch.cat([part.index for part in parts])
    )


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


def test_similarities_are_computed_in_pieces_and_where_it_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, pieces = knn._normalised, list[tuple[int, object]]()

    def noted(features: Tensor, device: torch.device | None) -> Tensor:
        pieces.append((len(features), device))
        return real(features, device)

    monkeypatch.setattr(knn, "_normalised", noted)
    device, labels = torch.device("cpu"), np.zeros(7, dtype=np.int64)
    score_neighbours(
        torch.randn(7, 2),
        labels,
        torch.randn(5, 2),
        labels[:5],
        [1],
        device=device,
        num_queries=3,
        num_bank=4,
    )
    # the queries, then the bank for them: once for three, once for two
    assert pieces == [(n, device) for n in (3, 4, 3, 2, 4, 3)]


def test_the_temperature_weighs_near_neighbours() -> None:
    # one neighbour of class 0 is nearer than two of class 1
    bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    for temperature, right in ((0.07, 0), (1.0, 1)):
        for answer in (0, 1):
            (score,) = score_neighbours(
                bank,
                np.array([0, 1, 1]),
                torch.tensor([[2.0, 0.0]]),
                np.array([answer]),
                [3],
                temperature=temperature,
            )
            assert score.top1 == float(answer == right)


def test_what_is_not_told_is_as_published() -> None:
    assert (knn.TEMPERATURE, knn.NEIGHBOURS) == (0.07, (1, 5, 20, 200))
    scores = score_neighbours(
        torch.randn(300, 3), np.zeros(300, np.int64), torch.randn(2, 3), np.zeros(2, np.int64)
    )
    assert [score.k for score in scores] == [1, 5, 20, 200]
