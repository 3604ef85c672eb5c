"""A run as one HTML page that needs nothing else: loss, schedules, throughput and the health of every layer.

metrics.jsonl -> series by name -> figures (SVG, drawn by matplotlib, which the extra `plot` brings) -> page
"""

import html
import io
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from bitnet_train.errors import UserError, printable
from bitnet_train.formats.metrics import METRICS, read_events
from bitnet_train.training.health import NAMES


class Series(NamedTuple):
    """A metric over the run: optimizer steps, and its values at them."""

    steps: list[int]
    values: list[float]


Metrics: TypeAlias = Mapping[str, Series]
Draw: TypeAlias = Callable[[Any], None]  # draws on matplotlib's Axes

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 15px sans-serif; max-width: 1100px; margin: 2em auto }} svg {{ max-width: 100% }}
td {{ padding: 0 1em 0 0 }} td + td {{ text-align: right; font-variant-numeric: tabular-nums }}</style></head>
<body><h1>{title}</h1>
<table>{rows}</table>
{figures}
</body></html>
"""
_CURVES = {
    "Loss, nats": ("train/loss", "val*/loss"),
    "Learning rate": ("train/lr",),
    "Weight decay": ("train/weight_decay",),
    "Norm of the gradient": ("train/grad_norm",),
    "Tokens per second": ("train/tokens_per_second",),
    "Share of time waiting for data": ("train/data_wait",),
    "Rewards": ("*/rewards/margins", "*/rewards/accuracies"),
    "Token accuracy": ("*/mean_token_accuracy",),
    "Bits per byte": ("*/bits_per_byte",),
    "Share of the codes": ("health/minus", "health/zero", "health/plus"),
}


def read_metrics(run_dir: Path) -> dict[str, Series]:
    """Every metric of a run directory, in the order of its steps.

    Raises:
        UserError: there is no metrics.jsonl, or it cannot be read.
    """
    if not (run_dir / METRICS).is_file():
        raise UserError(f"{run_dir}: no metrics.jsonl; give a run directory")
    series: dict[str, Series] = defaultdict(lambda: Series([], []))
    for event in read_events(run_dir):
        step = int(event.pop("step"))
        for name, value in event.items():
            series[printable(name)].steps.append(step)
            series[printable(name)].values.append(value)
    return dict(series)


def report(run_dir: Path) -> str:
    """The page of a run.

    Raises:
        UserError: the run has logged nothing, or matplotlib is not installed.
    """
    metrics = read_metrics(run_dir)
    if not metrics:
        raise UserError(f"{run_dir}: metrics.jsonl holds no figures; let the run log a step first")
    figures = [_figure(title, _lines(metrics, names)) for title, names in _CURVES.items() if _matching(metrics, names)]
    figures += [
        _figure(f"Every layer: {name.replace('_', ' ')}", _heat_map(layers))
        for name in NAMES
        if (layers := layer_series(metrics, name))
    ]
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{series.values[-1]:.6g}</td></tr>"
        for name, series in sorted(metrics.items())
        if "layers." not in name
    )
    return _PAGE.format(title=html.escape(str(run_dir)), rows=rows, figures="\n".join(figures))


def _matching(metrics: Metrics, names: Sequence[str]) -> list[str]:
    return [name for name in metrics for pattern in names if fnmatchcase(name, pattern)]


def layer_series(metrics: Metrics, name: str) -> list[Series]:
    """A figure of the ternary health by layer, the first one first."""
    layers: list[Series] = []
    while (series := metrics.get(f"health/layers.{len(layers)}/{name}")) is not None:
        layers.append(series)
    return layers


def _figure(title: str, draw: Draw) -> str:
    """A heading and an inline SVG."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("a report needs matplotlib; install it: pip install 'bitnet-train[plot]'") from None
    figure, svg = Figure(figsize=(10, 3), layout="constrained"), io.StringIO()
    axes = figure.subplots()
    axes.set_xlabel("optimizer step")
    draw(axes)
    figure.savefig(svg, format="svg")
    return f"<h2>{html.escape(title)}</h2>\n{svg.getvalue()[svg.getvalue().index('<svg') :]}"


def _lines(metrics: Metrics, names: Sequence[str]) -> Draw:
    def draw(axes: Any) -> None:
        for name in _matching(metrics, names):
            axes.plot(
                *metrics[name], label=name.replace("$", r"\$"), marker="." if len(metrics[name].steps) < 30 else ""
            )
        axes.legend()
        axes.grid(alpha=0.3)

    return draw


def _heat_map(layers: Sequence[Series]) -> Draw:
    """Layers upwards, steps to the right; a layer has a gap where it was not measured."""
    steps = sorted({step for layer in layers for step in layer.steps})
    measured = [dict(zip(layer.steps, layer.values, strict=True)) for layer in layers]
    values = [[layer.get(step, math.nan) for step in steps] for layer in measured]

    def draw(axes: Any) -> None:
        mesh = axes.pcolormesh(steps, range(len(layers)), values, shading="nearest")
        axes.set_ylabel("layer")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.figure.colorbar(mesh)

    return draw
