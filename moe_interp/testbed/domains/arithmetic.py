"""Arithmetic word problems with step-by-step solutions, graded by operand size and number of steps."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from moe_interp.testbed.domains.domain import Domain, Example, Split, generated_domain, words

LIMIT = 9999  # no value is larger
SIZES = ("small", "medium", "large")
# size -> range of what is added or taken away, range of factors; a number above 99 is never multiplied.
# A product of two numbers of two digits in one step is what a small model goes on getting wrong, and sometimes right.
_RANGES = {"small": ((2, 50), (2, 5)), "medium": ((11, 99), (2, 19)), "large": ((11, 299), (11, 99))}
_TRAIN_WEIGHTS = (1, 2, 3)
_NAMES = words("Ana Bo Cleo Dan Eva Finn Gus Hana Ivo Jo Kim Lea Max Nora Otto Pia")
_THINGS = words("apples books coins shells stamps cards beads stones")
_PHRASES = {
    "+": ("{n} buys {b} more.", "{m} gives {n} {b} {t}.", "{n} finds {b} {t}."),
    "-": ("{n} gives {b} {t} to {m}.", "{n} loses {b} {t}.", "{n} sells {b}."),
    "*": ("Then {n} makes it {b} times as many.", "{m} swaps them for {b} times as many."),
}


@dataclass(frozen=True)
class Problem:
    """A chain of operations on a start value. ``steps`` are (operation, operand)."""

    start: int
    steps: tuple[tuple[str, int], ...]
    size: str

    @property
    def key(self) -> str:
        """The computation itself: problems that differ in names and wording only are in the same split."""
        return f"{self.start}" + "".join(f"{op}{b}" for op, b in self.steps)

    @property
    def answer(self) -> int:
        return self.equations()[-1][3]

    def equations(self) -> list[tuple[int, str, int, int]]:
        """(left, operation, right, result) of each step."""
        value, rows = self.start, []
        for op, b in self.steps:
            result = apply(op, value, b)
            rows.append((value, op, b, result))
            value = result
        return rows

    def solution(self) -> str:
        """One equation a line, then ``Answer: n``."""
        return "".join(f"{a}{op}{b}={c}\n" for a, op, b, c in self.equations()) + f"Answer: {self.answer}"


def apply(op: str, a: int, b: int) -> int:
    """``a op b`` for one of ``+ - *``."""
    return a + b if op == "+" else a - b if op == "-" else a * b


def draw_problem(rng: random.Random, n_steps: int, size: str) -> Problem:
    """A problem of ``n_steps``: values stay in 0..9999, and products have factors below 100."""
    (low, high), (f_low, f_high) = _RANGES[size]
    value = start = rng.randint(low, min(high, 99))
    steps: list[tuple[str, int]] = []
    while len(steps) < n_steps:
        op = rng.choice("+-**")
        b = rng.randint(f_low, f_high) if op == "*" else rng.randint(low, high)
        result = apply(op, value, b)
        if 0 <= result <= LIMIT and not (op == "*" and not 2 <= value <= 99):
            steps.append((op, b))
            value = result
    return Problem(start, tuple(steps), size)


def word_problem(problem: Problem, rng: random.Random) -> str:
    """The question in words."""
    n, m = rng.sample(_NAMES, 2)
    t = rng.choice(_THINGS)
    told = [rng.choice(_PHRASES[op]).format(n=n, m=m, t=t, b=b) for op, b in problem.steps]
    return " ".join([f"{n} has {problem.start} {t}.", *told, f"How many {t} does {n} have?"])


def verify_solution(problem: Problem, solution: str) -> bool:
    """Whether a solution is right in every step: true equations in the problem's order, chained, and their last result.

    It reads the text and recomputes each equation, so it holds for a model's solution as for the generator's.
    """
    *lines, last = solution.strip().split("\n")
    value = problem.start
    if len(lines) != len(problem.steps) or last != f"Answer: {problem.answer}":
        return False
    for line, (op, b) in zip(lines, problem.steps):
        found = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", line)
        if found is None or (int(found[1]), found[2], int(found[3])) != (value, op, b):
            return False
        value = int(found[4])
        if value != apply(op, int(found[1]), b):
            return False
    return value == problem.answer


def final_answer(text: str) -> str | None:
    """The number after the last ``Answer:``, or None."""
    found = re.findall(r"Answer: *(-?\d+)", text)
    return found[-1] if found else None


def _draw(rng: random.Random, split: Split, number: int) -> Example:
    if split == "items":  # round the grades, so that each has the same number of items
        steps, size = number % 5 + 1, SIZES[number // 5 % 3]
    else:
        steps, size = rng.randint(1, 5), rng.choices(SIZES, _TRAIN_WEIGHTS)[0]
    problem = draw_problem(rng, steps, size)
    question, solution = word_problem(problem, rng), problem.solution()
    worked, last = solution.rsplit("\n", 1)[0].rsplit("=", 1)
    fields = {"steps": steps, "size": size, "operation": problem.steps[-1][0]}
    fields |= {"question": question + "\n", "solution": solution, "final_answer": str(problem.answer)}
    return Example(problem.key, f"{question}\n{solution}", f"{question}\n{worked}=", last, fields)


def arithmetic(*, n_train: int = 80_000, n_validation: int = 600, n_items: int = 300, seed: int = 0) -> Domain:
    """Word problems of 1 to 5 steps. Held out: whole computations (the chain of numbers), not single equations.

    An item's prompt is the question with the solution up to the last ``=``; its answer is that last result. Its fields
    hold ``question``, ``solution`` and ``final_answer`` for free generation, and the grade: ``steps``, ``size``.
    """
    sizes = {"n_train": n_train, "n_validation": n_validation, "n_items": n_items}
    return generated_domain("arithmetic", _draw, **sizes, seed=seed, split_by="computation")
