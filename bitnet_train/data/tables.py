"""Rows of Arrow tables as the JSON that they were made of.

extension<arrow.json>    a string in Arrow, decoded here: `datasets` keeps objects of mixed shape so
null within a struct     taken out: Arrow gives every struct of a column all fields that one of them has
"""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bitnet_train.errors import UserError
from bitnet_train.formats.json_file import MAX_DEPTH

if TYPE_CHECKING:
    import pyarrow

Convert = Callable[[Any], Any]


def converters(schema: "pyarrow.Schema") -> dict[str, Convert]:
    """The functions that change the values of columns, by column; each raises UserError for a bad value."""
    found = {field.name: _converter(field.type) for field in schema}
    return {name: convert for name, convert in found.items() if convert is not None}


def _converter(kind: Any, depth: int = 1) -> Convert | None:
    import pyarrow
    from pyarrow import types

    if depth > MAX_DEPTH:
        raise UserError(f"a column is nested more than {MAX_DEPTH} levels deep; leave it out")
    deeper = depth + 1
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _from_json if kind.extension_name == "arrow.json" else None
    if types.is_struct(kind):
        return _struct({kind.field(i).name: _converter(kind.field(i).type, deeper) for i in range(kind.num_fields)})
    if types.is_map(kind):
        return _map(_converter(kind.item_type, deeper))
    if types.is_dictionary(kind):
        return _converter(kind.value_type, deeper)
    if any(is_list(kind) for is_list in lists):
        return _list(_converter(kind.value_type, deeper))
    return None


def _map(change: Convert | None) -> Convert:
    def convert(value: Any) -> Any:
        return None if value is None else {key: change(part) if change else part for key, part in value}

    return convert


def _struct(fields: dict[str, Convert | None]) -> Convert:
    def convert(value: Any) -> Any:
        if value is None:
            return None
        present = ((name, part, fields[name]) for name, part in value.items() if part is not None)
        return {name: part if change is None else change(part) for name, part, change in present}

    return convert


def _list(change: Convert | None) -> Convert | None:
    if change is None:
        return None
    return lambda value: None if value is None else [change(part) for part in value]


def _from_json(value: Any) -> Any:
    if value is None:
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"a value of type arrow.json is no JSON ({error}); write the file again") from None
