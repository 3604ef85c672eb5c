import sys
from collections import OrderedDict
from pathlib import Path

import pytest

from bitnet_train.classes import check_object, class_named
from bitnet_train.errors import UserError


class Callback:
    """The kind of these tests."""


class Mine(Callback):
    """One of the kind."""


MINE = f"{__name__}.Mine"
HOUR = {"_target_": "datetime.timedelta", "hours": 1}
NO_CLASSES = [
    "os.system", "builtins.exec", "numpy.load", "json.loads", "json.JSONDecoder", "Mine", "a..b", ".x", "os.path/x.Y",
    "", None, 5,
]  # fmt: skip


@pytest.mark.parametrize("target", NO_CLASSES)
def test_functions_and_other_classes_are_refused(target: object) -> None:
    with pytest.raises(
        UserError, match=r"^callbacks\.x\._target_ must name a class of the kind tests.*Callback[^\n]*$"
    ):
        class_named(target, "callbacks.x._target_", (Callback,))


def test_a_class_of_the_kind_is_found() -> None:
    assert class_named(MINE, "x", (Callback,)) is Mine
    assert class_named("collections.OrderedDict", "x", (Callback, OrderedDict)) is OrderedDict


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules of a user; each writes a file when it is run."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_package").mkdir()
    run = f"open({str(tmp_path / 'run')!r}, 'a').write(__name__ + ' ')\n"
    for name in ("a_script", "a_package/__init__", "a_package/inner"):
        (tmp_path / f"{name}.py").write_text(run + "X = 1\n")
    (tmp_path / "a_broken.py").write_text(run + "def f(:\n")
    (tmp_path / "a_callback.py").write_text(run + f"from {__name__} import Callback\nclass Own(Callback): ...\n")
    (tmp_path / "a_front.py").write_text(run + "from a_callback import Own as Other\n")
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


@pytest.mark.parametrize(
    "target", ["a_script.X", "a_script.Y", "a_package.inner.X", "a_broken.X", "no_such.X", "a_script.b.C"]
)
def test_a_module_that_holds_no_such_class_is_not_imported(modules: Path, target: str) -> None:
    with pytest.raises(UserError, match=r"no module '.*' that holds a class '.*' can be imported here"):
        class_named(target, "x", (Callback,))
    assert not (modules / "run").exists()


@pytest.mark.parametrize("target", ["a_callback.Own", "a_front.Other"])
def test_a_class_of_a_users_own_module_is_found(modules: Path, target: str) -> None:
    assert class_named(target, "x", (Callback,)).__name__ == "Own"


BAD_OBJECTS: list[tuple[dict[str, object], str]] = [
    ({}, "c._target_ must name a class"),
    ({"_target_": MINE, "_partial_": True}, "c._partial_ must be false"),
    ({"_target_": MINE, "_partial_": "false"}, "c._partial_ must be false"),
    ({"_target_": MINE, "a": {"_target_": MINE}}, "c.a._target_ must not stand there"),
    ({"_target_": MINE, "a": [1, {"b": {"_target_": "os.system"}}]}, "c.a.1.b._target_ must not stand there"),
    ({"_target_": MINE, "_args_": [{"_target_": MINE}]}, "c._args_.0._target_ must not stand there"),
    ({"_target_": MINE, "place": {"_target_": "os.system"}}, "c.place._target_ must name a class"),
    ({"_target_": MINE, "place": [{"_target_": MINE, "a": {"_target_": MINE}}]}, "c.place.0.a._target_ must not"),
    ({"_target_": MINE, "a": {**HOUR, "hours": {"_target_": "time.time"}}}, "c.a.hours._target_ must not stand there"),
    ({"_target_": MINE, "a": {**HOUR, "place": {"_target_": MINE}}}, "c.a.place._target_ must not stand there"),
    ({"_target_": MINE, "a": {**HOUR, "_partial_": True}}, "c.a._partial_ must be false"),
    ({"_target_": MINE, "a": {"_target_": "datetime.datetime"}}, "c.a._target_ must not stand there"),
    (HOUR, "c._target_ must name a class"),
]


@pytest.mark.parametrize(("node", "message"), BAD_OBJECTS)
def test_nothing_else_is_made_of_an_object_or_its_arguments(node: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        check_object(node, "c", (Callback,), {"place": (Callback,)})
    assert message in str(error.value)


def test_an_argument_that_takes_objects_may_hold_one() -> None:
    inner = {"_target_": MINE, "number": 1, "names": ["a"], "options": {"b": None}}
    check_object(
        {"_target_": MINE, "place": [inner, "name"], "_convert_": "all"}, "c", (Callback,), {"place": (Callback,)}
    )


def test_a_value_without_a_kind_may_stand_anywhere() -> None:
    schedule = {"_target_": "torch.profiler.schedule", "wait": 1, "warmup": 1, "active": 3}
    inner = {"_target_": MINE, "timeout": HOUR}
    values = {"every": HOUR, "steps": [schedule], "options": {"every": HOUR}, "place": inner}
    check_object({"_target_": MINE, **values}, "c", (Callback,), {"place": (Callback,)})
