"""Jinja for templates from strangers: a sandbox with bounds on what one rendering may take.

    steps       1,000,000, 20 for each character of the conversation and 20 for each pair of its messages (a template
                may look at all earlier ones for each), of the latter at most 25,000,000. A block that runs (the body of
                a loop or of a macro, a branch) is one step, so is each part of a list that is made, compared or
                written, and every 500 characters of a text
    a text      10,000,000 characters, and 10 for each of the conversation, be it written or made on the way

Steps are counted, not seconds: the same template ends in the same place on every machine. What makes a long text or a
large number of short ones (`*`, `center`, `replace`) is refused before it is done.

    {% for %}, {% if %}, {% macro %}      the generated code counts at the beginning of each body
    ~ + * ** % [a:b] == in (a, b) {{ }}   the generated code hands their values to the environment
    filters, tests, methods               are wrapped, or pass through `call`
"""

import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from functools import wraps
from typing import Any, NamedTuple, NoReturn, cast

from jinja2 import TemplateRuntimeError, nodes
from jinja2.compiler import CodeGenerator, Frame, operators
from jinja2.runtime import Context, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_STEPS, _STEPS_EACH = 1_000_000, 20
_STEPS_OF_PAIRS = 25_000_000  # half a minute or two: 1,500 messages have them
_LONGEST, _LONGEST_EACH = 10_000_000, 10
_STEPS_OF_CALL = 5
_AT_ONCE = 500  # characters that count as one step
_BITS = 1 << 16  # of a whole number

_TEXTS = (str, bytes)
_PARTED = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)
_SIZED = (*_PARTED, dict, range)
_BUILTIN = (*_TEXTS, int, list, tuple, dict)
# Filters that look at the first level of a value alone, or hand its parts on one by one.
_SHALLOW = {"attr", "count", "d", "default", "first", "items", "last", "length", "list", "reverse"} | {
    "map", "select", "reject", "selectattr", "rejectattr", "batch", "slice"
}  # fmt: skip
_MAKE_TEXT = {"capitalize", "indent", "join", "lower", "replace", "string", "title", "tojson", "trim", "upper"}
_COMPARING = ("in", "eq", "equalto", "==", "ne", "!=", "lt", "lessthan", "<", "le", "<=", "gt", "greaterthan", ">")
_PERCENT = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\d+|\*)?(?:\.(\d+|\*))?")
_BRACES = re.compile(r"\{[^{}]*:[^{}]*?(\d+|\{)(?:\.(\d+|\{))?|\{")


class Weight(NamedTuple):
    """How large a value is with all that it holds."""

    characters: int
    parts: int
    depth: int


def _filled(fields: re.Pattern[str], text: str, weight: Weight) -> int:
    """Characters of a text whose fields are filled; a width that is a value itself counts as beyond all bounds."""
    found = [width for match in fields.finditer(text) for width in match.groups(default="0")]
    widths = sum(int(width) if width.isdigit() and len(width) < 10 else _LONGEST**2 for width in found)
    return len(text) + widths + len(found) * weight.characters


def _number(_: Weight, _value: object, number: object = 0, *_rest: object, **named: object) -> int:
    return max((abs(value) for value in (number, *named.values()) if isinstance(value, int)), default=0)


def _replaced(_: Weight, value: Any, old: Any, new: Any, *_rest: object, **_named: object) -> int:
    text = value if isinstance(value, _TEXTS) else str(value)
    return text.count(old) * len(new)


def _indented(_: Weight, value: object, width: int | str = 4, *_rest: object, **_named: object) -> int:
    return (str(value).count("\n") + 1) * (len(width) if isinstance(width, str) else abs(width))


def _as_json(weight: Weight, _value: object, *rest: object, **named: object) -> int:
    given = [*rest, *named.values()]
    widths = [abs(part) if isinstance(part, int) else len(str(part)) for part in given if part is not None]
    return weight.parts * weight.depth * max(widths, default=0)


def _wrapped(weight: Weight, value: object, *rest: object, **named: object) -> int:
    longest = max((len(part) for part in (*rest, *named.values()) if isinstance(part, str)), default=1)
    return len(str(value)) * longest


