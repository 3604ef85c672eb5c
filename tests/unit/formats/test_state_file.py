"""state.pt: what a trainer and an exporter read of it is there and of its type, or one line says what is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet_train.errors import UserError
from bitnet_train.formats.state_file import STATE, ModelState, RunState, read_state
from tests.states import tiny_state

State = dict[str, Any]
Change = Callable[[State], object]

BROKEN: dict[str, tuple[Change, str]] = {
    "no identity": (lambda state: state.pop("identity"), "must hold the state of a run"),
    "another identity": (lambda state: state.update(identity="x"), "must hold the state of a run"),
    "no model": (lambda state: state.pop("model"), "must have model"),
    "weights in a list": (lambda state: state.update(model=[1]), "model: must be an object, got a list"),
    "a weight of text": (lambda state: state["model"].update(w="x"), r"model\.w must be a tensor of floats, got str"),
    "a weight of integers": (
        lambda state: state["model"].update(w=torch.zeros(2, dtype=torch.int8)),
        r"model\.w must be a tensor of floats, got torch\.int8 of shape \(2,\)",
    ),
    "a weight that is not stored": (
        lambda state: state["model"].update(w=torch.zeros(1).expand(1 << 40)),
        r"model\.w must be a tensor of floats, got torch\.float32 of shape \(1099511627776,\)",
    ),
    "a sparse weight": (lambda state: state["model"].update(w=torch.eye(2).to_sparse()), r"model\.w must be a tensor"),
}
BROKEN_RUN: dict[str, tuple[Change, str]] = {
    "a step of text": (lambda state: state.update(step="x"), "step: must be an integer, got a string"),
    "a step below 0": (lambda state: state.update(step=-1), "step: must be an integer >= 0"),
    "no optimizer": (lambda state: state.pop("optimizer"), "must have optimizer"),
    "no rank": (lambda state: state.update(ranks=[]), "ranks: must be a list of length >= 1"),
    "no generators": (lambda state: state["ranks"][0].pop("rng"), r"ranks\[0\]: must have rng"),
    "a generator of text": (
        lambda state: state["ranks"][0]["rng"].update(torch="x"),
        r"ranks\[0\]\.rng\.torch: must be Tensor, got a string",
    ),
    "a cut generator": (
        lambda state: state["ranks"][0]["rng"].update(numpy=["MT19937"]),
        r"ranks\[0\]\.rng\.numpy: must be a list of length 5",
    ),
    "three counts": (lambda state: state.update(skipped=[0, 0, 0]), "skipped: must be a list of length 2"),
}


def saved(folder: Path, change: Change = lambda state: None) -> Path:
    state = tiny_state()
    change(state)
    torch.save(state, folder / STATE)
    return folder


def test_a_whole_state_is_read_for_both(tmp_path: Path) -> None:
    for schema in (ModelState, RunState):
        assert read_state(saved(tmp_path), schema).keys() == tiny_state().keys()


def test_an_export_needs_the_model_alone(tmp_path: Path) -> None:
    folder = saved(tmp_path, lambda state: [state.pop(name) for name in ("optimizer", "ranks", "step")])
    assert read_state(folder, ModelState)["model"]["w"].shape == (3,)


def refused(folder: Path, schema: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_state(folder, schema)
    assert str(error.value).startswith(f"{folder / STATE}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_state_is_one_line_for_both(tmp_path: Path, name: str) -> None:
    change, message = BROKEN[name]
    for schema in (ModelState, RunState):
        refused(saved(tmp_path, change), schema, message)


@pytest.mark.parametrize("name", BROKEN_RUN)
def test_a_state_that_no_run_can_go_on_from_is_one_line(tmp_path: Path, name: str) -> None:
    change, message = BROKEN_RUN[name]
    refused(saved(tmp_path, change), RunState, message)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\3\4" + b"\0" * 100, b"\x80\x02]q\0."])
def test_a_file_that_is_no_state_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / STATE).write_bytes(content)
    refused(tmp_path, ModelState, r"state\.pt: ")


def test_an_identity_without_a_model_cannot_be_exported(tmp_path: Path) -> None:
    refused(saved(tmp_path, lambda state: state.update(identity={})), ModelState, "identity: must have model")
    refused(
        saved(tmp_path, lambda state: state["identity"].update(model=5)),
        ModelState,
        r"identity\.model: must be a string",
    )
