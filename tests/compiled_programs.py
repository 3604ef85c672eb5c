"""Compiles the Triton programs at 2b4t's shapes for a GPU that need not be there; prints each one's outcome as JSON."""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout, int8

from bitnet_train.kernels import gpu, hopper_product, triton_kernels

ARCHITECTURE = 90  # H100 and H200
ALIGNED = ("size", "out", "rows", "vocab", "count", "half", "stride")  # multiples of 16 at these shapes
INT8_PRODUCT = re.compile(r"wgmma\.mma_async\S*\.s8\.s8|mma\.sync\S*\.s8\.s8")

Launch = tuple[str, dict[str, str], dict[str, Any], dict[str, int]]  # program, types, constants, options


def launches() -> Iterator[Launch]:
    """What training at hidden 2560 with bf16 autocast launches."""
    for size, activation, x in (
        (2560, None, "*fp32"),
        (6912, "relu2", "*bf16"),
        (6912, "silu", "*bf16"),
        (16384, None, "*fp32"),
    ):
        block = gpu._power_of_two(size)
        constants, options = {"ACTIVATION": activation, "BLOCK": block}, {"num_warps": gpu._warps(block)}
        row = {"x": x, "weight": "*fp32", "rms": "*fp32", "size": "i32"}
        yield "quantize", {**row, "codes": "*i8", "scale": "*fp32", "eps": "fp32"}, constants, options
        elements, sizes = (
            torch.float32 if x == "*fp32" else torch.bfloat16,
            (size, size if activation is None else 2 * size),
        )
        stages = gpu._stages(
            block, torch.empty(0, sizes[1], dtype=elements), torch.empty(0, size, dtype=torch.bfloat16)
        )
        gradients = {"grad": "*bf16", "grad_x": x, "partial": "*fp32", "rows": "i32", "height": "i32"}
        yield "norm_backward", {**row, **gradients}, constants | {"STAGES": stages}, options
    product = {"codes": "*i8", "ternary": "*i8", "column": "*fp32", "scale": "*fp32", "y": "*bf16"}
    counts = dict.fromkeys(("rows", "out", "size", "magnitude"), "i32")
    for tile in triton_kernels.TILES:
        constants = {"bias": None, "residual": None, "WHOLE": True, **tile.kwargs}
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        yield "linear", {**product, **counts}, constants, options
        stream = {"y": "*fp32", "residual": "*fp32"}  # o_proj and down_proj end in the residual stream
        yield "linear", {**product, **counts, **stream}, {"bias": None, "WHOLE": True, **tile.kwargs}, options
    sums = {"products": "*i32", "column": "*fp32", "scale": "*fp32", "y": "*fp32", "residual": "*fp32", "out": "i32"}
    yield "dequantize", sums, {"bias": None, "BLOCK": gpu._PART}, {}
    yield "expand", {"codes": "*i8", "factor": "*fp32", "y": "*bf16", "size": "i32"}, {"BLOCK": gpu._PART}, {}
    matrices = dict.fromkeys("abc", "*fp32")
    rows = {**matrices, "sums": "*fp64", **dict.fromkeys(("second", "third", "size", "odd"), "i32")}
    yield "absolute_sums", rows, {"HALVINGS": 8, "BLOCK": 32}, {"num_warps": gpu._warps(2 * 6912)}
    bounds = dict.fromkeys(("second", "third", "rows", "size"), "i32")
    yield "absmeans", {"sums": "*fp64", "scales": "*fp32", **bounds}, {"BLOCK": gpu._PART}, {}
    stacked = {**matrices, "scales": "*fp32", "codes": "*i8", "column": "*fp32", **bounds}
    del stacked["rows"]
    yield "stacked_codes", stacked, {"BLOCK": gpu._PART}, {}
    weights = {"w": "*fp32", "half": "*fp32", "codes": "*i8", "count": "i32"}
    yield "ternary_codes", weights, {"BLOCK": gpu._PART}, {}
    logits, block = {"logits": "*bf16", "labels": "*i64", "lse": "*fp32", "vocab": "i32"}, gpu._VOCABULARY_PART
    yield "log_likelihood", {**logits, "logps": "*fp32"}, {"BLOCK": block}, {"num_warps": 8}
    factors = {"p_factor": "*fp32", "label_factor": "*fp32"}
    yield "likelihood_gradient", {**logits, **factors}, {"BLOCK": block}, {"num_warps": 8}
    angles = {
        "cos": "*fp32",
        "sin": "*fp32",
        "sign": "fp32",
        **dict.fromkeys(("stride", "heads", "half", "positions"), "i32"),
    }
    yield "rotate", {"x": "*bf16", "y": "*bf16", **angles}, {"HEADS": 32, "HALF": 64}, {}


