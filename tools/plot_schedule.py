"""Learning rate and weight decay of a recipe as a PNG, without training.

python tools/plot_schedule.py +recipe=pretrain [key=value ...] [OUT.png]        OUT is schedule.png if left out
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from bitnet_train import config as configuration
from bitnet_train.composition import explained
from bitnet_train.errors import UserError, run_command
from bitnet_train.formats.atomic import atomic_file
from bitnet_train.schedule import Schedule

_POINTS = 2000


def composed(overrides: Sequence[str]) -> DictConfig:
    """The configuration that the overrides give."""
    configuration.register()
    words = [f"+{word}" if word.startswith("recipe=") else word for word in overrides]
    with initialize_config_dir(str(configuration.CONF_DIR), version_base="1.3"):
        try:
            return compose("train", words)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(explained(error)) from error


def total_steps(config: DictConfig, tokens_per_step: int) -> int:
    """The run's length as far as it is known without the data: max_epochs counts it in rows."""
    ends = [config.max_steps or 0, (config.max_tokens or 0) // tokens_per_step]
    if not any(ends):
        raise UserError("the length of the run is not known without its data; add max_steps=N")
    return min(end for end in ends if end)


def plot(schedule: Schedule, total: int, file: Path) -> None:
    """Both curves over the run."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the picture needs matplotlib; install it: pip install 'bitnet-train[plot]'") from None
    steps = sorted({total * point // _POINTS for point in range(_POINTS + 1)})
    figure = Figure(figsize=(10, 6), layout="constrained")
    curves = {"learning rate": schedule.lr, "weight decay": schedule.weight_decay}
    for axes, (name, curve) in zip(figure.subplots(2, 1, sharex=True), curves.items(), strict=True):
        axes.plot(steps, [curve(step, total) for step in steps])
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    axes.set_xlabel("optimizer step")
    with atomic_file(file) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def main() -> None:
    """Reads the command line and writes the picture."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        return
    out = Path(words.pop()) if words[-1].endswith(".png") else Path("schedule.png")
    config = composed(words)
    tokens_per_step = config.global_batch_size * (config.data.sequence_length or 1)
    schedule = configuration.build(config.schedule, "schedule")
    plot(schedule.in_steps(tokens_per_step), total_steps(config, tokens_per_step), out)
    print(out)


if __name__ == "__main__":
    run_command(main)
