"""metrics.jsonl on a disk that is full for a while."""

import json
import resource
from pathlib import Path

import pytest

from bitnet_train.training.loggers import JsonlLogger, append
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
