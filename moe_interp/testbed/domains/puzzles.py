"""Puzzles: put people in order, and draw conclusions from chains of 'all' and 'no'."""

from __future__ import annotations

import random
from itertools import pairwise

from moe_interp.testbed.domains.domain import Domain, Example, Split, generated_domain, words

_NAMES = words("Ada Bea Cal Dee Eli Fay Gil Hal Ida Jed Kai Lou Mia Ned Oli Pam")
_ORDERS = (
    ("taller", "shorter", "tallest", "shortest"),
    ("older", "younger", "oldest", "youngest"),
    ("faster", "slower", "fastest", "slowest"),
)
_KINDS = words("blips dops wugs zorks fims lurs taks nebs gorps pims yorts vexes")


def order_puzzle(rng: random.Random, n_people: int) -> Example:
    """``n_people`` in a hidden order, told by adjacent pairs in any order and direction; asked: one end of it."""
    people = rng.sample(_NAMES, n_people)  # from the most to the least
    more, less, most, least = rng.choice(_ORDERS)
    told = []
    for a, b in pairwise(people):
        told.append(f"{a} is {more} than {b}." if rng.random() < 0.5 else f"{b} is {less} than {a}.")
    rng.shuffle(told)
    word, answer = rng.choice(((most, people[0]), (least, people[-1])))
    prompt = " ".join([*told, f"Who is the {word}?"]) + "\nAnswer:"
    fields = {"kind": "order", "n_people": n_people}
    return Example(prompt, f"{prompt} {answer}", prompt, f" {answer}", fields)


def syllogism(rng: random.Random, n_links: int) -> Example:
    """A chain 'All A are B. All B are C.', its last link perhaps 'No', and a question: yes, no, or unknown.

    'unknown' asks the chain backwards (all A are B does not say that all B are A).
    """
    kinds = rng.sample(_KINDS, n_links + 1)
    answer = rng.choice(("yes", "no", "unknown"))
    told = [f"All {a} are {b}." for a, b in pairwise(kinds)]
    if answer == "no":
        told[-1] = f"No {kinds[-2]} are {kinds[-1]}."
    rng.shuffle(told)
    first, last = (kinds[-1], kinds[0]) if answer == "unknown" else (kinds[0], kinds[-1])
    prompt = " ".join([*told, f"Are all {first} also {last}?"]) + "\nAnswer:"
    fields = {"kind": "syllogism", "n_links": n_links}
    return Example(prompt, f"{prompt} {answer}", prompt, f" {answer}", fields)


def _draw(rng: random.Random, split: Split, number: int) -> Example:
    order = number % 2 == 0 if split == "items" else rng.random() < 0.6
    return order_puzzle(rng, rng.randint(3, 4)) if order else syllogism(rng, rng.randint(2, 3))


def puzzles(*, n_train: int = 60_000, n_validation: int = 600, n_items: int = 300, seed: int = 0) -> Domain:
    """Order puzzles (3 or 4 people) and syllogisms (2 or 3 links). Held out: whole questions."""
    return generated_domain(
        "puzzles", _draw, n_train=n_train, n_validation=n_validation, n_items=n_items, seed=seed, split_by="question"
    )
