"""What a sweep replaces at one layer: the activations of both runs, and which of them belong to a cell."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moe_interp.arch.routing_rule import widen
from moe_interp.interventions.positions import merge_slots, merge_weights, pack_routes
from moe_interp.patching.inputs import PatchInputs, cached_activation
from moe_interp.types import EMPTY, Hooks, Layer

Activations = Mapping[tuple[str, Layer], Tensor]
"""The corrupted run's activations, by bare hook name and layer."""


class Patch(ABC):
    """Activations of one layer that are taken from the clean run, a cell at a time.

    A cell is a mask of the activations ``[batch, pos]``, or ``[batch, pos, slot]``.

    Args:
        inputs: The corrupted batch.
        layer: The layer.
        cache: The clean run's cache.
        corrupted: The corrupted run's activations.

    Attributes:
        differs: A mask of the activations that differ between the runs; a patch elsewhere changes nothing.
    """

    needs: tuple[str, ...]  # hooks of the clean cache
    writes: str  # the hook that must be there to be written to
    reads: tuple[str, ...]  # hooks of the corrupted run
    differs: Tensor

    def __init__(self, inputs: PatchInputs, layer: Layer, cache: Any, corrupted: Activations) -> None:
        self.inputs, self.layer = inputs, layer
        clean = {name: cached_activation(inputs, cache, name, layer) for name in self.needs}
        self.prepare(clean, {name: corrupted[name, layer] for name in self.reads})

    @abstractmethod
    def prepare(self, clean: dict[str, Tensor], corrupted: dict[str, Tensor]) -> None:
        """Take the activations of both runs, and set ``differs``."""

    @abstractmethod
    def hooks(self, where: Tensor) -> Hooks:
        """The patch of a cell, as hooks for a pass of the corrupted batch."""

    @abstractmethod
    def block_out(self, where: Tensor, plain: Tensor, examples: Tensor, start: int) -> Tensor:
        """The output of the experts' block under the patch of a cell, from a column on.

        Args:
            where: The cell.
            plain: ``[batch, pos, d_model]``, the output without a patch.
            examples: ``[n]``, of the batch.
            start: The first column.

        Returns:
            ``[n, pos - start, d_model]``.
        """

    def hook(self, name: str, write: Callable[[Tensor], Tensor]) -> Hooks:
        return [(self.inputs.moe.hook_name(name, self.layer), lambda value, hook: write(value))]


class TokenPatch(Patch):
    """Whole tokens: what the experts' block gives at a token depends on that token's activation alone.

    Attributes:
        patched_out: ``[batch, pos, d_model]``, the output of the experts' block with every token patched; set before
            :meth:`block_out` is called.
    """

    patched_out: Tensor

    def block_out(self, where: Tensor, plain: Tensor, examples: Tensor, start: int) -> Tensor:
        here = where[examples, start:].unsqueeze(-1)
        return torch.where(here, self.patched_out[examples, start:], plain[examples, start:])


class RouterLogitsPatch(TokenPatch):
    """Router logits: the token is routed anew by the family's own rule, experts and weights."""

    needs = reads = ("router_logits",)
    writes = "router_logits"

    def prepare(self, clean: dict[str, Tensor], corrupted: dict[str, Tensor]) -> None:
        self.clean = clean["router_logits"]
        self.differs = (self.clean != corrupted["router_logits"]).any(dim=-1)

    def hooks(self, where: Tensor) -> Hooks:
        return self.hook("router_logits", lambda v: torch.where(where.unsqueeze(-1), self.clean.to(v.dtype), v))


class RoutesPatch(TokenPatch):
    """Routes: the clean run's experts, with the clean run's weights or with the corrupted run's own for them."""

    needs = reads = ("expert_indices", "expert_weights")
    writes = "expert_weights"
    own_weights = False

    def prepare(self, clean: dict[str, Tensor], corrupted: dict[str, Tensor]) -> None:
        self.indices, self.weights = pack_routes(clean["expert_indices"], clean["expert_weights"])
        own, weights = pack_routes(corrupted["expert_indices"], corrupted["expert_weights"])
        slots = max(own.shape[-1], self.indices.shape[-1])
        differs = widen(self.indices, slots, EMPTY) != widen(own, slots, EMPTY)
        if not self.own_weights:
            assert weights is not None
            assert self.weights is not None
            differs = differs | (widen(self.weights, slots, 0.0) != widen(weights, slots, 0.0))
        self.differs = differs.any(dim=-1)

    def hooks(self, where: Tensor) -> Hooks:
        hooks = self.hook("expert_indices", lambda value: merge_slots(where, self.indices, value))
        if self.own_weights:
            return hooks
        assert self.weights is not None
        weights = self.weights
        return hooks + self.hook("expert_weights", lambda value: merge_weights(where, weights, value))


class OwnWeightsRoutesPatch(RoutesPatch):
    """Routes, with the corrupted run's own weights for the clean run's experts."""

    own_weights = True


class SharedOutPatch(TokenPatch):
    """The shared experts' output, as it is added."""

    needs = reads = ("shared_out",)
    writes = "shared_out"

    def prepare(self, clean: dict[str, Tensor], corrupted: dict[str, Tensor]) -> None:
        self.clean, self.corrupted = clean["shared_out"], corrupted["shared_out"]
        self.differs = (self.clean != self.corrupted).any(dim=-1)

    def hooks(self, where: Tensor) -> Hooks:
        return self.hook("shared_out", lambda v: torch.where(where.unsqueeze(-1), self.clean.to(v.dtype), v))

    def block_out(self, where: Tensor, plain: Tensor, examples: Tensor, start: int) -> Tensor:
        difference = (self.clean - self.corrupted)[examples, start:]
        return plain[examples, start:] + difference * where[examples, start:].unsqueeze(-1)


