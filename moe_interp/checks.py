"""What every part checks alike: whole numbers, and names that end up in files, results and terminals."""

from __future__ import annotations

import unicodedata
from numbers import Integral
from operator import index
from typing import Any

from moe_interp.errors import ConfigError, DataError, MoEInterpError

_NOT_IN_A_NAME = {"Cc": "control character", "Cs": "half of a surrogate pair", "Zl": "line break", "Zp": "line break"}


def check_whole(
    value: Any,
    name: str,
    low: int | None = None,
    high: int | None = None,
    error: type[MoEInterpError] = ConfigError,
) -> int:
    """A whole number as Python's int: of Python, numpy or a tensor; never a bool, a float or a text.

    Args:
        value: What was given.
        name: The argument's name, for the error.
        low, high: The smallest and the largest that is accepted, if any.
        error: The exception to raise.

    Raises:
        MoEInterpError: (of the class ``error``) something else, or a number outside of the bounds.
    """
    number = as_whole(value)
    if number is None or (low is not None and number < low) or (high is not None and number > high):
        bounds = [f"of at least {low}" if low is not None else "", f"of at most {high}" if high is not None else ""]
        expected = " ".join(["a whole number", " and ".join(part for part in bounds if part)]).strip()
        remedy = f"Pass {name} as an integer." if number is None else f"Choose another {name}."
        raise error(f"{name}={repr(value)[:60] if number is None else _digits(number)}", expected, remedy)
    return number


def _digits(number: int) -> str:
    """A number in digits; a very long one by its bits, since Python refuses to write out thousands of digits."""
    return str(number) if number.bit_length() <= 200 else f"a number of {number.bit_length()} bits"


def as_whole(value: Any) -> int | None:
    """A whole number as Python's int; None for anything else, bools and floats without a fraction among it."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith(("bool", "bool_")):
        return None
    try:
        return index(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def check_seed(value: Any, name: str = "seed") -> int:
    """A seed: a whole number of 64 bits, negative ones included.

    Raises:
        ConfigError: something else.
    """
    return check_whole(value, name, -(2**63), 2**63 - 1)


def check_name(value: Any, what: str, is_file: bool = False) -> str:
    """An id, a domain or a model's name as a text that files, results and terminals can hold.

    Args:
        value: A text, or a whole number, which is written out.
        what: What it is and where it stands, for the error, such as ``items.jsonl, line 3: id``.
        is_file: It becomes the name of a file: without slashes, and no dot first.

    Raises:
        DataError: neither of these, an empty text, or one with a control character (NUL, line breaks and the escape
            character among them) or half of a surrogate pair.
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        return _digits(int(value))
    if not isinstance(value, str):
        expected = "a text, or a whole number"
        raise DataError(f"{what} {str(value)[:40]!r} of type {type(value).__name__}", expected, "Write it as a text.")
    for character in value:
        if kind := _NOT_IN_A_NAME.get(unicodedata.category(character)):
            given = f"{what} {value[:60]!r} with the {kind} {character!r}"
            raise DataError(given, "a name without control characters, of whole characters", "Remove the character.")
    if not any(unicodedata.category(character)[0] in "LNPS" for character in value):
        raise DataError(f"{what} {str(value)[:40]!r}", "a name of at least one character that shows", "Name it.")
    if is_file and (value.startswith(".") or set(value) & {"/", "\\"}):
        given = f"{what} {value[:60]!r}, which names a file"
        raise DataError(given, "a name without slashes and without a dot at its start", "Rename it.")
    return str(value)


def check_text(text: str, what: str) -> str:
    """A text that can be written as UTF-8.

    Raises:
        DataError: half of a surrogate pair in it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        given = f"{what} with {text[error.start]!r}, half of a surrogate pair"
        raise DataError(given, "whole characters", "Remove it.") from None
    return text
