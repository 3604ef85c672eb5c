"""A dense Llama becomes a trained BitNet by one command."""

import json
import sys
from pathlib import Path

import pytest

from bitnet_train.cli import main
from bitnet_train.model.config import BitNetConfig
from bitnet_train.model.pretrained import load_for_inference
from bitnet_train.model.rope import RopeScaling
from tests.runs import train
from tests.support import DENSE, chat_rows, tiny_tokenizer, write_jsonl

transformers = pytest.importorskip("transformers")

SCALING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SHAPE = {**DENSE, "vocab_size": 384}
COMMAND = [
    "+recipe=quickstart-sft",
    "trainer=cpu",
    "init_from=llama",
    "data.train=chat.jsonl",
    "data.val=null",
    "data.sequence_length=127",
    "global_batch_size=4",
    "max_steps=3",
    "log_every=1",
    "schedule.warmup_steps=1",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with conversations and a random Llama of two layers."""
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "chat.jsonl", chat_rows(24))
    config = transformers.LlamaConfig(**SHAPE, rope_parameters={"rope_theta": 5000.0, **SCALING})
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    tiny_tokenizer().save(folder / "llama")
    return folder


def test_a_llama_is_trained_as_a_bitnet(data: Path) -> None:
    result = train(*COMMAND, "run_dir=run", cwd=data)
    assert result.returncode == 0, result.stdout + result.stderr
    report = (data / "run/init_from.txt").read_text()
    assert report.startswith("start from llama (llama)\ncopied: 21 tensors: ")
    assert report in result.stdout
    model = load_for_inference(data / "run/model")
    assert model.config == BitNetConfig(
        **SHAPE,  # type: ignore[arg-type]
        hidden_act="silu",
        rms_norm_eps=1e-6,
        rope_theta=5000.0,
        rope_scaling=RopeScaling(**SCALING),  # type: ignore[arg-type]
        tie_word_embeddings=False,
    )
    losses = [json.loads(line)["train/loss"] for line in (data / "run/metrics.jsonl").open()]
    assert losses[-1] < losses[0]


def test_fields_of_the_model_can_be_changed(data: Path) -> None:
    scaling = "model.rope_scaling={rope_type: linear, factor: 8.0}"
    changes = ["model.hidden_act=relu2", "model.max_position_embeddings=512", scaling]
    result = train(*COMMAND, *changes, "run_dir=changed", "max_steps=1", cwd=data)
    assert result.returncode == 0, result.stdout + result.stderr
    config = load_for_inference(data / "changed/model").config
    assert (config.hidden_act, config.max_position_embeddings, config.rope_theta) == ("relu2", 512, 5000.0)
    assert config.rope_scaling == RopeScaling("linear", 8.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.hidden_act=gelu"], "model.hidden_act must be one of relu2, silu, got 'gelu'"),
        (["model.rope_theta=high"], "model.rope_theta: Value 'high'"),
        (["model.hidden_size=128"], "model.hidden_size must be 64, as in llama, got 128"),
        (["model.rope_scaling={rope_type: yarn}"], "rope_scaling.factor"),
        (["init_from=null", "data.tokenizer=llama"], "model=inherit takes the model of init_from"),
    ],
)
def test_bad_changes_are_one_line_and_exit_2(
    data: Path, overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data)
    monkeypatch.setattr(sys, "argv", ["bitnet-train", *COMMAND, *overrides, "run_dir=bad"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
