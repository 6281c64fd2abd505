"""What may stand in the place of a layer's natural routing, one variant a row of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from moe_interp.checks import check_whole
from moe_interp.errors import ConfigError
from moe_interp.experiments.expert_families import family_layers, of_layer
from moe_interp.hooks.attach import MoEHooks
from moe_interp.hooks.layer import check_route
from moe_interp.interventions.force import NaturalMass
from moe_interp.interventions.positions import merge_slots, merge_weights
from moe_interp.types import EMPTY, Hooks, Layer

Mode = Literal["force", "ablate"]
ExpertSet = tuple[int, ...]


def expert_sets(experts: Sequence[int | Sequence[int]] | None, n_experts: int) -> list[ExpertSet]:
    """Ids, or sets of ids, as sets; all experts one by one where None is given.

    Raises:
        RouteError: an id out of range, or an expert twice in a set.
        ConfigError: no experts, what is no id, an empty set, or one set twice.
    """
    sets: list[ExpertSet] = []
    entry: Any
    try:
        for entry in range(n_experts) if experts is None else experts:
            # numpy's and torch's integers too
            sets.append(tuple(check_whole(e, "expert") for e in (entry if np.ndim(entry) else [entry])))
    except (TypeError, ValueError, ConfigError) as error:
        raise ConfigError(f"experts={experts!r}", "expert ids, or tuples of them", "Correct the list.") from error
    if not sets or not all(sets) or len({frozenset(s) for s in sets}) < len(sets):
        raise ConfigError(f"experts={experts!r}", "different, non-empty sets of experts", "Correct the list.")
    for chosen in sets:
        check_route(torch.tensor([chosen]), n_experts, "experts")
    return sets


def label(chosen: Any) -> str:
    """``"3"``, ``"3+5"`` for experts forced together, or ``"0.3+1.5"`` for a family: expert 3 of layer 0, 5 of 1."""
    return "+".join(str(e) if isinstance(e, int) else ".".join(map(str, e)) for e in chosen)


def is_family(chosen: Any) -> bool:
    """Whether a set is a family over several layers."""
    return isinstance(chosen[0], tuple)


def rows_hooks(moe: MoEHooks, mode: Mode, layer: int, rows: Sequence[Any], total: Any) -> Hooks:
    """Row r of the batch with its set of experts forced, or without it.

    Args:
        moe: Attached hooks.
        mode: "force" or "ablate".
        layer: The sets' layer; of families the first of all.
        rows: One set, or family, a row.
        total: Sum of the weights where they are forced: a number, ``[row, pos, 1]``, or None for the token's own.
    """
    if not is_family(rows[0]):
        return forced_rows(moe, layer, rows, total) if mode == "force" else ablated_rows(moe, layer, rows)
    hooks: Hooks = []
    for at in family_layers(rows):
        sets = [of_layer(family, at) for family in rows]
        hooks += forced_rows(moe, at, sets, total) if mode == "force" else ablated_rows(moe, at, sets)
    return hooks


def forced_rows(moe: MoEHooks, layer: Layer, rows: Sequence[ExpertSet], total: Tensor | float | None) -> Hooks:
    """Row r of the batch runs its experts at every position, whatever the router says.

    A single expert has the whole of ``total``; several share it in proportion to the family's weights for the set
    (equally where these vanish).

    Args:
        moe: Attached hooks.
        layer: An MoE layer.
        rows: One set a row; a row with an empty one is left alone.
        total: Sum of the weights, a number or ``[row, pos, 1]``; None for the sum that the token has in the running
            pass, as ``force_experts`` takes it.
    """
    natural = NaturalMass(moe, layer)
    ids = _padded(rows)

    is_whole = all(len(row) for row in rows)
    is_set = torch.tensor([bool(row) for row in rows]).unsqueeze(1)  # [row, 1]

    def set_indices(value: Tensor, hook: Any) -> Tensor:
        if total is None:
            natural.read(value)
        new = ids.to(value).unsqueeze(1).expand(-1, value.shape[1], -1)
        return new if is_whole else merge_slots(is_set.to(value.device).expand(value.shape[:2]), new, value)

    def set_weights(value: Tensor, hook: Any) -> Tensor:
        if not is_whole:
            new = share_weights(value[..., : ids.shape[-1]])
            return merge_weights(is_set.to(value.device).expand(value.shape[:2]), new, value)
        return share_weights(value)

    def share_weights(value: Tensor) -> Tensor:
        taken = (ids >= 0).to(value).unsqueeze(1)
        sums = value.sum(dim=-1, keepdim=True)
        equal = taken / taken.sum(dim=-1, keepdim=True)
        share = torch.where(sums == 0, equal, value / sums.masked_fill(sums == 0, 1.0))
        return share * (natural.take() if total is None else total)

    return [
        (moe.hook_name("expert_indices", layer), set_indices),
        (moe.hook_name("expert_weights", layer), set_weights),
    ]


def ablated_rows(moe: MoEHooks, layer: Layer, rows: Sequence[ExpertSet]) -> Hooks:
    """Row r of the batch runs without its experts; the others keep their weights."""
    ids = _padded(rows)
    seen: dict[str, Tensor] = {}

    def read(value: Tensor, hook: Any) -> None:
        seen["route"] = value

    def drop(value: Tensor, hook: Any) -> Tensor:
        # shape: (row, pos, slot, 1) against (row, 1, 1, set)
        gone = (seen.pop("route").unsqueeze(-1) == ids.to(value.device)[:, None, None, :]).any(dim=-1)
        return value.masked_fill(gone, 0.0)

    return [(moe.hook_name("expert_indices", layer), read), (moe.hook_name("expert_weights", layer), drop)]


def _padded(rows: Sequence[ExpertSet]) -> Tensor:
    width = max(1, *(len(row) for row in rows))
    return torch.tensor([list(row) + [EMPTY] * (width - len(row)) for row in rows])
