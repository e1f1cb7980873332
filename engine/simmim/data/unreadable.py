"""The images of a run that cannot be read: counted and named, whichever process met them."""

from collections.abc import Callable, Iterable

from simmim.data.source import Source
from simmim.distributed import World, gather_objects

# So many are named on the terminal each time; a log has all of them.
MOST_NAMED = 20


class UnreadableImages:
    """Collects images that cannot be read, of all processes.

    Args:
        source: that they are of.
        world: this process.
        known: samples that were named before.

    Attributes:
        samples: every one that all processes know of, after `agree`.
    """

    def __init__(self, source: Source, world: World, known: Iterable[int] = ()) -> None:
        self.source, self.world = source, world
        self.samples = set(known)
        self._own: list[tuple[int, str]] = []

    def note(self, sample: int, reason: str) -> None:
        """Remember an image that this process could not read."""
        self._own.append((sample, reason))

    def agree(self) -> list[tuple[int, str]]:
        """Share what the processes met; called by all of them.

        Returns:
            (sample, reason) of every image that is new, by sample, the same in every process.
        """
        reasons = dict(
            problem for problems in gather_objects(self._own, self.world) for problem in problems
        )
        self._own = []
        new = sorted((s, reason) for s, reason in reasons.items() if s not in self.samples)
        self.samples.update(sample for sample, _ in new)
        return new

    def describe(self, problem: tuple[int, str]) -> str:
        """Name and reason of an image, such as "cat.jpg: truncated"."""
        sample, reason = problem
        return f"{self.source.names[sample]}: {reason}"

    def report(
        self, problems: list[tuple[int, str]], report: Callable[[str], None], what: str, total: int
    ) -> None:
        """Name the first images of `problems` in lines, and count them where there are more.

        Args:
            problems: (sample, reason) of images.
            report: told each line, in the main process.
            what: that they are, such as "unreadable, not counted".
            total: images of the pass.
        """
        if not self.world.is_main:
            return
        for problem in problems[:MOST_NAMED]:
            report(f"{what}: {self.describe(problem)}")
        if len(problems) > MOST_NAMED:
            report(f"{what}: {len(problems)} of {total} images in all")
