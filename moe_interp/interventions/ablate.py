"""Take experts away, in four ways that answer different questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from moe_interp.checks import check_seed
from moe_interp.errors import ConfigError
from moe_interp.hooks.attach import MoEHooks, check_attached
from moe_interp.interventions.force import checked_experts
from moe_interp.interventions.streams import layer_labels
from moe_interp.interventions.where import Positions, Where
from moe_interp.interventions.writing import RouteWriter
from moe_interp.types import EMPTY, Hooks, Layer

Ablation = Literal["zero", "mean", "resample", "reroute"]


def ablate_experts(
    moe: MoEHooks,
    layer: Layer,
    experts: int | Sequence[int],
    mode: Ablation = "zero",
    seed: int = 0,
    positions: Positions = None,
    attention_mask: Tensor | None = None,
) -> Hooks:
    """Take experts away from the tokens that chose them.

    "zero": their outputs are dropped; the other experts keep their weights. "mean": each output is replaced by the
    expert's mean over the tokens of the batch that use it. "resample": by its output on one of those tokens, drawn by
    ``seed``, maybe itself. "reroute": the token keeps its other experts and takes the next best by ``choice_logits`` in
    place of these (none where the family's group limit leaves none), with the family's weights for its new set. Tokens
    that do not use the experts are untouched by all four.

    Args:
        moe: Attached hooks; "mean" and "resample" need ``expert_outputs=True``.
        layer: An MoE layer.
        experts: Expert ids.
        mode: What stands in their place.
        seed: Seed of "resample".
        positions, attention_mask: See :class:`moe_interp.interventions.where.Where`; padding is in no mean.

    Raises:
        RouteError: an id out of range, or an expert twice.
        ConfigError: an unknown mode, no experts, or fewer experts left than the router needs.
    """
    check_attached(moe)
    spec, seed = moe.spec(layer), check_seed(seed)
    gone = checked_experts(moe, layer, experts, "ablate_experts")
    if mode not in get_args(Ablation):
        raise ConfigError(f"mode={mode!r}", f"one of {', '.join(get_args(Ablation))}", "Correct the mode.")
    if mode == "reroute" and spec.n_experts - len(gone) < spec.top_k:
        raise ConfigError(
            f"{spec.n_experts - len(gone)} experts left of {spec.n_experts}",
            f"at least the {spec.top_k} that a token uses",
            "Ablate fewer experts, or use mode='zero'.",
        )
    where = Where(moe, positions, attention_mask)
    if mode == "reroute":
        return _reroute(moe, layer, gone, where)
    if mode == "zero":
        return _replace(moe, layer, gone, where, "expert_weights", lambda value, expert, used: torch.zeros_like(value))
    stand_in = _mean if mode == "mean" else _resampler(where, seed, layer)
    return _replace(moe, layer, gone, where, "expert_out", stand_in)


class StandIn(Protocol):
    """What takes the place of ``value`` where ``used`` ``[batch, pos, slot]``, the real tokens' slots of the expert."""

    def __call__(self, value: Tensor, expert: int, used: Tensor) -> Tensor: ...


def _replace(moe: MoEHooks, layer: Layer, gone: Tensor, where: Where, name: str, stand_in: StandIn) -> Hooks:
    def replace(value: Tensor, hook: Any) -> Tensor:
        route, tokens = moe.running(layer).indices, where.tokens(value).unsqueeze(-1)
        real = where.is_real(value).unsqueeze(-1)
        for expert in gone.tolist():
            used = (route == expert) & real
            spot = used & tokens
            value = torch.where(spot if value.ndim == 3 else spot.unsqueeze(-1), stand_in(value, expert, used), value)
        return value

    return [(moe.hook_name(name, layer), replace)]


def _mean(value: Tensor, expert: int, used: Tensor) -> Tensor:
    mask = used.unsqueeze(-1).to(value)
    return ((value * mask).sum(dim=(0, 1, 2)) / mask.sum().clamp(min=1)).expand_as(value)


def _resampler(where: Where, seed: int, layer: Layer) -> StandIn:
    def resample(value: Tensor, expert: int, used: Tensor) -> Tensor:
        pool = value[used]
        if not len(pool):
            return value
        key = where.keys(value, 1, seed, *layer_labels(layer), expert)  # [batch, pos, 1]
        return pool[(key * len(pool)).long()].expand_as(value)

    return resample


def _reroute(moe: MoEHooks, layer: Layer, gone: Tensor, where: Where) -> Hooks:
    everyone = torch.arange(moe.spec(layer).n_experts)

    def route(value: Tensor) -> Tensor:
        run = moe.running(layer)
        assert run.logits is not None
        choice = moe.spec(layer).rule.choice_logits(run.logits)
        is_gone = torch.isin(value, gone.to(value))
        taken = (value.unsqueeze(-1) == everyone.to(value)).any(dim=-2) | torch.isin(everyone, gone).to(value.device)
        best = choice.masked_fill(taken, float("-inf")).topk(min(value.shape[-1], len(everyone)), dim=-1)
        rank = torch.arange(best.indices.shape[-1], device=value.device)
        is_needed = (rank < is_gone.sum(dim=-1, keepdim=True)) & (best.values > float("-inf"))
        return torch.cat([value.masked_fill(is_gone, EMPTY), best.indices.masked_fill(~is_needed, EMPTY)], dim=-1)

    return RouteWriter(moe, layer, where, route).hooks
