"""Whether a completion is right: by its number, its letter, its formula, or a user's own function."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

from moe_interp.errors import ConfigError, DataError
from moe_interp.experiments.pass_at_k.problems import Problem

Checker = Callable[[str, Any], bool]
"""``(completion, problem) -> bool``."""

LONGEST_NUMBER = 300  # characters; longer ones are no answer
_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(rf"(?P<sign>(?<![\w)\]])[+-])?\$?(?P<digits>{_UNSIGNED})(?:[eE](?P<power>[+-]?[0-9]+))?")
_FRACTION = re.compile(rf"{_NUMBER.pattern}\s*/\s*(?P<below>[0-9]+(?:\.[0-9]+)?)(?![\w/])")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


@dataclass(frozen=True)
class NamedChecker:
    """A checker with its name, and what it asks of an answer.

    Attributes:
        name: By which a stored run knows it.
        function: ``(completion, problem) -> bool``.
        refuse: Raises a ``DataError`` for a problem whose answer it cannot compare with.
    """

    name: str
    function: Checker
    refuse: Callable[[Problem], None] = lambda problem: None


def checker_of(given: str | Checker) -> NamedChecker:
    """A checker by name, "number", "choice", "exact" or "math"; or a function's.

    Raises:
        ConfigError: an unknown name, no function, or "math" without its library.
    """
    if isinstance(given, str):
        if given not in CHECKERS:
            raise ConfigError(f"is_correct={given!r}", f"one of {', '.join(CHECKERS)}, or a function", "Correct it.")
        if given == "math":
            math_verify()
        return CHECKERS[given]
    if not callable(given):
        expected = f"one of {', '.join(CHECKERS)}, or a function of a completion and its problem"
        raise ConfigError(f"is_correct of type {type(given).__name__}", expected, "Pass a function.")
    name = getattr(given, "__qualname__", type(given).__qualname__)
    return NamedChecker(f"{getattr(given, '__module__', '')}.{name}", given)


LONGEST_CHECK = 30
"""Seconds that comparing two formulas may take; the first one loads the library's grammar."""


def same_number(completion: str, problem: Problem) -> bool:
    """Whether a completion's number is exactly the answer's, whatever the way it is written.

    Of a text, the number is the last one in its last ``\\boxed{}``; else the first after its last ``####``; else the
    last one. Read are signs, decimals, commas between thousands, exponents, ``a/b`` and ``\\frac{a}{b}``; compared are
    rational numbers: 0.5 = 1/2. A minus after a letter, a digit or a bracket is taken as an operator. A box without a
    number is a wrong answer. Units and percent signs are passed over.

    Source: derived; what it does not show is whether the way to the number was right.
    """
    found = number_in(completion)
    return found is not None and found == number_in(str(problem.answer))


def same_choice(completion: str, problem: Problem) -> bool:
    """Whether a completion chooses the letter of the answer.

    Its letter is that of its last ``\\boxed{}``; else the last after "answer is", "answer:" or "####"; else the last
    capital letter in brackets; else the last one that stands alone.

    Source: derived.
    """
    found = choice_in(completion)
    return found is not None and found == choice_in(str(problem.answer))


def same_text(completion: str, problem: Problem) -> bool:
    """Whether the first line of a completion is the answer's text, white space at its ends aside."""
    return completion.strip().split("\n")[0].strip() == str(problem.answer).strip()


def same_formula(completion: str, problem: Problem) -> bool:
    """Whether a completion's last formula equals the answer mathematically, as math-verify finds.

    A completion without a formula that can be read is a wrong answer. Errors of reading the problem's own answer are
    raised.

    Raises:
        ConfigError: the library is not installed.
        TimeoutError: reading or comparing took longer than ``LONGEST_CHECK`` seconds, which says nothing of the answer.
    """
    library, answer = math_verify(), str(problem.answer)

    def read(text: str) -> Any:
        return library.parse(text, parsing_timeout=_limit(), raise_on_error=True)

    try:
        gold = read(answer if "\\boxed" in answer or "$" in answer else f"${answer}$")
        try:
            return bool(library.verify(gold, read(completion), timeout_seconds=_limit(), raise_on_error=True))
        except Exception:  # the parser's and sympy's own, of any class
            return False
    except library.errors.TimeoutException:
        raise TimeoutError(f"{completion[-40:]!r} beside {answer!r}: no answer in {LONGEST_CHECK} s") from None


