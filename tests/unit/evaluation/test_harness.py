"""lm-evaluation-harness with this package's models, on tasks in a local folder."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from bitnet_train.data.chat import encode_chat, encode_prompt
from bitnet_train.data.conversation import Message
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError
from bitnet_train.evaluation.perplexity import evaluate
from bitnet_train.evaluation.scoring import Request, score
from bitnet_train.evaluation.tasks import evaluate_task
from bitnet_train.generate import Sampling, complete
from bitnet_train.model.decoder import BitNetForCausalLM
from bitnet_train.model.pretrained import load_for_inference
from tests.folders import write_master
from tests.support import write_jsonl

pytest.importorskip("lm_eval")
from lm_eval.tasks import TaskManager

from bitnet_train.evaluation import harness
from bitnet_train.evaluation.harness import BitNetLM, Generation, run_tasks

Rows = list[dict[str, object]]
Figures = dict[str, dict[str, float | str]]

_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
num_fewshot: 0
{rest}
"""
_CHOICE = """
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
_GENERATION = """
output_type: generate_until
doc_to_text: prompt
doc_to_target: answer
generation_kwargs: {until: ["."], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
filter_list: [{name: strip, filter: [{function: regex, regex_pattern: '(\\S+)'}, {function: take_first}]}]
"""
_ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: bits_per_byte}]
"""


def request(*arguments: object) -> SimpleNamespace:
    """What the harness hands over."""
    return SimpleNamespace(args=arguments, task_name="mine", doc_id=3)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, choices: Rows, prompts: Rows) -> Path:
    """A folder with a task of every kind that the adapter answers."""
    folder = tmp_path_factory.mktemp("tasks")
    texts: Rows = [{"text": f"The fox number {n} sat on mat {n * n}. " * (n % 3 * 4 + 1)} for n in range(11, 21)]
    for name, rest, rows in [
        ("mats", _CHOICE, choices), ("numbers", _GENERATION, prompts), ("texts", _ROLLING, texts)
    ]:  # fmt: skip
        file = write_jsonl(folder / f"{name}.jsonl", rows)
        (folder / f"{name}.yaml").write_text(_TASK.format(name=name, file=file, rest=rest))
    return folder


@pytest.fixture(scope="module")
def results(tasks: Path, master: Path, packed: Path) -> dict[Path, Figures]:
    """The figures of the three tasks for the masters and for the packed export."""
    names = ["mats", "numbers", "texts"]
    return {
        folder: run_tasks(load_for_inference(folder), Tokenizer.from_folder(folder), names, tasks)
        for folder in (master, packed)
    }


def test_the_figures_are_those_of_a_count_by_hand(results: dict[Path, Figures], tasks: Path, master: Path) -> None:
    """`evaluate_task` is held to a count by hand in test_tasks.py; the texts are counted one by one."""
    model, tokenizer, found = load_for_inference(master), Tokenizer.from_folder(master), results[master]
    expected = evaluate_task(model, tokenizer, str(tasks / "mats.jsonl"))
    assert found["mats"]["acc,none"] == expected["acc"]
    assert found["mats"]["acc_norm,none"] == expected["acc_norm"]
    matches = evaluate_task(model, tokenizer, str(tasks / "numbers.jsonl"), max_new_tokens=12)
    assert found["numbers"]["exact_match,strip"] == matches["exact_match"] > 0


def test_packed_and_masters_agree(results: dict[Path, Figures], master: Path, packed: Path) -> None:
    """The packed folder holds embedding and norms in bfloat16, 8 bits: of ten rows one may fall to the other side."""
    ours, theirs = results[master], results[packed]
    for task, metric in [("mats", "acc,none"), ("mats", "acc_norm,none"), ("numbers", "exact_match,strip")]:
        assert theirs[task][metric] == pytest.approx(ours[task][metric], abs=0.11)
    assert theirs["texts"]["bits_per_byte,none"] == pytest.approx(ours["texts"]["bits_per_byte,none"], rel=0.01)


def test_rolling_likelihood_counts_every_token_once(master: Path, tmp_path: Path) -> None:
    """Of a text that fits: our own measure less the end token. Of a longer one: as many tokens as it has."""
    lm = BitNetLM.from_pretrained(str(master))
    short, long = "The owl number 14 sat on mat 196. ", "The hen number 15 sat on mat 225. " * 12
    whole = evaluate(lm.model, lm.tokenizer, str(write_jsonl(tmp_path / "t.jsonl", [{"text": short}])))
    ids = lm.tokenizer.begun(lm.tokenizer.encode(short))
    end = score(lm.model, [Request(ids, [lm.tokenizer.eos_token_id])])[0].logp
    (found,) = lm.loglikelihood_rolling([request(short)])
    assert found == pytest.approx(-whole["nll"] * whole["tokens"] - end, rel=1e-3)
    windows = lm._windows(long)
    assert [id for window in windows for id in window.continuation] == lm.tokenizer.encode(long)
    assert len(windows) > 2
    assert {window.positions for window in windows[1:]} == {lm.max_length}


