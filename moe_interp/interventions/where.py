"""Which tokens an intervention touches, and how two routes are merged token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from moe_interp.errors import ConfigError, HookError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.hooks.layer import pack_left
from moe_interp.interventions.streams import uniform_keys
from moe_interp.types import EMPTY

Positions = Sequence[int] | Tensor | Literal["all", "new"] | None


class Where:
    """The tokens of a running pass that an intervention is meant for.

    Args:
        moe: The attached hooks; they know how much of the sequence is in the cache.
        positions: None: every position of a forward pass; under ``generate`` those of the prompt only.
            Integers: absolute positions, counted in the unpadded prompt and on into what is generated; negative ones
            count from the end of the prompt. "all": every position of every step. "new": the generated ones only.
        attention_mask: ``[batch, pos]`` of the prompt, 1 at real tokens. Padding is never touched, and positions count
            each row's real tokens. A mask with fewer rows serves several samples a prompt.

    Without a mask the prompt is the pass that finds no cache. So ``generate`` without a cache needs the mask: every
    step is a whole pass there, which nothing else tells from a prompt.

    Raises:
        ConfigError: positions of another kind, or a mask that is not 2-D.
    """

    def __init__(self, moe: MoEHooks, positions: Positions = None, attention_mask: Tensor | None = None) -> None:
        self.moe = moe
        if isinstance(positions, str) and positions not in ("all", "new"):
            raise _bad_positions(positions)
        self.named = positions if positions is None or isinstance(positions, str) else "listed"
        self.listed = _as_positions(positions) if self.named == "listed" else torch.empty(0)
        self.attention_mask = None if attention_mask is None else torch.as_tensor(attention_mask).bool()
        if self.attention_mask is not None and self.attention_mask.ndim != 2:
            raise ConfigError(
                f"an attention mask of shape {tuple(self.attention_mask.shape)}",
                "[batch, pos]",
                "Pass the prompt's 2-D mask.",
            )

    def tokens(self, value: Tensor) -> Tensor:
        """``[batch, pos]`` bool for a hooked tensor ``[batch, pos, ...]``.

        Raises:
            HookError: the tensor came without its batch axis.
            ConfigError: the mask is not of this batch.
        """
        real = self.is_real(value)
        if self.named == "all":
            return real
        if self.named == "listed":
            listed = self.listed.to(value.device)
            listed = torch.where(listed < 0, listed + self._prompt_lengths(value), listed)  # [batch, n] or [1, n]
            return real & (self.index(value).unsqueeze(-1) == listed.unsqueeze(1)).any(dim=-1)
        column = torch.arange(self.moe.n_past, self.moe.n_past + value.shape[1], device=value.device)
        is_prompt = column < self._prompt_width(value)
        return real & (is_prompt if self.named is None else ~is_prompt)

    def index(self, value: Tensor) -> Tensor:
        """``[batch, pos]`` absolute position of each token in its unpadded sequence; of padding, any number."""
        past, pos = self.moe.n_past, value.shape[1]
        return (self._mask(value).cumsum(dim=-1) - 1)[:, past : past + pos]

    def is_real(self, value: Tensor) -> Tensor:
        """``[batch, pos]``: not padding. What is generated is real."""
        past, pos = self.moe.n_past, value.shape[1]
        return self._mask(value)[:, past : past + pos]

    def keys(self, value: Tensor, n: int, *labels: int) -> Tensor:
        """``[batch, pos, n]`` uniform numbers, fixed by labels, row and position in the unpadded sequence."""
        row = torch.arange(value.shape[0], device=value.device).unsqueeze(1)
        return uniform_keys(self.index(value), n, *labels, row)

    def _mask(self, value: Tensor) -> Tensor:
        """``[batch, past + pos]`` bool: the prompt's mask, and all that came after it."""
        if value.ndim < 3:
            raise HookError(
                f"an activation of shape {tuple(value.shape)}, without its batch axis",
                "[batch, pos, ...]",
                "Run without remove_batch_dim.",
            )
        (batch, pos), past = value.shape[:2], self.moe.n_past
        if self.attention_mask is None:
            return torch.ones(batch, past + pos, dtype=torch.bool, device=value.device)
        rows, width = self.attention_mask.shape
        if batch % rows or (past == 0 and pos < width):
            raise ConfigError(
                f"an attention mask of {rows} x {width} for a pass of {batch} x {pos} tokens",
                "the mask of the prompt that runs: its positions, and its rows or a divisor (several samples a prompt)",
                "Build the intervention with this batch's own mask.",
            )
        mask = self.attention_mask.to(value.device).repeat_interleave(batch // rows, dim=0)
        return torch.nn.functional.pad(mask, (0, max(past + pos - width, 0)), value=True)

    def _prompt_width(self, value: Tensor) -> int:
        """Columns of the prompt, padding included; 0 in a later step whose prompt is not known: it has passed."""
        if self.attention_mask is not None:
            return self.attention_mask.shape[1]
        return 0 if self.moe.n_past else value.shape[1]

    def _prompt_lengths(self, value: Tensor) -> Tensor:
        """``[batch, 1]`` (or ``[1, 1]``) real tokens of the prompt."""
        if self.attention_mask is None:
            return torch.full((1, 1), self._prompt_width(value), device=value.device)
        repeats = value.shape[0] // self.attention_mask.shape[0]
        return self.attention_mask.to(value.device).sum(dim=-1, keepdim=True).repeat_interleave(repeats, dim=0)


def _as_positions(positions: Any) -> Tensor:
    try:
        listed = torch.as_tensor(positions)
    except (TypeError, ValueError, RuntimeError):
        raise _bad_positions(positions) from None
    if listed.ndim > 1 or (listed.numel() and (listed.is_floating_point() or listed.dtype == torch.bool)):
        raise _bad_positions(positions)
    return listed.reshape(-1).long()


def _bad_positions(positions: Any) -> ConfigError:
    return ConfigError(f"positions={positions!r}", 'a list of integers, None, "all" or "new"', "Name the positions.")


def pack_routes(routes: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Empty slots to the end, and the weights ``[..., slot]`` along with their experts."""
    order = (routes == EMPTY).to(torch.int8).sort(dim=-1, stable=True).indices
    return routes.gather(-1, order), None if weights is None else weights.gather(-1, order)


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
