"""A folder of random masters for each test."""

from pathlib import Path

import pytest

from tests.folders import write_master


@pytest.fixture
def master(tmp_path: Path) -> Path:
    write_master(tmp_path / "master")
    return tmp_path / "master"
