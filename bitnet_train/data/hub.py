"""Data sets of the Hugging Face hub: owner/name[:config][@split], read as a stream."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from bitnet_train.data.parts import Cut
from bitnet_train.data.readers import ROWS_AT_ONCE, START, Placed, is_readable, rows_of
from bitnet_train.errors import UserError

_HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.-]+))?")


def is_hub_id(name: str) -> bool:
    """Whether a name is no local path but reads like owner/name[:config][@split]."""
    return bool(_HUB_ID.fullmatch(name)) and not is_readable(name) and not os.path.lexists(name)


def hub_revision(name: str) -> str:
    """The commit of a data set on the hub: with its id it names the rows.

    Raises:
        UserError: the hub does not answer or knows no such data set.
    """
    import datasets

    with _hub(name) as id_:
        return str(datasets.load_dataset_builder(id_["name"], id_["config"]).hash)


def read_hub(name: str, cut: Cut | None = None) -> Placed:
    """Streams a data set of the hub; none that brings code of its own (`datasets` >= 4 runs none)."""
    import datasets

    with _hub(name) as id_:
        rows = datasets.load_dataset(id_["name"], id_["config"], split=id_["split"] or "train", streaming=True)
        tables = rows.with_format("arrow").iter(ROWS_AT_ONCE)
        yield from rows_of((batch for table in tables for batch in table.to_batches()), 0, START, cut)


@contextmanager
def _hub(name: str) -> Iterator[re.Match[str]]:
    """The parts of a hub id; what goes wrong with the hub becomes a UserError."""
    match = _HUB_ID.fullmatch(name)
    assert match is not None
    try:
        yield match
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{name}: no such local path, and the hub gave no data ({type(error).__name__}: {error}); "
            "check the path, or write a hub id as owner/name:config@split"
        ) from None
