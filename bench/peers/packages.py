"""Imports of packages that may be missing."""

import importlib
import os
from types import ModuleType

from bench.peers.peer import Unavailable


def import_package(name: str) -> ModuleType:
    """Import a module of a package.

    Raises:
        Unavailable: the package is not installed, or does not import here.
    """
    package = name.split(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise Unavailable(f"{package} is not installed: pip install {package}") from None
        reason = str(error)
    except (ImportError, RuntimeError) as error:
        reason = str(error)  # such as a torchvision that was built for another torch
    raise Unavailable(f"{package} does not import here: {reason.splitlines()[0]}")


def import_lightly(name: str) -> ModuleType:
    """Import a module of lightly without its version check, which would ask a server.

    Raises:
        Unavailable: lightly is not installed, or does not import here.
    """
    os.environ.setdefault("LIGHTLY_DID_VERSION_CHECK", "True")
    return import_package(f"lightly.{name}")
