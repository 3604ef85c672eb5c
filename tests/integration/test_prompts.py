"""An export with a tokenizer of every family: other programs have the prompts of training, or it is refused."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from bitnet_train.data.chat import encode_prompt
from bitnet_train.data.tokenizer import Tokenizer, train_bpe
from bitnet_train.errors import UserError
from bitnet_train.export import export
from bitnet_train.export.cli import run
from bitnet_train.export.llama_process import IK_LLAMA, Text, ask
from bitnet_train.export.runtimes import Line, compare
from bitnet_train.export.source import open_source
from bitnet_train.export.tokenization import Answers, Compared, Questions, check_folder, check_gguf, check_tokenizer
from tests.families import FAMILIES, TEXTS, write_family
from tests.folders import edit_config, write_master

pytest.importorskip("transformers")
pytest.importorskip("ik_llama_cpp")
pytestmark = pytest.mark.runtime

IN_GGUF = ("gpt-2", "llama-3")


def write_model(folder: Path, family: str) -> tuple[Path, Tokenizer]:
    """A folder of masters with a tokenizer of the family, as a run writes it."""
    tokenizer = Tokenizer.from_folder(write_family(folder / "tokenizer", family))
    write_master(folder / "model", {"vocab_size": 512}, with_tokenizer=False)
    edit_config(folder / "model", bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    tokenizer.save(folder / "model")
    stops = {"eos_token_id": list(tokenizer.stop_token_ids)}
    (folder / "model" / "generation_config.json").write_text(json.dumps(stops))
    return folder / "model", tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_has_the_prompts_of_training(tmp_path: Path, family: str) -> None:
    model, tokenizer = write_model(tmp_path, family)
    export(model, tmp_path / "packed")
    found = check_folder(tokenizer, tmp_path / "packed")
    assert found.agrees, found
    assert found.prompts == Compared("prompts", 36, 36)
    assert found.texts == Compared("texts", 200, 200)
    assert open_source(tmp_path / "packed").trained_tokenizer.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("family", FAMILIES)
def test_ik_llama_has_the_prompts_of_training_or_the_file_is_refused(tmp_path: Path, family: str) -> None:
    model, tokenizer = write_model(tmp_path, family)
    if family not in IN_GGUF:
        with pytest.raises(UserError, match=r"tokenizer.json: (pre_tokenizer|normalizer|model\.type) must be"):
            export(model, tmp_path / "model.gguf", format="gguf", type="f16")
        assert not (tmp_path / "model.gguf").exists()
        return
    export(model, tmp_path / "model.gguf", format="gguf", type="f16")
    found = check_gguf(tokenizer, tmp_path / "model.gguf", IK_LLAMA)
    assert found.agrees, found
    assert found.prompts == Compared("prompts", 36, 36)
    assert found.texts == Compared("texts", 200, 200)
    back = Tokenizer.from_folder(tmp_path / "model.gguf")
    assert (back.bos_token, back.stop_token_ids) == (tokenizer.bos_token, tokenizer.stop_token_ids)


@pytest.mark.parametrize("family", IN_GGUF)
def test_a_prompt_has_bos_once_or_never(tmp_path: Path, family: str) -> None:
    """llama-3's template writes it, ChatML does not: a runtime adds it to the one and not to the other."""
    model, tokenizer = write_model(tmp_path, family)
    export(model, tmp_path / "model.gguf", format="gguf", type="f16")
    ids = ask(IK_LLAMA, tmp_path / "model.gguf", [1], [Text("Hi", add_bos=True)]).ids
    assert ids == [tokenizer.begun(tokenizer.encode("Hi")) if family == "llama-3" else tokenizer.encode("Hi")]


