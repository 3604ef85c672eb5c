"""GGUF: our reader against literal bytes and the gguf library's writer, our writer against the library's reader."""

import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter

from bitnet_train.errors import UserError
from bitnet_train.formats.gguf_blocks import GGMLType, pack_float
from bitnet_train.formats.gguf_file import GGUFFile, LazyBlocks, write_gguf
from bitnet_train.formats.gguf_ternary import pack_ternary_blocks, unpack_ternary_blocks

METADATA = {
    "name": "a model",
    "count": 7,
    "epsilon": 0.5,
    "flag": True,
    "tokens": ["a", "é"],
    "types": [1, 3],
}


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def write(path: Path) -> torch.Tensor:
    """A file with one tensor of each kind; returns the codes of the ternary one, whose scale is 0.25."""
    codes = torch.randint(-1, 2, (3, 128), dtype=torch.int8)
    values = torch.arange(10.0).reshape(2, 5)
    tensors = {
        "f32": LazyBlocks(GGMLType.F32, (2, 5), [lambda: pack_float(values, GGMLType.F32)]),
        "f16": LazyBlocks(GGMLType.F16, (2, 5), [lambda: pack_float(values, GGMLType.F16)]),
        "i2_s": LazyBlocks(GGMLType.I2_S, (3, 128), [lambda: pack_ternary_blocks(GGMLType.I2_S, codes, 0.25)]),
        "last": LazyBlocks(
            GGMLType.F32,
            (5,),
            [lambda: pack_float(values[1][:3], GGMLType.F32), lambda: pack_float(values[1][3:], GGMLType.F32)],
        ),
    }
    write_gguf(path, "some-arch", METADATA, tensors)
    return codes