def test_a_context_is_cut_from_the_left(master: Path) -> None:
    lm = BitNetLM.from_pretrained(str(master))
    whole = lm._request("The pig number 19 sat on mat 361. " * 20, " The pig")
    assert whole.positions == lm.max_length
    short = lm._request("The pig number 19 sat on mat 361. " * 2, " The pig")
    assert whole.context[-20:] == short.context[-20:]
    assert short.context[0] == lm.tokenizer.bos_token_id
    with pytest.raises(UserError, match=r"^task mine, row 3: .*needs \d+ positions, the context has 128"):
        lm.loglikelihood([request("", "The pig number 19 sat on mat 361. " * 20)])


def test_text_ends_before_the_first_stop_string(master: Path) -> None:
    lm = BitNetLM.from_pretrained(str(master))
    text = complete(lm.model, lm.tokenizer, "The bee", chat=False, max_new_tokens=12)
    options = {"until": ["no such", text[5:7], ""], "max_gen_toks": 12, "do_sample": False}
    assert lm.generate_until([request("The bee", options)]) == [text.split(text[5:7])[0]]
    assert lm.generate_until([request("The bee", {"until": [], "max_gen_toks": 12})]) == [text]
    long = lm.generate_until([request("The bee sat. " * 50, {"until": "x y z", "max_gen_toks": 300})])
    assert long[0]


def test_chats_are_tokenized_as_in_training(master: Path) -> None:
    lm = BitNetLM.from_pretrained(str(master))
    lm.tokenizer = Tokenizer(lm.tokenizer._backend)  # with BitNet's template
    said = [
        Message(role="user", content="who <|eot_id|> sat"),
        Message(role="assistant", content="the cat"),
        Message(role="user", content="where"),
    ]
    context = lm.apply_chat_template(said)
    answer = Message(role="assistant", content="on the mat")
    prompt, whole = encode_prompt(said, lm.tokenizer), encode_chat([*said, answer], lm.tokenizer)
    request = lm._request(context, "on the mat")
    assert request.context == prompt
    assert [*request.context, *request.continuation, lm.tokenizer.eot_token_id] == whole.input_ids
    begun = lm.apply_chat_template([*said, Message(role="assistant", content="on")], add_generation_prompt=False)
    assert lm._context_ids(begun) == [*prompt, *lm.tokenizer.encode("on")]
    plain = "<|eot_id|>User: "
    assert lm.tokenizer.eot_token_id not in lm._context_ids(plain)


def test_chat_prompts_reach_the_model(tasks: Path, master: Path) -> None:
    model, tokenizer = load_for_inference(master), Tokenizer.from_folder(master)
    found = run_tasks(model, tokenizer, ["mats"], tasks, limit=4, chat=True)
    rows = tasks / "four.jsonl"
    rows.write_text("".join((tasks / "mats.jsonl").open().readlines()[:4]))
    expected = evaluate_task(model, tokenizer, str(rows), chat=True)
    assert found["mats"]["acc,none"] == expected["acc"]


