"""Sweeps of activation patching over routers and experts: one activation after the other taken from the clean run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from moe_interp.engine import threads_asleep
from moe_interp.engine.eval_mode import eval_mode
from moe_interp.engine.memory import out_of_memory_in_words
from moe_interp.engine.pass_inputs import check_memory
from moe_interp.errors import ConfigError, DataError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.patching.cells import Grid, expert_grid, position_grid, slot_grid
from moe_interp.patching.inputs import check_cached, check_patch_inputs, check_positions
from moe_interp.patching.metric import Metric, Metrics
from moe_interp.patching.passes import METHODS, Method
from moe_interp.patching.patches import (
    ContributionsPatch,
    ExpertOutputsPatch,
    OwnWeightsRoutesPatch,
    Patch,
    RouterLogitsPatch,
    RoutesPatch,
    SharedOutPatch,
    SlotOutputsPatch,
)
from moe_interp.patching.result import PatchingSweep
from moe_interp.patching.sweep_run import Sweep
from moe_interp.progress import Report
from moe_interp.types import Layer

By = Literal["expert", "slot"]
AnyMetric = Metric | Mapping[str, Metric]


def router_logits(
    moe: MoEHooks,
    corrupted_tokens: Any,
    clean_cache: Any,
    metric: AnyMetric,
    layers: Layer | Sequence[Layer] | None = None,
    positions: Sequence[int] | None = None,
    *,
    attention_mask: Tensor | None = None,
    clean_logits: Tensor | None = None,
    method: Method = "auto",
    memory_budget: int | None = None,
    progress: bool | Report | None = None,
    **options: Any,
) -> PatchingSweep:
    """Patch the router logits of one token at one layer after the other: layer x pos.

    The token is routed by the clean run's logits: experts and weights by the family's own rule. What its experts
    compute stays the corrupted run's. A large effect says that the choice at that token carries what distinguishes the
    prompts; it does not say that those experts compute it, nor that no other token's choice does as well.

    Args:
        moe: Attached hooks.
        corrupted_tokens: ``[batch, pos]`` ids (or texts), as long as the clean ones, and padded alike.
        clean_cache: Of the clean run, ``moe.bridge.run_with_cache(clean_tokens, names_filter=moe.filter(...))``.
        metric: From logits ``[batch, pos, vocab]`` to a number, or to one an example ``[batch]``, which is then kept
            and gives intervals; or several of one form, by name. It is evaluated on the whole batch for each cell.
            Where its value on the corrupted run does not depend on any but each example's last token's logits (it is
            tried, with NaN and with other logits in their place), only these are computed.
        layers: MoE layers; all by default.
        positions: Absolute positions in the unpadded prompts; negative ones count from each example's end. All by
            default. Padding is never patched; an example that is too short for a position has NaN there.
        attention_mask: ``[batch, pos]``, 0 at padding, on the left or on the right.
        clean_logits: Of the clean run, ``[batch, pos, vocab]``: gives the metric's clean value, which
            :meth:`PatchingSweep.normalized` needs.
        method: "auto": from a recorded pass where that is exact, else "naive". "rerun": the former, or an error.
            "naive": one ``run_with_hooks`` a cell.
        memory_budget: Bytes that passes may take; by default what is free.
        progress: As :func:`moe_interp.progress.reporting` takes it.
        options: Further keyword arguments of the forward pass, such as ``decoder_input`` of an encoder-decoder, whose
            sweeps are naive.

    Raises:
        DataError: prompts of different length, or tokens that the model cannot read.
        HookError: a layer that is not there or lacks the hook, or a cache without what is needed; by name.
        ConfigError: positions that are not there, or a metric of another form (after one pass, before the sweep).

    The unit and sign are the metric's: effect = patched - corrupted. Source: activation patching (Meng et al. 2022;
    Zhang and Nanda 2024) at router logits. TransformerLens' ``generic_activation_patch`` makes the same patches one
    pass at a time; it takes no attention mask, knows no layer without a router, and keeps values in float32.
    """
    given = (attention_mask, clean_logits, method, memory_budget, progress, options)
    return _over_tokens(
        "router_logits", RouterLogitsPatch, moe, corrupted_tokens, clean_cache, metric, layers, positions, given
    )


def routes(
    moe: MoEHooks,
    corrupted_tokens: Any,
    clean_cache: Any,
    metric: AnyMetric,
    layers: Layer | Sequence[Layer] | None = None,
    positions: Sequence[int] | None = None,
    *,
    weights: Literal["clean", "own"] = "clean",
    attention_mask: Tensor | None = None,
    clean_logits: Tensor | None = None,
    method: Method = "auto",
    memory_budget: int | None = None,
    progress: bool | Report | None = None,
    **options: Any,
) -> PatchingSweep:
    """Patch the route of one token at one layer after the other: layer x pos.

    The token uses the clean run's experts, each computing on the corrupted run's input.

    Args:
        weights: "clean": with the clean run's weights. "own": with the family's own weights for these experts, from
            the corrupted run's logits; the effect is then of *which* experts are used alone.
        moe, corrupted_tokens, clean_cache, metric, layers, positions, attention_mask, clean_logits, method,
            memory_budget, progress, options: See :func:`router_logits`.

    Raises:
        As :func:`router_logits`; ConfigError: other weights.
    """
    if weights not in ("clean", "own"):
        raise ConfigError(f"weights={weights!r}", "clean or own", "Choose one of these.")
    patch = RoutesPatch if weights == "clean" else OwnWeightsRoutesPatch
    given = (attention_mask, clean_logits, method, memory_budget, progress, options)
    return _over_tokens("routes", patch, moe, corrupted_tokens, clean_cache, metric, layers, positions, given)


def shared_out(
    moe: MoEHooks,
    corrupted_tokens: Any,
    clean_cache: Any,
    metric: AnyMetric,
    layers: Layer | Sequence[Layer] | None = None,
    positions: Sequence[int] | None = None,
    *,
    attention_mask: Tensor | None = None,
    clean_logits: Tensor | None = None,
    method: Method = "auto",
    memory_budget: int | None = None,
    progress: bool | Report | None = None,
    **options: Any,
) -> PatchingSweep:
    """Patch the shared experts' output, as it is added, of one token at one layer after the other: layer x pos.

    Args:
        moe, corrupted_tokens, clean_cache, metric, layers, positions, attention_mask, clean_logits, method,
            memory_budget, progress, options: See :func:`router_logits`. By default, layers that have shared experts.

    Raises:
        As :func:`router_logits`; HookError: a family without shared experts.
    """
    given = (attention_mask, clean_logits, method, memory_budget, progress, options)
    return _over_tokens(
        "shared_out", SharedOutPatch, moe, corrupted_tokens, clean_cache, metric, layers, positions, given
    )


def expert_out(
    moe: MoEHooks,
    corrupted_tokens: Any,
    clean_cache: Any,
    metric: AnyMetric,
    by: By = "expert",
    layers: Layer | Sequence[Layer] | None = None,
    positions: Sequence[int] | None = None,
    *,
    quantity: Literal["output", "contribution"] = "output",
    experts: Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
    clean_logits: Tensor | None = None,
    method: Method = "auto",
    memory_budget: int | None = None,
    progress: bool | Report | None = None,
    **options: Any,
) -> PatchingSweep:
    """Patch the outputs of experts: layer x expert, or layer x pos x slot.

    ``by="expert"``, ``quantity="output"``: at every position where the corrupted run uses the expert *and* the clean
    run does so too, in whatever slot, its output is the clean run's; the weight stays the corrupted run's. Positions
    where the clean run does not use it have no counterpart, keep the corrupted output, and are counted
    (``n_unmatched``). The effect is of what the expert computes, not of whether it is chosen.

    ``by="expert"``, ``quantity="contribution"``: at every position where either run uses the expert, its weighted
    output within the routed sum becomes the clean run's: zero where that does not use it. So the effect is of choice,
    weight and computation together, and the contributions of all experts of a layer add up to its whole routed output
    (``routed_out``, which is what is written to).

    ``by="slot"``: the output in one slot of one token is the clean run's in the same slot (rank in the route), whatever
    the two experts are; the weight stays the corrupted run's. An empty slot in either run has no counterpart.

    A cell without any activation to patch, or whose activations are equal in both runs, has exactly the baseline's
    value, and costs no pass.

    Args:
        by: "expert" or "slot".
        positions: Where to patch; with ``by="expert"`` all of them together.
        quantity: "output" or "contribution"; the latter by expert only.
        experts: With ``by="expert"``, which; all by default.
        moe, corrupted_tokens, clean_cache, metric, layers, attention_mask, clean_logits, method, memory_budget,
            progress, options: See :func:`router_logits`. The cache needs expert_out and expert_indices, for
            contributions expert_weights too.

    Raises:
        As :func:`router_logits`; HookError: attached with ``expert_outputs=False``; ConfigError: an expert that is not
        there, or another ``by`` or ``quantity``.

    llama4: its score multiplies the input, so an expert's output is weighted already. gemma4: outputs are summed before
    the family's norm. Source: as :func:`router_logits`; the matching by expert is derived.
    """
    if by not in ("expert", "slot") or quantity not in ("output", "contribution"):
        given = f"by={by!r}, quantity={quantity!r}"
        raise ConfigError(given, "by expert or slot, of the output or the contribution", "Choose one of these.")
    if by == "slot" and (quantity != "output" or experts is not None):
        raise ConfigError(
            "contributions or chosen experts by slot", "outputs of slots", "Take by='expert', or leave them out."
        )
    patch = (
        ContributionsPatch if quantity == "contribution" else ExpertOutputsPatch if by == "expert" else SlotOutputsPatch
    )
    inputs = check_patch_inputs(moe, corrupted_tokens, layers, attention_mask, (patch.writes, *patch.needs), options)
    places = check_positions(inputs, positions)
    grid = expert_grid(inputs, places, experts) if by == "expert" else slot_grid(inputs, places)
    what = f"expert_out by {by}" if quantity == "output" else "expert contributions"
    return _run(
        what, patch, grid, clean_cache, metric, (attention_mask, clean_logits, method, memory_budget, progress, options)
    )


def _over_tokens(
    what: str,
    patch: type[Patch],
    moe: MoEHooks,
    tokens: Any,
    cache: Any,
    metric: AnyMetric,
    layers: Any,
    positions: Any,
    given: tuple[Any, ...],
) -> PatchingSweep:
    inputs = check_patch_inputs(moe, tokens, layers, given[0], (patch.writes, *patch.needs), given[-1])
    return _run(what, patch, position_grid(inputs, check_positions(inputs, positions)), cache, metric, given)


def _check_clean_logits(grid: Grid, clean_logits: Any) -> None:
    """Refuse, before any pass, what are no logits ``[batch, pos, vocab]``; an encoder-decoder's are of its decoder."""
    if clean_logits is None:
        return
    shape = tuple(getattr(clean_logits, "shape", ()))
    is_decoder = all(isinstance(layer, int) for layer in grid.inputs.layers)
    if (
        not isinstance(clean_logits, Tensor)
        or len(shape) != 3
        or (is_decoder and shape[:2] != grid.inputs.tokens.shape)
    ):
        raise DataError(
            f"clean_logits of shape {shape}",
            f"the clean run's logits, {(*grid.inputs.tokens.shape, 'vocab')}",
            "Pass what the clean run returned.",
        )


def _run(
    what: str, patch: type[Patch], grid: Grid, cache: Any, metric: AnyMetric, given: tuple[Any, ...]
) -> PatchingSweep:
    _, clean_logits, method, memory_budget, progress, _ = given
    check_cached(grid.inputs, cache, patch.needs)
    _check_clean_logits(grid, clean_logits)
    metrics, memory = Metrics(metric, len(grid.inputs.tokens)), check_memory(grid.inputs.moe, memory_budget)
    if method not in METHODS:
        raise ConfigError(f"method={method!r}", f"one of {', '.join(METHODS)}", "Choose one of these.")
    sweep = Sweep(what, patch, grid, cache, metrics, method)
    with (
        out_of_memory_in_words(),
        threads_asleep(),
        eval_mode(grid.inputs.moe.bridge),
        torch.inference_mode(False),  # whose tensors count no writes
        torch.no_grad(),
    ):
        return sweep.run(clean_logits, memory, progress)
