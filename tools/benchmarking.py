"""What the benchmarks share: spreads, memory, the machine they ran on, and what cannot run there."""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bitnet_train.formats.atomic import atomic_file

_PACKAGES = ("torch", "lightning", "transformers", "trl", "datasets", "torchao", "onebitllms")


class Spread(NamedTuple):
    """Median and quartiles; of three values the quartiles are the smallest and the largest."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4)
        return cls(low, median, high)

    def text(self, form: str = ".2f") -> str:
        """`median (low to high)`, each number in the given format."""
        return f"{self.median:{form}} ({self.low:{form}} to {self.high:{form}})"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Quotients round by round: what was noisy in a round was noisy for both."""
    return [a / b for a, b in zip(above, below, strict=True)]


def resident_bytes(field: str = "VmHWM") -> int:
    """VmRSS or VmHWM (the peak) of this process; ru_maxrss would begin with what the parent process had."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def synchronize(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def median_milliseconds(call: Callable[[], object], device: str, repetitions: int = 40) -> float:
    """How long a call takes on the device, without what its launch costs the host.

    Args:
        call: runs on the device.
        device: "cuda" or "cpu".
        repetitions: milliseconds of repetitions on CUDA; on CPU the call is made three times.
    """
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, warmup=repetitions // 4, rep=repetitions, return_mode="median"))
    times = []
    for _ in range(4):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times[1:])


def unavailable(needs: str | None, cuda_only: bool, device: str) -> str | None:
    """Why a contestant cannot run here, if it cannot."""
    if cuda_only and device != "cuda":
        return "needs CUDA"
    if needs is not None and importlib.util.find_spec(needs) is None:
        return f"{needs} is not installed"
    return None


def context() -> dict[str, Any]:
    """Date, machine and versions, as they stand beside every figure."""
    installed = {name: _version(name) for name in _PACKAGES}
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{_processor()}, {len(os.sched_getaffinity(0))} cores{_gpu()}",
        "versions": {"python": platform.python_version(), **{name: v for name, v in installed.items() if v}},
    }


def context_line(threads: int | None = None) -> str:
    """`context` for people, with the threads of the arithmetic where they are known."""
    known = context()
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    used = f", {threads} threads" if threads else ""
    return f"{known['date']}, {known['machine']}{used}; {versions}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> str:
    """The name of the GPU, for programs that have loaded torch."""
    torch = sys.modules.get("torch")
    return f", {torch.cuda.get_device_name()}" if torch is not None and torch.cuda.is_available() else ""


def _processor() -> str:
    """The first model name of /proc/cpuinfo, with the matrix unit that decides about int8 and bfloat16."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return (names[0] if names else platform.machine()) + (" with AMX" if "amx_int8" in text else "")


def write_results(path: Path, results: Any) -> None:
    """`results` as JSON beside the `context` that they were measured in."""
    with atomic_file(path) as file:
        file.write_text(json.dumps({**context(), "results": results}, indent=2) + "\n")
