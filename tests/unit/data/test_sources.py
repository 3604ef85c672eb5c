"""Paths to rows in every format and compression, and rows to texts and conversations."""

import gzip
import json
import lzma
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import feather, ipc, parquet

from bitnet_train.data import readers
from bitnet_train.data.readers import START, read_from
from bitnet_train.data.sources import Row, read_rows
from bitnet_train.errors import UserError

ROWS: list[dict[str, object]] = [{"text": "one"}, {"text": "zwei, größer"}, {"text": "three\u2028lines"}]
JSON_LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def zstd(data: bytes) -> bytes:
    """Two frames, as parallel compressors write them."""
    half = len(data) // 2
    return b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (data[:half], data[half:]))


COMPRESSIONS: Mapping[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def write_table(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=2)
    elif path.stem == "feather":
        feather.write_feather(table, str(path))
    else:
        with ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)


def fields(rows: Iterator[Row]) -> list[dict[str, object]]:
    return [row.fields for row in rows]


# ---- formats ----


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_lines(tmp_path: Path, name: str, compression: str) -> None:
    path = tmp_path / (name + compression)
    path.write_bytes(COMPRESSIONS[compression](JSON_LINES))
    assert fields(read_rows(str(path))) == ROWS


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet", "stream.arrow", "feather.arrow"])
def test_reading_goes_on_at_any_place(tmp_path: Path, name: str, compression: str) -> None:
    if name.endswith((".jsonl", ".txt")):
        (tmp_path / name).write_bytes(JSON_LINES.replace(b"\n", b"\n\n \n") + b"{broken")
    else:
        write_table(tmp_path / name)
    path = tmp_path / ("x-" + name + compression)
    path.write_bytes(COMPRESSIONS[compression]((tmp_path / name).read_bytes()))
    whole = [(place, str(content)) for place, content in read_from(str(path), START)]
    assert len(whole) == (1 if name == "a.txt" else 4 if name == "a.jsonl" else 3)
    for rest, (place, _) in enumerate(whole, start=1):
        assert [(place, str(content)) for place, content in read_from(str(path), place)] == whole[rest:]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "feather.arrow"])
