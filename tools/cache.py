"""What the cache of tokens and DPO references holds, and room in it again.

python tools/cache.py [--cache-dir DIR] [--keep GB]        lists; with --keep, removes what was not used for longest
"""

import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bitnet_train.data.eviction import Entry, entries, evict
from bitnet_train.errors import ArgumentParser, UserError, printable, run_command
from bitnet_train.options import number
from bitnet_train.user_cache import user_cache


def table(listed: list[Entry], title: str) -> Table:
    """Name, size, tokens and last use of every entry."""
    shown = Table("name", "MB", "tokens", "days since use", title=Text(f"{printable(title)}: {megabytes(listed)} MB"))
    for entry in listed:
        tokens = "" if entry.tokens is None else f"{entry.tokens:,}"
        shown.add_row(
            Text(printable(entry.path.name)), megabytes([entry]), tokens, f"{(time.time() - entry.used) / 86400:.1f}"
        )
    return shown


def megabytes(listed: list[Entry]) -> str:
    """The size of all in MB."""
    return f"{sum(entry.size for entry in listed) / 1e6:,.1f}"


def main() -> None:
    """Reads the command line, removes, and shows what is left."""
    parser = ArgumentParser(description="List the cache of tokens and DPO references, or make room in it.")
    parser.add_argument("--cache-dir", type=Path, default=user_cache(), help="default: %(default)s")
    parser.add_argument(
        "--keep", type=number(0, 1e9), metavar="GB", help="remove the least recently used beyond so many GB"
    )
    arguments = parser.parse_args()
    if not arguments.cache_dir.is_dir():
        raise UserError(f"--cache-dir {arguments.cache_dir}: no such folder; name the data.cache_dir of your runs")
    if arguments.keep is not None:
        Console().print(table(evict(arguments.cache_dir, int(arguments.keep * 1e9)), "removed"))
    Console().print(table(entries(arguments.cache_dir), str(arguments.cache_dir)))


if __name__ == "__main__":
    run_command(main)
