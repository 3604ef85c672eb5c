"""Additions to Hydra's composition, without a run."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from bitnet_train import composition
from bitnet_train import config as configuration
from bitnet_train.cli import _run
from bitnet_train.errors import UserError

RECIPE = """# @package _global_
defaults:
  - override /model: tiny
recipe_name: mine
"""


@pytest.fixture(autouse=True, scope="module")
def hydra_here() -> Iterator[None]:
    configuration.register()
    with hydra.initialize_config_dir(str(configuration.CONF_DIR), version_base="1.3"):
        yield


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        hydra.compose("train", overrides=list(overrides))
    return str(error.value)


VALUES = [
    "lr=1e-3.jsonl",
    "größe.jsonl",
    "~/rows.jsonl",
    "a (1).jsonl",
    'it\'s "x"',
    "a(b.jsonl",
    "x!",
    "back\\slash\\",
    "数据.jsonl",
]


@pytest.mark.parametrize("value", VALUES)
def test_the_quotes_that_a_message_names_work_in_a_shell_and_in_hydra(value: str) -> None:
    override = f"data.train={value}"
    advice = composition._unquoted(override)
    assert advice.startswith(override)
    assert "\n" not in advice
    (argument,) = shlex.split(advice.partition("write ")[2])
    assert OverridesParser.create().parse_override(argument).value() == value


@pytest.mark.parametrize(
    ("value", "quoted"),
    [
        ("[größe.jsonl, b.jsonl]", '["größe.jsonl",b.jsonl]'),
        ("choice(größe.jsonl,b)", 'choice("größe.jsonl",b)'),
        ("größe.jsonl,b", '"größe.jsonl",b'),
    ],
)
def test_of_a_list_only_the_texts_that_need_it_are_quoted(value: str, quoted: str) -> None:
    assert shlex.quote(f"data.train={quoted}") in composition._unquoted(f"data.train={value}")


@pytest.mark.parametrize("override", ["foo", "größe=1", "data.val={a: größe.jsonl}", "seed=[1", "a=[{b: ~}]"])
def test_where_quotes_do_not_help_the_argument_is_named(override: str) -> None:
    assert refused(override).startswith(f"{override}: no argument that Hydra understands")


def test_an_argument_that_does_not_parse_is_named_by_the_composition() -> None:
    assert refused("+recipe=sft", "data.train=größe.jsonl").startswith("data.train=größe.jsonl: a text with")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=1", "unknown key sed; did you mean seed?"),
        ("datta=chat", "unknown key datta; did you mean data?"),
        ("optimzer.eps=1", "unknown key optimzer.eps; did you mean optimizer.eps?"),
        ("optimizer.epss=1", "unknown key optimizer.epss; did you mean optimizer.eps?"),
        ("zzzz=1", "unknown key zzzz; where a library takes it, add it as +zzzz"),
        ("model=tinny", "; did you mean tiny?"),
        ("schedule=cosin", "schedule has no 'cosin'; it has "),
        ("+recipe=pretain", "; did you mean pretrain?"),
    ],
)
def test_a_misspelt_key_or_option_says_which_one_was_meant(override: str, message: str) -> None:
    assert message in refused(override)


def test_what_a_library_says_stands_behind_what_hydra_says() -> None:
    assert refused("hydra.mode=NOPE").startswith("Error merging override hydra.mode=NOPE: Invalid value 'NOPE'")


def test_a_tilde_is_the_home_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = hydra.compose(
        "train",
        overrides=[
            "+recipe=pretrain", "run_dir='~/runs/${recipe_name}'", "init_from='~/m'", "resume='~/c'",
            "data.train=[{path: '~/a', weight: 1}, '~/b', 'c~']", "data.val={one: '~/d'}", "data.tokenizer='~/t'",
            "data.cache_dir='~'",
        ],
    )  # fmt: skip
    assert [config.run_dir, config.init_from, config.resume] == ["/home/me/runs/pretrain", "/home/me/m", "/home/me/c"]
    data = OmegaConf.to_container(config.data)
    assert isinstance(data, dict)
    assert data["train"] == [{"path": "/home/me/a", "weight": 1}, "/home/me/b", "c~"]
    assert (data["val"], data["tokenizer"], data["cache_dir"]) == ({"one": "/home/me/d"}, "/home/me/t", "/home/me")


def master(*overrides: str) -> DictConfig:
    words = ["+recipe=pretrain", "run_dir=r", *overrides]
    return GlobalHydra.instance().config_loader().load_configuration("train", words, RunMode.MULTIRUN)


def job(*overrides: str) -> DictConfig:
    return GlobalHydra.instance().config_loader().load_sweep_config(master(), ["+recipe=pretrain", *overrides])


@pytest.mark.parametrize("value", ["größe.jsonl", "a=b.jsonl", "~no-user", "a,b"])
def test_a_value_of_a_search_reaches_its_job_though_it_came_without_quotes(value: str) -> None:
    config = job(f"data.train={value}")
    assert config.data.train == value
    assert composition.REFUSED not in config


@pytest.mark.parametrize("override", ["stage=nope", "sed=1", "größe=1"])
def test_a_job_that_cannot_be_composed_fails_alone(override: str, tmp_path: Path) -> None:
    config = job(override)
    code, reason = _run(config, tmp_path)
    assert code == 2
    assert override.partition("=")[0] in reason
    assert config.hydra.overrides.task == ["+recipe=pretrain", override]
    assert config.run_dir == "r"


@pytest.mark.parametrize("target", ["pandas.read_pickle", "os.makedirs", "lightning.Callback"])
def test_hydras_own_callbacks_and_samplers_are_of_their_kind(target: str) -> None:
    assert "hydra.callbacks.x._target_ must name a class" in refused(f"+hydra.callbacks.x._target_={target}")


def source(folder: Path, text: str | bytes) -> composition.FileConfigSource:
    (folder / "recipe").mkdir()
    (folder / "recipe/mine.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return composition.FileConfigSource("command-line", f"file://{folder}")


def test_hydra_reads_files_and_composes_by_this_module() -> None:
    loader = GlobalHydra.instance().config_loader()
    assert isinstance(loader, composition.Loader)
    sources = {one.provider: one for one in loader.get_sources()}
    assert isinstance(sources["main"], composition.FileConfigSource)


BAD_RECIPES = {
    "seed: [\n": "line 6: must be YAML: ",
    "seed: 1\nseed: 2\n": "must be YAML: found duplicate key seed",
    "seed: !!python/object/apply:os.system [x]\n": "must be YAML: could not determine a constructor",
    "x: &a [*a]\n": "must hold at most 100,000 values",
    "hydra: {callbacks: {x: {_target_: os.system}}}\n": "got callbacks.x; give it on the command line",
    "hydra: {job_logging: {a: 1}, launcher: {setup: [x]}}\n": "got job_logging.a, launcher.setup; give",
    "hydra: {launcher: {partition: a, python: sh, srun_args: [x]}}\n": "got launcher.python, launcher.srun_args; give",
    "hydra: {launcher: {additional_parameters: {wrap: x}}}\n": "got launcher.additional_parameters; give",
    "hydra: {launcher: {_target_: os.system}, job: {env_set: {A: b}}}\n": "got launcher._target_, job.env_set; give",
    "x: {setup: [x]}\nhydra: {launcher: '${x}'}\n": "got launcher; give",
    "x: {launcher: {setup: [x]}}\nhydra: ${x}\n": "got hydra; give",
    "hydra: {sweeper: {custom_search_space: os.system}}\n": "got sweeper.custom_search_space; give",
    "hydra: 5\n": "got hydra; give",
}


@pytest.mark.parametrize("more", BAD_RECIPES)
def test_a_bad_recipe_is_one_line_that_names_its_file(tmp_path: Path, more: str) -> None:
    with pytest.raises(UserError) as error:
        source(tmp_path, RECIPE + more).load_config("recipe/mine")
    assert str(error.value).startswith(f"{tmp_path}/recipe/mine.yaml: ")
    assert BAD_RECIPES[more] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"seed: \xff\n", "cannot be read: 'utf-8' codec"),
        (b"- 1\n", "must hold keys and values"),
        (b"# @package hydra.callbacks\nx: {_target_: os.system}\n", "got another; give it on the command line"),
        (b"# @package _global_.hydra.launcher\nsetup: [x]\n", "got another; give it on the command line"),
    ],
)
def test_what_is_no_recipe_at_all(tmp_path: Path, text: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        source(tmp_path, text).load_config("recipe/mine")


def test_a_recipe_may_set_a_sweep(tmp_path: Path) -> None:
    text = RECIPE + "hydra: {mode: MULTIRUN, sweep: {subdir: a}, sweeper: {params: {seed: '1,2'}}}\n"
    config = source(tmp_path, text).load_config("recipe/mine").config
    assert OmegaConf.select(config, "hydra.sweep.subdir") == "a"


def test_a_recipe_may_say_how_large_a_job_is_and_its_name(tmp_path: Path) -> None:
    launcher = "{partition: a, nodes: 2, gres: 'gpu:1', timeout_min: 5, cpus_per_task: 1, mem_gb: 1, account: b}"
    text = f"{RECIPE}hydra: {{job: {{name: mine}}, launcher: {launcher}}}\n"
    config = source(tmp_path, text).load_config("recipe/mine").config
    assert OmegaConf.select(config, "hydra.launcher.partition") == "a"


EVIL = "{_target_: numpy.savetxt, fname: made, X: [1]}"


@pytest.mark.parametrize(
    ("override", "field"),
    [
        (f"hydra.sweeper.storage={EVIL}", "sweeper.storage"),
        (f"hydra.sweeper.direction=[{EVIL}]", "sweeper.direction.0"),
        (f"hydra.sweeper.storage={{a: {{b: {EVIL}}}}}", "sweeper.storage.a.b"),
        (f"+hydra.sweeper.sampler.gamma={EVIL}", "sweeper.sampler.gamma"),
    ],
)
def test_no_other_object_is_made_for_a_sweeper(override: str, field: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    assert f"hydra.{field}._target_ must not stand there" in refused("hparams_search=optuna", override)


def test_an_object_by_way_of_an_interpolation_is_seen() -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    message = refused("hparams_search=optuna", f"+evil={EVIL}", "hydra.sweeper.storage=${evil}")
    assert "hydra.sweeper.storage._target_ must not stand there" in message


@pytest.mark.parametrize("key", ["sampler", "sampler.independent_sampler"])
def test_samplers_are_of_their_kind(key: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = ["hparams_search=optuna", "hydra/sweeper/sampler=cmaes"]
    message = refused(*words, f"++hydra.sweeper.{key}._target_=numpy.savetxt")
    assert f"hydra.sweeper.{key}._target_ must name a class of the kind" in message
    random = "{_target_: optuna.samplers.RandomSampler, seed: 1}"
    hydra.compose("train", overrides=[*words, f"hydra.sweeper.sampler.independent_sampler={random}"])
    hydra.compose("train", overrides=["hydra/sweeper=optuna", "hydra/sweeper/sampler=grid"])


@pytest.mark.parametrize("group", ["launcher", "sweeper"])
def test_launcher_and_sweeper_are_of_their_kind(group: str) -> None:
    assert f"hydra.{group}._target_ must name a class" in refused(f"hydra.{group}._target_=hydra.utils.call")
    assert f"hydra.{group}.x._target_ must not stand there" in refused(f"+hydra.{group}.x={EVIL}")


@pytest.mark.parametrize("key", ["hydra.launcher.partition", "hydra.job.name", "run_dir"])
def test_no_text_is_a_second_line_of_a_jobs_script(key: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    assert "must be one line, got " in refused("+recipe=pretrain", "launcher=slurm", f"{key}='a\nrm b'")
    hydra.compose("train", overrides=["+recipe=pretrain", "launcher=slurm", "hydra.launcher.setup=['export A=b']"])
