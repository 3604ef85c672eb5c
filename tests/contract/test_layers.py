"""The import contracts of pyproject.toml hold, and each of them can fail."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """Checks the package and the contracts under `root`."""
    return subprocess.run([LINT_IMPORTS, "--no-cache"], cwd=root, capture_output=True, text=True, timeout=120)


def test_import_contracts_hold() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("quant.py", "import bitnet_train.model.decoder"),  # upwards
        ("generate/sampling.py", "import lightning.pytorch"),  # a library of the training layer
        ("stages/base.py", "import bitnet_train.data.module"),  # the same by way of another module
        ("nowhere.py", "import torch"),  # a module that no layer names
    ],
)
def test_import_contracts_can_fail(tmp_path: Path, module: str, line: str) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "bitnet_train", tmp_path / "bitnet_train", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "bitnet_train" / module).open("a") as file:
        file.write(f"\n{line}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1
    assert "BROKEN" in result.stdout, result.stdout + result.stderr
