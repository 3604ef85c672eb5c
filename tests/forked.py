"""`python ARGUMENTS` without the imports: forked from a process that has imported everything and computed nothing.

A program of its own spends ten seconds on imports. It can be harmed as any process; only the interpreter's start is
not the user's (tests/contract and tests/integration/test_quickstart.py have that).
"""

import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.support import environment

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.everything", __name__])


class Program(ForkServerProcess):
    """A program that runs in a folder; what it prints is kept in two files there or elsewhere."""

    def __init__(
        self,
        *arguments: str,
        cwd: Path,
        out: Path,
        error: Path,
        variables: Mapping[str, str] | None = None,
        memory: int | None = None,
    ) -> None:
        """Starts it, with variables beside those of `environment`, and with so many bytes of memory as its own."""
        what = (arguments, cwd, {**environment(), **(variables or {})}, out, error, memory)
        super().__init__(target=_program, args=what, daemon=True)
        self.start()


def start(*overrides: str, cwd: Path, log: Path) -> Program:
    """`python -m bitnet_train OVERRIDES`, all that it says added to `log`."""
    return Program("-m", "bitnet_train", *overrides, cwd=cwd, out=log, error=log)


def python(
    *arguments: str,
    cwd: Path,
    timeout: float = 240,
    variables: Mapping[str, str] | None = None,
    memory: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` in a folder and waits."""
    with tempfile.TemporaryDirectory() as folder:
        out, error = Path(folder, "out"), Path(folder, "error")
        process = Program(*arguments, cwd=cwd, out=out, error=error, variables=variables, memory=memory)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(arguments, timeout)
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read_text(), error.read_text())


def train(*overrides: str, cwd: Path, memory: int | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m bitnet_train OVERRIDES`."""
    return python("-m", "bitnet_train", *overrides, cwd=cwd, memory=memory)


def _program(
    arguments: Sequence[str], cwd: Path, variables: Mapping[str, str], out: Path, error: Path, memory: int | None
) -> None:
    os.chdir(cwd)
    os.environ.update(variables)
    for number, file in ((1, out), (2, error)):
        with file.open("a") as stream:
            os.dup2(stream.fileno(), number)
    if memory is not None:
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + memory, resource.RLIM_INFINITY))
    first, *rest = arguments
    if first == "-m":
        sys.argv = [rest[0], *rest[1:]]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")
