"""The wheel, built from the sdist and installed into an environment of its own, works from any folder."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import bitnet_train

ROOT = Path(__file__).parents[2]
COMPOSE = ("-m", "bitnet_train", "+recipe=quickstart-pretrain", "--cfg", "job")
SCRIPTS = ("bitnet-train", "bitnet-export", "bitnet-generate", "bitnet-evaluate")


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed; it sees no PYTHONPATH, so nothing of this checkout."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`python -m build` without --wheel: the sdist from the checkout, then the wheel from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the programs of a new environment: the wheel, and the dependencies of this one by way of a .pth file.

    Lines of a .pth file are folders for sys.path and no more, so this environment's own link to the checkout is not
    followed.
    """
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False)
    paths = sysconfig.get_paths(vars={"base": str(home), "platbase": str(home)})
    (Path(paths["purelib"]) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    programs = Path(paths["scripts"])
    options = ("--no-deps", "--no-index", "--no-compile")
    run(sys.executable, "-m", "pip", "--python", programs / "python", "install", *options, wheel, cwd=home)
    return programs


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """An empty folder, empty again after the test: no command here may write into the current folder."""
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


def test_wheel_holds_the_package_and_its_data_only(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"bitnet_train-{bitnet_train.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"bitnet_train", info}
    data = {path.relative_to(ROOT) for group in ("conf", "recipes") for path in (ROOT / group).rglob("*.yaml")}
    assert data
    assert {f"bitnet_train/_data/{path.as_posix()}" for path in data} <= names


def test_wheel_is_what_the_new_environment_imports(installed: Path, elsewhere: Path) -> None:
    file = run(installed / "python", "-c", "import bitnet_train; print(bitnet_train.__file__)", cwd=elsewhere)
    assert Path(file.strip()).is_relative_to(installed.parent)


def test_wheel_composes_the_same_recipe_as_the_checkout(installed: Path, elsewhere: Path) -> None:
    composed = run(installed / "python", *COMPOSE, cwd=elsewhere)
    assert composed == run(sys.executable, *COMPOSE, cwd=ROOT)
    assert "\nrecipe_name: quickstart-pretrain\n" in f"\n{composed}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_console_scripts_show_their_help(installed: Path, elsewhere: Path, script: str) -> None:
    assert run(installed / script, "--help", cwd=elsewhere).strip()
