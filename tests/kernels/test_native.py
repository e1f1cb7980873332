"""The native kernels' memory and instruction sets."""

import gc
import random
import threading

import pytest
import torch

from simmim_kernels import native

pytestmark = pytest.mark.skipif(native.extension is None, reason=str(native.missing_reason))


@pytest.fixture(autouse=True)
def nothing_left() -> None:
    """What earlier tests left in reference cycles holds memory until it is collected."""
    gc.collect()


LARGE = native.RECYCLED_BYTES // 4 + 1000  # elements of float32


def test_small_outputs_come_from_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "extension", None)
    assert native.empty((3, 4), torch.bfloat16).shape == (3, 4)
    assert native.empty((LARGE,), torch.float32).shape == (LARGE,)


def test_memory_is_reused_when_free_and_not_before() -> None:
    native.release_memory()
    first = native.empty((LARGE, 2), torch.float32)
    assert first.is_contiguous()
    assert first.shape == (LARGE, 2)
    assert not first._is_view()
    part = first.fill_(7)[10:20, 1]
    del first  # `part` still needs the memory
    second = native.empty((LARGE, 2), torch.float32)
    second.fill_(8)
    assert (part == 7).all()
    places = {_place(second)}
    del part, second
    for _ in range(10):
        places.add(_place(native.empty((LARGE, 2), torch.bfloat16)))
    assert len(places) <= 2


def _place(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() // (2 << 20)


@pytest.mark.parametrize("order", [1, -1], ids=["forwards", "backwards"])
def test_neighbours_that_are_free_become_one(order: int) -> None:
    native.release_memory()
    block = native.empty((26, LARGE), torch.float32)  # of which the parts are taken
    lowest, highest = block.data_ptr(), block[-1].data_ptr()
    del block
    parts = [native.empty((LARGE,), torch.float32) for _ in range(24)]
    assert all(lowest <= part.data_ptr() <= highest for part in parts)
    for part in parts[::order]:
        part.set_()
    del part, parts
    whole = native.empty((24, LARGE), torch.float32)
    # nothing else is large enough unless the parts were put together
    assert lowest <= whole.data_ptr() <= highest


def test_blocks_never_overlap() -> None:
    native.release_memory()
    draw = random.Random(0)
    held: list[tuple[int, torch.Tensor]] = []
    for step in range(400):
        if held and draw.random() < 0.5:
            value, tensor = held.pop(draw.randrange(len(held)))
            assert (tensor == value).all()
        tensor = native.empty((LARGE + draw.randrange(4 * LARGE),), torch.float32)
        held.append((step, tensor.fill_(step)))
        held = held[-20:]
    assert all((tensor == value).all() for value, tensor in held)


def test_kept_memory_can_be_released_and_is_bounded() -> None:
    native.release_memory()
    together = [native.empty((LARGE,), torch.float32) for _ in range(3)]
    del together
    largest = 39 * LARGE * 4
    for rows in range(2, 40):  # growing sizes must not pile up
        native.empty((rows, LARGE), torch.float32)
    kept = native.release_memory()
    assert 0 < kept <= 1.25 * largest + (4 << 20)  # and the ends of two huge pages
    assert native.release_memory() == 0


def test_another_thread_may_free_it() -> None:
    native.release_memory()
    held = [native.empty((LARGE,), torch.float32)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert native.release_memory() > 0


def test_large_outputs_are_right_when_streamed() -> None:
    """Beyond 8 MiB rows are written past the cache; the small tests never get there."""
    from simmim_kernels import masked_l1_loss_from_tokens, substitute_mask_tokens

    tokens = torch.randn(40, 600, 128, requires_grad=True)
    token, mask = torch.randn(128, requires_grad=True), torch.rand(40, 600) < 0.6
    prediction, image = torch.randn(40, 6, 6, 3072), torch.randn(40, 3, 192, 192)
    units = torch.rand(40, 6, 6) < 0.6
    found = []
    for backend in ("reference", "native"):
        out = substitute_mask_tokens(tokens, mask, token, backend=backend)
        gradients = torch.autograd.grad(out, (tokens, token), torch.ones_like(out))
        leaf = prediction.clone().requires_grad_()
        loss = masked_l1_loss_from_tokens(leaf, image, units, 32, backend=backend)
        loss.backward()
        found.append((out, *gradients, loss, leaf.grad))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_targets() -> None:
    best = native.extension.target()
    assert best in ("baseline", "avx2", "avx512")
    assert native.extension.use_target("baseline")
    assert native.extension.target() == "baseline"
    assert not native.extension.use_target("sse9")
    assert native.extension.use_target(best)
