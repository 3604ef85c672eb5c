"""The training command: Hydra composes a recipe and the overrides; `training.run.run` makes of it a run.

    python -m bitnet_train +recipe=NAME [key=value ...]

Exit codes: 0 done; 2 the configuration or the data is wrong (one line); 85 stopped on request, start again to go on;
anything else a failure, with the traceback in the run's log. Nothing heavy is imported before a job runs.
"""

import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from bitnet_train import config as configuration
from bitnet_train.errors import EXIT_FAILURE, EXIT_REQUEUE, UserError, run_command
from bitnet_train.training.signals import StopRequested

log = logging.getLogger(__name__)


def main() -> NoReturn:
    """Entry point of `bitnet-train`."""
    run_command(_main)


def _main() -> int:
    if {"-h", "--help"} & set(sys.argv[1:]):  # Hydra's own page copies the configuration a hundred times: 2 seconds
        print(_help())
        return 0
    configuration.register()
    sys.argv[1:] = [f"+{word}" if word.startswith("recipe=") else word for word in sys.argv[1:]]
    # Hydra would print its errors itself and exit with 1; this makes it raise them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    codes: list[int] = []
    mistakes: list[UserError] = []  # raised through Hydra, they would be printed twice

    @hydra.main(version_base="1.3", config_path=str(configuration.CONF_DIR), config_name="train")
    def job(config: DictConfig) -> None:
        try:
            codes.append(_job(config))
        except UserError as mistake:
            mistakes.append(mistake)

    try:
        job()
    except (HydraException, OmegaConfBaseException, OSError) as error:
        raise UserError(_one_line(error)) from error
    if mistakes:
        raise mistakes[0]
    return max(codes, default=0)


def _job(config: DictConfig) -> int:
    """One run: a single one, or a job of a sweep."""
    settings = configuration.run_config(config)
    from bitnet_train.training import launch

    try:
        launch.start(settings, config, Path(HydraConfig.get().runtime.output_dir))
    except StopRequested as stop:
        log.info("stopped (%s), state saved; start again with resume=auto to go on", stop)
        return EXIT_REQUEUE
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error)) from error
    except launch.RunFailed as failure:
        log.error("%s", failure)
        return EXIT_FAILURE
    except Exception:
        log.exception("the run failed")
        return EXIT_FAILURE
    return 0


def _help() -> str:
    """Recipes, groups and the run's own keys, as their files have them."""
    groups = {
        folder.name: ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        for folder in sorted(configuration.CONF_DIR.iterdir())
        if folder.is_dir()
    }
    own_keys = (configuration.CONF_DIR / "train.yaml").read_text().partition("recipe_name")[2].partition("\nhydra:")[0]
    return "\n".join(
        [
            "bitnet-train +recipe=NAME [group=option ...] [key=value ...]",
            f"\nrecipes: {', '.join(configuration.recipe_names())}\n",
            *(f"{group}: {options}" for group, options in groups.items()),
            f"\nrecipe_name{own_keys}",
            "--cfg job --resolve prints the configuration of a run, -m sweeps, --hydra-help shows Hydra's own options.",
        ]
    )


def _one_line(error: Exception) -> str:
    """Hydra's message without its layout, and with the recipes that exist if one was not found."""
    text = " ".join(str(error).split())
    if "'recipe/" in text:
        name = text.split("'recipe/")[1].split("'")[0]
        return f"unknown recipe {name!r}; the recipes are {', '.join(configuration.recipe_names())}"
    return text
