"""The run's own fields, read out of a composed configuration."""

import pytest
from omegaconf import OmegaConf

from bitnet_train.config import CONF_DIR, run_config
from bitnet_train.errors import UserError

GROUPS: dict[str, object] = {path.name: {} for path in CONF_DIR.iterdir() if path.is_dir()}


@pytest.mark.parametrize("value", ["grad_clip_pe", None, [1], 3])
@pytest.mark.parametrize("group", ["optimizer", "model", "trainer"])
def test_a_group_is_keys_with_values(group: str, value: object) -> None:
    """A recipe that ends in the middle of a line leaves a text of its last group."""
    with pytest.raises(UserError, match=f"^{group} must be keys with values, got"):
        run_config(OmegaConf.create({**GROUPS, group: value, "recipe_name": "mine"}))


def test_loggers_and_callbacks_may_be_absent() -> None:
    absent = {"logger": None, "callbacks": None}
    with pytest.raises(UserError, match="no recipe was chosen"):
        run_config(OmegaConf.create({**GROUPS, **absent, "recipe_name": None}))
