"""Natural routing of items, read off while they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_interp.experiments.inputs.items import ItemBatch
from moe_interp.hooks.attach import MoEHooks
from moe_interp.types import Hooks

POSITIONS = ("all", "prompt", "answer")
"""Which positions an item's routing is averaged over: all that predict something, those before the answer's
predictions, and those that predict the answer."""


READ = ("routing", "share", "uses", "reaches", "margin")


class RoutingStats:
    """Mean routing probability and slot share of each expert, by item, layer and kind of position.

    Routing probability is exp of ``rule.log_policy``; an item's last position predicts nothing and is left out, padding
    too. A slot share counts how often an expert fills a slot; empty slots do not count. ``uses`` is whether any token
    of the item uses an expert, its last one included; ``reaches``, whether one does whose output can reach a prediction
    of the answer: not the last token's, and in the model's last block, behind which nothing mixes positions, only those
    that predict the answer.
    """

    def __init__(self, moe: MoEHooks, batch: ItemBatch, layers: Sequence[int]) -> None:
        self.moe, self.layers = moe, list(layers)
        column = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        predicts = column < (batch.length - 1).unsqueeze(1)
        answers = predicts & (column >= (batch.prompt_length - 1).unsqueeze(1))
        self.masks = torch.stack([predicts, predicts & ~answers, answers])  # [positions, row, pos]
        self.real = column < batch.length.unsqueeze(1)
        self.last = len(moe.bridge.blocks) - 1
        self.found: dict[int, dict[str, Any]] = {layer: {} for layer in layers}

    def hooks(self) -> Hooks:
        """Hooks that only read, for the natural pass."""
        return [
            (self.moe.hook_name(name, layer), self._reader(layer, read))
            for layer in self.layers
            for name, read in (
                ("router_logits", self._read_logits),
                ("expert_indices", self._read_indices),
            )
        ]

    def natural_mass(self, layer: int) -> Tensor:
        """``[row, pos, 1]``: the sum of each token's own weights, as the interventions take it: the family's."""
        return self.found[layer]["mass"]

    def arrays(self, layer: int) -> dict[str, Any]:
        """``routing`` and ``share`` as ``[positions, row, expert]``, ``uses`` and ``reaches`` as ``[row, expert]``, and
        the smallest ``margin`` of a choice."""
        return {name: np.asarray(self.found[layer][name]) for name in READ}

    def _reader(self, layer: int, read: Any) -> Any:
        def hook_function(value: Tensor, hook: Any) -> None:
            read(layer, value)

        return hook_function

    def _read_logits(self, layer: int, logits: Tensor) -> None:
        spec = self.moe.spec(layer)
        rule = spec.rule
        self.found[layer]["routing"] = self._average(rule.log_policy(logits).exp())
        best = rule.choice_logits(logits)[self.masks[0]].topk(min(spec.top_k + 1, spec.n_experts), dim=-1).values
        margins = best[:, -2] - best[:, -1] if best.shape[-1] > spec.top_k else torch.tensor([torch.inf])
        self.found[layer]["margin"] = float(margins.min())

    def _read_indices(self, layer: int, indices: Tensor) -> None:
        n_experts = self.moe.spec(layer).n_experts
        counts = torch.nn.functional.one_hot(indices + 1, n_experts + 1)[..., 1:].sum(dim=-2).double()
        totals = torch.einsum("mrp,rpe->mre", self.masks.double(), counts)
        reached = totals[POSITIONS.index("answer" if layer == self.last else "all")]
        self.found[layer]["reaches"] = (reached > 0).cpu().numpy()
        self.found[layer]["uses"] = ((counts > 0) & self.real.unsqueeze(-1)).any(dim=1).cpu().numpy()
        self.found[layer]["mass"] = self.moe.running(layer).family_weights(indices).sum(dim=-1, keepdim=True)
        self.found[layer]["share"] = (totals / totals.sum(dim=-1, keepdim=True)).cpu().numpy()

    def _average(self, values: Tensor) -> Any:
        masks = self.masks.double()
        sums = torch.einsum("mrp,rpe->mre", masks, values.double())
        return (sums / masks.sum(dim=-1, keepdim=True)).cpu().numpy()  # nan where an item has no such position
