"""timm, which training views and mixing draw with, and which is an optional dependency."""

from importlib import import_module
from typing import Any

from simmim.errors import RunError


def import_timm(module: str) -> Any:
    """A module of timm, or of torchvision, which timm needs.

    Raises:
        RunError: it cannot be imported; names the extra to install.
    """
    try:
        return import_module(module)
    except Exception as error:
        # torchvision, which timm imports, raises all kinds beside a torch it was not built for
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RunError(
            f"training views and mixing need timm, which cannot be imported ({reason}): "
            "pip install 'simmim[finetune]'"
        ) from None
