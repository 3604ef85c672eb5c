"""The training command: Hydra composes a recipe and the overrides; `training.launch.start` makes of it a run.

    python -m bitnet_train +recipe=NAME [key=value ...]

Exit codes: 0 done; 2 the configuration or the data is wrong (one line); 85 stopped on request, start again to go on;
anything else a failure, with the traceback in the run's log. Nothing heavy is imported before a job runs.

With -m the command runs a job for every combination of values. A job that fails, or whose time (`trainer.max_time`) is
over, does not end the sweep, a signal does; a table of all jobs ends it, and its exit code is that of the job that
matters most.
"""

import logging
import os
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from bitnet_train import composition
from bitnet_train import config as configuration
from bitnet_train.errors import EXIT_FAILURE, EXIT_REQUEUE, EXIT_USER_ERROR, RunFailed, UserError, run_command
from bitnet_train.training import sweep
from bitnet_train.training.signals import TIME_OVER, StopRequested, stop_on_signals
from bitnet_train.training.worker import leave, own_rank

log = logging.getLogger(__name__)

configuration.register()  # at import: a job on a cluster imports this module, and nothing calls `main` there


class Ended(NamedTuple):
    """How a run ended."""

    run_dir: Path
    code: int
    reason: str = ""


_ended: list[Ended] = []  # Hydra gives nothing back from a job


def main() -> NoReturn:
    """Entry point of `bitnet-train`."""
    rank = own_rank()
    if rank is None:
        run_command(_main)
    if {"-m", "--multirun"} & set(sys.argv):
        run_command(_refuse_sweep)
    if rank > 0:  # the first one writes the files; argparse wants all overrides in one place
        place = next((i for i, word in enumerate(sys.argv) if i and word[0] != "-" and "=" in word), 1)
        sys.argv[place:place] = ["hydra.output_subdir=null", "hydra/job_logging=stdout"]
    try:
        run_command(_main)
    except SystemExit as end:
        leave(int(end.code or 0))


def _refuse_sweep() -> NoReturn:
    raise UserError(
        "-m starts the ranks of each job itself; start it without torchrun and srun, with trainer.devices=N"
    )


def _main() -> int:
    if {"-h", "--help"} & set(sys.argv[1:]):  # Hydra's own page copies the configuration a hundred times: 2 seconds
        print(_help())
        return 0
    sys.argv[1:] = [f"+{word}" if word.startswith("recipe=") else word for word in sys.argv[1:]]
    # Hydra would print its errors itself and exit with 1; this makes it raise them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    _ended.clear()
    sweep.started.clear()
    command = hydra.main(version_base="1.3", config_path=str(configuration.CONF_DIR), config_name="train")(job)
    code = 0
    try:
        with stop_on_signals():
            command()
    except StopRequested as stop:
        log.info("stopped (%s), state saved; start again with resume=auto to go on", stop)
        code = EXIT_REQUEUE
    except (HydraException, OmegaConfBaseException, OSError) as error:
        raise UserError(composition.explained(error)) from error
    except Exception as error:
        if not sweep.started:
            raise
        log.error("the sweep has ended early: %s: %s", type(error).__name__, error)
        code = EXIT_FAILURE
    if sweep.started:
        return max(code, sweep.conclude([ended.run_dir for ended in _ended]))
    return code or _conclude()


def _conclude() -> int:
    """The exit code of the only run, if there was one."""
    ended = _ended[-1] if _ended else Ended(Path(), 0)
    if ended.code == EXIT_USER_ERROR:
        raise UserError(ended.reason)
    return ended.code


def job(config: DictConfig) -> float | None:
    """A run, or one of a sweep. Returns its objective, for who looks for the best values; None if there is none."""
    run_dir, swept = Path(HydraConfig.get().runtime.output_dir), HydraConfig.get().mode == RunMode.MULTIRUN
    code, reason = _run(config, run_dir)
    _ended.append(Ended(run_dir, code, reason))
    if swept:
        sweep.write_outcome(run_dir, code, reason)
    is_over = swept and code == EXIT_REQUEUE and reason == TIME_OVER
    if is_over:
        log.info("stopped (%s), state saved; the sweep goes on", reason)
    elif code == EXIT_REQUEUE:
        if swept:
            sweep.requeue(reason)
        raise StopRequested(reason)
    if swept and code == EXIT_USER_ERROR:  # a run that stands alone says it last
        log.error("%s", reason)
    return sweep.last_value(run_dir, config.objective) if code == 0 or is_over else None


def _run(config: DictConfig, run_dir: Path) -> tuple[int, str]:
    """The exit code and the reason with which a run ends."""
    from bitnet_train.training import launch

    try:
        if (refused := config.get(composition.REFUSED)) is not None:
            raise UserError(refused)
        with stop_on_signals():
            launch.start(configuration.run_config(config), config, run_dir)
    except StopRequested as stop:
        return EXIT_REQUEUE, str(stop)
    except UserError as error:
        return EXIT_USER_ERROR, str(error)
    except (HydraException, OmegaConfBaseException) as error:
        return EXIT_USER_ERROR, composition.explained(error)
    except RunFailed as failure:
        log.error("error: %s", failure)
        return EXIT_FAILURE, str(failure)
    except Exception as error:
        log.exception("the run failed")
        return EXIT_FAILURE, f"{type(error).__name__}: {error}"
    return 0, ""


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
