"""Items and sequences that are given more than once: what has the same content counts once.

Every interval and test takes items (or sequences) as independent. The same text under two ids is one observation:
counted twice, intervals are too short by sqrt(2) and tests reject too often. So experiments run each content once,
under the id that comes first, warn with the names of the others, and keep these in the result.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from moe_interp.errors import warn
from moe_interp.experiments.inputs.items import TokenizedItem
from moe_interp.experiments.inputs.sequences import ScoredSequence

NAMED = 5  # merged ones that the warning names

Merged = dict[str, list[str]]


class RepeatedContentWarning(UserWarning):
    """Items or sequences with the same content under several ids: within a domain they count once."""


def merge_repeats(contents: Iterable[Hashable], names: Sequence[str], kind: str) -> tuple[list[int], Merged]:
    """Which of several contents to keep, with a warning where any is given more than once.

    Args:
        contents: What is compared; equal ones are one.
        names: Their ids.
        kind: What they are, in the plural, for the warning.

    Returns:
        Places of the first of each content, in order; and the others' ids by the id of the first.
    """
    first: dict[Hashable, int] = {}
    merged: Merged = {}
    for place, content in enumerate(contents):
        kept = first.setdefault(content, place)
        if kept != place:
            merged.setdefault(names[kept], []).append(names[place])
    if merged:
        pairs = [f"{other!r} (as {name!r})" for name, others in merged.items() for other in others]
        more = f" and {len(pairs) - NAMED} more" if len(pairs) > NAMED else ""
        text = (
            f"{len(pairs)} {kind} have the content of another under a different id and are not counted again: "
            f"{', '.join(pairs[:NAMED])}{more}"
        )
        warn(text, RepeatedContentWarning)
    return list(first.values()), merged


def distinct_items(items: Sequence[TokenizedItem]) -> tuple[list[TokenizedItem], Merged]:
    """Items of a domain whose prompt and answer are the same tokens, counted once.

    The same prompt with another answer is another item. An item that stands in several domains is one of each, as
    whoever made the domains meant it; these domains are then not independent, and a warning says so.
    """
    contents = [(item.item.domain, item.prompt, item.answer) for item in items]
    kept, merged = merge_repeats(contents, [item.item.id for item in items], "items")
    distinct = [items[i] for i in kept]
    _warn_of_shared(distinct)
    return distinct, merged


def _warn_of_shared(items: Sequence[TokenizedItem]) -> None:
    """Say which items stand in more than one domain."""
    ids: dict[Hashable, list[str]] = {}
    for item in items:
        ids.setdefault((item.prompt, item.answer), []).append(item.item.id)
    if shared := [" = ".join(map(repr, names)) for names in ids.values() if len(names) > 1]:
        more = f" and {len(shared) - NAMED} more" if len(shared) > NAMED else ""
        warn(
            f"{len(shared)} items stand in several domains ({', '.join(shared[:NAMED])}{more}). Each domain counts "
            "them, so rows over all domains, and comparisons of these domains, take them as independent more than "
            "once.",
            RepeatedContentWarning,
        )


def distinct_sequences(sequences: Sequence[ScoredSequence]) -> tuple[list[ScoredSequence], Merged]:
    """Sequences of the same tokens, counted once; a token is scored where any of them is to score it.

    A sequence that begins as another one does, or is cut from it, has another content.
    """
    kept, merged = merge_repeats([s.tokens for s in sequences], [s.id for s in sequences], "sequences")
    if not merged:
        return list(sequences), merged
    scored = {sequences[i].tokens: sequences[i].is_scored for i in kept}
    for sequence in sequences:
        scored[sequence.tokens] = np.logical_or(scored[sequence.tokens], sequence.is_scored)
    first = [sequences[i] for i in kept]
    return [replace(s, is_scored=scored[s.tokens]) if s.id in merged else s for s in first], merged
