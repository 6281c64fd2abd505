"""Whether a completion is right: numbers, letters, texts, formulas and functions."""

from __future__ import annotations

import sys
from fractions import Fraction

import pytest

from moe_interp.errors import ConfigError, DataError
from moe_interp.experiments.pass_at_k.checkers import checker_of, choice_in, last_box, number_in
from moe_interp.experiments.pass_at_k.problems import Problem


def problem(answer: str) -> Problem:
    return Problem("p", "all", "question", answer)


@pytest.mark.parametrize(
    "text, number",
    [
        ("The answer is 42.", 42),
        ("3+4=7\nAnswer: 7", 7),
        ("It costs $1,234.50 in all", Fraction("1234.5")),
        ("-3", -3),
        ("x = -3", -3),
        ("x = +3", 3),
        ("5-3", 3),
        ("so (x)-3", 3),
        ("\u22127", -7),
        ("between 10 and 1,000,000", 1_000_000),
        ("1,2", 2),
        ("a list: 1, 2, 3", 3),
        (".5", Fraction(1, 2)),
        ("1/2", Fraction(1, 2)),
        ("-1/2", Fraction(-1, 2)),
        ("1.5e3", 1500),
        ("50%", 50),
        ("7/0", None),
        ("no number", None),
        ("", None),
        ("1 2 3 #### 18 eggs, of 20", 18),
        ("#### 3\n#### -4,000\n9", -4000),
        ("#### none, 3", 3),
        (r"so \boxed{17} of 20", 17),
        (r"\boxed{3}, no, \boxed{4} #### 5", 4),
        (r"\boxed{\frac{3}{4}}", Fraction(3, 4)),
        (r"\boxed{-\frac{3}{4}}", Fraction(-3, 4)),
        (r"\boxed{x = 5}", 5),
        (r"\boxed{12{,}345}", 12345),
        (r"\boxed{1\,000}", 1000),
        (r"\boxed{- 3}", -3),
        (r"7 \boxed{x}", None),
        (r"\boxed{8} and \boxed{9", 8),
        ("9" * 400, None),
        ("1e99999", None),
        ("1e-2", Fraction(1, 100)),
    ],
)
def test_number_of_a_text(text: str, number: Fraction | int | None) -> None:
    assert number_in(text) == number


@pytest.mark.parametrize(
    "text, letter",
    [
        ("C", "C"),
        (" c)", "C"),
        ("(B)", "B"),
        ("B.", "B"),
        ("The answer is (C).", "C"),
        ("The answer is C, since A is wrong", "C"),
        ("Answer: D", "D"),
        ("**Answer:** B", "B"),
        ("answer is a dog", None),
        ("A dog ran. I saw it. So B", "B"),
        ("First (A), no: (D) it is", "D"),
        (r"\boxed{B}", "B"),
        (r"\boxed{\text{(C)}}", "C"),
        (r"(A) or \boxed{d}", "D"),
        ("It's nothing", None),
        ("#### E", "E"),
        ("", None),
    ],
)
def test_letter_of_a_text(text: str, letter: str | None) -> None:
    assert choice_in(text) == letter


def test_boxes_hold_braces_and_unfinished_ones_do_not_count() -> None:
    assert last_box(r"\boxed{a{b}c} \boxed{d{e}") == "a{b}c"
    assert last_box(r"\boxed {1}") == "1"
    assert last_box("none") is None


def test_named_checkers_compare_with_the_answer() -> None:
    assert checker_of("number").function("so 0.50", problem("1/2"))
    assert checker_of("number").function("#### 1,000", problem("it is #### 1000"))
    assert not checker_of("number").function("no idea", problem("3"))
    assert checker_of("choice").function("I think (B)", problem("B"))
    assert not checker_of("choice").function("I think so", problem("B"))
    assert checker_of("exact").function(" yes\nmore", problem(" yes"))
    assert not checker_of("exact").function("yes, more", problem("yes"))


def test_answers_that_a_checker_cannot_read_are_refused() -> None:
    with pytest.raises(DataError, match=r"problem 'p': answer 'none' without a number.*another checker \(is_correct\)"):
        checker_of("number").refuse(problem("none"))
    with pytest.raises(DataError, match="without a letter"):
        checker_of("choice").refuse(problem("12"))
    checker_of("exact").refuse(problem("none"))


def test_functions_and_unknown_names() -> None:
    made = checker_of(test_functions_and_unknown_names)
    assert made.name.endswith("test_functions_and_unknown_names")
    with pytest.raises(ConfigError, match=r"is_correct='numbre'.*number, choice, exact, math, or a function"):
        checker_of("numbre")
    with pytest.raises(ConfigError, match="is_correct of type int"):
        checker_of(3)  # type: ignore[arg-type]


def test_formulas_by_math_verify() -> None:
    pytest.importorskip("math_verify")
    check = checker_of("math").function
    assert check(r"so it is $\boxed{\frac{\sqrt{8}}{2}}$", problem(r"\sqrt{2}"))
    assert check(r"\boxed{x^2+2x+1}", problem("(x+1)^2"))
    assert check(r"\boxed{0.5}", problem(r"$\frac{1}{2}$"))
    assert not check(r"\boxed{3}", problem(r"\sqrt{2}"))
    assert not check("no formula", problem(r"\sqrt{2}"))


def test_a_formula_that_takes_too_long_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("math_verify")
    from math_verify.errors import TimeoutException

    def endless(*given: object, **options: object) -> bool:
        raise TimeoutException("Timeout during comparison")

    monkeypatch.setattr(library, "verify", endless)
    with pytest.raises(TimeoutError, match=r"beside 'x': no answer in 30 s"):
        checker_of("math").function(r"\boxed{x}", problem("x"))


def test_an_answer_that_cannot_be_read_is_no_wrong_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("math_verify")
    own = library.parse

    def parse(text: str, **options: object) -> object:
        if "unreadable" in text:
            raise RuntimeError("no such command")
        return own(text, **options)

    monkeypatch.setattr(library, "parse", parse)
    check = checker_of("math").function
    assert not check("unreadable", problem("x"))
    with pytest.raises(RuntimeError, match="no such command"):
        check(r"\boxed{x}", problem("unreadable"))


def test_formulas_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    from moe_interp.experiments.pass_at_k import checkers

    checkers.math_verify.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'moe-interp\[math\]'"):
        checker_of("math")
    checkers.math_verify.cache_clear()
