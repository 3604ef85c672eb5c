"""A batch as text for people: which tokens carry loss, where documents end, how much is padding, what was left out.

A token is trained if the position before it has it as its label. Neighbours differ in shade, so that one sees where
tokens begin.
"""

from collections.abc import Iterator

from rich.text import Text

from bitnet_train.data.batches import PairBatch, TokenBatch
from bitnet_train.data.config import Rows
from bitnet_train.data.packing import PackedRows, PairRows, StreamRows
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import printable
from bitnet_train.labels import IGNORE_INDEX

TRAINED, CONTEXT = ("bold green", "bold bright_green"), ("white", "bright_black")  # two shades of each


def batch_lines(batch: TokenBatch | PairBatch, tokenizer: Tokenizer) -> Iterator[Text]:
    """A heading and a coloured text per row, a line per document."""
    tokens = batch.tokens if isinstance(batch, PairBatch) else batch
    rows = len(tokens.input_ids)
    for index in range(rows):
        kind = f"{'chosen' if index < rows // 2 else 'rejected'} " if isinstance(batch, PairBatch) else ""
        length = int((tokens.document_ids[index] >= 0).sum())
        trained = int((tokens.labels[index] != IGNORE_INDEX).sum())
        padding = tokens.input_ids.shape[1] - length
        heading = f"{kind}row {index}: {length} positions, {trained} trained, {padding} padding"
        yield Text(heading, style="bold underline")
        yield row_text(TokenBatch(*(field[index] for field in tokens)), length, tokenizer)


def row_text(row: TokenBatch, length: int, tokenizer: Tokenizer) -> Text:
    """The tokens of one row: fields of shape `(seq,)`, of which the first `length` positions are no padding."""
    ids, labels, documents = (field[:length].tolist() for field in (row.input_ids, row.labels, row.document_ids))
    text = Text()
    if ids and labels[-1] != IGNORE_INDEX:  # the last label is no input of this row
        ids, documents = [*ids, labels[-1]], [*documents, documents[-1]]
    for position, spelled in enumerate(tokenizer.spelled(ids)):
        if position and documents[position] != documents[position - 1]:
            text.append("\n")
        is_trained = position > 0 and labels[position - 1] != IGNORE_INDEX
        text.append(printable(spelled), style=(TRAINED if is_trained else CONTEXT)[position % 2])
    return text


def summary(rows: Rows) -> list[str]:
    """What the rows were made of, and what was left out."""
    if isinstance(rows, StreamRows):
        stores = {id(span.store): span.store for span in rows.spans}.values()
        lines = [
            f"{len(rows)} rows of {rows.sequence_length} positions; documents are cut where rows end, none is lost"
        ]
    else:
        assert isinstance(rows, PackedRows | PairRows)
        items, stores = rows.items, {id(store): store for store in rows.items.stores}.values()
        full = f", {rows.efficiency:.1%} full" if isinstance(rows, PackedRows) else ""
        lines = [f"{len(items)} items in {len(rows)} rows{full}; {items.truncated} truncated, {items.dropped} dropped"]
    bad, read = (sum(getattr(store.counts, name) for store in stores) for name in ("bad", "rows"))
    return [*lines, f"{bad} of {read} source rows are bad and were skipped"]
