"""The end of a save in the background; tests/parallel has whole ones."""

from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from bitnet_train.training import checkpoint
from bitnet_train.training.saving import commit

pytestmark = pytest.mark.fault


def begun(target: Path) -> ExitStack:
    stack = ExitStack()
    folder = stack.enter_context(checkpoint.committed(target, {"step": 3, "identity": {}}, keep_last=2))
    (folder / "__0_0.distcp").write_bytes(b"rows")
    return stack


def test_a_checkpoint_is_sealed_with_the_files_of_all_ranks(tmp_path: Path) -> None:
    written: Future[None] = Future()
    written.set_result(None)
    commit(written, begun(tmp_path / "step-000003"))
    assert checkpoint.newest(tmp_path) == tmp_path / "step-000003"
    (tmp_path / "step-000003/__0_0.distcp").write_bytes(b"wors")
    assert not checkpoint.verifies(tmp_path / "step-000003")


@pytest.mark.parametrize("cause", [OSError(28, "No space left on device"), RuntimeError("No space left on device")])
def test_rows_that_a_rank_could_not_write_leave_nothing(tmp_path: Path, cause: Exception) -> None:
    written: Future[None] = Future()
    written.set_exception(CheckpointException("write", {1: (cause, None)}))  # type: ignore[dict-item]
    with pytest.raises(OSError, match="No space left on device"):
        commit(written, begun(tmp_path / "step-000003"))
    assert not list(tmp_path.iterdir())
