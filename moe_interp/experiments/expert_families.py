"""Families: experts of several layers that are forced, or ablated, together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_interp.checks import as_whole
from moe_interp.errors import ConfigError
from moe_interp.experiments.isolation.natural_routing import RoutingStats
from moe_interp.hooks.attach import MoEHooks
from moe_interp.interventions.named import experts_by_layer
from moe_interp.results.cells import Arrays
from moe_interp.stats import derive_rng

ExpertFamily = tuple[tuple[int, int], ...]
"""Pairs (layer, expert), layers in order."""


def are_families(experts: Any) -> bool:
    """Whether sets are mappings from layers to experts, or tuples of pairs (layer, expert)."""
    if experts is None or isinstance(experts, str | Mapping) or not isinstance(experts, Sequence):
        return isinstance(experts, Mapping)
    return any(
        isinstance(entry, Mapping) or (isinstance(entry, Sequence) and any(np.ndim(pair) == 1 for pair in entry))
        for entry in experts
    )


def expert_families(moe: MoEHooks, experts: Any) -> list[ExpertFamily]:
    """The families, each in the order of layers and experts.

    Raises:
        ConfigError: one mapping in the place of a list, an entry that is no family, or one family twice.
        HookError, RouteError: a layer or an expert that is not there, or an expert twice.
    """
    expected = "families: mappings {layer: experts}, or tuples of pairs (layer, expert)"
    if isinstance(experts, Mapping):
        raise ConfigError("one family in the place of several", f"a list of {expected}", "Wrap it in a list.")
    families = []
    for entry in experts:
        by_layer: dict[Any, Any] = {}
        try:
            if isinstance(entry, Mapping):
                by_layer = dict(entry)
            else:
                for layer, expert in entry:
                    by_layer.setdefault(moe.layer_label(layer), []).append(expert)
        except (TypeError, ValueError):
            raise ConfigError(f"experts: {str(entry)[:60]}", expected, "Correct the entry.") from None
        named = experts_by_layer(moe, None, by_layer, "experts")
        if any(as_whole(layer) is None for layer in named):
            raise ConfigError(f"experts: {str(entry)[:60]}", "layers of a decoder-only model", "Correct the entry.")
        whole = {layer: sorted(ids.tolist()) for layer, ids in named.items() if isinstance(layer, int)}
        families.append(tuple((layer, expert) for layer in sorted(whole) for expert in whole[layer]))
    if len(set(families)) < len(families):
        raise ConfigError(f"experts={str(experts)[:60]}", "different families", "Leave the repeated one out.")
    return families


def family_layers(families: Sequence[ExpertFamily]) -> list[int]:
    """All layers of some families, in order."""
    return sorted({layer for family in families for layer, _ in family})


def of_layer(family: ExpertFamily, layer: int) -> tuple[int, ...]:
    """The experts that a family has at a layer."""
    return tuple(expert for at, expert in family if at == layer)


def check_one_shape(families: Sequence[ExpertFamily], baselines: Sequence[str]) -> None:
    """Baselines but the natural one are the same for all families, which then have as many experts at each layer.

    Raises:
        ConfigError: their numbers of experts differ.
    """
    layers = family_layers(families)
    shapes = {tuple(len(of_layer(family, layer)) for layer in layers) for family in families}
    if len(shapes) > 1 and set(baselines) != {"natural"}:
        raise ConfigError(
            f"families of different size with baselines={tuple(baselines)}",
            'as many experts at each layer in all of them, or baselines=("natural",)',
            "Run families of one size at a time.",
        )


def drawn_families(moe: MoEHooks, like: ExpertFamily, seed: int, draws: int) -> tuple[ExpertFamily, ...]:
    """Random families with as many experts at each layer."""
    drawn = []
    for draw in range(draws):
        family: list[tuple[int, int]] = []
        for layer in family_layers([like]):
            rng = derive_rng(seed, "random family", layer, draw)
            chosen = rng.choice(moe.spec(layer).n_experts, len(of_layer(like, layer)), replace=False)
            family += [(layer, int(expert)) for expert in sorted(chosen)]
        drawn.append(tuple(family))
    return tuple(drawn)


def family_arrays(stats: RoutingStats, families: Sequence[ExpertFamily]) -> Arrays:
    """What :meth:`RoutingStats.arrays` gives of an expert, of each family: ``routing`` and ``share`` summed over its
    experts and averaged over its layers; whether any of them is used, or reaches."""
    by_layer = {layer: stats.arrays(layer) for layer in family_layers(families)}
    found: Arrays = {}
    for name in ("routing", "share", "uses", "reaches"):
        columns = []
        for family in families:
            each = np.stack([by_layer[layer][name][..., expert] for layer, expert in family], axis=-1)
            is_flag = name in ("uses", "reaches")
            columns.append(each.any(-1) if is_flag else each.sum(-1) / len(family_layers([family])))
        found[name] = np.stack(columns, axis=-1)
    found["margin"] = np.asarray(min(float(arrays["margin"]) for arrays in by_layer.values()))
    return found
