"""Which tokens an intervention touches, and how two routes are merged token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from moe_interp.errors import ConfigError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.hooks.layer import pack_left
from moe_interp.types import EMPTY

Positions = Sequence[int] | Tensor | Literal["all", "new"] | None


class Where:
    """The tokens of a running pass that an intervention is meant for.

    Args:
        moe: The attached hooks; they know how much of the sequence is in the cache.
        positions: None: every position of a forward pass, under ``generate`` with a cache those of the prompt.
            Integers: absolute positions, counted in the unpadded prompt and on into what is generated; negative ones
            count from the end of the prompt. "all": every position of every step. "new": the generated ones only.
        attention_mask: ``[batch, pos]`` of the prompt, 1 at real tokens. Padding is never touched, and positions are
            counted from each row's first real token.

    Raises:
        ConfigError: positions of another kind, or a mask that is not 2-D.
    """

    def __init__(self, moe: MoEHooks, positions: Positions = None, attention_mask: Tensor | None = None) -> None:
        self.moe = moe
        self.named = positions if positions in (None, "all", "new") else "listed"  # type: ignore[comparison-overlap]
        self.listed = torch.as_tensor(positions).reshape(-1) if self.named == "listed" else torch.empty(0)
        self.attention_mask = attention_mask
        if (isinstance(positions, str) and self.named == "listed") or self.listed.dtype == torch.bool:
            raise ConfigError(f"positions={positions!r}", 'integers, None, "all" or "new"', "Name the positions.")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ConfigError(
                f"an attention mask of shape {tuple(attention_mask.shape)}",
                "[batch, pos]",
                "Pass the prompt's 2-D mask.",
            )

    def tokens(self, value: Tensor) -> Tensor:
        """``[batch, pos]`` bool for a hooked tensor ``[batch, pos, ...]``."""
        batch, pos = value.shape[:2]
        index = self.index(value)
        chosen = torch.ones(batch, pos, dtype=torch.bool, device=value.device)
        if self.named is None:
            chosen &= self.moe.n_past == 0
        elif self.named == "new":
            chosen &= self.moe.n_past > 0
        elif self.named == "listed":
            listed = self.listed.to(value.device)
            listed = torch.where(listed < 0, listed + self._prompt_lengths(value), listed)  # [batch, n] or [1, n]
            chosen = (index.unsqueeze(-1) == listed.unsqueeze(1)).any(dim=-1)
        return chosen & self.is_real(value)

    def index(self, value: Tensor) -> Tensor:
        """``[batch, pos]`` absolute position of each token in its unpadded sequence."""
        batch, pos = value.shape[:2]
        raw = torch.arange(self.moe.n_past, self.moe.n_past + pos, device=value.device).expand(batch, pos)
        if self.attention_mask is None:
            return raw
        mask = self._mask_for(batch).to(value.device)
        return raw - mask.bool().int().argmax(dim=-1, keepdim=True)

    def is_real(self, value: Tensor) -> Tensor:
        """``[batch, pos]``: not padding. What is generated is real."""
        batch, pos = value.shape[:2]
        real = torch.ones(batch, pos, dtype=torch.bool, device=value.device)
        if self.attention_mask is None:
            return real
        past, width = self.moe.n_past, self.attention_mask.shape[1]
        part = self._mask_for(batch).to(value.device).bool()[:, past : past + pos]
        if past == 0 and pos < width:
            raise ConfigError(
                f"an attention mask of {width} positions for a pass of {pos}",
                "the mask of the prompt that runs",
                "Build the intervention with this batch's own mask.",
            )
        real[:, : part.shape[1]] = part
        return real

    def _prompt_lengths(self, value: Tensor) -> Tensor:
        if self.attention_mask is not None:
            return self._mask_for(value.shape[0]).to(value.device).long().sum(dim=-1, keepdim=True)
        if self.moe.n_past:
            raise ConfigError(
                "negative positions in a later step of generate",
                "the prompt's attention mask",
                "Pass attention_mask, so that the end of the prompt is known.",
            )
        return torch.full((1, 1), value.shape[1], device=value.device)

    def _mask_for(self, batch: int) -> Tensor:
        assert self.attention_mask is not None
        rows = self.attention_mask.shape[0]
        if batch % rows:
            raise ConfigError(
                f"an attention mask of {rows} rows for a batch of {batch}",
                "as many rows as the batch, or a divisor of it (several samples a prompt)",
                "Build the intervention with this batch's own mask.",
            )
        return self.attention_mask.repeat_interleave(batch // rows, dim=0)


def merge_slots(tokens: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Expert ids: ``new`` where ``tokens``, ``old`` elsewhere, as wide as the widest route that results."""
    slots = max(new.shape[-1], old.shape[-1])
    merged = torch.where(tokens.unsqueeze(-1), _fit(new, slots, EMPTY).to(old.dtype), _fit(old, slots, EMPTY))
    return pack_left(merged)


def merge_weights(tokens: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Weights: ``new`` where ``tokens``, ``old`` elsewhere, as wide as the routes that run (``old``)."""
    return torch.where(tokens.unsqueeze(-1), _fit(new, old.shape[-1], 0.0).to(old.dtype), old)


def _fit(values: Tensor, slots: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, max(slots - values.shape[-1], 0)), value=fill)[..., :slots]
