"""Every image once an epoch, the same at any number of processes, and resumable at any step."""

from dataclasses import dataclass
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from simmim.data.order import MicroBatches, SampleOrder

Place = tuple[int, int]


@dataclass(frozen=True)
class Split:
    """How a step's batch is split."""

    micro_batch: int
    accumulation_steps: int
    world_size: int

    @property
    def batch(self) -> int:
        return self.micro_batch * self.accumulation_steps * self.world_size

    def of_rank(
        self, num_images: int, seed: int, rank: int, first: int, last: int
    ) -> list[list[Place]]:
        order = SampleOrder(num_images, seed)
        steps = (self.accumulation_steps, rank, self.world_size, first, last)
        batches = MicroBatches(order, self.micro_batch, *steps)
        assert len(batches) == len(list(batches)) == (last - first) * self.accumulation_steps
        return list(batches)

    def steps(self, num_images: int, seed: int, last: int) -> list[list[Place]]:
        """What all processes see together, step by step."""
        ranks = [self.of_rank(num_images, seed, r, 0, last) for r in range(self.world_size)]
        number = self.accumulation_steps
        return [
            [*chain(*(batch for rank in ranks for batch in rank[s * number : (s + 1) * number]))]
            for s in range(last)
        ]


SPLITS = st.builds(Split, st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))
NUM_IMAGES = st.integers(1, 40)
SEEDS = st.integers(0, 2**63)


@given(split=SPLITS, num_images=NUM_IMAGES, seed=SEEDS)
def test_every_epoch_has_every_image_exactly_once(split: Split, num_images: int, seed: int) -> None:
    steps = -(-3 * num_images // split.batch)
    seen = [*chain(*split.steps(num_images, seed, steps))]
    assert len(seen) == len(set(seen))
    for epoch in range(3):
        assert sorted(image for e, image in seen if e == epoch) == list(range(num_images))


@given(split=SPLITS, num_images=NUM_IMAGES, seed=SEEDS, steps=st.integers(1, 6))
def test_a_step_takes_the_same_images_however_it_is_split(
    split: Split, num_images: int, seed: int, steps: int
) -> None:
    whole = Split(split.batch, 1, 1).steps(num_images, seed, steps)
    assert [sorted(s) for s in split.steps(num_images, seed, steps)] == [sorted(s) for s in whole]


@given(split=SPLITS, num_images=NUM_IMAGES, seed=SEEDS, data=st.data())
def test_a_run_that_resumes_sees_the_rest_of_the_same_sequence(
    split: Split, num_images: int, seed: int, data: st.DataObject
) -> None:
    last = data.draw(st.integers(0, 8), label="last step")
    first = data.draw(st.integers(0, last), label="resumed at")
    rank = data.draw(st.integers(0, split.world_size - 1), label="rank")
    whole = split.of_rank(num_images, seed, rank, 0, last)
    rest = split.of_rank(num_images, seed, rank, first, last)
    assert rest == whole[first * split.accumulation_steps :]


@given(num_images=st.integers(1, 60), seed=SEEDS, data=st.data())
def test_a_place_does_not_depend_on_those_asked_before(
    num_images: int, seed: int, data: st.DataObject
) -> None:
    places = data.draw(st.lists(st.integers(0, 4 * num_images - 1), min_size=1, max_size=12))
    order = SampleOrder(num_images, seed)
    answers = [order.at(place) for place in places]
    assert answers == [SampleOrder(num_images, seed).at(place) for place in places]
    assert [epoch for epoch, _ in answers] == [place // num_images for place in places]
