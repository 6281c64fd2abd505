"""Branches that run together, as the rows of a batch, and the base pass's values at each of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import DynamicCache

from moe_interp.engine.recorded_pass import RecordedPass


class Rows(ABC):
    """Branches that run together, ``[row, n]``.

    They travel through the model with its cache, which every layer is handed: see :class:`RowsCache`.

    Attributes:
        base: The base pass.
        block_out: ``[row, n, d_model]``, the output of their layer's experts' block.
    """

    def __init__(self, base: RecordedPass, block_out: Tensor) -> None:
        self.base, self.block_out = base, block_out
        self._gathered: dict[int, Any] = {}

    @property
    @abstractmethod
    def tokens(self) -> Tensor:
        """``[row, n]`` ids."""

    @property
    @abstractmethod
    def positions(self) -> Tensor:
        """``[row, n]``."""

    @abstractmethod
    def cache(self) -> RowsCache:
        """The argument ``past_key_values`` of the model."""

    @abstractmethod
    def attention_mask(self, layer: int) -> Any:
        """The argument ``attention_mask`` of a layer above."""

    @abstractmethod
    def at(self, value: Tensor) -> Tensor | None:
        """A tensor of the base pass at the branches; None for one without a position axis."""

    def gathered(self, value: Any) -> Any:
        """A value of the base pass at the branches; None in the place of tensors without positions."""
        return tree_map(lambda leaf: self.at(leaf) if isinstance(leaf, Tensor) else leaf, value)

    def argument(self, number: int) -> Any:
        """One of the base pass's :class:`Arguments` at the branches; gathered once, as layers share it."""
        if number not in self._gathered:
            self._gathered[number] = self.gathered(self.base.arguments.values[number])
        return self._gathered[number]


class RowsCache(DynamicCache):
    """The cache of a pass of branches: brings the rows to every layer, and gives it their own keys and values only.

    Attributes:
        rows: The rows.
    """

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states


class CopiedKeys(RowsCache):
    """Hands a layer the base pass's keys and values before each row's branches, followed by the branches' own."""

    rows: CompactRows

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.rows.base.cache.recorded[layer_idx]
        return self._before(keys, key_states), self._before(values, value_states)

    def _before(self, base: Tensor, own: Tensor) -> Tensor:
        base = base[..., : self.rows.crop, :]
        rows = base.expand(len(own), -1, -1, -1) if len(base) == 1 else base[self.rows.sequence]
        return torch.cat([rows, own], dim=-2)


class CompactRows(Rows):
    """Some positions of one sequence a row, whatever they are, each with a copy of its sequence's keys.

    Attributes:
        sequence: ``[row]``, which sequence of the batch a row's branches belong to.
        position: ``[row, n]``.
        token: ``[row, n]``, index into the flattened ``[batch, pos]``.
        crop: Keys before this position are all that any branch reads.
    """

    def __init__(self, base: RecordedPass, sequence: Tensor, position: Tensor, block_out: Tensor) -> None:
        super().__init__(base, block_out)
        self.sequence, self.position = sequence, position
        self.token = sequence.unsqueeze(1) * base.tokens.shape[1] + position
        self.crop = int(position.max())
        self._masks: dict[int | None, Tensor] = {}

    @property
    def tokens(self) -> Tensor:
        return self.base.tokens.reshape(-1)[self.token]

    @property
    def positions(self) -> Tensor:
        return self.position

    def cache(self) -> RowsCache:
        return CopiedKeys(self)

    def at(self, value: Tensor) -> Tensor | None:
        batch, pos = self.base.tokens.shape
        if value.shape[:2] == (batch, pos):
            return value.reshape(-1, *value.shape[2:])[self.token]
        if value.shape[:1] == (batch * pos,):
            return value[self.token.reshape(-1)]
        return value.reshape(-1, *value.shape[2:])[self.position] if value.shape[:2] == (1, pos) else None

    def attention_mask(self, layer: int) -> Any:
        """``[row, 1, n, crop + n]``: a branch reads what its token read before its position, and itself."""
        number = self.base.arguments.number(layer, "attention_mask")
        if number not in self._masks:
            self._masks[number] = self._mask(self.base.arguments.value(number))
        return self._masks[number]

    def _mask(self, base_mask: Tensor | None) -> Tensor:
        dtype, device = self.block_out.dtype, self.block_out.device
        never, n = torch.finfo(dtype).min, self.position.shape[1]
        is_later = torch.arange(self.crop, device=device) >= self.position.unsqueeze(-1)
        if base_mask is None:
            before = torch.zeros(is_later.shape, dtype=dtype, device=device)
        else:
            index = self.position if len(base_mask) == 1 else self.token
            before = base_mask.flatten(0, 2)[:, : self.crop][index]
            if before.dtype == torch.bool:
                before = torch.zeros(is_later.shape, dtype=dtype, device=device).masked_fill(~before, never)
        own = torch.full((n, n), never, dtype=dtype, device=device).fill_diagonal_(0.0)
        return torch.cat([before.masked_fill(is_later, never), own.expand(len(before), n, n)], dim=-1).unsqueeze(1)
