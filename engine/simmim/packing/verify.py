"""Whether a packed folder is sound: its indices, its tar files, its images."""

from collections.abc import Callable
from pathlib import Path

from simmim.data.decode import UnreadableImage, decode
from simmim.data.names import printable
from simmim.data.shard_index import DATASET_FILE, read_dataset, read_index, shard_name
from simmim.data.source import ARRAY_EXTENSION
from simmim.errors import DataError
from simmim.packing.dataset_file import channels_of, value_range_of
from simmim.packing.members import check_members, dali_index
from simmim.packing.tasks import Tally, Tasks


def verify(
    folder: Path, *, workers: int = 1, tick: Callable[[int], None] = lambda done: None
) -> tuple[int, list[str]]:
    """Check a packed folder against its indices, and decode every image.

    Args:
        folder: a packed folder.
        workers: processes.
        tick: called now and then with the number of images checked.

    Returns:
        The number of images that the indices name, and a line for each damaged or missing piece.

    Raises:
        DataError: no packed folder, or its dataset.json is damaged.
        RunError: a process died.
    """
    dataset = read_dataset(folder)
    if dataset["images"] is None:
        raise DataError(
            f"{folder}: a pack that is not finished; the same simmim pack command finishes it"
        )
    value_range, channels = value_range_of(dataset), channels_of(dataset)
    tasks = Tasks(
        lambda number, tally: _verify_shard(folder, number, value_range, channels, tally),
        workers,
        f"{folder}/{{:06d}}.tar",
    )
    checked = dict(tasks.results(range(dataset["shards"]), lambda tally: tick(tally.total()[0])))
    problems = [line for number in sorted(checked) for line in checked[number][1]]
    images = sum(count for count, _ in checked.values())
    if not problems and images != dataset["images"]:
        problems = [f"{DATASET_FILE}: says {dataset['images']} images, the indices {images}"]
    return images, problems


def _verify_shard(
    folder: Path,
    number: int,
    value_range: tuple[float, float] | None,
    channels: int | None,
    tally: Tally,
) -> tuple[int, list[str]]:
    shard = folder / f"{shard_name(number)}.tar"
    try:
        index = read_index(shard)
    except DataError as error:
        return 0, [printable(str(error).removeprefix(f"{folder}/"))]
    if not index.name:
        return 0, []
    problems = check_members(shard, index)
    try:
        if shard.with_suffix(".idx").read_text() != dali_index(index):
            problems.append("its .idx is damaged")
    except (OSError, ValueError):
        problems.append("its .idx is missing or damaged")
    with shard.open("rb") as file:
        for row, name in enumerate(index.name):
            file.seek(index.offset[row])
            indexed = index.height[row], index.width[row], index.channels[row]
            try:
                # one larger than its index says is damaged: there is no need to decode it
                data = file.read(index.size[row])
                # only the index says which axis of an array is channels
                pixels = decode(
                    data,
                    indexed[2] if name.endswith(ARRAY_EXTENSION) else channels,
                    max_pixels=indexed[0] * indexed[1],
                    value_range=value_range,
                )
            except UnreadableImage as error:
                problems.append(f"{name}: unreadable: {error}")
            else:
                if pixels.shape != indexed:
                    problems.append(f"{name}: is {list(pixels.shape)}, not {list(indexed)}")
            tally.add(done=1)
    return len(index.name), [printable(f"{shard.name}: {problem}") for problem in problems]