def hopper_launches() -> Iterator[Launch]:
    """The products of an H100 or H200: with and without bias, and into the residual stream."""
    for tile in hopper_product.TILES:
        height, width = (
            f"tensordesc<i8[{rows}, {tile.features}],{layout(rows, tile.features)!r}>"
            for rows in (tile.rows, tile.columns)
        )
        types = {"codes": height, "ternary": width, "column": "*fp32", "scale": "*fp32"}
        types |= dict.fromkeys(("rows", "out", "size"), "i32")
        constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "FEATURES": tile.features, "STAGES": tile.stages}
        constants["COALESCED"] = tile.coalesced
        options = {"num_warps": tile.warps} | ({"maxnreg": tile.registers} if tile.registers else {})
        others: list[tuple[dict[str, str], dict[str, None]]] = [
            ({"y": "*bf16"}, {"bias": None, "residual": None}),
            ({"y": "*bf16", "bias": "*fp32"}, {"residual": None}),
        ]
        if not tile.coalesced:
            others = [({"y": "*fp32", "residual": "*fp32"}, {"bias": None})]
        for more, none in others:
            yield "hopper linear", types | more, constants | none, options


def layout(rows: int, features: int) -> NVMMASharedLayout:
    """How the copy engine lays out a tile in shared memory."""
    return NVMMASharedLayout.get_default_for([rows, features], int8)


def compiled(launch: Launch) -> dict[str, Any]:
    """The program, by ptxas."""
    name, types, constants, options = launch
    in_gluon = name == "hopper linear"
    program = hopper_product.linear if in_gluon else getattr(triton_kernels, name)
    program = program.fn if name == "linear" else program  # inside its autotuner
    signature = {argument: types.get(argument, "constexpr") for argument in program.arg_names}
    aligned = [
        position
        for position, (argument, kind) in enumerate(signature.items())
        if kind[0] == "*" or (kind == "i32" and argument in ALIGNED)
    ]
    attributes = {(at,): [["tt.divisibility", 16]] for at in aligned}
    named = {(program.arg_names.index(name),): value for name, value in constants.items()} if in_gluon else constants
    source = (GluonASTSource if in_gluon else ASTSource)(program, signature, named, attributes)
    target = GPUTarget("cuda", ARCHITECTURE, 32)
    made = compile(source, target=target, options={**options, **gpu.ROUNDING})
    return {
        "name": name,
        **constants,
        **options,
        "shared_bytes": made.metadata.shared,
        "local_bytes": local_bytes(made.asm["cubin"]),
        "fused_multiply_adds": made.asm["ptx"].count("fma.rn.f32"),
        "int8_products": len(INT8_PRODUCT.findall(made.asm["ptx"])),
    }


def local_bytes(cubin: bytes) -> int:
    """Bytes of registers that went to memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("STACK", "LOCAL"))  # type: ignore[index]
    return stack + local


if __name__ == "__main__":
    for launch in chain(hopper_launches(), launches()):
        print(json.dumps(compiled(launch)))