def _limit() -> int | None:
    """Seconds: the library's limits are signals, which only the main thread may set."""
    return LONGEST_CHECK if threading.current_thread() is threading.main_thread() else None


def number_in(text: str) -> Fraction | None:
    """The number that a text gives as its answer: see :func:`same_number`; None where there is none."""
    text = _plain(text)
    if (box := last_box(text)) is not None:
        found = _numbers(re.sub(r"(?<=^[+-])\s+", "", box.strip()))
        return found[-1] if found else None
    if "####" in text:
        found = _numbers(text.rpartition("####")[2])
        return found[0] if found else None
    found = _numbers(text)
    return found[-1] if found else None


def choice_in(text: str) -> str | None:
    """The letter that a text chooses: see :func:`same_choice`; None where there is none."""
    if (box := last_box(text)) is not None:
        text = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*", "", box).strip("{}() .")
        return text.upper() if re.fullmatch(r"[A-Za-z]", text) else _last(_ALONE, text)
    if re.fullmatch(r"[\s*(\[]*[A-Za-z][\s*)\].:]*", text):
        return re.sub(r"[^A-Za-z]", "", text).upper()
    return _last(_ANSWER, text) or _last(_BRACKETS, text) or _last(_ALONE, text)


_ANSWER = re.compile(r"(?i:answer(?:\s+is)?|####)\s*:?[\s*]*(?i:option\s+|choice\s+)?[*(\[]*([A-Z])(?![A-Za-z'])")
_BRACKETS = re.compile(r"[(\[]([A-Z])[)\]]")
# "A" and "I" are words where one follows
_ALONE = re.compile(r"(?<![\w'])([B-HJ-Z]|[AI](?!\s+[a-z]))(?![\w'])")


def last_box(text: str) -> str | None:
    """What the last complete ``\\boxed{}`` of a text holds; None where there is none."""
    for start in reversed([match.end() for match in _BOX.finditer(text)]):
        depth = 1
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[start:place]
    return None


def _plain(text: str) -> str:
    """With one minus sign, and without LaTeX's spaces inside of numbers."""
    text = text.replace("\u2212", "-").replace("\uff0d", "-").replace("{,}", ",").replace("\\$", "$")
    return re.sub(r"(?<=[0-9])(?:\\[,!; ])(?=[0-9])", "", text)


def _numbers(text: str) -> list[Fraction]:
    text = _LATEX_FRACTION.sub(r" \1/\2 ", text)
    text = re.sub(r"([+-])\s+(?=[0-9.]+/)", r"\1", text) if re.match(r"\s*[+-]\s", text) else text
    found, place = [], 0
    while match := _NUMBER.search(text, place):
        fraction = _FRACTION.match(text, match.start())
        number = _value(fraction or match)
        if number is not None:
            found.append(number)
        place = (fraction or match).end()
    return found


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > LONGEST_NUMBER or len(match["power"] or "") > 4:
        return None
    value = Fraction(match["digits"].replace(",", "")) * Fraction(10) ** int(match["power"] or 0)
    below = Fraction(match.groupdict().get("below") or 1)
    return None if below == 0 else (-value if match["sign"] == "-" else value) / below


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.findall(text)
    return found[-1] if found else None


def _needs(read: Callable[[str], Any], kind: str) -> Callable[[Problem], None]:
    def refuse(problem: Problem) -> None:
        if read(str(problem.answer)) is None:
            given = f"{problem.place}: answer {str(problem.answer)[:40]!r} without a {kind}"
            raise DataError(
                given, f"an answer that gives a {kind}", "Correct it, or choose another checker (is_correct)."
            )

    return refuse


@cache
def math_verify() -> Any:
    """The library, with its errors.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import math_verify.errors
    except ImportError as error:
        raise ConfigError(
            'is_correct="math" without math-verify',
            "the library that compares formulas",
            "Install it: pip install 'moe-interp[math]'.",
        ) from error
    return math_verify


CHECKERS = {
    "number": NamedChecker("number", same_number, _needs(number_in, "number")),
    "choice": NamedChecker("choice", same_choice, _needs(choice_in, "letter")),
    "exact": NamedChecker("exact", same_text),
    "math": NamedChecker("math", same_formula),
}