def test_tables(tmp_path: Path, name: str, compression: str) -> None:
    write_table(tmp_path / name)
    path = tmp_path / ("x-" + name + compression)
    path.write_bytes(COMPRESSIONS[compression]((tmp_path / name).read_bytes()))
    rows = list(read_rows(str(path)))
    assert [row.fields for row in rows] == ROWS
    assert [row.number for row in rows] == [1, 2, 3]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_text_file_is_one_document(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(COMPRESSIONS[compression](b"line one\r\nline two\n"))
    assert fields(read_rows(str(path))) == [{"text": "line one\r\nline two\n"}]


def test_numbers_count_lines_and_blank_ones_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    rows = list(read_rows(str(path)))
    assert [(row.number, row.fields) for row in rows] == [(1, {"text": "a"}), (4, {"text": "b"})]
    assert rows[1].where == f"{path}:4"


def test_rows_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\nbroken\n')
    rows = read_rows(str(path))
    assert next(rows).fields == {"text": "fine"}
    with pytest.raises(UserError, match=r"a\.jsonl:2: the line is no JSON"):
        next(rows)


# ---- damaged files ----


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds no rows"),
        (b"\n \n", "holds no rows"),
        (b'{"text": "a"}\n{"text": }\n', r"a\.jsonl:2: the line is no JSON .*one object per line"),
        (b'[\n{"text": "a"}\n]', r"a\.jsonl:1: .*jq -c"),
        (b'["a"]\n', r"a\.jsonl:1: the line is a list"),
        (b"null\n", r"a\.jsonl:1: the line is null"),
        (b"[" * 100_000 + b"\n", r"a\.jsonl:1: the line is no JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}\n", r"a\.jsonl:1: the line is no JSON"),
        (b'{"text": "a"}\n{"text": "\xe4"}\n', r"a\.jsonl:2: byte 0xe4 at 10 is not UTF-8"),
        ('{"text": "a"}\n'.encode("utf-16"), r"a\.jsonl:1: the byte order mark says UTF-16"),
    ],
)
def test_bad_json_lines(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=message):
        list(read_rows(str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize(
    ("data", "message"), [(b" \n", "holds no rows"), (b"\xff\xfea\0", "UTF-16"), (b"\xff", "UTF-8")]
)
def test_bad_text_files(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=message):
        list(read_rows(str(tmp_path / "a.txt")))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet", "a.arrow", "a.parquet.gz"])
@pytest.mark.parametrize("data", [b"not what the name says", b""])
def test_damaged_files(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=r"a\.\w+(\.\w+)?: (cannot be read|the file holds no rows)"):
        list(read_rows(str(tmp_path / name)))


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_a_truncated_download_is_an_error(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(COMPRESSIONS[compression](JSON_LINES)[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        list(read_rows(str(path)))


def zstd_frame(window_log: int, content: bytes) -> bytes:
    """A frame of one raw block (RFC 8878, section 3.1.1) that asks for a window of 2^window_log bytes."""
    block = (len(content) << 3 | 1).to_bytes(3, "little") + content
    return b"\x28\xb5\x2f\xfd\x00" + bytes([(window_log - 10) << 3]) + block


def test_zstd_windows(tmp_path: Path) -> None:
    """zstd --long=28 is a whole file, which is not read; --long=27 is read."""
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstd_frame(27, JSON_LINES))
    assert len(list(read_rows(str(path)))) == len(ROWS)
    for window_log in (28, 31):
        path.write_bytes(zstd_frame(window_log, JSON_LINES))
        with pytest.raises(
            UserError, match=r"a window of more than 128 MB .*; write it anew without: zstd -d --long=31"
        ):
            list(read_rows(str(path)))


@pytest.mark.parametrize("container", ["stream", "file"])
@pytest.mark.parametrize("offsets", [(2**30, 2**30 + 5, -7), (11, 5, 33)])
def test_offsets_in_an_arrow_file_are_checked(tmp_path: Path, container: str, offsets: tuple[int, int, int]) -> None:
    """Arrow takes them on trust, and reads beyond the file."""
    table = pyarrow.table({"text": ["hello world"] * 500})
    new = ipc.new_stream if container == "stream" else ipc.new_file
    with pyarrow.OSFile(str(tmp_path / "x.arrow"), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table)
    content = (tmp_path / "x.arrow").read_bytes()
    true = struct.pack("<iii", 11, 22, 33)
    assert true in content
    (tmp_path / "x.arrow").write_bytes(content.replace(true, struct.pack("<iii", *offsets)))
    with pytest.raises(UserError, match=r"x\.arrow: cannot be read, it may be damaged"):
        list(read_rows(str(tmp_path / "x.arrow")))


def test_offsets_in_a_saved_data_set_are_checked(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["hello world"] * 500}).save_to_disk(str(tmp_path / "saved"))
    file = next((tmp_path / "saved").glob("*.arrow"))
    content = file.read_bytes()
    file.write_bytes(content.replace(struct.pack("<iii", 11, 22, 33), struct.pack("<iii", 2**30, 2**30 + 5, -7)))
    with pytest.raises(UserError, match="it may be damaged"):
        list(read_rows(str(tmp_path / "saved")))


@pytest.mark.parametrize("suffix", [".txt.gz", ".jsonl.xz", ".jsonl.zst", ".parquet.gz"])
def test_a_file_that_expands_as_no_text_does_is_refused(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_EXPANDED_BYTES", 1 << 20)
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(COMPRESSIONS[file.suffix](b"\n" * (4 << 20)))
    with pytest.raises(UserError, match=f"{file}: decompresses to more than 100 times its size"):
        list(read_rows(str(file)))


def test_what_repeats_itself_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_EXPANDED_BYTES", 1 << 16)
    file = tmp_path / "log.jsonl.gz"
    file.write_bytes(gzip.compress(b"".join(b'{"text": "request %d served"}\n' % number for number in range(20_000))))
    assert len(list(read_rows(str(file)))) == 20_000
