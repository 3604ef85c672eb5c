"""Shows a batch of a run: the tokens that carry loss in green, what was truncated, dropped and skipped.

python tools/inspect_batch.py +recipe=NAME [key=value ...] [--step N]        (FORCE_COLOR=1 colours pipes, too)
"""

from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from bitnet_train import config as configuration
from bitnet_train.composition import explained
from bitnet_train.data.inspection import batch_lines, summary
from bitnet_train.data.module import DataModule
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import ArgumentParser, UserError, run_command
from bitnet_train.model.pretrained import source_folder
from bitnet_train.options import integer


def composed(overrides: list[str]) -> DictConfig:
    """The configuration of the run that the overrides describe."""
    configuration.register()
    words = [f"+{word}" if word.startswith("recipe=") else word for word in overrides]
    try:
        with hydra.initialize_config_dir(str(configuration.CONF_DIR), version_base="1.3"):
            return hydra.compose("train", overrides=words)
    except HydraException as error:
        raise UserError(explained(error)) from None


def data_of(config: DictConfig) -> tuple[DataModule, Tokenizer]:
    """The data of a run, as training reads it."""
    try:
        settings, data = configuration.run_config(config), configuration.build(config.data, "data")
    except OmegaConfBaseException as error:
        raise UserError(explained(error)) from None
    tokenizer = Tokenizer.from_folder(_tokenizer_folder(data.tokenizer, settings.init_from))
    return DataModule(data, tokenizer, settings.seed, settings.global_batch_size, settings.micro_batch_size), tokenizer


def _tokenizer_folder(tokenizer: str | None, init_from: str | None) -> Path:
    if tokenizer is not None:
        return Path(tokenizer)
    if init_from is None:
        raise UserError("data.tokenizer is not set; give a folder with tokenizer.json, or init_from=DIR")
    return source_folder(init_from, "init_from")


def main() -> None:
    """Reads the command line, prints the first micro-batch of a step."""
    parser = ArgumentParser(description="Show a batch as training reads it.")
    parser.add_argument("overrides", nargs="+", help="as for python -m bitnet_train")
    parser.add_argument("--step", type=integer(0, 10**9), default=0, help="optimizer step (default: %(default)s)")
    arguments = parser.parse_intermixed_args()
    data, tokenizer = data_of(composed(arguments.overrides))
    data.first_step, data.steps = arguments.step, arguments.step + 1
    rows = data.row_sets["train"]
    batch = rows.collate([rows[index] for index in next(iter(data.micro_batches(rank=0, ranks=1)))])
    console = Console(highlight=False, soft_wrap=True)
    for line in (*batch_lines(batch, tokenizer), *summary(rows)):
        console.print(line, markup=False)


if __name__ == "__main__":
    run_command(main)
