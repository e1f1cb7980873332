"""What the launchers of Triton kernels ask of torch's settings."""

from collections.abc import Iterator

import pytest
import torch

from simmim_kernels.triton_backend import product_precision


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield
    matmul.fp32_precision = before


@pytest.mark.parametrize("chosen", [True, False])
def test_products_have_the_precision_of_torchs_own(chosen: bool) -> None:
    matmul, expected = torch.backends.cuda.matmul, "tf32" if chosen else "ieee"
    matmul.allow_tf32 = chosen  # the name of old
    assert product_precision(torch.float32) == expected
    matmul.fp32_precision = "ieee" if chosen else "tf32"  # the present one wins; the old one raises
    assert product_precision(torch.float32) == matmul.fp32_precision
    for dtype in (torch.bfloat16, torch.float16):
        assert product_precision(dtype) == "tf32"


def test_without_a_setting_products_are_exact() -> None:
    torch.backends.cuda.matmul.fp32_precision = "none"
    assert product_precision(torch.float32) == "ieee"
