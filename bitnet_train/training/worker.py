"""A rank of a run that `launch` has started: python -m bitnet_train.training.worker CONFIG RUN_DIR

The configuration is YAML text with nothing left to resolve. The exit code is the command's for the same outcome; an
exception is left for `launch`, which says it once for all ranks.
"""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from bitnet_train.errors import (
    EXIT_FAILURE,
    EXIT_REQUEUE,
    EXIT_USER_ERROR,
    PrintableFormatter,
    RunFailed,
    UserError,
)
from bitnet_train.training.imports import import_lightning
from bitnet_train.training.signals import StopRequested, ignore_signals, stop_on_signals

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main() -> NoReturn:
    """Ends by `os._exit`: gloo aborts now and then while the interpreter is taken down."""
    die_with_the_parent()
    code = outcome(lambda: _run(Path(sys.argv[1]), Path(sys.argv[2])))
    leave(code)


def own_rank() -> int | None:
    """The number of this process among those that were started together, None for one that stands alone."""
    if not {"TORCHELASTIC_RUN_ID", "SLURM_STEP_ID"} & os.environ.keys():
        return None
    from bitnet_train.training import ranks

    environment = ranks.environment()
    return environment.global_rank() if environment is not None else None


def leave(code: int) -> NoReturn:
    """Ends the process at once, with what was printed."""
    ignore_signals()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def die_with_the_parent() -> None:
    """The kernel kills this process when its parent dies, however that happens: no rank goes on alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ["LAUNCHER_PID"]):  # it died before
        os._exit(EXIT_FAILURE)


def outcome(job: Callable[[], None]) -> int:
    """Runs the job and gives the exit code for its end."""
    try:
        with stop_on_signals():
            job()
    except StopRequested:
        return EXIT_REQUEUE
    except BaseException as error:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
        return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILURE
    return 0


def _run(file: Path, run_dir: Path) -> None:
    try:
        _log_into(run_dir)
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise RunFailed(f"run_dir={run_dir}: {error}; see who removes it, then start the same command again") from None

    from omegaconf import DictConfig, OmegaConf

    from bitnet_train.config import run_config

    import_lightning()
    from bitnet_train.training.run import run

    config = OmegaConf.create(text)
    assert isinstance(config, DictConfig)
    run(run_config(config), config, run_dir)


def _log_into(run_dir: Path) -> None:
    """The first rank logs to run_dir/train.log as well, the others say only what is wrong."""
    first = os.environ["RANK"] == "0"
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if first:
        handlers.append(logging.FileHandler(run_dir / "train.log"))
    for handler in handlers:
        handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, handlers=handlers)


if __name__ == "__main__":
    main()
