"""Facts of a made-up, consistent world: each person has one home, job, animal, dish and friend."""

from __future__ import annotations

import random

from moe_interp.testbed.domains.domain import Domain, Item, split_of, words

_VALUES = {
    "home": words(
        "Torbel Ostrin Valmar Kesh Lunden Brivo Sarnath Quell Mirfen Dolvek Ashby Perrin Tolva Hask Wendle Orso"
    ),
    "job": words("baker farmer tailor miner singer healer hunter weaver sailor potter smith guard clerk cook"),
    "animal": words("fox owl goat cat toad crow hare mule dog swan newt bear"),
    "dish": words("bread soup plums cheese eggs beans rice honey figs fish corn nuts"),
}
_TOLD = {
    "home": ("{p} lives in {v}.", "The home of {p} is {v}."),
    "job": ("{p} works as a {v}.", "The job of {p} is {v}."),
    "animal": ("{p} keeps a {v}.", "The animal of {p} is {v}."),
    "dish": ("{p} likes to eat {v}.", "The favourite dish of {p} is {v}."),
}
_ASKED = {
    "home": "Where does {p} live?",
    "job": "What is the job of {p}?",
    "animal": "Which animal does {p} keep?",
    "dish": "What does {p} like to eat?",
}
_FIRST = words("Adel Bren Cora Doran Elva Fitz Gorm Hild Isla Jarn Korin Lysa")
_LAST = words("Vole Marsh Tarn Pike Reed Holt Crane Birch Frost Wren")


def make_world(n_people: int = 80, seed: int = 0) -> dict[str, dict[str, str]]:
    """person -> {relation: value}. The same seed gives the same world."""
    rng = random.Random(f"{seed}/world")
    people = [f"{a} {b}" for a in _FIRST for b in _LAST]
    rng.shuffle(people)
    return {p: {relation: rng.choice(values) for relation, values in _VALUES.items()} for p in people[:n_people]}


def is_asked(person: str, relation: str, held_out: float = 0.3) -> bool:
    """Whether a fact is asked in training; the others are only stated there, and make the items."""
    return split_of(f"{person}/{relation}", validation=0.0, items=held_out) == "train"


def _question(person: str, relation: str) -> str:
    return f"{_ASKED[relation].format(p=person)}\nAnswer:"


def _item(number: int, person: str, relation: str, value: str) -> Item:
    fields = {"relation": relation, "asked_in_training": is_asked(person, relation)}
    return Item(f"facts-{number:04d}", "facts", _question(person, relation), f" {value}", fields)


def _document(world: dict[str, dict[str, str]], rng: random.Random) -> str:
    """A profile of one person, or statements on several, or questions (asked facts only)."""
    people, relations = list(world), list(_VALUES)
    kind = rng.random()
    if kind < 0.45:
        pairs = [(rng.choice(people), r) for r in rng.sample(relations, rng.randint(2, 4))]
        pairs = [(pairs[0][0], r) for _, r in pairs]
    else:
        pairs = [(rng.choice(people), rng.choice(relations)) for _ in range(rng.randint(2, 4))]
    if kind < 0.6:
        return " ".join(rng.choice(_TOLD[r]).format(p=p, v=world[p][r]) for p, r in pairs)
    asked = [(p, r) for p, r in pairs if is_asked(p, r)]
    return "\n".join(f"{_question(p, r)} {world[p][r]}" for p, r in asked)


def facts(
    *, n_people: int = 80, n_train: int = 60_000, n_validation: int = 600, n_items: int = 300, seed: int = 0
) -> Domain:
    """Statements and questions about ``n_people`` people with four facts each.

    Items: first the facts that training only states and never asks (``asked_in_training`` false), then asked ones; the
    facts themselves are in the training text, or there would be nothing to know. Validation documents are new
    combinations of the same facts.
    """
    world = make_world(n_people, seed)
    rng = random.Random(f"{seed}/facts")
    pairs = [(p, r) for p in world for r in _VALUES]
    rng.shuffle(pairs)
    pairs.sort(key=lambda pair: is_asked(*pair))
    items = tuple(_item(i, p, r, world[p][r]) for i, (p, r) in enumerate(pairs[:n_items]))
    questions = {item.prompt + item.answer for item in items}
    texts: dict[str, None] = {}
    while len(texts) < n_train + n_validation:
        text = _document(world, rng)
        if text and text not in questions:
            texts.setdefault(text)
    documents = tuple(texts)
    return Domain(
        "facts",
        documents[n_validation:],
        documents[:n_validation],
        items,
        "questions whose field asked_in_training is false: stated in training, never asked",
    )