def test_special_tokens_may_come_first(tmp_path: Path) -> None:
    """GPT-2's and SmolLM's order, with a third token that stops."""
    backend, config = FAMILIES["llama-3"]()
    names = [token.content for token in backend.get_added_tokens_decoder().values()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    first = tokenizers.Tokenizer(models.BPE())
    first.pre_tokenizer, first.decoder = backend.pre_tokenizer, decoders.ByteLevel()
    first.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    )
    (tmp_path / "tokenizer").mkdir()
    Tokenizer(first, config).save(tmp_path / "tokenizer")
    write_master(tmp_path / "model", {"vocab_size": 512}, with_tokenizer=False)
    edit_config(tmp_path / "model", bos_token_id=0, eos_token_id=1)
    tokenizer = Tokenizer.from_folder(tmp_path / "tokenizer")
    tokenizer.save(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [1, 4, 2]}')
    export(tmp_path / "model", tmp_path / "model.gguf", format="gguf", type="f16")
    found = check_gguf(open_source(tmp_path / "model").trained_tokenizer, tmp_path / "model.gguf", IK_LLAMA)
    assert found.prompts == Compared("prompts", 36, 36)
    assert found.texts == Compared("texts", 200, 200)
    assert found.stops.agrees  # the end of a text, of a turn and of a message
    assert found.stops.alone == ()
    export(tmp_path / "model.gguf", tmp_path / "back")
    again = check_folder(Tokenizer.from_folder(tmp_path / "model.gguf"), tmp_path / "back")
    assert again.agrees, again


def test_verify_says_what_became_of_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = write_model(tmp_path, "llama-3")
    assert run([str(model), str(tmp_path / "packed"), "--format", "safetensors", "--verify"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in told[2:]] == [
        *("tensors", "config.json", "generation_config.json"),
        *("transformers", "transformers", "transformers", "transformers"),
    ]
    assert told[-3:] == [
        "transformers: prompts 36 of 36 equal",
        "transformers: texts 200 of 200 equal",
        "transformers: stop ids equal",
    ]


def test_another_template_makes_the_command_fail(tmp_path: Path) -> None:
    model, tokenizer = write_model(tmp_path, "llama-3")
    export(model, tmp_path / "packed")
    config = tmp_path / "packed" / "tokenizer_config.json"
    config.write_text(config.read_text().replace("{{ bos_token }}", "{{ bos_token }} "))
    found = check_folder(tokenizer, tmp_path / "packed")
    assert not found.agrees
    assert found.lines()[0].startswith("prompts 0 of 36 equal, first 'Hi': [")
    assert found.texts.agrees


def test_a_template_that_the_runtime_cannot_run_is_told(tmp_path: Path) -> None:
    model, _ = write_model(tmp_path, "llama-3")
    export(model, tmp_path / "packed")
    config = tmp_path / "packed" / "tokenizer_config.json"
    config.write_text(config.read_text().replace("{{ bos_token }}", "{{ raise_exception('not here') }}"))
    (report,) = compare(model, tmp_path / "packed")
    assert report.agreement is not None
    assert report.tokenizer is not None
    assert report.tokenizer.prompts is None
    assert report.lines()[1] == Line("transformers: prompts not compared: TemplateError: not here")


def test_answers_that_training_cuts_are_counted_apart() -> None:
    """BitNet's own format: "Assistant: " and an answer share a space."""
    tokenizer = train_bpe(["Assistant: Yes, 1. "] * 20, 300)

    def ask_us(asked: Questions) -> Answers:
        as_tokens = [tokenizer.encode_pieces([text])[0] for text in asked.texts]
        prompts = [encode_prompt(prompt, tokenizer) for prompt in asked.prompts]
        return Answers(prompts, tokenizer.encode_batch(asked.texts), as_tokens, tokenizer.stop_token_ids)

    found = check_tokenizer(tokenizer, ask_us)
    assert found.agrees
    assert found.lines() == [
        "prompts 24 of 24 equal (12 with earlier answers are cut in training alone)",
        "texts 200 of 200 equal",
        "stop ids equal",
    ]
