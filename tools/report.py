"""A run as a static HTML page.

python tools/report.py RUN [OUT.html]        OUT is RUN/report.html if left out
"""

from pathlib import Path

from bitnet_train.errors import ArgumentParser, UserError, printable, run_command
from bitnet_train.formats.atomic import atomic_file
from bitnet_train.training.report import report


def main() -> None:
    """Reads the command line and writes the page."""
    parser = ArgumentParser(description="Draw loss, schedules, throughput and ternary health of a run.")
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory, also of a run that is still going on")
    parser.add_argument("out", metavar="OUT.html", type=Path, nargs="?", help="the page; RUN/report.html if left out")
    arguments = parser.parse_args()
    page, out = report(arguments.run), arguments.out or arguments.run / "report.html"
    try:
        with atomic_file(out) as file:
            file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); name another file") from None
    print(printable(str(out)))


if __name__ == "__main__":
    run_command(main)
