"""Every recipe goes with every schedule: a shape takes of a recipe's numbers those that it has."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from bitnet_train import config as configuration
from bitnet_train.config import CONF_DIR, RECIPES_DIR, build, recipe_names
from bitnet_train.errors import UserError
from bitnet_train.schedule import Schedule

SHAPES = sorted(path.stem for path in (CONF_DIR / "schedule").glob("*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def hydra() -> Iterator[None]:
    configuration.register()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        yield


def schedule(*overrides: str) -> Schedule:
    return build(compose("train", list(overrides)).schedule, "schedule")  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_goes_with_every_schedule(recipe: str, shape: str) -> None:
    built = schedule(f"+recipe={recipe}", f"schedule={shape}")
    named = OmegaConf.load(RECIPES_DIR / f"{recipe}.yaml").schedule
    assert repr(built).lower().startswith(shape.replace("_", "").replace("wsd", "warmupstabledecay"))
    for key in ("peak_lr", "warmup_steps"):
        assert getattr(built, key) == named[key]
    assert built.lr(999, 1000) <= named.peak_lr


def test_what_the_command_line_says_stands_above_the_recipe() -> None:
    assert schedule("+recipe=sft", "schedule.peak_lr=3.0").lr(375, 1000) == 3.0


def test_a_number_that_the_shape_has_not_is_refused_on_the_command_line() -> None:
    with pytest.raises(UserError, match=r"unknown key schedule\.end_lr"):
        schedule("+recipe=sft", "schedule=constant", "schedule.end_lr=1e-5")


def test_a_number_that_no_shape_has_is_refused_in_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(RECIPES_DIR, tmp_path, dirs_exist_ok=True)
    recipe = (RECIPES_DIR / "sft.yaml").read_text()
    (tmp_path / "mistaken.yaml").write_text(recipe.replace("end_lr", "last_lr"))
    monkeypatch.setattr(configuration, "RECIPES_DIR", tmp_path)
    configuration.register()
    for shape in SHAPES:
        with pytest.raises(UserError, match=r"unknown key schedule\.last_lr"):
            schedule("+recipe=mistaken", f"schedule={shape}")
