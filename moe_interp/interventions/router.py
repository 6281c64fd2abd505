"""Change how a whole layer routes: uniformly, at random, with a bias or at a temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_interp.arch.rules import HashTable
from moe_interp.checks import check_seed
from moe_interp.errors import ConfigError, warn
from moe_interp.hooks.attach import MoEHooks, check_attached
from moe_interp.interventions.force import Mass, NaturalMass, check_mass
from moe_interp.interventions.named import Layers, chosen_layers
from moe_interp.interventions.positions import Positions, TokenSelection
from moe_interp.interventions.random_keys import layer_labels
from moe_interp.interventions.reach import limits
from moe_interp.interventions.route_writer import RouteWriter
from moe_interp.types import HookFunction, Hooks, Layer


class BiasLimitWarning(UserWarning):
    """A bias on the router's logits that may not have its way, by what the family ranks experts by."""


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
        positions, attention_mask: See :class:`moe_interp.interventions.positions.TokenSelection`.
    """
    check_attached(moe)
    check_mass(mass)
    selections = {layer: TokenSelection(moe, layer, positions, attention_mask) for layer in _layers(moe, layers)}
    return [hook for layer, selection in selections.items() for hook in _uniform(moe, layer, mass, selection)]


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
        positions, attention_mask: See :class:`moe_interp.interventions.positions.TokenSelection`.
    """
    check_attached(moe)
    seed = check_seed(seed)

    def draw(layer: Layer) -> Hooks:
        selection, n_experts = TokenSelection(moe, layer, positions, attention_mask), moe.spec(layer).n_experts

        def route(value: Tensor) -> Tensor:
            keys = selection.keys(value, n_experts, seed, *layer_labels(layer))
            return keys.topk(value.shape[-1], dim=-1).indices.masked_fill(value < 0, -1)

        return RouteWriter(moe, layer, selection, route).hooks

    return [hook for layer in _layers(moe, layers) for hook in draw(layer)]


