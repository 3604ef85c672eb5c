"""metrics.jsonl on a disk that is full for a while, and the loggers beside it."""

import json
import resource
from pathlib import Path

import pytest
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from bitnet_train.errors import RunFailed, UserError
from bitnet_train.training.loggers import JsonlLogger, append, begin_wandb, forget_after, make_loggers, run_name
from tests.faults import limited


def steps(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def test_lines_that_the_disk_does_not_take_wait(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    with limited(resource.RLIMIT_FSIZE, 100):
        for step in range(10):
            logger.log_metrics({"train/loss": 1.0}, step)
        written = steps(logger.file)
        assert written == list(range(len(written)))  # whole lines only
        assert 0 < len(written) < 10
        with pytest.raises(OSError, match="File too large"):
            logger.flush()
    assert caplog.text.count("its lines wait for the next event") == 10 - len(written)
    logger.log_metrics({"train/loss": 1.0}, 10)
    assert steps(logger.file) == list(range(11))


def test_no_space_on_a_device(caplog: pytest.LogCaptureFixture) -> None:
    logger = JsonlLogger(Path("/dev/full"))
    logger.log_metrics({}, 1)
    assert "/dev/full: cannot be written (No space left on device)" in caplog.text
    with pytest.raises(OSError, match="No space left"):
        append(Path("/dev/full"), "text")


def test_a_resumed_run_forgets_later_lines_and_torn_ones(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    kept = b'{"step": 1, "train/loss": NaN}\n{"step": 3}\n'
    file.write_bytes(kept.rstrip() + b'\n{"step": 4}\n[1]\n{"step": 2, "\xff": 1}\n{"step": 2, "tra')
    forget_after(file, 3)
    assert file.read_bytes() == kept
    forget_after(tmp_path / "missing", 3)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("run_dir", "name"),
    [
        ("/runs/sft/2026-11-22_10-00-00", "sft-2026-11-22_10-00-00"),
        ("/runs/sft/2026-11-22_10-00-00/3", "sft-2026-11-22_10-00-00-3"),
        ("/out/run", "sft-out-run"),
    ],
)
def test_names_tell_runs_apart(run_dir: str, name: str) -> None:
    assert run_name("sft", Path(run_dir)) == name


def wandb_config(folder: Path, **values: object) -> DictConfig:
    node = {"_target_": "lightning.pytorch.loggers.WandbLogger", "name": None, "id": None, "save_dir": str(folder)}
    return OmegaConf.create({"recipe_name": "sft", "seed": 3, "logger": {"wandb": {**node, **values}}})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """The arguments that W&B is begun with; it begins no run."""
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(WandbLogger, "__init__", lambda self, **values: calls.append(values))
    for name in ("WANDB_NAME", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_wandb_is_told_which_run_it_is(tmp_path: Path, asked: list[dict[str, object]]) -> None:
    (tmp_path / "wandb-id.txt").write_text("abc\n")
    config = wandb_config(tmp_path)
    for is_resumed, id in ((False, None), (True, "abc")):
        (logger,) = make_loggers(config, tmp_path, is_resumed)
        assert isinstance(logger, WandbLogger)
        assert asked[-1]["id"] == id
        assert asked[-1]["name"] == f"sft-{'-'.join(tmp_path.parts[-2:])}"
        assert asked[-1]["config"] == OmegaConf.to_container(config)


def test_what_a_user_has_chosen_wins(
    tmp_path: Path, asked: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb-id.txt").write_text("abc\n")
    make_loggers(wandb_config(tmp_path, id="mine", name="my run"), tmp_path, True)
    assert (asked[-1]["id"], asked[-1]["name"]) == ("mine", "my run")
    monkeypatch.setenv("WANDB_NAME", "theirs")
    monkeypatch.setenv("WANDB_RUN_ID", "theirs")
    make_loggers(wandb_config(tmp_path), tmp_path, True)
    assert (asked[-1]["id"], asked[-1]["name"]) == (None, None)


def begin_refused(folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise error

    monkeypatch.setattr("wandb.init", refuse)
    loggers: list[Logger] = make_loggers(wandb_config(folder), folder, False)
    try:
        begin_wandb(loggers, folder)
    finally:
        assert not (folder / "wandb-id.txt").exists()


@pytest.mark.parametrize("name", ["UsageError", "AuthenticationError"])
def test_wandb_without_a_login_is_one_line(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = getattr(pytest.importorskip("wandb").errors, name)("No API key configured.")
    with pytest.raises(UserError, match=r"No API key configured; .* `wandb login`, .*WANDB_MODE=offline"):
        begin_refused(tmp_path, error, monkeypatch)


@pytest.mark.parametrize("name", ["CommError", "WandbCoreNotAvailableError"])
def test_a_network_that_is_away_is_a_failure_and_no_wrong_input(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = getattr(pytest.importorskip("wandb").errors, name)("Run initialization has timed out after 90.0 sec.")
    with pytest.raises(RunFailed, match=r"timed out after 90\.0 sec; start the same command again, ") as failure:
        begin_refused(tmp_path, error, monkeypatch)
    assert "login" not in str(failure.value)


@pytest.mark.parametrize("kind", [TypeError, ValueError])
def test_an_option_that_wandb_does_not_take_is_about_the_option(
    tmp_path: Path, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    error = kind("init() got an unexpected keyword argument 'entitty'")
    with pytest.raises(UserError, match=r"^logger\.wandb: .* 'entitty'; correct or remove this option$"):
        begin_refused(tmp_path, error, monkeypatch)