# What a filter or a method makes of (weight of all arguments, value, arguments): characters, at most. Others make
# no more than a few times what they are given.
_GROWTH: Mapping[str, Callable[..., int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "to_bytes", "batch", "slice", "round", "truncate"), _number),
    "expandtabs": lambda _, value, tabsize=8: len(value) * abs(tabsize),
    "replace": _replaced,
    "indent": _indented,
    "tojson": _as_json,
    "join": lambda weight, *given, **_named: (
        weight.parts * max((len(x) for x in given if isinstance(x, _TEXTS)), default=0)
    ),
    # lists are added one after the other, each time anew
    "sum": lambda weight, _value, attribute=None, start=0: 0 if isinstance(start, int | float) else weight.parts**2,
    **dict.fromkeys(("wordwrap", "urlize"), _wrapped),
    "translate": lambda weight, value, _table: len(value) * weight.characters,
    "format": lambda weight, value, *_rest, **_named: max(_filled(p, str(value), weight) for p in (_PERCENT, _BRACES)),
    "format_map": lambda weight, value, _fields: _filled(_BRACES, value, weight),
}


class _Generator(CodeGenerator):
    """Writes the code of a template, and what counts into it."""

    def blockvisit(self, body: Iterable[nodes.Node], frame: Frame) -> None:
        self.writeline("environment.steps -= 1")
        self.writeline("if environment.steps < 0: environment.refuse_steps()")
        super().blockvisit(body, frame)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:  # noqa: N802
        if node.test is not None:  # {% for a in b if c %} runs no block where c is false
            node.test = nodes.And(nodes.EnvironmentAttribute("step"), node.test)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.joined(context, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:  # noqa: N802
        self.write("environment.take(")
        self.visit(node.left, frame)
        self.write(" + ")
        self.visit(node.right, frame)
        self.write(")")

    def visit_Operand(self, node: nodes.Operand, frame: Frame) -> None:  # noqa: N802
        if isinstance(node.expr, nodes.Const):
            super().visit_Operand(node, frame)
        else:
            self.write(f" {operators[node.op]} ")
            self._handed("weighed", lambda: self.visit(node.expr, frame))

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx == "load":  # it may be a key, whose hash is made of all that it holds
            self._handed("weighed", lambda: super(_Generator, self).visit_Tuple(node, frame))
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        if isinstance(node.arg, nodes.Slice):
            self._handed("take", lambda: super(_Generator, self).visit_Getitem(node, frame))
        else:
            super().visit_Getitem(node, frame)

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        super()._output_child_pre(node, frame, finalize)
        self.write("" if _is_text(node) else "environment.weighed(")

    def _output_child_post(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        self.write("" if _is_text(node) else ")")
        super()._output_child_post(node, frame, finalize)

    def _handed(self, method: str, write: Callable[[], None]) -> None:
        self.write(f"environment.{method}(")
        write()
        self.write(")")


def _is_text(node: nodes.Expr) -> bool:
    return isinstance(node, nodes.Concat) or (isinstance(node, nodes.Filter) and node.name in _MAKE_TEXT)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with bounds. It renders one conversation at a time, after `allow` was told its size."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, filters: Mapping[str, Callable[..., Any]], **options: Any) -> None:
        super().__init__(**options)
        self.allow(0)
        self.filters = {name: self._counted(name, f) for name, f in {**self.filters, **filters}.items()}
        self.tests |= {name: self._counted(name, cast(Callable[..., Any], self.tests[name])) for name in _COMPARING}
        del self.globals["lipsum"]  # random text, as much as is asked for

    def allow(self, characters: int, messages: int = 0) -> None:
        """Begins to count anew, for a conversation of so many characters and messages."""
        pairs = messages * (messages - 1) // 2
        self.steps = self._steps = _STEPS + _STEPS_EACH * characters + min(_STEPS_EACH * pairs, _STEPS_OF_PAIRS)
        self._longest = _LONGEST + _LONGEST_EACH * characters

    @property
    def step(self) -> bool:
        """True; to read it is a step."""
        self._spend(1)
        return True

    def _spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            self.refuse_steps()

    def refuse_steps(self) -> NoReturn:
        """Raises the error of a template that runs too long."""
        raise TemplateRuntimeError(
            f"it runs for more than {self._steps:,} steps, as many as a conversation of this size has"
        )

    def _reserve(self, characters: int) -> None:
        """Refuses a text, or a number of parts, that is too long to be made."""
        if characters > self._longest:
            raise TemplateRuntimeError(
                f"it makes a text of more than {self._longest:,} characters, the most for a conversation of this size"
            )
        self._spend(characters // _AT_ONCE)

    def take(self, value: Any) -> Any:
        """A value that was made, counted at its first level; of what is still to be made the parts, as they come."""
        if type(value) is str and len(value) < _AT_ONCE:
            return value
        if isinstance(value, _TEXTS):
            self._reserve(len(value))
        elif isinstance(value, int):
            _check_bits(value.bit_length())
        elif isinstance(value, _SIZED):
            self._spend(len(value))
        elif isinstance(value, Iterator):
            return (part for part in value if self.step)
        return value

    def weighed(self, value: Any) -> Any:
        """A value that is about to be written, compared or hashed with all that it holds."""
        if type(value) is not str:
            self.weigh(value)
        elif len(value) >= _AT_ONCE:
            self._reserve(len(value))
        return value

    def weigh(self, *values: object) -> Weight:
        """Counts values with all that they hold, level by level; what they hold twice counts twice."""
        characters, parts, depth, level = 0, 0, 0, list(values)
        while level:
            depth, parts, inner = depth + 1, parts + len(level), list[Any]()
            for value in level:
                if isinstance(value, _TEXTS):
                    characters += len(value)
                elif isinstance(value, Namespace):
                    inner.append(dict(value._Namespace__attrs))
                elif isinstance(value, dict):
                    self._spend(len(value))
                    inner += value.keys()
                    inner += value.values()
                elif isinstance(value, _PARTED):
                    self._spend(len(value))
                    inner += value
            level = inner
            self._spend(1)
        self._reserve(characters)
        return Weight(characters, parts, depth)

    def joined(self, context: Context, parts: Sequence[Any]) -> str:
        """a ~ b"""
        for part in parts:
            self.weighed(part)
        text: str = self.take((markup_join if context.eval_ctx.autoescape else str_join)(parts))
        return text

    def concat(self, pieces: Iterable[str]) -> str:
        """The text of a template, a macro or a block."""
        pieces = list(pieces)
        self._reserve(sum(map(len, pieces)))
        return "".join(pieces)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """left * right, left ** right, left % right."""
        self._check_operands(operator, left, right)
        return self.take(self.binop_table[operator](left, right))

    def _check_operands(self, operator: str, left: Any, right: Any) -> None:
        if operator == "%":
            if isinstance(left, _TEXTS):
                self._reserve(_filled(_PERCENT, str(left), self.weigh(left, right)))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            _check_bits(bits * right if operator == "**" else bits + right.bit_length())
        elif operator == "*":
            sized, times = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(times, int) and isinstance(sized, (*_TEXTS, list, tuple)):
                self._reserve(len(sized) * times)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function, a macro, or a method of a value."""
        method = getattr(obj, "__wrapped__", obj)  # `format` comes wrapped
        receiver = getattr(method, "__self__", None)
        if isinstance(receiver, _BUILTIN):
            self._check_call(method.__name__, receiver, args, kwargs)
        else:
            self._spend(_STEPS_OF_CALL)
        return self.take(super().call(context, obj, *args, **kwargs))

    def _check_call(self, name: str, value: Any, rest: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Refuses what a filter or a method of a value would make too much of."""
        self._spend(_STEPS_OF_CALL)
        if growth := _GROWTH.get(name):
            weight = Weight(0, 0, 0) if name in _SHALLOW else self.weigh(value, *rest, *named.values())
            self._reserve(growth(weight, value, *rest, **named))
        elif name not in _SHALLOW:
            for given in (value, *rest, *named.values()):
                self.weighed(given)

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        first = 1 if hasattr(function, "jinja_pass_arg") else 0  # behind the context

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not kwargs and len(args) == first + 1 and type(args[first]) is str and len(args[first]) < _AT_ONCE:
                self.steps -= _STEPS_OF_CALL  # the most frequent case by far
                return function(*args)
            given = list(args)
            if name in ("join", "sum") and isinstance(given[first], Iterator):
                given[first] = list(given[first])
            self._check_call(name, given[first], given[first + 1 :], kwargs)
            return self.take(function(*given, **kwargs))

        return run


def _check_bits(bits: int) -> None:
    if bits > _BITS:
        raise TemplateRuntimeError(f"it makes a number of more than {_BITS:,} bits")
