"""Take experts away, in four ways that answer different questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from moe_interp.errors import ConfigError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.hooks.layer import check_route
from moe_interp.interventions.streams import uniform_keys
from moe_interp.interventions.where import Positions, Where, merge_slots
from moe_interp.types import Hooks, Layer

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
    expert's mean over the tokens of the batch that use it. "resample": by its output on another such token, drawn by
    ``seed``. "reroute": the token takes the next best experts instead, with the family's weights for its new set.
    Tokens that do not use the experts are untouched by all four.

    Args:
        moe: Attached hooks; "mean" and "resample" need ``expert_outputs=True``.
        layer: An MoE layer.
        experts: Expert ids.
        mode: What stands in their place.
        seed: Seed of "resample".
        positions, attention_mask: See :class:`moe_interp.interventions.where.Where`; padding is in no mean.

    Raises:
        RouteError: an id out of range, or an expert twice.
        ConfigError: an unknown mode, or fewer experts left than the router needs.
    """
    spec = moe.spec(layer)
    gone = torch.tensor([experts] if isinstance(experts, int) else list(experts))
    check_route(gone, spec.n_experts, "ablate_experts")
    if mode not in ("zero", "mean", "resample", "reroute") or not len(gone):
        raise ConfigError(f"mode={mode!r}, {len(gone)} experts", "zero, mean, resample or reroute", "Correct the mode.")
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
        return _replace(moe, layer, gone, where, "expert_weights", lambda value, used, real: torch.zeros_like(value))
    stand_in = _mean if mode == "mean" else _resampler(seed)
    return _replace(moe, layer, gone, where, "expert_out", lambda v, used, real: stand_in(v, used & real))


def _replace(moe: MoEHooks, layer: Layer, gone: Tensor, where: Where, name: str, stand_in: Any) -> Hooks:
    seen: dict[str, Tensor] = {}

    def read(value: Tensor, hook: Any) -> None:
        seen["route"] = value

    def replace(value: Tensor, hook: Any) -> Tensor:
        route, tokens = seen.pop("route"), where.tokens(value).unsqueeze(-1)
        real = where.is_real(value).unsqueeze(-1)
        for expert in gone.tolist():
            used = route == expert
            spot = used & tokens
            new = stand_in(value, used, real)
            value = torch.where(spot if value.ndim == 3 else spot.unsqueeze(-1), new, value)
        return value

    return [(moe.hook_name("expert_indices", layer), read), (moe.hook_name(name, layer), replace)]


def _mean(value: Tensor, used: Tensor) -> Tensor:
    mask = used.unsqueeze(-1).to(value)
    return ((value * mask).sum(dim=(0, 1, 2)) / mask.sum().clamp(min=1)).expand_as(value)


def _resampler(seed: int) -> Any:
    def resample(value: Tensor, used: Tensor) -> Tensor:
        pool = value[used]
        if not len(pool):
            return value
        place = torch.arange(used.numel(), device=value.device)
        draw = (uniform_keys(place, 1, seed).squeeze(-1) * len(pool)).long().clamp(max=len(pool) - 1)
        return pool[draw].view_as(value)

    return resample


def _reroute(moe: MoEHooks, layer: Layer, gone: Tensor, where: Where) -> Hooks:
    seen: dict[str, Tensor] = {}

    def read(value: Tensor, hook: Any) -> None:
        seen["logits"] = value

    def set_indices(value: Tensor, hook: Any) -> Tensor:
        choice = moe.spec(layer).rule.choice_logits(seen.pop("logits")).clone()
        choice[..., gone.to(choice.device)] = float("-inf")
        best = choice.topk(value.shape[-1], dim=-1).indices.masked_fill(value < 0, -1)
        uses = torch.isin(value, gone.to(value)).any(dim=-1)
        return merge_slots(where.tokens(value) & uses, best, value)

    return [(moe.hook_name("router_logits", layer), read), (moe.hook_name("expert_indices", layer), set_indices)]