def test_reader_reads_literal_bytes(tmp_path: Path) -> None:
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 2)
    pairs = string("a") + struct.pack("<If", 6, 0.5)
    pairs += string("b") + struct.pack("<IIQ", 9, 8, 2) + string("x") + string("yz")
    info = string("w") + struct.pack("<IQQIQ", 2, 3, 2, 0, 32)
    start = -(-len(header + pairs + info) // 32) * 32
    data = (header + pairs + info).ljust(start + 32, b"\0") + struct.pack("<6f", 0, 1, 2, 3, 4, 5)
    (tmp_path / "file.gguf").write_bytes(data)
    file = GGUFFile(tmp_path / "file.gguf")
    assert file.metadata == {"a": 0.5, "b": ["x", "yz"]}
    assert file.tensors["w"].shape == (2, 3)  # the file says the innermost dimension first
    assert np.frombuffer(file.read("w"), "<f4").tolist() == [0, 1, 2, 3, 4, 5]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    codes = write(tmp_path / "file.gguf")
    file = GGUFFile(tmp_path / "file.gguf")
    assert file.metadata == {"general.architecture": "some-arch", **METADATA}
    assert {name: info.shape for name, info in file.tensors.items()} == {
        "f32": (2, 5),
        "f16": (2, 5),
        "i2_s": (3, 128),
        "last": (5,),
    }
    unpacked, scale = unpack_ternary_blocks(GGMLType.I2_S, file.read("i2_s"), (3, 128))
    assert file.kind("i2_s") == GGMLType.I2_S
    assert torch.equal(unpacked, codes)
    assert scale == 0.25
    assert np.frombuffer(file.read("last"), "<f4").tolist() == [5, 6, 7, 8, 9]
    assert np.frombuffer(file.read("last", 4, 12), "<f4").tolist() == [6, 7]
    assert np.frombuffer(file.read("last", 12, 1000), "<f4").tolist() == [8, 9]


def test_the_header_has_the_bytes_of_the_gguf_library(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "theirs.gguf", "some-arch")
    writer.add_string("name", "a model")
    writer.add_uint32("count", 7)
    writer.add_float32("epsilon", 0.5)
    writer.add_bool("flag", True)
    writer.add_array("tokens", ["a", "é"])
    writer.add_array("types", [1, 3])
    writer.add_array("none", [])  # leaves no trace
    for name, shape, dtype in (("f16", (3, 5), np.float16), ("f32", (7,), np.float32), ("last", (2, 4), np.float16)):
        writer.add_tensor(name, np.ones(shape, dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ones = {
        "f16": LazyBlocks(GGMLType.F16, (3, 5), [lambda: pack_float(torch.ones(15), GGMLType.F16)]),
        "f32": LazyBlocks(GGMLType.F32, (7,), [lambda: pack_float(torch.ones(7), GGMLType.F32)]),
        "last": LazyBlocks(GGMLType.F16, (2, 4), [lambda: pack_float(torch.ones(8), GGMLType.F16)]),
    }
    write_gguf(tmp_path / "ours.gguf", "some-arch", {**METADATA, "none": []}, ones)
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_the_gguf_library_reads_what_it_knows(tmp_path: Path) -> None:
    values = torch.arange(10.0).reshape(2, 5)
    blocks = LazyBlocks(GGMLType.F16, (2, 5), [lambda: pack_float(values, GGMLType.F16)])
    write_gguf(tmp_path / "file.gguf", "some-arch", METADATA, {"w": blocks})
    reader = GGUFReader(tmp_path / "file.gguf")
    assert reader.fields["count"].types[0].name == "UINT32"
    assert reader.fields["types"].types[1].name == "INT32"
    assert reader.fields["flag"].types[0].name == "BOOL"
    assert reader.tensors[0].data.tolist() == values.tolist()


def test_tensors_are_made_when_their_turn_has_come(tmp_path: Path) -> None:
    written: list[str] = []
    before: list[int] = []

    def load() -> bytes:
        before.append(len(written))
        return bytes(1 << 20)

    tensors = {f"w{i}": LazyBlocks(GGMLType.F32, (1 << 18,), [load]) for i in range(20)}
    write_gguf(tmp_path / "file", "a", {}, tensors, lambda _, name: written.append(name))
    assert len(before) == 20
    assert all(index - 4 <= count <= index for index, count in enumerate(before))  # made a few parts ahead of the file


def test_a_file_that_is_being_written_is_as_large_as_it_will_be(tmp_path: Path) -> None:
    """Its header says more values than the bytes of its first tensors could hold."""
    sizes: list[int] = []

    def read(file: Path, name: str) -> None:
        sizes.append(file.stat().st_size)
        GGUFFile(file).read(name, 0, None)

    tensors = {f"w{i}": LazyBlocks(GGMLType.F32, (50,), [lambda: bytes(200)]) for i in range(60)}
    write_gguf(tmp_path / "file", "a", {}, tensors, read)
    assert {*sizes} == {(tmp_path / "file").stat().st_size}


def test_a_tensor_can_be_read_as_soon_as_it_is_told(tmp_path: Path) -> None:
    values = {f"w{i}": torch.full((5,), i + 0.5) for i in range(3)}
    tensors = {
        name: LazyBlocks(
            GGMLType.F32,
            (5,),
            [lambda v=v: pack_float(v[:3], GGMLType.F32), lambda v=v: pack_float(v[3:], GGMLType.F32)],  # type: ignore[misc]
        )
        for name, v in values.items()
    }
    told: list[str] = []

    def written(path: Path, name: str) -> None:
        told.append(name)
        assert np.frombuffer(GGUFFile(path).read(name), "<f4").tolist() == values[name].tolist()

    write_gguf(tmp_path / "file.gguf", "a", {}, tensors, written)
    assert told == list(values)


def test_a_tensor_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.gguf"
    write(path)
    before = path.read_bytes()

    def fail() -> bytes:
        raise UserError("no tensor")

    good = LazyBlocks(GGMLType.F32, (1,), [lambda: bytes(4)])
    with pytest.raises(UserError, match="no tensor"):
        write_gguf(path, "a", {}, {"good": good, "bad": LazyBlocks(GGMLType.F32, (1,), [fail])})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["file.gguf"]


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    header = min(info.offset for info in GGUFFile(tmp_path / "whole.gguf").tensors.values())
    for size in range(1, header - 32, 7):
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        with pytest.raises(UserError, match="must be a whole GGUF file"):
            GGUFFile(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(data[:-32])
    with pytest.raises(UserError, match="last: must end by byte"):
        GGUFFile(tmp_path / "cut.gguf").read("last")


def test_other_files_and_unknown_tensors_are_refused(tmp_path: Path) -> None:
    for content in (b"", b"GGUG" + bytes(100), b"GGUF" + struct.pack("<IQQ", 2, 0, 0)):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(UserError, match="file: "):
            GGUFFile(tmp_path / "file")
    with pytest.raises(UserError, match="No such file"):
        GGUFFile(tmp_path / "none")
    write(tmp_path / "file")
    with pytest.raises(UserError, match="'none' is missing"):
        GGUFFile(tmp_path / "file").read("none")


def test_a_type_that_is_not_written_here_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    number = data.index(b"i2_s") + 4 + 4 + 16
    (tmp_path / "file").write_bytes(data[:number] + struct.pack("<I", 37) + data[number + 4 :])
    with pytest.raises(UserError, match=r"i2_s: type must be one of .* got 37"):
        GGUFFile(tmp_path / "file").read("i2_s")


@pytest.mark.parametrize(
    "value",
    [
        *(0, 2**32 - 1, 2**32, 2**64 - 1, -1, -(2**31), -(2**31) - 1),
        *([1, -1], [2**31, 1], [-1, 2**40], [2**63]),
        *([0.5, -1.0], [True, False], ["a", ""], 1e300, [1e300, 0.5], float("inf")),
    ],
)
def test_numbers_get_a_type_that_holds_them(tmp_path: Path, value: object) -> None:
    """Of other writers' files keys of any type are copied: scores, ids beyond 32 bits, negative ones."""
    write_gguf(tmp_path / "file.gguf", "arch", {"key": value}, {})
    assert GGUFFile(tmp_path / "file.gguf").metadata["key"] == value


@pytest.mark.parametrize("value", [2**64, [1, "a"], [[1]], None, [-1, 2**63]])
def test_what_no_type_holds_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(UserError, match=r"file\.gguf: key: "):
        write_gguf(tmp_path / "file.gguf", "arch", {"key": value}, {})
    assert os.listdir(tmp_path) == []


def test_keys_that_are_copied_keep_their_types(tmp_path: Path) -> None:
    types = {"a": 0, "b": 10, "c": 11, "d": 12, "e": 4, "f": 1, "g": 6}
    keys = {"a": 5, "b": 5, "c": [-5, 6], "d": [0.1], "e": [1, 2], "f": -3, "g": [0.5]}
    write_gguf(tmp_path / "file.gguf", "arch", keys, {}, types=types)
    file = GGUFFile(tmp_path / "file.gguf")
    assert {key: file.metadata[key] for key in keys} == keys
    assert {key: file.types[key] for key in keys} == types


def pair(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def info(*dimensions: int, kind: int = 0, offset: int = 0) -> bytes:
    return string("w") + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


NESTED = struct.pack("<IQ", 9, 1) * 100_000


@pytest.mark.parametrize(
    ("pairs", "infos", "problem"),
    [
        (pair("general.alignment", 4, struct.pack("<I", 0)), info(8), "alignment must be a power of two, got 0"),
        (pair("general.alignment", 4, struct.pack("<I", 24)), info(8), "alignment must be a power of two, got 24"),
        (pair("general.alignment", 5, struct.pack("<i", -32)), info(8), "alignment must be a power of two, got -32"),
        (pair("general.alignment", 8, string("32")), info(8), "alignment must be a power of two, got '32'"),
        (pair("general.alignment", 6, struct.pack("<f", 32)), info(8), "alignment must be a power of two, got 32.0"),
        (pair("a", 9, NESTED), info(8), "an array of one of these, got 9"),
        (pair("a", 9, struct.pack("<IQIQB", 9, 1, 0, 1, 7)), info(8), "an array of one of these, got 9"),
        (pair("a", 99, bytes(8)), info(8), "an array of one of these, got 99"),
        (pair("a", 9, struct.pack("<IQ", 0, 2**60)), info(8), "within its header"),
        (pair("a", 9, struct.pack("<IQ", 8, 2**60)), info(8), "within its header"),
        (pair("a", 8, struct.pack("<Q", 2**63)), info(8), "within its header"),
        (pair("a", 8, struct.pack("<Q2s", 2, b"\xff\xfe")), info(8), "can't decode byte 0xff"),
        (pair("a", 0, b"\1"), info(), "tensor w must have 1 to 4 dimensions, got 0"),
        (pair("a", 0, b"\1"), info(*[1] * 5), "tensor w must have 1 to 4 dimensions, got 5"),
        (pair("a", 0, b"\1"), info(2**63, 2**63), "more values than it has bits"),
        (pair("a", 0, b"\1"), info(10**9, 3), "more values than it has bits"),
    ],
)
def test_a_header_that_no_file_can_have(tmp_path: Path, pairs: bytes, infos: bytes, problem: str) -> None:
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    (tmp_path / "file").write_bytes(header + pairs + infos + bytes(100))
    with pytest.raises(UserError, match=f"file: must be a whole GGUF file of version 3: .*{re.escape(problem)}"):
        GGUFFile(tmp_path / "file")


@pytest.mark.parametrize("counts", [(2**63, 1), (1, 2**63)])
def test_more_tensors_or_keys_than_there_are(tmp_path: Path, counts: tuple[int, int]) -> None:
    (tmp_path / "file").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + pair("a", 0, b"\1") + info(8))
    with pytest.raises(UserError, match="within its header"):
        GGUFFile(tmp_path / "file")


def test_a_header_has_an_end(tmp_path: Path) -> None:
    """A list of Python's takes eight times the memory of the bytes that it was read from."""
    size = 70_000_000
    with (tmp_path / "file").open("wb") as file:  # with a hole: it takes no room on the disk
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + pair("a", 9, struct.pack("<IQ", 0, size)))
        file.truncate(2 * size)
    with pytest.raises(UserError, match="its header must end by byte 67108864"):
        GGUFFile(tmp_path / "file")


def test_a_file_that_is_found_wrong_does_not_get_its_name(tmp_path: Path) -> None:
    seen = []

    def whole(path: Path) -> None:
        seen.append(GGUFFile(path).metadata["key"])
        raise RuntimeError("wrong")

    with pytest.raises(RuntimeError, match="wrong"):
        write_gguf(tmp_path / "file.gguf", "arch", {"key": 7}, {}, whole=whole)
    assert seen == [7]
    assert os.listdir(tmp_path) == []
