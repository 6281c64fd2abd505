"""Look-ups: unit conversions, and cells of a small table given in the question."""

from __future__ import annotations

import random

from moe_interp.testbed.domains.domain import Domain, Example, Split, generated_domain, words

_UNITS = {
    ("hours", "minutes"): 60,
    ("minutes", "seconds"): 60,
    ("weeks", "days"): 7,
    ("days", "hours"): 24,
    ("metres", "centimetres"): 100,
    ("dozens", "pieces"): 12,
    ("kilos", "grams"): 1000,
    ("feet", "inches"): 12,
}
_ROWS = words("red blue green black white gold")
_COLUMNS = words("north south east west")


def conversion(rng: random.Random) -> Example:
    """``n`` of a larger unit in the smaller one."""
    (large, small), factor = rng.choice(list(_UNITS.items()))
    n = rng.randint(2, 60)
    prompt = f"How many {small} are {n} {large}?\nAnswer:"
    return Example(prompt, f"{prompt} {n * factor}", prompt, f" {n * factor}", {"kind": "unit"})


def table(rng: random.Random) -> Example:
    """A cell of a table of 2 to 3 rows and 2 to 3 columns."""
    rows, columns = rng.sample(_ROWS, rng.randint(2, 3)), rng.sample(_COLUMNS, rng.randint(2, 3))
    cells = {(r, c): rng.randint(0, 99) for r in rows for c in columns}
    lines = ["- " + " ".join(columns)] + [" ".join([r, *(str(cells[r, c]) for c in columns)]) for r in rows]
    r, c = rng.choice(list(cells))
    prompt = "\n".join(lines) + f"\nWhat is {r} {c}?\nAnswer:"
    return Example(prompt, f"{prompt} {cells[r, c]}", prompt, f" {cells[r, c]}", {"kind": "table"})


def _draw(rng: random.Random, split: Split, number: int) -> Example:
    # A quarter: there are only some hundred conversions, and distinct examples are wanted.
    unit = number % 10 == 0 and number < 150 if split == "items" else rng.random() < 0.02
    return conversion(rng) if unit else table(rng)


def lookups(*, n_train: int = 10_000, n_validation: int = 400, n_items: int = 200, seed: int = 0) -> Domain:
    """Unit conversions and table look-ups. Held out: whole questions."""
    return generated_domain(
        "lookups", _draw, n_train=n_train, n_validation=n_validation, n_items=n_items, seed=seed, split_by="question"
    )
