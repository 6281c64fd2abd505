"""Take experts away, in four ways that answer different questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from moe_interp.checks import check_seed
from moe_interp.errors import ConfigError
from moe_interp.hooks.attach import MoEHooks, check_attached
from moe_interp.interventions.named import checked_experts
from moe_interp.interventions.positions import Positions, TokenSelection
from moe_interp.interventions.random_keys import layer_labels
from moe_interp.interventions.reference import Reference, ReferenceOutputs, RunningPassOutputs, outputs_of
from moe_interp.interventions.route_writer import RouteWriter, demands_of
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
    reference: Reference = None,
    reference_mask: Tensor | None = None,
) -> Hooks:
    """Take experts away from the tokens that chose them.

    "zero": their outputs are dropped; the other experts keep their weights. "mean": each output is replaced by the mean
    of what the expert gives on tokens of reference. "resample": by what it gives on one of them, drawn by ``seed``.
    "reroute": the token keeps its other experts and takes the next best by ``choice_logits`` in place of these (none
    where the family's group limit leaves none), with the family's weights for its new set. Tokens that do not use the
    experts are untouched by all four.

    The tokens of reference are by default the prompt's own: those of the running pass that use the expert, padding left
    out, the replaced one among them. That says nothing about a generated token, whose pass holds one token a row, about
    a prompt that runs in chunks, or about an expert with a single token: these need ``reference``.

    Args:
        moe: Attached hooks; "mean" and "resample" need ``expert_outputs=True``.
        layer: An MoE layer.
        experts: Expert ids.
        mode: What stands in their place.
        seed: Seed of "resample".
        positions, attention_mask: See :class:`~moe_interp.interventions.positions.TokenSelection`; padding is in no
            mean.
        reference: Of "mean" and "resample": token ids ``[row, pos]`` or text, which run once, when this is called, with
            the hooks that are on; or a cache with ``expert_indices`` and ``expert_out`` of the layer; or "prompt", the
            prompt's own tokens also for what is generated from it.
        reference_mask: ``[row, pos]``, 1 at the real tokens of the reference.

    Means are taken in float32 or, in a float64 model, in float64.

    Raises:
        RouteError: an id out of range, or an expert twice.
        ConfigError: an unknown mode, no experts, fewer experts left than the router needs, a reference that does not
            serve; when it runs, an output for which there are no tokens of reference.
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
    if (reference is not None and mode not in ("mean", "resample")) or (
        reference is None and reference_mask is not None
    ):
        raise ConfigError(
            f"a reference{'_mask without one' if reference is None else f' for mode={mode!r}'}",
            'reference for mode "mean" or "resample", and reference_mask beside it',
            "Leave it out.",
        )
    selection = TokenSelection(moe, layer, positions, attention_mask)
    if mode == "reroute":
        return _reroute(moe, layer, gone, selection)
    if mode == "zero":
        drop: Replacement = lambda value, expert, used, asked: torch.zeros_like(value)  # noqa: E731
        return _replace(moe, layer, gone, selection, "expert_weights", drop)
    moe.hook_name("expert_out", layer)  # refuses before a reference runs
    source: RunningPassOutputs | ReferenceOutputs
    if reference is None or (isinstance(reference, str) and reference == "prompt"):
        source = RunningPassOutputs(selection, mode, is_kept=reference is not None)
    else:
        source = outputs_of(moe, layer, gone.tolist(), reference, reference_mask)
    replacement = _mean(source) if mode == "mean" else _resampler(source, selection, seed, layer)
    return _replace(moe, layer, gone, selection, "expert_out", replacement)


class Replacement(Protocol):
    """What takes the place of ``value`` at slots ``asked``, ``[batch, pos, slot]``, of those ``used`` by the expert."""

    def __call__(self, value: Tensor, expert: int, used: Tensor, asked: Tensor) -> Tensor: ...


def _replace(
    moe: MoEHooks, layer: Layer, gone: Tensor, selection: TokenSelection, name: str, replacement: Replacement
) -> Hooks:
    def replace(value: Tensor, hook: Any) -> Tensor:
        route, tokens = moe.running(layer).indices, selection.tokens(value).unsqueeze(-1)
        real = selection.is_real(value).unsqueeze(-1)
        for expert in gone.tolist():
            used = (route == expert) & real
            asked = used & tokens
            new = replacement(value, expert, used, asked)
            value = torch.where(asked if value.ndim == 3 else asked.unsqueeze(-1), new, value)
        return value

    return [(moe.hook_name(name, layer), replace)]


def _mean(source: RunningPassOutputs | ReferenceOutputs) -> Replacement:
    means: dict[int, Tensor] = {}  # of a given reference, taken once

    def mean(value: Tensor, expert: int, used: Tensor, asked: Tensor) -> Tensor:
        pool = source.outputs(expert, value, used, asked)
        if not bool(asked.any()):
            return value
        if isinstance(source, RunningPassOutputs) or expert not in means:
            means[expert] = pool.to(torch.promote_types(pool.dtype, torch.float32)).mean(dim=0)
        return means[expert].to(value).expand_as(value)

    return mean


def _resampler(
    source: RunningPassOutputs | ReferenceOutputs, selection: TokenSelection, seed: int, layer: Layer
) -> Replacement:
    def resample(value: Tensor, expert: int, used: Tensor, asked: Tensor) -> Tensor:
        pool = source.outputs(expert, value, used, asked).to(value)
        if not bool(asked.any()):
            return value
        key = selection.keys(value, 1, seed, *layer_labels(layer), expert)  # [batch, pos, 1]
        return pool[(key * len(pool)).long()].expand_as(value)

    return resample


def _reroute(moe: MoEHooks, layer: Layer, gone: Tensor, selection: TokenSelection) -> Hooks:
    all_experts = torch.arange(moe.spec(layer).n_experts)

    def route(value: Tensor) -> Tensor:
        run = moe.running(layer)
        choice = run.ranking()
        is_gone = torch.isin(value, gone.to(value))
        taken = (value.unsqueeze(-1) == all_experts.to(value)).any(dim=-2) | torch.isin(all_experts, gone).to(
            value.device
        )
        taken = taken | demands_of(run, layer).banned
        best = choice.masked_fill(taken, float("-inf")).topk(min(value.shape[-1], len(all_experts)), dim=-1)
        rank = torch.arange(best.indices.shape[-1], device=value.device)
        is_needed = (rank < is_gone.sum(dim=-1, keepdim=True)) & (best.values > float("-inf"))
        return torch.cat([value.masked_fill(is_gone, EMPTY), best.indices.masked_fill(~is_needed, EMPTY)], dim=-1)

    return RouteWriter(moe, layer, selection, route).hooks