class SlotsPatch(Patch):
    """Outputs of experts, slot by slot, whose weighted sum is part of what the experts' block gives.

    Attributes:
        experts: ``[batch, pos, slot]``, the expert of each slot that may be patched; -1 at others.
        difference: ``[batch, pos, slot, d_model]``, what patching a slot adds to the sum.
        own_experts: ``[batch, pos, slot]``, the corrupted run's route.
    """

    experts: Tensor
    difference: Tensor
    own_experts: Tensor

    def unmatched(self, expert: int) -> Tensor:
        """``[batch, pos]``: tokens whose use of the expert has no counterpart in the clean run."""
        return ((self.own_experts == expert) & ~self.has_counterpart).any(dim=-1)

    def unmatched_slot(self, slot: int) -> Tensor:
        """``[batch, pos]``: tokens that use a slot which is empty in the clean run."""
        if slot >= self.own_experts.shape[-1]:
            return torch.zeros_like(self.own_experts[..., 0], dtype=torch.bool)
        return (self.own_experts[..., slot] != EMPTY) & ~self.has_counterpart[..., slot]

    @property
    def has_counterpart(self) -> Tensor:
        """``[batch, pos, slot]`` of the corrupted run's route."""
        return torch.ones_like(self.own_experts, dtype=torch.bool)

    def block_out(self, where: Tensor, plain: Tensor, examples: Tensor, start: int) -> Tensor:
        here = where[examples, start:].unsqueeze(-1).to(self.difference.dtype)
        return plain[examples, start:] + (self.difference[examples, start:] * here).sum(dim=2).to(plain.dtype)


class SlotOutputsPatch(SlotsPatch):
    """Each slot's output by the clean run's output in the same slot, whatever the two experts are."""

    needs = ("expert_out", "expert_indices")
    reads = ("expert_out", "expert_indices", "expert_weights")
    writes = "expert_out"

    def prepare(self, clean: dict[str, Tensor], corrupted: dict[str, Tensor]) -> None:
        own = corrupted["expert_indices"]
        self.own_experts = own
        found, output = self.counterparts(clean["expert_indices"], clean["expert_out"], own)
        self.experts = own.masked_fill(~found, EMPTY)
        self.clean = output
        self.differs = found & (output != corrupted["expert_out"]).any(dim=-1)
        spec = self.inputs.moe.spec(self.layer)
        difference = output.to(corrupted["expert_out"].dtype) - corrupted["expert_out"]
        weights = corrupted["expert_weights"].unsqueeze(-1).to(difference.dtype)
        self.difference = difference if spec.weight_on_input else difference * weights

    @property
    def has_counterpart(self) -> Tensor:
        return self.experts != EMPTY

    def counterparts(self, clean: Tensor, outputs: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Which slots ``[batch, pos, slot]`` have a counterpart in the clean run, and its output."""
        slots = own.shape[-1]
        aligned = _fit_slots(outputs, slots)
        return (own != EMPTY) & (_fit_slots(clean.unsqueeze(-1), slots, EMPTY).squeeze(-1) != EMPTY), aligned

    def hooks(self, where: Tensor) -> Hooks:
        return self.hook("expert_out", lambda v: torch.where(where.unsqueeze(-1), self.clean.to(v.dtype), v))


class ExpertOutputsPatch(SlotOutputsPatch):
    """Each expert's output by the same expert's in the clean run at that token, where both runs use it there."""

    def counterparts(self, clean: Tensor, outputs: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        # shape: (batch, pos, slot, slot of the clean run)
        same = (own.unsqueeze(-1) == clean.unsqueeze(-2)) & (own != EMPTY).unsqueeze(-1)
        place = same.long().argmax(dim=-1, keepdim=True)
        return same.any(dim=-1), outputs.gather(2, place.expand(*place.shape[:-1], outputs.shape[-1]))


class ContributionsPatch(SlotsPatch):
    """Each expert's weighted output by what it contributes in the clean run: nothing where that does not use it.

    ``experts`` has the clean run's slots, then the corrupted run's.
    """

    needs = reads = ("expert_out", "expert_indices", "expert_weights")
    writes = "routed_out"

    def prepare(self, clean: dict[str, Tensor], corrupted: dict[str, Tensor]) -> None:
        on_input = self.inputs.moe.spec(self.layer).weight_on_input
        self.own_experts = corrupted["expert_indices"]

        def weighted(run: dict[str, Tensor]) -> Tensor:
            return run["expert_out"] if on_input else run["expert_out"] * run["expert_weights"].unsqueeze(-1)

        self.experts = torch.cat([clean["expert_indices"], corrupted["expert_indices"]], dim=-1)
        self.difference = torch.cat([weighted(clean).to(corrupted["expert_out"].dtype), -weighted(corrupted)], dim=2)

    @cached_property
    def differs(self) -> Tensor:  # type: ignore[override]
        same = (self.experts.unsqueeze(-1) == self.experts.unsqueeze(-2)).to(self.difference.dtype)
        return (same @ self.difference != 0).any(dim=-1) & (self.experts != EMPTY)

    def hooks(self, where: Tensor) -> Hooks:
        delta = (self.difference * where.unsqueeze(-1).to(self.difference.dtype)).sum(dim=2)
        return self.hook("routed_out", lambda value: value + delta.to(value.dtype))


def _fit_slots(values: Tensor, slots: int, fill: float = 0.0) -> Tensor:
    """``[batch, pos, slots, width]``, cut or filled."""
    missing = max(slots - values.shape[2], 0)
    return torch.nn.functional.pad(values, (0, 0, 0, missing), value=fill)[:, :, :slots]
