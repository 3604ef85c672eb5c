"""lm-evaluation-harness (extra `eval`): its tasks, metrics and prompts, this package's models.

    from lm_eval import simple_evaluate
    simple_evaluate(model=BitNetLM.from_pretrained("runs/quickstart/sft"), tasks=["arc_easy"])

Every text begins with BOS, as in training, or with EOS, where there is no BOS. A context is cut from the left where it
does not fit. What the chat template made is tokenized as in training, too: in pieces that begin and end where answers
do, which a mark in the text keeps apart; names of special tokens count as control tokens in these texts alone.
"""

import contextlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch

from bitnet_train.data.chat import chat_pieces
from bitnet_train.data.conversation import Message
from bitnet_train.data.tokenizer import Tokenizer
from bitnet_train.errors import UserError, is_utf8
from bitnet_train.evaluation.scoring import Request, check_fits, request_of, score
from bitnet_train.generate import Sampling, stream, until
from bitnet_train.generate.loading import load
from bitnet_train.model.decoder import BitNetForCausalLM

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(f"lm-evaluation-harness is not installed ({error}): pip install 'bitnet-train[eval]'") from error

T = TypeVar("T")
Figures = dict[str, float | str]

_OURS = __name__.partition(".")[0]
_ANSWER = "\ufdd4"  # a code point that Unicode keeps out of text: an answer begins or ends here


class Generation(NamedTuple):
    """How a task wants a text to be written, its `generation_kwargs`."""

    max_new_tokens: int
    how: Sampling
    until: list[str]

    @classmethod
    def of(cls, options: Any, default_max_new_tokens: int) -> "Generation":
        """Checks and completes what a task's YAML says. Raises UserError."""
        try:
            known = normalize_gen_kwargs(options, default_max_new_tokens)
            temperature = float(known.get("temperature", 0.0))
            top_p = 1.0 if known.get("top_p") is None else float(known["top_p"])
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"generation_kwargs cannot be read ({error}), got {options}") from None
        if known["max_gen_toks"] < 1:
            raise UserError(f"max_gen_toks must be at least 1, got {known['max_gen_toks']}")
        until = list(filter(None, known["until"]))
        if not all(isinstance(string, str) for string in until):
            raise UserError(f"until must be a list of strings, got {until}")
        return cls(known["max_gen_toks"], Sampling(temperature, top_p), until)


