"""docs/tour.md: its blocks, applied to a copy of the tree in their order, and the tests that it names, run there.

<!-- file: PATH -->       on the line before a block: a diff of that file, or the whole of a new one
<!-- test: WORD ... -->  what pytest is given
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, environment

TOUR = ROOT / "docs/tour.md"
_FILE = re.compile(r"<!-- file: (\S+) -->\n```(\w+)\n(.*?)```", re.DOTALL)
_TEST = re.compile(r"<!-- test: (.*) -->")
_RUN = """
import sys
from pathlib import Path
import pytest
from tests.commands import check, commands
for command in commands(Path("docs/tour.md")):
    check(command.words)
sys.exit(max(pytest.main([*words.split(), "-q", "-p", "no:cacheprovider"]) for words in sys.argv[1:]))
"""


def patched(text: str, diff: str) -> str:
    """The text with a diff in it: the lines that the diff expects, in one place, become those that it leaves."""
    lines = [(line[:1], line[1:]) for line in diff.splitlines(keepends=True)]
    before, after = ("".join(line for sign, line in lines if sign != other) for other in "+-")
    if not all(sign in "+-" for sign, _ in lines if sign != " ") or text.count(before) != 1:
        raise AssertionError(f"found {text.count(before)} times, wanted once:\n{before}")
    return text.replace(before, after)


def test_a_diff_that_does_not_fit_is_found() -> None:
    assert patched("a\nb\nc\n", " a\n-b\n+d\n") == "a\nd\nc\n"
    with pytest.raises(AssertionError, match="0 times"):
        patched("a\nb\n", " a\n-c\n")


def test_what_the_tour_adds_works(tmp_path: Path) -> None:
    for name in ("bitnet_train", "conf", "recipes", "tests", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt", "Makefile", "docs/tour.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    text = TOUR.read_text(encoding="utf-8")
    for path, language, block in _FILE.findall(text):
        file = tmp_path / path
        assert file.exists() == (language == "diff"), path
        file.write_text(patched(file.read_text(), block) if language == "diff" else block)
    result = subprocess.run(
        [sys.executable, "-c", _RUN, *_TEST.findall(text)],
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" passed") == len(_TEST.findall(text))