def bias_router(
    moe: MoEHooks,
    layer: Layer,
    bias: Tensor | Sequence[float],
    positions: Positions = None,
    attention_mask: Tensor | None = None,
) -> Hooks:
    """Add a bias to the router's logits: selection and weights follow by the family's own rule.

    What that can do depends on what the family ranks experts by:

    - the logits, or a softmax of them (Mixtral, OLMoE, Qwen, GPT-OSS, Granite, Llama 4, Phi-MoE, ...): a large positive
      bias makes every token use the expert, a large negative one, or -inf, none.
    - a score plus a correction bias (DeepSeek-V3, GLM-4, MiniMax-M2, LFM2, AFMoE, Laguna, Nemotron-H, ERNIE): the
      logits move the score within its range, for a sigmoid 0 to 1, and no further. An expert whose correction bias is
      low may not be chosen with a score of 1, and one whose is high may be with a score of 0, also with -inf. Scores
      saturate: above a logit of about 17 in float32, of 6 in bfloat16, sigmoids are equal.
    - the best groups first (DeepSeek-V2 and V3, GLM-4): an expert is chosen only where its group is.
    - a table of token ids (hash layers of DeepSeek-V4): the choice does not move at all, only the weights do.
    - a capacity (Switch Transformers): tokens beyond it get no expert.

    Where the rule and the correction bias of this layer leave a biased expert uncertain, a :class:`BiasLimitWarning`
    names it. ``promote_experts`` and ``suppress_experts`` have their way in every family, for certain or by a margin on
    what the family ranks by.

    Args:
        moe: Attached hooks.
        layer: An MoE layer.
        bias: ``[expert]``.
        positions, attention_mask: See :class:`moe_interp.interventions.positions.TokenSelection`.

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
    _warn_of_limits(moe, layer, added)
    selection = TokenSelection(moe, layer, positions, attention_mask)

    def add(value: Tensor, hook: Any) -> Tensor:
        return torch.where(selection.tokens(value).unsqueeze(-1), value + added.to(value), value)

    return [(moe.hook_name("router_logits", layer), add)]


def router_temperature(
    moe: MoEHooks,
    layer: Layers,
    temperature: float,
    positions: Positions = None,
    attention_mask: Tensor | None = None,
) -> Hooks:
    """Divide the router's logits by a temperature: below 1 the weights sharpen, above 1 they even out.

    What follows is the family's own rule on the divided logits:

    - ranked by the logits or their softmax (Mixtral, OLMoE, Qwen, GPT-OSS, Granite, Phi-MoE, ...): the choice and its
      order stay, and the weights change. Where weights are not normalised over the chosen (OLMoE, Jamba, DeepSeek-V2),
      their sum changes too. Phi-MoE's mask of distant experts does not depend on the scale of the logits.
    - sigmoid and other scores of each expert alone (Llama 4, DeepSeek-V3, GLM-4, LFM2, ...): each score moves to that
      of logit 0. Without a correction bias the order stays.
    - a correction bias, or groups ranked by a sum of scores: the scores move and the bias does not, so **the choice may
      change** as well. ``set_routes`` with the natural routes after this keeps the choice.
    - one expert a token, normalised over the chosen, or a hash layer with a constant score: there is nothing to change.
      Laguna's soft-cap comes after the division.

    Args:
        moe: Attached hooks.
        layer: An MoE layer, several, or None for all.
        temperature: Above 0, and finite; 1 changes nothing.
        positions, attention_mask: See :class:`moe_interp.interventions.positions.TokenSelection`.

    Raises:
        ConfigError: another temperature.

    At half precision, quotients of close logits may round to the same number; ties go to the family's own order.
    """
    check_attached(moe)
    try:
        number = math.nan if isinstance(temperature, bool) else float(temperature)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigError(f"temperature={temperature!r}", "a finite number above 0", "Correct the temperature.")

    def divide(selection: TokenSelection) -> HookFunction:
        def hook_function(value: Tensor, hook: Any) -> Tensor:
            return torch.where(selection.tokens(value).unsqueeze(-1), value / number, value)

        return hook_function

    return [
        (moe.hook_name("router_logits", label), divide(TokenSelection(moe, label, positions, attention_mask)))
        for label in chosen_layers(moe, layer)
    ]


def _warn_of_limits(moe: MoEHooks, layer: Layer, added: Tensor) -> None:
    """Say which biased experts the family's rule leaves uncertain, however large the bias."""
    spec = moe.spec(layer)
    rule = spec.rule
    if isinstance(rule, HashTable):
        if bool(added.any()):
            text = "chooses experts by token id: a bias on the logits moves their weights, and never the choice"
            _warn(layer, spec.family.name, text)
        return
    found = limits(rule, added)
    parts = [
        f"a bias cannot ensure that {verb} {', '.join(f'{e} ({why})' for e, why in list(some.items())[:8])}"
        + (f" and {len(some) - 8} more" if len(some) > 8 else "")
        for verb, some in (("tokens use expert", found.up), ("no token uses expert", found.down))
        if some
    ]
    if parts:
        _warn(layer, spec.family.name, f"ranks by scores, not by logits ({spec.family.rule_text}): {'; '.join(parts)}")


def _warn(layer: Layer, family: str, text: str) -> None:
    remedy = "promote_experts and suppress_experts act for certain."
    warn(f"layer {layer!r} ({family}) {text}. {remedy}", BiasLimitWarning)


def _uniform(moe: MoEHooks, layer: Layer, mass: Mass, selection: TokenSelection) -> Hooks:
    spec = moe.spec(layer)
    natural = NaturalMass(moe, layer)
    all_experts = torch.arange(spec.n_experts)

    def route(value: Tensor) -> Tensor:
        if mass == "natural":
            natural.read(value)
        return all_experts.to(value).expand(*value.shape[:2], -1)

    def share(value: Tensor) -> Tensor:
        total = torch.ones_like(value[..., :1]) if mass == "one" else natural.take().to(value)
        return (total / spec.n_experts).expand_as(value)

    writer = RouteWriter(moe, layer, selection, route, torch.ones_like if spec.weight_on_input else share)

    def average(value: Tensor, hook: Any) -> Tensor:
        kept = writer.kept(value)
        return value if kept is None else torch.where(kept.unsqueeze(-1), value * share(value), value)

    return [*writer.hooks, (moe.hook_name("routed_out", layer), average)] if spec.weight_on_input else writer.hooks


def _layers(moe: MoEHooks, layers: Sequence[Layer] | None) -> list[Layer]:
    return list(moe.layers) if layers is None else [moe.layer_label(layer) for layer in layers]