class BitNetLM(LM):  # type: ignore[misc]
    """A decoder as lm-evaluation-harness calls it; one process, one device.

    Args:
        model: any decoder, trained or imported.
        tokenizer: the model's own.
        max_gen_toks: tokens of a generated text where the task names no number.
    """

    def __init__(self, model: BitNetForCausalLM, tokenizer: Tokenizer, max_gen_toks: int = 256) -> None:
        super().__init__()
        self.model, self.tokenizer, self.max_gen_toks = model, tokenizer, max_gen_toks
        self.max_length = model.config.max_position_embeddings
        self.generator = torch.Generator().manual_seed(0)  # for tasks that sample

    @classmethod
    def from_pretrained(cls, source: str) -> "BitNetLM":
        """The model of a run directory, a folder (master or packed), a GGUF file or a hub id."""
        return cls(*load(source, "source"))

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """log p(continuation | context) in nats, and whether greedy decoding gives the continuation."""
        pairs = []
        for request in requests:
            with _named(request):
                pairs.append(self._request(*_texts(*request.args)))
                check_fits(self.model, pairs[-1])
        found = [(logp, is_greedy) for logp, is_greedy in score(self.model, pairs)]
        return self._cached("loglikelihood", requests, found)

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """log p of each text in nats, every token predicted once with as much context as fits."""
        windows = []
        for request in requests:
            with _named(request):
                windows.append(self._windows(*_texts(*request.args)))
        scores = iter(score(self.model, [window for of_text in windows for window in of_text]))
        found = [sum(next(scores).logp for _ in of_text) for of_text in windows]
        return self._cached("loglikelihood_rolling", requests, found)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """What follows each context, up to a stop string, a stop token or max_gen_toks."""
        found: list[str] = []
        for request in requests:
            with _named(request):
                (context,), options = _texts(request.args[0]), request.args[1]
                text = self._generate(context, Generation.of(options, self.max_gen_toks))
            found += self._cached("generate_until", [request], [text])
        return found

    def _cached(self, method: str, requests: Sequence[Instance], results: list[T]) -> list[T]:
        """The results, handed to the harness's cache of answers, if it keeps one."""
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial(method, request.args, result)
        return results

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as text with marks around answers, the last of them open: empty, or begun by a prefix."""
        messages, begun = list(chat_history), ""
        if not add_generation_prompt and messages and messages[-1]["role"] == "assistant":
            begun = messages.pop()["content"]
        pieces = chat_pieces(messages, self.tokenizer, add_generation_prompt=True)
        return _ANSWER.join([*pieces, self.tokenizer.quote(begun)])

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template that `apply_chat_template` renders."""
        return self.tokenizer.chat_template

    @property
    def tokenizer_name(self) -> str:
        """Names ids and template in the keys of cached requests."""
        return self.tokenizer.fingerprint

    def _request(self, context: str, continuation: str) -> Request:
        if _ANSWER in context:
            *before, answer = self.tokenizer.encode_pieces(
                [*context.split(_ANSWER), self.tokenizer.quote(continuation)]
            )
            request = Request([id for piece in before for id in piece], answer)
        else:
            request = request_of(self.tokenizer, context, continuation)
        room = max(1, self.max_length + 1 - len(request.continuation))
        return request._replace(context=request.context[-room:])

    def _context_ids(self, context: str) -> list[int]:
        """Ids of a text, BOS first, or of what the chat template made, which begins as it likes."""
        if _ANSWER in context:
            return [id for piece in self.tokenizer.encode_pieces(context.split(_ANSWER)) for id in piece]
        return self.tokenizer.begun(self.tokenizer.encode(context)) or [self.tokenizer.prefix_token_id]

    def _windows(self, text: str) -> list[Request]:
        tokenizer, length = self.tokenizer, self.max_length
        windows = get_rolling_token_windows(tokenizer.encode(text), tokenizer.prefix_token_id, length, context_len=1)
        return [Request(*make_disjoint_window(window)) for window in windows]

    def _generate(self, context: str, wanted: Generation) -> str:
        new_tokens = min(wanted.max_new_tokens, self.max_length // 2)
        ids = self._context_ids(context)[new_tokens - self.max_length :]
        pieces = stream(self.model, self.tokenizer, ids, new_tokens, wanted.how, self.generator)
        return until(pieces, wanted.until)


@contextlib.contextmanager
def _named(request: Instance) -> Iterator[None]:
    """Puts the task and the row, as the harness counts them from 0, in front of a UserError from the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"task {request.task_name}, row {request.doc_id}: {error}") from None


def _texts(*values: object) -> list[str]:
    """The text that a task made of a row. Raises UserError where it is none."""
    texts = [value for value in values if isinstance(value, str) and is_utf8(value)]
    if len(texts) < len(values):
        raise UserError(f"the task must make texts of a row, got {values}")
    return texts


def run_tasks(
    model: BitNetForCausalLM,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
) -> dict[str, Figures]:
    """The harness's metrics of every task and group, under its own names, as {"arc_easy": {"acc,none": 0.25, ...}}.

    Args:
        tasks: names of tasks, groups or tags, or globs of them.
        include_path: a folder with tasks of one's own (YAML), which come before the harness's.
        num_fewshot: examples in front of each question; the task's own number if absent.
        limit: rows of each task; all if absent.
        chat: prompts are sent through the chat template.

    Raises:
        UserError: no such task, its data is out of reach, its YAML, code or rows are wrong.
    """
    try:
        results = _evaluate(BitNetLM(model, tokenizer), tasks, include_path, num_fewshot, limit, chat)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if _is_ours(error):
            raise
        raise _fault_of_task(error, tasks) from error
    return dict(results["results"])


def _evaluate(
    model: BitNetLM,
    tasks: Sequence[str],
    include_path: Path | None,
    num_fewshot: int | None,
    limit: int | None,
    chat: bool,
) -> dict[str, Any]:
    manager = _task_manager(tasks, include_path)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the figures
        results: dict[str, Any] = simple_evaluate(
            model=model,
            tasks=manager.match_tasks(list(tasks)),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=chat,
            log_samples=False,
        )
    return results


def _frames(error: Exception) -> list[FrameType]:
    """Where an exception passed, the place that raised it last."""
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]


def _is_ours(error: Exception) -> bool:
    """Whether this package failed, before it called the harness or called by it, and not what the harness ran."""
    ours = [str(frame.f_globals.get("__name__")).partition(".")[0] == _OURS for frame in _frames(error)]
    return False not in ours or any(ours[ours.index(False) :])


def _fault_of_task(error: Exception, tasks: Sequence[str]) -> UserError:
    """The error of a task's YAML, code or rows, with the place, which helps who wrote code of their own."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    said = "; ".join(": ".join(filter(None, (type(cause).__name__, str(cause)))) for cause in causes)
    where = f"{Path(place.filename).name}:{place.lineno}"
    name = _task_of(error) or ", ".join(tasks)
    return UserError(f"--lm-eval {name}: the task failed at {where} ({said}); check its YAML, its code and its rows")


def _task_of(error: Exception) -> str | None:
    """The name of the task that was read or run, as the harness's functions hold it."""
    for frame in reversed(_frames(error)):
        for value in frame.f_locals.values():
            name = value.name if isinstance(value, Entry) else None
            if isinstance(value, Task):
                name = getattr(getattr(value, "_config", None), "task", None)  # it may be half made
            if name is not None:
                return str(name)
    return None


def _task_manager(tasks: Sequence[str], include_path: Path | None) -> TaskManager:
    """Knows the tasks; the harness's own, which take many seconds to find, where one's own do not suffice."""
    if include_path is not None:
        if not include_path.is_dir():
            raise UserError(f"--include-path {include_path}: no such folder; name one that holds task YAMLs")
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        found = [own.match_tasks([name]) for name in tasks]
        if all(found) and {name for names in found for name in names} <= set(own.all_subtasks):
            return own
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in tasks:
        if not manager.match_tasks([name]):
            unread = "" if include_path is None else _unread(include_path)
            raise UserError(f"--lm-eval {name}: no such task, group or tag; `lm-eval ls tasks` lists them{unread}")
    return manager


def _unread(folder: Path) -> str:
    """Names the first YAML file that the harness passed over because it cannot be read."""
    for file in sorted(folder.glob("**/*.yaml")):
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:  # of any type: as the harness does
            return f"; {file} cannot be read: {error}"
    return ""