@pytest.fixture
def no_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness without its 14,000 tasks, which take 20 seconds to read."""
    monkeypatch.setattr(harness, "TaskManager", lambda **how: TaskManager(**{**how, "include_defaults": False}))


@pytest.mark.usefixtures("no_defaults")
def test_unknown_tasks_and_folders_are_refused(tasks: Path) -> None:
    with pytest.raises(UserError, match=r"--lm-eval nuts: no such task, group or tag; `lm-eval ls tasks` lists them"):
        harness._task_manager(["mats", "nuts"], tasks)
    with pytest.raises(UserError, match=r"--include-path .*none: no such folder"):
        harness._task_manager(["mats"], tasks / "none")


@pytest.mark.usefixtures("no_defaults")
@pytest.mark.parametrize("content", ["task: [\n", "- mine\n", "task: mine\ninclude: none.yaml\n", "\xff"])
def test_a_file_that_was_passed_over_is_named_where_a_task_is_missing(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"--lm-eval mine: no such task.*/t\.yaml cannot be read: "):
        harness._task_manager(["mine"], tmp_path)


def test_a_task_without_its_data_costs_one_line(tmp_path: Path, master: Path) -> None:
    (tmp_path / "lost.yaml").write_text(_TASK.format(name="lost", file=tmp_path / "none.jsonl", rest=_CHOICE))
    model, tokenizer = load_for_inference(master), Tokenizer.from_folder(master)
    with pytest.raises(UserError, match=r"^--lm-eval lost: the task failed at .* \(FileNotFoundError: .*none\.jsonl"):
        run_tasks(model, tokenizer, ["lost"], tmp_path)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[BitNetForCausalLM, Tokenizer]:
    folder = tmp_path_factory.mktemp("untrained")
    write_master(folder, {"max_position_embeddings": 128, "num_hidden_layers": 1})
    return load_for_inference(folder), Tokenizer.from_folder(folder)


_GOOD_ROW = '{"context": "a", "choices": ["x", "y"], "answer": 0, "prompt": "a"}\n'


@pytest.mark.parametrize(
    ("rest", "rows", "message"),
    [
        ("output_type: multiple_choice", _GOOD_ROW, r"the task failed at \w+\.py:\d+ \(TypeError\); check its YAML"),
        (_CHOICE, "not json\n", r"\(DatasetGenerationError: .*; \w+: .+\); check"),
        (_CHOICE, _GOOD_ROW.replace('"y"', '""').replace('"x"', '""'), r"the task failed at task\.py:\d+ \(IndexError"),
        (_CHOICE.replace("context", "'{{ context / 0 }}'"), _GOOD_ROW, r"the task failed at .*TypeError"),
        (_CHOICE + "process_docs: !function code.none", _GOOD_ROW, r"AttributeError: .*has no function 'none'"),
        (_CHOICE + "process_docs: !function code.fails", _GOOD_ROW, r"the task failed at code\.py:2 \(KeyError: 'no"),
    ],
)
def test_a_faulty_task_is_one_line_that_names_it(
    rest: str, rows: str, message: str, tmp_path: Path, untrained: tuple[BitNetForCausalLM, Tokenizer]
) -> None:
    (tmp_path / "d.jsonl").write_text(rows)
    (tmp_path / "code.py").write_text("def fails(docs):\n    return {}['no field']\n")
    (tmp_path / "t.yaml").write_text(_TASK.format(name="mine", file=tmp_path / "d.jsonl", rest=rest))
    with pytest.raises(UserError, match=rf"^--lm-eval mine: .*{message}"):
        run_tasks(*untrained, ["mine"], tmp_path)


def test_a_fault_of_this_package_keeps_its_traceback(
    tasks: Path, untrained: tuple[BitNetForCausalLM, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(harness, "score", lambda *arguments: [][0])
        with pytest.raises(IndexError):
            run_tasks(*untrained, ["mats"], tasks)
    with monkeypatch.context() as patch:
        patch.setattr(harness, "TaskManager", None)
        with pytest.raises(TypeError):
            run_tasks(*untrained, ["mats"], tasks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": None}, "generation_kwargs cannot be read .*'temperature': None"),
        ({"max_gen_toks": "abc"}, "generation_kwargs cannot be read .*'abc'"),
        ({"max_gen_toks": math.inf}, "generation_kwargs cannot be read .*infinity"),
        ({"max_gen_toks": -1}, "max_gen_toks must be at least 1, got -1"),
        ({"temperature": math.nan, "do_sample": True}, "temperature must be finite and at least 0, got nan"),
        ({"temperature": 0.7, "top_p": 2}, r"top_p must lie in \(0, 1\], got 2.0"),
        ({"until": [5]}, r"until must be a list of strings, got \[5\]"),
        (["x"], "generation_kwargs cannot be read"),
    ],
)
def test_options_of_a_text_that_cannot_be_are_one_line(
    options: object, message: str, untrained: tuple[BitNetForCausalLM, Tokenizer]
) -> None:
    with pytest.raises(UserError, match=f"^task mine, row 3: {message}"):
        BitNetLM(*untrained).generate_until([request("a", options)])


def test_options_without_a_value_are_those_of_the_harness() -> None:
    assert Generation.of({"until": None, "top_p": None, "max_gen_toks": None}, 7) == (7, Sampling(), [])


@pytest.mark.parametrize("value", [5, None, "\ud800"])
def test_what_a_task_makes_of_a_row_must_be_text(value: object, untrained: tuple[BitNetForCausalLM, Tokenizer]) -> None:
    lm, message = BitNetLM(*untrained), "^task mine, row 3: the task must make texts of a row, got "
    for call, arguments in [
        (lm.loglikelihood, (value, "a")), (lm.loglikelihood, ("a", value)), (lm.loglikelihood_rolling, (value,)),
        (lm.generate_until, (value, {})),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            call([request(*arguments)])


def test_bits_per_byte_of_texts_longer_than_the_context(
    results: dict[Path, Figures], tasks: Path, master: Path
) -> None:
    lm = BitNetLM.from_pretrained(str(master))
    texts = [json.loads(line)["text"] for line in (tasks / "texts.jsonl").open()]
    total = sum(lm.loglikelihood_rolling([request(text) for text in texts]))
    expected = -total / math.log(2) / sum(len(text.encode()) for text in texts)
    assert results[master]["texts"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-3)
