"""Counts of right answers: by definition, and the same in any number of parts and processes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from simmim.distributed import World
from simmim.downstream import metrics
from simmim.downstream.metrics import ClassificationMetrics

CPU = torch.device("cpu")


@st.composite
def answers(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Logits without ties [N, K], some of them not finite, and labels, some of them missing."""
    number, classes = draw(st.integers(1, 12)), draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**40)))
    logits = torch.stack([torch.randperm(classes, generator=generator) for _ in range(number)]) / 2
    for row in draw(st.lists(st.integers(0, number - 1), max_size=2)):
        logits[row, 0] = draw(st.sampled_from([float("nan"), float("inf")]))
    labels = draw(st.lists(st.integers(-1, classes - 1), min_size=number, max_size=number))
    return logits, torch.tensor(labels)


def counted(logits: Tensor, labels: Tensor) -> ClassificationMetrics:
    made = ClassificationMetrics(logits.shape[1], CPU)
    if len(labels):
        made.add(logits, labels)
    return made


@given(both=answers())
def test_the_figures_are_their_definitions(both: tuple[Tensor, Tensor]) -> None:
    logits, labels = both
    rows = [(row, int(k)) for row, k in zip(logits, labels) if k >= 0]
    finite = [(row, k) for row, k in rows if row.isfinite().all()]
    rank = [int((row > row[k]).sum()) for row, k in finite]
    losses = [float(torch.logsumexp(row.double(), 0) - row[k]) for row, k in finite]
    made = counted(logits, labels)
    assert made.num_images == len(rows)
    assert made.not_finite == len(rows) - len(finite)
    assert made.top1 == sum(r == 0 for r in rank) / max(1, len(rows))
    assert made.top5 == sum(r < 5 for r in rank) / max(1, len(rows))
    assert made.loss == pytest.approx(sum(losses) / max(1, len(finite)), rel=1e-5)
    assert made.confusion is not None
    table = torch.zeros(logits.shape[1], logits.shape[1], dtype=torch.int64)
    for row, k in finite:
        table[k, row.argmax()] += 1
    assert made.confusion.tolist() == table.flatten().tolist()


@given(both=answers(), cuts=st.lists(st.integers(0, 12), min_size=1, max_size=3).map(sorted))
def test_processes_that_count_parts_merge_to_the_whole(
    both: tuple[Tensor, Tensor], cuts: list[int]
) -> None:
    logits, labels = both
    whole = counted(logits, labels)
    parts = [
        counted(rows, numbers)
        for rows, numbers in zip(logits.tensor_split(cuts), labels.tensor_split(cuts))
    ]
    sums = [
        sum(tensors[1:], tensors[0].clone())
        for tensors in zip(*([p.counts, p.sums, p.confusion] for p in parts))
    ]
    for rank, part in enumerate(parts):
        left = iter(sums)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                metrics, "all_reduce_sum", lambda t, world, left=left: t.copy_(next(left))
            )
            part.merge(World(rank, len(parts), CPU))
        assert torch.equal(part.counts, whole.counts)
        assert torch.equal(part.confusion, whole.confusion)
        assert part.summary() == pytest.approx(whole.summary(), rel=1e-12)
