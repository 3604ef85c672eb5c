"""Where the user's cache lies."""

from pathlib import Path

import pytest

from bitnet_train.errors import UserError
from bitnet_train.user_cache import user_cache


def test_an_absolute_path_is_taken_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somebody")
    for named, expected in [("/cache", "/cache"), ("", "/somebody/.cache"), ("cache/here", "/somebody/.cache")]:
        monkeypatch.setenv("XDG_CACHE_HOME", named)
        assert user_cache() == Path(expected, "bitnet_train")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache() == Path("/somebody/.cache/bitnet_train")


def test_without_a_home_folder_one_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(UserError, match="no home folder; set HOME, or XDG_CACHE_HOME, to an absolute path"):
        user_cache()
