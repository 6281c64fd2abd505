"""What may stand in the place of a layer's natural routing, one variant a row of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from moe_interp.checks import check_whole
from moe_interp.errors import ConfigError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.hooks.layer import check_route
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


def label(chosen: ExpertSet) -> str:
    """``"3"``, or ``"3+5"`` for experts forced together."""
    return "+".join(str(e) for e in chosen)


def forced_rows(moe: MoEHooks, layer: Layer, rows: Sequence[ExpertSet], total: Tensor | float) -> Hooks:
    """Row r of the batch runs its experts at every position, whatever the router says.

    A single expert has the whole of ``total``; several share it in proportion to the family's weights for the set
    (equally where these vanish).

    Args:
        moe: Attached hooks.
        layer: An MoE layer.
        rows: One set a row.
        total: Sum of the weights, a number or ``[row, pos, 1]``.
    """
    ids = _padded(rows)

    def set_indices(value: Tensor, hook: Any) -> Tensor:
        return ids.to(value).unsqueeze(1).expand(-1, value.shape[1], -1)

    def set_weights(value: Tensor, hook: Any) -> Tensor:
        taken = (ids >= 0).to(value).unsqueeze(1)
        sums = value.sum(dim=-1, keepdim=True)
        equal = taken / taken.sum(dim=-1, keepdim=True)
        share = torch.where(sums == 0, equal, value / sums.masked_fill(sums == 0, 1.0))
        return share * total

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
    width = max(len(row) for row in rows)
    return torch.tensor([list(row) + [EMPTY] * (width - len(row)) for row in rows])
