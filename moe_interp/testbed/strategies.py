"""Routing strategies: hooks that change the route, plus an auxiliary loss. The model code is never forked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RouterRecord:
    """One layer's router in a micro-batch: logits ``[token, expert]``, indices used ``[token, slot]`` (-1 empty)."""

    logits: Tensor
    indices: Tensor

    def load(self) -> Tensor:
        """f: share of the slots of each expert, ``[expert]``, summing to 1."""
        used = self.indices.flatten()
        counts = torch.bincount(used[used >= 0], minlength=self.logits.shape[-1])
        return counts / counts.sum().clamp_min(1)


class Strategy:
    """No balancing: the family's own routing and no auxiliary loss. Others override what they need."""

    name = "none"

    def fwd_hooks(self, step: int, domain: Tensor) -> list[tuple[str, Callable[..., Any]]]:
        """Hooks for this micro-batch, as ``run_with_hooks`` takes them; ``domain`` is ``[batch, pos]``."""
        return []

    def auxiliary_loss(self, records: Mapping[int, RouterRecord]) -> Tensor | float:
        """The auxiliary loss of one micro-batch, summed over layers, before its coefficient."""
        return 0.0

    def after_step(self, loads: Mapping[int, Tensor]) -> None:
        """Called after each optimiser step with every layer's load over the whole step."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""


class MicroBatchBalance(Strategy):
    """sum over layers of E * sum_e f_e P_e, f and P of the micro-batch (Fedus et al. 2021, f over all top-k slots).

    1 per layer for balanced use, E for collapsed use. Per layer, unlike transformers' own, which pools the layers.
    """

    name = "micro_batch"

    def auxiliary_loss(self, records: Mapping[int, RouterRecord]) -> Tensor | float:
        total: Tensor | float = 0.0
        for record in records.values():
            probs = record.logits.float().softmax(-1).mean(0)
            total = total + record.logits.shape[-1] * (record.load() * probs).sum()
        return total
