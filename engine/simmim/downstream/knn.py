"""Classifies images by a weighted vote of their nearest neighbours in feature space.

M queries (images to classify), N images of the bank, D width, K classes, k neighbours. Similarities
are computed for pieces of the queries and of the bank.
A neighbour of cosine similarity s votes for its class with exp(s / T).
Source: Wu et al. 2018 (arXiv 1805.01978), section 3.4; T = 0.07 as there and in DINO
(facebookresearch/dino:eval_knn.py).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

TEMPERATURE = 0.07
NEIGHBOURS = (1, 5, 20, 200)

# Numbers of queries and of images of the bank whose similarities are held at a time.
QUERIES, BANK = 512, 32768

_LOW_BITS = 2**32 - 1


@dataclass(frozen=True)
class Nearest:
    """The nearest images of the bank, the nearest first; equally near ones by their number.

    Attributes:
        similarity: float32 [M, k], cosine.
        index: int64 [M, k], rows of the bank.
    """

    similarity: Tensor
    index: Tensor


@dataclass(frozen=True)
class NeighbourScore:
    """How often the vote of k neighbours is right.

    Attributes:
        k: neighbours.
        top1: share of images whose best class is right.
        top5: share of images with the right class among the five best that have a vote.
    """

    k: int
    top1: float
    top5: float


def score_neighbours(
    bank: Tensor,
    bank_labels: NDArray[np.int64],
    queries: Tensor,
    labels: NDArray[np.int64],
    neighbours: Sequence[int] = NEIGHBOURS,
    *,
    temperature: float = TEMPERATURE,
    device: torch.device | None = None,
    advance: Callable[[int], None] | None = None,
    num_queries: int = QUERIES,
    num_bank: int = BANK,
) -> list[NeighbourScore]:
    """Classify images by the images of a bank, for several numbers of neighbours at once.

    Args:
        bank: features [N, D], any floating type; need not be normalised.
        bank_labels: int64 [N], from 0.
        queries: features [M, D].
        labels: int64 [M].
        neighbours: numbers of neighbours k; N is taken for a k above N.
        temperature: T.
        device: where similarities are computed; None takes the device of the features.
        advance: called with the number of images that were classified since the last call.
        num_queries: queries of a piece.
        num_bank: images of the bank of a piece.

    Returns:
        One score for every k, ascending, without repetitions.

    Raises:
        ValueError: a k below 1, a temperature not above 0, or no images.
    """
    if not neighbours or min(neighbours) < 1:
        raise ValueError(f"k={list(neighbours)}: choose numbers of at least 1")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: choose one above 0")
    if not len(bank) or not len(queries):
        raise ValueError(f"{len(queries)} images and a bank of {len(bank)}: nothing to compare")
    ks = sorted({min(k, len(bank)) for k in neighbours})
    num_classes = int(max(bank_labels.max(), labels.max())) + 1
    right = np.zeros((len(ks), 2), dtype=np.int64)
    pieces = nearest_in_pieces(
        bank, queries, ks[-1], device=device, num_queries=num_queries, num_bank=num_bank
    )
    for start, nearest in pieces:
        own = torch.from_numpy(labels[start : start + len(nearest.index)])
        voted = torch.from_numpy(bank_labels)[nearest.index]
        for row, k in enumerate(ks):
            votes = vote(nearest.similarity[:, :k], voted[:, :k], num_classes, temperature)
            rank = _rank(votes, own)
            right[row] += [int((rank < 1).sum()), int((rank < 5).sum())]
        if advance is not None:
            advance(len(own))
    shares = (right / len(queries)).tolist()
    return [NeighbourScore(k, *share) for k, share in zip(ks, shares)]


def vote(similarity: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Votes for every class, float64 [M, K], each row up to a factor.

    Args:
        similarity: [M, k], nearest first.
        labels: int64 [M, k], classes of the neighbours.
        num_classes: K.
        temperature: T.
    """
    # relative to the nearest, as exp(1 / T) overflows for a small T
    away = (similarity.double() - similarity[:, :1].double()) / temperature
    votes = away.new_zeros(len(labels), num_classes)
    return votes.scatter_add_(1, labels, away.exp())


def _rank(votes: Tensor, label: Tensor) -> Tensor:
    # the number of classes before the right one: those with more votes, and those with as many
    # votes and a lower number; more than all of them if the right one has no vote
    own = votes.gather(1, label[:, None])
    number = torch.arange(votes.shape[1])
    before = (votes > own) | ((votes == own) & (number < label[:, None]))
    return torch.where(own.squeeze(1) > 0, before.sum(1), votes.shape[1] + 5)


def nearest_in_pieces(
    bank: Tensor,
    queries: Tensor,
    k: int,
    *,
    device: torch.device | None = None,
    num_queries: int = QUERIES,
    num_bank: int = BANK,
) -> Iterator[tuple[int, Nearest]]:
    """The k nearest images of the bank for each query, for one piece of the queries at a time.

    Args:
        bank: see `score_neighbours`.
        queries: see `score_neighbours`.
        k: neighbours.
        device: see `score_neighbours`.
        num_queries: see `score_neighbours`.
        num_bank: see `score_neighbours`.

    Yields:
        The number of the first query of a piece, and the neighbours of its queries on the CPU.
    """
    for start in range(0, len(queries), num_queries):
        asked = _normalised(queries[start : start + num_queries], device)
        best: Tensor | None = None
        for first in range(0, len(bank), num_bank):
            part = _normalised(bank[first : first + num_bank], device)
            keys = _best_keys(asked @ part.T, first, k)
            keys = keys if best is None else torch.cat([best, keys], 1)
            best = keys.topk(min(k, keys.shape[1]), dim=1).values
        assert best is not None
        yield start, _unpacked(best.cpu())


def _normalised(features: Tensor, device: torch.device | None) -> Tensor:
    return F.normalize(features.to(device).float(), dim=1)


def _best_keys(similarity: Tensor, first: int, k: int) -> Tensor:
    # the keys of the k largest similarities of every row; of equal ones topk takes any, the keys
    # those of lower numbers
    values, index = similarity.topk(min(k, similarity.shape[1]), dim=1)
    keys = _sortable(values, index + first)
    last = values[:, -1:]
    left_out = (similarity == last).sum(1) > (values == last).sum(1)
    rows = left_out.nonzero().squeeze(1)
    if len(rows):
        every = torch.arange(first, first + similarity.shape[1], device=similarity.device)
        keys[rows] = _sortable(similarity[rows], every).topk(keys.shape[1], dim=1).values
    return keys


def _sortable(similarity: Tensor, index: Tensor) -> Tensor:
    # one int64 that orders by similarity, then by the lower row. No two are equal, so that the k
    # largest are the same however the bank is cut into pieces. The bits of positive floats are
    # ordered as integers are, those of negative ones in reverse
    bits = (similarity + 0.0).view(torch.int32)  # + 0.0 makes -0.0 positive
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    return (ordered << 32) | (_LOW_BITS - index)


def _unpacked(keys: Tensor) -> Nearest:
    ordered = (keys >> 32).int()
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return Nearest(bits.view(torch.float32), _LOW_BITS - (keys & _LOW_BITS))
