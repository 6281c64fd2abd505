"""A cache whose keys and values have room for the tokens to come."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Tokens that a row's keys have room for before they are copied again."""


class PreallocatedLayer(DynamicLayer):
    """Keys and values of a layer with room for the next ones, which are written in place.

    transformers' own makes a larger copy of all of them for every token.
    """

    @classmethod
    def of(cls, layer: DynamicLayer) -> PreallocatedLayer:
        """The same keys and values."""
        made = cls()
        made.__dict__.update(layer.__dict__)
        return made

    def __init__(self) -> None:
        super().__init__()
        self._room: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys = self._longer("keys", self.keys, key_states)
        self.values = self._longer("values", self.values, value_states)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._room.clear()

    def _longer(self, name: str, old: Any, new: Tensor) -> Tensor:
        n, end = old.shape[-2], old.shape[-2] + new.shape[-2]
        room = self._room.get(name)
        if room is None or room.shape[-2] < end:
            room = self._room[name] = old.new_empty(*old.shape[:-2], end + ROOM, old.shape[-1])
            room[..., :n, :] = old
        room[..., n:end, :] = new
        return room[..., :end, :]
