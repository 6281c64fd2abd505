"""What the commands run on: items and sequences of files and of the bundled set, and what is said of them before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.markup import escape

from moe_interp.cli import console
from moe_interp.cli.options import DEMO
from moe_interp.errors import DataError
from moe_interp.experiments.inputs.items import Item, check_items, load_items
from moe_interp.experiments.inputs.sequence_texts import FIELDS, load_sequences, unread_fields
from moe_interp.experiments.inputs.sequences import ScoredSequence, read_sequences
from moe_interp.experiments.isolation.findings import plan_isolation
from moe_interp.experiments.pass_at_k.problems import Problem, check_problems, load_problems
from moe_interp.hooks.attach import MoEHooks
from moe_interp.jsonlines import read_json_lines
from moe_interp.routes import AllSubsets, GumbelTopK, OneSwap, RouteSampler, UniformSubsets
from moe_interp.testbed.demo import load_demo_assets

SAMPLERS: dict[str, Callable[[float, int | None], RouteSampler]] = {
    "gumbel": lambda tau, pool: GumbelTopK(tau, pool),
    "uniform": lambda tau, pool: UniformSubsets(),
    "one-swap": lambda tau, pool: OneSwap(),
    "all": lambda tau, pool: AllSubsets(),
}


def read_items(sources: list[str], domains: list[str] | None, first: int | None, **names: str) -> list[Item]:
    """Items of files and of the bundled set, the first of each domain.

    ``names`` are the ``*_field`` arguments of :func:`moe_interp.load_items`.
    """
    found: list[Item] = []
    for source in sources:
        if source == DEMO:
            found += check_items([item for group in load_demo_assets().items.values() for item in group])
        else:
            found += load_items(source, **names)
    return first_of_each(check_items(found, domains), first)


def first_of_each(items: list[Item], first: int | None) -> list[Item]:
    """The first items of each domain; all where no number is given."""
    seen: Counter[str] = Counter()
    kept = []
    for item in items:
        seen[item.domain] += 1
        if first is None or seen[item.domain] <= first:
            kept.append(item)
    return kept


def announce_items(items: list[Item], n_layers: int, n_experts: int) -> None:
    """Before the run: what the tests will be able to show."""
    counts = Counter(item.domain for item in items)
    sizes = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    console.err.print(
        escape(f"{console.quantity(len(items), 'item')} ({sizes}). {plan_isolation(counts, n_layers, n_experts)}")
    )


def read_sequence_files(sources: list[str], first: int | None = None, **names: str) -> list[Any]:
    """Sequences of files and of the bundled set, as :func:`moe_interp.counterfactual_routes` takes them.

    Args:
        sources: Files, or "demo".
        first: Keep so many of each domain, and of each file those of no domain.
        names: The ``*_field`` arguments of :func:`moe_interp.experiments.inputs.sequence_texts.load_sequences`.

    Raises:
        DataError: a file that cannot be read or holds no sequence, or a line that is not JSON (with its number).
    """
    found: list[Any] = []
    seen: Counter[tuple[str, Any]] = Counter()
    for source in sources:
        if source == DEMO:
            found += demo_sequences(first)
            continue
        for sequence in load_sequences(source, **names):
            domain = sequence.fields.get("domain")
            group = ("domain", str(domain)) if domain else ("file", source)
            seen[group] += 1
            if first is None or seen[group] <= first:
                found.append(sequence)
    return found


def read_labelled_sequences(
    sources: list[str],
    first: int | None = None,
    prompt_field: str = "prompt",
    answer_field: str = "answer",
    domain_field: str = "domain",
) -> list[dict[str, Any]]:
    """Sequences of files and of the bundled set with their domains, as :func:`moe_interp.capture_routing` takes them.

    Args:
        sources: Files, or "demo".
        first: Keep so many of each domain, and of each file those of no domain.
        prompt_field, answer_field, domain_field: What the fields are called in the files.

    Raises:
        DataError: a file that cannot be read or holds no sequence, or a line that is not JSON (with its number).
    """
    found: list[dict[str, Any]] = []
    seen: Counter[tuple[str, str]] = Counter()
    given = {"prompt": prompt_field, "answer": answer_field, "domain": domain_field}
    for source in sources:
        if source == DEMO:
            assets = load_demo_assets().items
            records = [vars(item) for group in assets.values() for item in group]
            names = {name: name for name in ("id", "prompt", "answer", "domain")}
        else:
            path, expected = Path(source).expanduser(), "a file of JSON lines, each a sequence"
            records, names = [], {"id": "id", "text": "text", "tokens": "tokens", "messages": "messages", **given}
            for line, record in read_json_lines(path, expected):
                fields = {"text" if isinstance(record, str) else "tokens": record}
                records.append({"id": f"{path.stem}-{line}"} | (record if isinstance(record, dict) else fields))
            if not records:
                raise DataError(f"{source} without a sequence", expected, "Add lines, or name another file.")
        for record in records:
            sequence = {name: record[field] for name, field in names.items() if record.get(field) is not None}
            domain = sequence.get("domain")
            group = ("domain", str(domain)) if domain else ("file", source)
            seen[group] += 1
            if first is None or seen[group] <= first:
                found.append(sequence)
    return found


def demo_sequences(first: int | None = None, longest: int | None = None) -> list[dict[str, Any]]:
    """The demo's held-out trajectories: worked solutions of arithmetic, whose final answer is right, and answers.

    Args:
        first: Keep so many of each domain.
        longest: Leave out before what has more characters.
    """
    found: list[dict[str, Any]] = []
    for items in load_demo_assets().items.values():
        texts = [
            {
                "id": item.id,
                "prompt": str(item.fields.get("question", item.prompt)),
                "answer": str(item.fields.get("solution", item.answer)),
            }
            for item in items
        ]
        found += [t for t in texts if longest is None or len(t["prompt"]) + len(t["answer"]) <= longest][:first]
    return found


def read_routed_sequences(sources: list[str], first: int | None = None, **names: str) -> list[Any]:
    """Sequences whose routing is measured: those of files, and the bundled set's items with their domains.

    Arguments and errors as :func:`read_sequence_files`.
    """
    found: list[Any] = []
    for source in sources:
        if source != DEMO:
            found += read_sequence_files([source], first, **names)
            continue
        for items in load_demo_assets().items.values():
            found += [
                {"id": item.id, "prompt": item.prompt, "answer": item.answer, "domain": item.domain}
                for item in items[:first]
            ]
    return found


def read_problems(sources: list[str], first: int | None, **names: str) -> list[Problem]:
    """Problems of files, data sets and the bundled set (word problems, asked from the beginning); the first of each.

    ``names`` are the ``*_field`` arguments of :func:`moe_interp.load_problems`.
    """
    files = [source for source in sources if source != DEMO]
    found: list[Any] = list(load_problems(*files, first=first, **names)) if files else []
    if DEMO in sources:
        for item in load_demo_assets().items["arithmetic"][:first]:
            question = {"prompt": item.fields["question"], "answer": item.fields["final_answer"]}
            found.append({**item.fields, "id": item.id, "domain": item.domain, **question})
    return check_problems(found)


def announced_sequences(moe: MoEHooks, sequences: list[Any], n_layers: int, n_routes: int) -> list[ScoredSequence]:
    """The sequences as they are scored, after saying how much that is and what of them is not read."""
    read = read_sequences(moe.bridge, sequences)
    parts = [
        console.quantity(len(read), "sequence"),
        console.quantity(sum(int(one.is_scored.sum()) for one in read), "token") + " to score",
        console.quantity(n_layers, "MoE layer"),
        console.quantity(n_routes, "route") + " a token",
    ]
    console.say(", ".join(parts))
    if unread := unread_fields(sequences):
        named = ", ".join(f"{name} (of {console.quantity(n, 'sequence')})" for name, n in unread.items())
        console.say(f"Not read: {named}. The fields that are read: {', '.join(FIELDS)}.")
    return read


def route_sampler(name: str, tau: float, pool: int | None) -> RouteSampler:
    """The sampler of a name; temperature and pool are gumbel's."""
    return SAMPLERS[name](tau, pool)
