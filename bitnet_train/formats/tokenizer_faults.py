"""Faults of the tokenizers library: plain `Exception`s, and panics of its Rust code, which are no `Exception`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bitnet_train.errors import UserError


@contextmanager
def tokenizer_faults(message: Callable[[BaseException], str]) -> Iterator[None]:
    """Makes a UserError of what the library raises about foreign content; any other error passes."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise UserError(message(error)) from None
