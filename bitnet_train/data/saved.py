"""Data sets as `datasets` saves them (save_to_disk), read by the library itself.

    FOLDER/dataset_dict.json              a DatasetDict: FOLDER/SPLIT is a data set for each split
    FOLDER/state.json dataset_info.json   a data set; state.json names its .arrow files

Other .arrow files in such a folder (cache-*.arrow) are what map, shuffle and filter left there: not its rows.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bitnet_train.data.entries import check_entry
from bitnet_train.data.parts import Cut
from bitnet_train.data.readers import ROWS_AT_ONCE, Place, Placed, rows_of
from bitnet_train.errors import UserError

if TYPE_CHECKING:
    import pyarrow


_NO_DATA = 2  # files: state.json and dataset_info.json


def is_saved(folder: Path) -> bool:
    """Whether the folder is a data set, or one split of several."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def splits_of(folder: Path) -> list[str] | None:
    """The splits of a DatasetDict; None where the folder is none.

    Raises:
        UserError: dataset_dict.json is damaged.
    """
    file = folder / "dataset_dict.json"
    if not file.is_file():
        return None
    splits = _object(file).get("splits")
    if not isinstance(splits, list) or not splits or not all(isinstance(name, str) for name in splits):
        raise UserError(f"{file}: splits must be a list of names, got {splits!r}; save the data set again")
    return splits


def files_of(folder: Path) -> list[Path]:
    """The files that a data set consists of.

    Raises:
        UserError: state.json is damaged, or what it names is no file.
    """
    state = folder / "state.json"
    entries = _object(state).get("_data_files")
    names = (
        [entry.get("filename") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else [0]
    )
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{state}: _data_files must name the files of the data set, got {entries!r}; save it again")
    files = [state, folder / "dataset_info.json", *(folder / str(name) for name in names)]
    for file in files:
        check_entry(file)
    return files


def read_saved(folder: str, start: Place, on_read: Callable[[int], object] = int, cut: Cut | None = None) -> Placed:
    """The rows of a data set from a place on; see `readers.read_from`.

    Raises:
        UserError: `datasets` cannot open it.
    """
    import datasets

    if len(files_of(Path(folder))) == _NO_DATA:  # what `datasets` wrote of no rows, it cannot open
        return
    try:
        rows = datasets.load_from_disk(folder)
        assert isinstance(rows, datasets.Dataset)
        if start.number >= len(rows):
            return
        tables = rows.select(range(start.number, len(rows))).with_format("arrow").iter(ROWS_AT_ONCE)
        yield from rows_of(_batches(tables, on_read), start.number, start, cut)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: datasets cannot open it, it may be damaged ({error}); save it again") from None


def _batches(tables: Iterable["pyarrow.Table"], on_read: Callable[[int], object]) -> Iterator["pyarrow.RecordBatch"]:
    for table in tables:
        on_read(table.nbytes)
        yield from table.to_batches()


def _object(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({error}); save the data set again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: must hold a JSON object, got {type(content).__name__}; save the data set again")
    return content
