"""Which backends the tests of an op run on."""

import pytest

# Ops without matrix products, of which "native-bfloat16" is "native" once more.
WITHOUT_PRODUCTS = {
    "test_masked_l1_loss.py",
    "test_random_patch_mask.py",
    "test_substitute_mask_tokens.py",
    "test_window_attention.py",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    repeated = [
        item
        for item in items
        if item.path.name in WITHOUT_PRODUCTS and "native-bfloat16" in item.name
    ]
    config.hook.pytest_deselected(items=repeated)
    items[:] = [item for item in items if item not in set(repeated)]
