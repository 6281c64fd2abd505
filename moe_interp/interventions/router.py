"""Change how a whole layer routes: uniformly, at random, or with a bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_interp.checks import check_seed
from moe_interp.errors import ConfigError
from moe_interp.hooks.attach import MoEHooks, check_attached
from moe_interp.interventions.force import Mass, NaturalMass, check_mass
from moe_interp.interventions.streams import layer_labels
from moe_interp.interventions.where import Positions, Where
from moe_interp.interventions.writing import RouteWriter
from moe_interp.types import Hooks, Layer


def uniform_routing(
    moe: MoEHooks,
    layers: Sequence[Layer] | None = None,
    mass: Mass = "one",
    positions: Positions = None,
    attention_mask: Tensor | None = None,
) -> Hooks:
    """Every expert runs, with weight 1/E (``mass="one"``) or the token's natural sum of weights / E (``"natural"``).

    Llama 4, where a weight scales the expert's input: the mean of E(x) over the experts with s = 1 (derived), times the
    natural sum for ``mass="natural"``.

    Args:
        moe: Attached hooks.
        layers: MoE layers; all by default.
        mass: The total weight.
        positions, attention_mask: See :class:`moe_interp.interventions.where.Where`.
    """
    check_attached(moe)
    check_mass(mass)
    where = Where(moe, positions, attention_mask)
    return [hook for layer in _layers(moe, layers) for hook in _uniform(moe, layer, mass, where)]


def random_routing(
    moe: MoEHooks,
    layers: Sequence[Layer] | None = None,
    seed: int = 0,
    positions: Positions = None,
    attention_mask: Tensor | None = None,
) -> Hooks:
    """As many experts as the router would use, drawn uniformly without replacement; the family's weights for them.

    A token's draw depends on the seed, the layer, the row of the batch and the position in the unpadded sequence alone:
    not on padding, and not on whether the sequence runs at once or step by step.

    Args:
        moe: Attached hooks.
        layers: MoE layers; all by default.
        seed: Seed of the draw.
        positions, attention_mask: See :class:`moe_interp.interventions.where.Where`.
    """
    check_attached(moe)
    seed = check_seed(seed)
    where = Where(moe, positions, attention_mask)

    def draw(layer: Layer) -> Hooks:
        n_experts = moe.spec(layer).n_experts

        def route(value: Tensor) -> Tensor:
            keys = where.keys(value, n_experts, seed, *layer_labels(layer))
            return keys.topk(value.shape[-1], dim=-1).indices.masked_fill(value < 0, -1)

        return RouteWriter(moe, layer, where, route).hooks

    return [hook for layer in _layers(moe, layers) for hook in draw(layer)]


def bias_router(
    moe: MoEHooks,
    layer: Layer,
    bias: Tensor | Sequence[float],
    positions: Positions = None,
    attention_mask: Tensor | None = None,
) -> Hooks:
    """Add a bias to the router's logits: selection and weights follow by the family's own rule.

    Args:
        moe: Attached hooks.
        layer: An MoE layer.
        bias: ``[expert]``; -inf shuts an expert out (of softmax families; where a family adds a correction bias to its
            scores, use ``ablate_experts(mode="reroute")``).
        positions, attention_mask: See :class:`moe_interp.interventions.where.Where`.

    Raises:
        ConfigError: a bias of another width, or one that is NaN.
    """
    check_attached(moe)
    added, n_experts = torch.as_tensor(bias, dtype=torch.float64), moe.spec(layer).n_experts
    if added.shape != (n_experts,) or bool(torch.isnan(added).any()):
        raise ConfigError(
            f"a bias of shape {tuple(added.shape)}" + (" with NaN" if added.shape == (n_experts,) else ""),
            f"{n_experts} numbers, one an expert",
            "Give each expert a bias; 0 leaves it.",
        )
    where = Where(moe, positions, attention_mask)

    def add(value: Tensor, hook: Any) -> Tensor:
        return torch.where(where.tokens(value).unsqueeze(-1), value + added.to(value), value)

    return [(moe.hook_name("router_logits", layer), add)]


def _uniform(moe: MoEHooks, layer: Layer, mass: Mass, where: Where) -> Hooks:
    spec = moe.spec(layer)
    natural = NaturalMass(moe, layer)
    everyone = torch.arange(spec.n_experts)

    def route(value: Tensor) -> Tensor:
        if mass == "natural":
            natural.read(value)
        return everyone.to(value).expand(*value.shape[:2], -1)

    def share(value: Tensor) -> Tensor:
        total = torch.ones_like(value[..., :1]) if mass == "one" else natural.take().to(value)
        return (total / spec.n_experts).expand_as(value)

    writer = RouteWriter(moe, layer, where, route, torch.ones_like if spec.weight_on_input else share)

    def average(value: Tensor, hook: Any) -> Tensor:
        kept = writer.kept(value)
        return value if kept is None else torch.where(kept.unsqueeze(-1), value * share(value), value)

    return [*writer.hooks, (moe.hook_name("routed_out", layer), average)] if spec.weight_on_input else writer.hooks


def _layers(moe: MoEHooks, layers: Sequence[Layer] | None) -> list[Layer]:
    return list(moe.layers) if layers is None else [moe.layer_label(layer) for layer in layers]
