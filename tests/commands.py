"""The commands in the pages of this project: found in their fenced blocks, checked, and run.

    ```sh                     a block of commands, one a line (a backslash continues a line)
    <!-- run: WORD ... -->    on the line before: the block is cheap and is run; WORDs are added to its Python commands
    ```python                 below such a line: a program, which is run between the commands

What is not run is checked: training commands compose, tools know the options that are named, make knows the targets.
"""

import contextlib
import io
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from bitnet_train import config as configuration
from bitnet_train.cli import main as train_main
from plot_schedule import composed
from tests.support import ROOT, environment

_BLOCK = re.compile(r"(?:<!-- run:(?P<run>[^\n]*)-->\n)?```(?P<kind>sh|python)\n(?P<text>.*?)```", re.DOTALL)
_PLUGINS = {"launcher=slurm": "hydra_plugins.hydra_submitit_launcher", "hparams_search=optuna": "optuna"}
_GROUPS_BUILT = ("data", "stage", "schedule", "execution")  # what composes is also of the right types and ranges


class Command(NamedTuple):
    """A command of a page, or a program; `extra` is what a test adds to it, None where it is only checked."""

    text: str
    extra: list[str] | None
    is_program: bool = False

    @property
    def words(self) -> list[str]:
        """Without comments, and without variables in front."""
        words = shlex.split(self.text, comments=True)
        return words[next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), 0) :]


def commands(page: Path) -> Iterator[Command]:
    """The commands of a page, in its order."""
    for block in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        extra = None if block["run"] is None else shlex.split(block["run"])
        if block["kind"] == "python":
            yield from [Command(block["text"], extra, is_program=True)] if extra is not None else []
            continue
        for line in block["text"].replace("\\\n", " ").splitlines():
            if shlex.split(line, comments=True):
                yield Command(line.strip(), extra)


def check(words: Sequence[str]) -> None:
    """Refuses a command that could not run: an unknown recipe, key, tool, option, extra or target."""
    if "bitnet_train" in words:  # python -m, torchrun ... -m and srun ... python -m
        _check_training(words[words.index("bitnet_train") + 1 :])
    elif words[0] == "python" and words[1].startswith("tools/"):
        _check_tool(words[1], words[2:])
    elif words[1:3] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[3:]), words
    elif words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[:2] == ["pip", "install"]:
        _check_extras(" ".join(words))
    else:
        assert words[0] in ("cat", "cd", "cp", "git", "kill", "pip", "printf", "sbatch", "touch", "unzip"), words


def _check_training(words: Sequence[str]) -> None:
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    config = composed([word for word in map(_first_of_sweep, overrides) if word and _is_installed(word)])
    configuration.run_config(config)
    for group in _GROUPS_BUILT:
        node = config[group].copy()
        if "sequence_length" in node and node.sequence_length is None:
            node.sequence_length = 2
        configuration.build(node, group)


def _is_installed(override: str) -> bool:
    """False for an option of an extra that is not here, and for Hydra's own keys, which depend on such options."""
    plugin = _PLUGINS.get(override)
    return not override.startswith("hydra.") and (plugin is None or find_spec(plugin) is not None)


def _first_of_sweep(override: str) -> str:
    """key=a,b as key=a; nothing of key=interval(a, b) and its like."""
    return "" if re.search(r"=\w+\(", override) else re.sub(r"^([^=]+=[^,\[{]*),.*", r"\1", override)


def _check_tool(tool: str, words: Sequence[str]) -> None:
    known = set(re.findall(r"--[\w-]+", output_of(tool, ["--help"])))
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, (tool, words)


def _check_extras(text: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for names in re.findall(r"(?:bitnet-train|\.)\[([\w,-]+)\]", text):
        assert set(names.split(",")) <= set(extras), names


def output_of(tool: str, words: Sequence[str]) -> str:
    """What a command of tools/ prints, run in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        _exits(lambda: runpy.run_path(str(ROOT / tool), run_name="__main__"), [tool, *words])
    return out.getvalue()


def run(command: Command, folder: Path) -> None:
    """Runs a command in a folder, in this process where it is a Python command of this project."""
    if "ik_llama_cpp" in command.text and not find_spec("ik_llama_cpp"):
        return
    words = [] if command.is_program else command.words
    with contextlib.chdir(folder):
        if words[:3] == ["python", "-m", "bitnet_train"]:
            _exits(train_main, ["bitnet-train", *words[3:], *(command.extra or [])])
        elif words[:1] == ["python"]:
            output_of(words[1], [*words[2:], *(command.extra or [])])
        else:
            env = environment()
            env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
            program = ["python", "-c"] if command.is_program else ["bash", "-ec"]
            subprocess.run([*program, command.text], env=env, check=True, timeout=120)


def _exits(main: Callable[[], object], argv: Sequence[str]) -> None:
    """Calls a program's main with its command line; it must end with 0."""
    before, sys.argv = sys.argv, [*argv]
    code: object = 0
    try:
        main()
    except SystemExit as exit:
        code = exit.code or 0
    finally:
        sys.argv = before
    assert code == 0, argv
