"""Domains by name, as a configuration states them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moe_interp.errors import ConfigError
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.domains.arithmetic import arithmetic
from moe_interp.testbed.domains.domain import Domain
from moe_interp.testbed.domains.facts import facts
from moe_interp.testbed.domains.lookups import lookups
from moe_interp.testbed.domains.puzzles import puzzles
from moe_interp.testbed.domains.text import dataset_domain, python_standard_library, read_documents, text_domain

# name -> (generator, training documents at data_scale 1)
GENERATED: dict[str, tuple[Callable[..., Domain], int]] = {
    "arithmetic": (arithmetic, 80_000),
    "facts": (facts, 60_000),
    "puzzles": (puzzles, 60_000),
    "lookups": (lookups, 10_000),
}


def load_domains(config: TestbedConfig) -> tuple[Domain, ...]:
    """The configuration's domains; generated ones have ``data_scale`` times their usual number of documents.

    Raises:
        ConfigError: A name that is neither generated, nor ``code``, nor of the form ``name=...``.
        DataError: No documents where a name points to.
    """
    return tuple(_load(name, config) for name in config.domains)


def has_text_files(config: TestbedConfig) -> bool:
    """Whether the configuration names the user's own text files, and all of them are there."""
    places = [place for name in config.domains if (place := name.partition("=")[2]) and not place.startswith("hub:")]
    return bool(places) and all(Path(place).exists() for place in places)


def _load(name: str, config: TestbedConfig) -> Domain:
    if name in GENERATED:
        generate, n_train = GENERATED[name]
        return generate(n_train=max(50, round(n_train * config.data_scale)), seed=config.seed)
    if name == "code":
        return python_standard_library(seed=config.seed)
    label, _, path = name.partition("=")
    if not path:
        raise ConfigError(
            f"domain {name!r}",
            f"one of {', '.join(GENERATED)}, code, name=path of text, or name=hub:dataset[:column]",
            "Name another domain.",
        )
    if path.startswith("hub:"):
        _, dataset, *column = path.split(":")
        return dataset_domain(label, dataset, column=column[0] if column else "text")
    return text_domain(label, read_documents(Path(path)), seed=config.seed)
