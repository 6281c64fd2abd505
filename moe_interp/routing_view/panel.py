"""The routes of one prompt through one stack of layers, as they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_interp.types import Layer


@dataclass(frozen=True, eq=False)
class Panel:
    """Which experts each token of a prompt was sent to, at each MoE layer of one stack.

    Attributes:
        layers: Labels of the layers, in their order.
        n_experts: Experts of each layer, shared experts not counted.
        tokens: ``[token]`` texts.
        token_ids: ``[token]`` ids; None where they were not recorded.
        positions: ``[token]`` positions in the unpadded prompt.
        indices: ``[token, layer, slot]`` experts in the router's own order; -1 is an empty slot. A token whose
            slots are all below -1 was not recorded at that layer.
        weights: ``[token, layer, slot]`` weights as applied; None where they were not recorded.
        predicted: ``[token]`` text of the token that the model finds most probable next; None where it is not known.
        predicted_ids: ``[token]`` its id.
        predicted_p: ``[token]`` its probability.
    """

    layers: tuple[Layer, ...]
    n_experts: tuple[int, ...]
    tokens: Sequence[str]
    token_ids: NDArray[np.int64] | None
    positions: NDArray[np.int64]
    indices: NDArray[np.int32]
    weights: NDArray[np.float32] | None = None
    predicted: Sequence[str] | None = None
    predicted_ids: NDArray[np.int64] | None = None
    predicted_p: NDArray[np.float32] | None = None

    @property
    def name(self) -> str:
        """``encoder`` or ``decoder``; empty where the model has one stack."""
        return self.layers[0][0] if isinstance(self.layers[0], tuple) else ""

    @property
    def numbers(self) -> list[int]:
        """The layers' numbers within their stack."""
        return [label[1] if isinstance(label, tuple) else label for label in self.layers]

    def slots(self, token: int, layer: int) -> list[tuple[int, float | None]]:
        """``(expert, weight)`` of the slots that are not empty: by falling weight, else in the router's order.

        Args:
            token, layer: Indices along the axes of :attr:`indices`.
        """
        experts = self.indices[token, layer]
        used = [slot for slot in range(len(experts)) if experts[slot] >= 0]
        if self.weights is None:
            return [(int(experts[slot]), None) for slot in used]
        weights = self.weights[token, layer]
        return [(int(experts[s]), float(weights[s])) for s in sorted(used, key=lambda s: -float(weights[s]))]

    def is_recorded(self, token: int, layer: int) -> bool:
        """Whether the token's route at the layer is known."""
        return not bool((self.indices[token, layer] < -1).all())
