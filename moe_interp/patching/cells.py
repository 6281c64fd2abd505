"""The cells of a sweep: their axes, and which activations belong to each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_interp.checks import as_whole
from moe_interp.errors import ConfigError
from moe_interp.patching.inputs import PatchInputs
from moe_interp.patching.patches import Patch, SlotsPatch
from moe_interp.types import Layer

CellMask = Callable[[Patch, tuple[int, ...]], Tensor]
"""From a layer's patch and a place on the inner axes to a mask of the cell's activations."""


@dataclass(frozen=True, eq=False)
class Grid:
    """The axes of a sweep besides its layers.

    Attributes:
        inputs: The corrupted batch.
        axes: Labels by name.
        where: The cell's mask of activations, ``[batch, pos]`` or ``[batch, pos, slot]``.
        unmatched: Like it, the activations that have no counterpart in the clean run; None where all have one.
        exists: ``[batch]``, whether an example has the cell at all.
        size: Of the inner axes at a layer, smaller where experts or slots are fewer.
    """

    inputs: PatchInputs
    axes: dict[str, tuple[int, ...]]
    where: CellMask
    unmatched: CellMask | None
    exists: Callable[[tuple[int, ...]], Tensor]
    size: Callable[[Layer], tuple[int, ...]]


def position_grid(inputs: PatchInputs, positions: Sequence[int]) -> Grid:
    """One cell a position."""
    columns = inputs.columns(positions)
    order = torch.arange(inputs.tokens.shape[1], device=columns.device)

    def where(patch: Patch, place: tuple[int, ...]) -> Tensor:
        return order == columns[:, place[0], None]

    axes = {"pos": tuple(positions)}
    return Grid(inputs, axes, where, None, lambda place: columns[:, place[0]] >= 0, lambda layer: (len(positions),))


def expert_grid(inputs: PatchInputs, positions: Sequence[int], experts: Any = None) -> Grid:
    """One cell an expert, at all of the positions together.

    Raises:
        ConfigError: experts that are not there at any layer, twice the same, or none.
    """
    chosen = check_experts(inputs, experts)
    asked = position_mask(inputs, positions).unsqueeze(-1)

    def where(patch: Patch, place: tuple[int, ...]) -> Tensor:
        assert isinstance(patch, SlotsPatch)
        return (patch.experts == chosen[place[0]]) & asked

    def unmatched(patch: Patch, place: tuple[int, ...]) -> Tensor:
        assert isinstance(patch, SlotsPatch)
        unmatched = patch.unmatched(chosen[place[0]])
        return unmatched & asked[..., 0]

    everywhere = inputs.lengths > 0

    def size(layer: Layer) -> tuple[int, ...]:
        return (sum(expert < inputs.moe.spec(layer).n_experts for expert in chosen),)

    return Grid(inputs, {"expert": chosen}, where, unmatched, lambda place: everywhere, size)


def slot_grid(inputs: PatchInputs, positions: Sequence[int]) -> Grid:
    """One cell a position and slot."""
    columns = inputs.columns(positions)
    order = torch.arange(inputs.tokens.shape[1], device=columns.device)
    top_k = {layer: inputs.moe.spec(layer).top_k for layer in inputs.layers}

    def token(place: tuple[int, ...]) -> Tensor:
        return order == columns[:, place[0], None]

    def where(patch: Patch, place: tuple[int, ...]) -> Tensor:
        assert isinstance(patch, SlotsPatch)
        slot = torch.arange(patch.experts.shape[-1], device=order.device) == place[1]
        return token(place).unsqueeze(-1) & slot & (patch.experts >= 0)

    def unmatched(patch: Patch, place: tuple[int, ...]) -> Tensor:
        assert isinstance(patch, SlotsPatch)
        return token(place) & patch.unmatched_slot(place[1])

    axes = {"pos": tuple(positions), "slot": tuple(range(max(top_k.values())))}
    return Grid(
        inputs, axes, where, unmatched, lambda place: columns[:, place[0]] >= 0,
        lambda layer: (len(positions), top_k[layer]),
    )  # fmt: skip


def position_mask(inputs: PatchInputs, positions: Sequence[int]) -> Tensor:
    """``[batch, pos]`` bool: the columns of these positions."""
    columns = inputs.columns(positions)
    found = torch.zeros(len(columns), inputs.tokens.shape[1] + 1, dtype=torch.bool, device=columns.device)
    return found.scatter(1, columns.masked_fill(columns < 0, inputs.tokens.shape[1]), True)[:, :-1]


def check_experts(inputs: PatchInputs, experts: Any = None) -> tuple[int, ...]:
    """Experts of a sweep; all by default.

    Raises:
        ConfigError: experts that are not there at every layer, twice the same, or none.
    """
    counts = [inputs.moe.spec(layer).n_experts for layer in inputs.layers]
    if experts is None:
        return tuple(range(max(counts)))
    several = experts.tolist() if hasattr(experts, "tolist") else experts
    several = several if isinstance(several, Iterable) and not isinstance(several, str) else [several]
    found = [as_whole(expert) for expert in several]
    chosen = tuple(expert for expert in found if expert is not None)
    if not chosen or len(chosen) < len(found) or len(set(chosen)) < len(chosen):
        raise ConfigError(f"experts={experts!r}", "whole numbers, each once", "Name the experts to patch.")
    if beyond := [expert for expert in chosen if not 0 <= expert < min(counts)]:
        raise ConfigError(
            f"expert {beyond[0]} at layers of {min(counts)} experts", f"ids from 0 to {min(counts) - 1}", "Correct it."
        )
    return chosen
