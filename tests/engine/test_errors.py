"""Errors that a user sees: a setting is named by whoever knows it."""

import pytest

from simmim.errors import DataError, PathError, from_setting


def test_the_setting_stands_before_the_path() -> None:
    with (
        pytest.raises(DataError, match=r"^data\.path=photos: no image$") as caught,
        from_setting("data.path"),
    ):
        raise PathError("photos: no image")
    assert type(caught.value) is DataError  # an outer setting is not put before it as well
    with pytest.raises(DataError, match=r"^photos: no image$"), from_setting(""):
        raise PathError("photos: no image")


def test_errors_that_do_not_begin_with_the_path_stay_as_they_are() -> None:
    with pytest.raises(DataError, match=r"^photos/0\.tar: damaged$"), from_setting("data.path"):
        raise DataError("photos/0.tar: damaged")
