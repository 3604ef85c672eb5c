"""What programs and people rely on when they call the command without training."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from bitnet_train.config import CONF_DIR, RECIPES_DIR
from tests.support import ROOT, environment

RECIPES = sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "bitnet_train", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=60)


def test_help_names_recipes_groups_and_keys_and_imports_nothing_heavy(tmp_path: Path) -> None:
    result = run("--help", cwd=tmp_path)
    assert result.returncode == 0
    for name in (*RECIPES, *(path.stem for path in CONF_DIR.glob("*/*.yaml")), "run_dir", "dry_run", "val_every"):
        assert name in result.stdout
    assert " torch" not in result.stderr
    assert " lightning" not in result.stderr


def test_the_package_alone_imports_nothing_but_itself(tmp_path: Path) -> None:
    program = "import sys; before = {*sys.modules}; import bitnet_train; print(*{*sys.modules} - before)"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == ["bitnet_train"]


@pytest.mark.parametrize(
    ("own", "found"),
    [
        ({}, ["4000", "None"]),
        ({"GOMP_SPINCOUNT": "7"}, ["7", "None"]),
        ({"OMP_WAIT_POLICY": "active"}, ["None", "active"]),
    ],
)
def test_threads_that_wait_soon_sleep_unless_the_user_says_otherwise(
    own: dict[str, str], found: list[str], tmp_path: Path
) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    variables = {name: value for name, value in environment().items() if name not in names} | own
    program = f"import os, bitnet_train; print(*map(os.environ.get, {names}))"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == found


@pytest.mark.parametrize(
    "file", [*sorted((ROOT / "tools").glob("*.py")), ROOT / "tests/conftest.py"], ids=lambda f: f.name
)
def test_every_program_says_how_threads_wait_before_torch_is_loaded(file: Path) -> None:
    """OpenMP reads the variable once, when the first library is loaded that it is linked to."""
    nodes = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [(node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes]
    roots = [name.partition(".")[0] for name in names]
    heavy = [roots.index(name) for name in ("torch", "lightning", "bitsandbytes", "transformers") if name in roots]
    assert not heavy or "bitnet_train" in roots[: min(heavy)]


def test_a_run_imports_neither_scipy_nor_transformers_and_leaves_them_to_others(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    pytest.importorskip("transformers")
    program = """
import sys
from bitnet_train.training.imports import UNUSED, import_lightning
import_lightning()
import bitnet_train.training.run
print(*{*UNUSED} & {*sys.modules})
from lightning_utilities.core.imports import RequirementCache, package_available
print(*(package_available(name) and bool(RequirementCache(name)) for name in UNUSED))
import scipy.special, transformers, torchmetrics.text.bert
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "\nTrue True\n"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("form", ["+recipe=", "recipe="])
def test_every_recipe_composes_without_torch(tmp_path: Path, form: str, recipe: str) -> None:
    result = run(f"{form}{recipe}", "--cfg", "job", "--resolve", cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert f"recipe_name: {recipe}" in result.stdout
    assert " torch" not in result.stderr
