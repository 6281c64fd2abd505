"""Keys and values: those of the base pass, kept whole, and what a layer of branches is handed of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from moe_interp.engine.branch_attention import Rows, offer

_PLAIN_CACHES = ("DynamicLayer", "DynamicSlidingWindowLayer")  # by name: the classes move between versions


class RecordingCache(DynamicCache):
    """Keeps each layer's keys and values whole (a sliding layer of its own would trim them) and hands them on."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.recorded: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        # as transformers' own cache, which holds values in the format of the keys (where rotary embeddings raise these)
        value_states = value_states.to(torch.promote_types(key_states.dtype, value_states.dtype))
        self.recorded[layer_idx] = (key_states, value_states)
        return key_states, value_states

    def refusal(self, layer: int, n_pos: int) -> str | None:
        """Why a layer's state before a token is not its plain keys and values; None where it is."""
        kind = type(self.layers[layer]).__name__ if layer < len(self.layers) else "nothing"
        if kind == "DummyLayer":  # a layer without attention, which sees its own token only
            return None
        if kind not in _PLAIN_CACHES:
            return f"the state {kind} instead of plain keys and values"
        keys = self.recorded.get(layer, (None,))[0]
        if keys is None or keys.shape[-2] != n_pos:
            return "no keys of its own for every position"
        return None


class BranchCache(DynamicCache):
    """The base pass's keys and values before each row's branches, followed by the branches' own."""

    def __init__(self, recorded: dict[int, tuple[Tensor, Tensor]], rows: Rows) -> None:
        super().__init__()
        self.recorded, self.rows = recorded, rows

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.recorded[layer_idx]
        return self._before(keys, key_states), self._before(values, value_states)

    def _before(self, base: Tensor, own: Tensor) -> Tensor:
        base = base[..., : self.rows.crop, :]
        rows = base.expand(len(own), -1, -1, -1) if len(base) == 1 else base[self.rows.sequence]
        return torch.cat([rows, own], dim=-2)


class SharedCache(BranchCache):
    """Hands a layer its branches' own keys and values, and its attention those of the base pass."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        offer(self.rows, self.recorded[layer_idx])
        return key_states, value_states
