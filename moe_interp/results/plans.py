"""What a stored run was computed with, and in which words another one differs from it.

A plan maps the name of an option, as Python spells it, to a JSON value. What is too long to show is a mapping with a
``checksum``; its other entries, such as a count, are what is shown of it. Names that begin with ``model.`` are of the
model itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LONGEST = 60  # characters of a value that is shown
SHOWN = 3  # differences that are named
MODEL = "model."
# what differs as a consequence of another difference is not named beside it
FOLLOWS = {"tokens": ("items",), "batches": ("items", "sequences"), "model.architecture": ("model",)}

Options = Mapping[str, tuple[str, Any]]  # option of the command line -> (name in the plan, value)


def difference(
    there: Mapping[str, Any], here: Mapping[str, Any], options_there: Options, options_here: Options
) -> str | None:
    """What of a stored plan is not as it is now, in words; None where all is.

    Args:
        there, here: The stored plan, and the one that was asked for.
        options_there, options_here: Options of the command line that set an entry, where there were any.
    """
    names = [name for name in [*here, *(n for n in there if n not in here)] if there.get(name) != here.get(name)]
    names = [name for name in names if not set(FOLLOWS.get(name, ())) & set(names)]
    if not names:
        return None
    words = list(dict.fromkeys(_words(name, there, here, options_there, options_here) for name in names))
    more = len(words) - SHOWN
    return "; ".join(words[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _words(
    name: str, there: Mapping[str, Any], here: Mapping[str, Any], options_there: Options, options_here: Options
) -> str:
    set_by = [option for option, (entry, _) in options_here.items() if entry == name]
    changed = [
        f"{option} {_given(options_there[option][1])} there, {_given(options_here[option][1])} here"
        for option in set_by
        if option in options_there and options_there[option][1] != options_here[option][1]
    ]
    if changed:
        return "; ".join(changed)
    if name == "batches":
        return "memory_budget: other batches"
    by = f" (set by {', '.join(set_by)})" if set_by else ""
    if name not in there or name not in here:
        return f"{_label(name)}: {'not known there' if name not in there else 'no longer part of a run'}{by}"
    old, new = there[name], here[name]
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        shown = [key for key in new if key != "checksum" and old.get(key) != new[key]]
        if not shown:
            return f"{_label(name)}: other content{by}"
        return f"{_label(name)}: {', '.join(f'{_short(old.get(k))} there, {_short(new[k])} here' for k in shown)}{by}"
    mark = ": " if name.startswith(MODEL) else "="
    return f"{_label(name)}{mark}{_short(old)} there, {_short(new)} here{by}"


def _label(name: str) -> str:
    return f"the model's {name.removeprefix(MODEL)}" if name.startswith(MODEL) else name


def _short(value: Any) -> str:
    text = repr(value)
    if len(text) <= LONGEST:
        return text
    return f"{len(value)} values" if isinstance(value, list | Mapping) else f"{text[: LONGEST - 3]}..."


def _given(value: Any) -> str:
    if value is None or value == []:
        return "not given"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
