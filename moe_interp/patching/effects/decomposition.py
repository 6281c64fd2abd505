"""Routing against computation: which experts are chosen, their weights, and what they compute on the changed input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_interp.arch.grouped_products import sort_by_expert
from moe_interp.arch.spec import MoESpec
from moe_interp.engine import threads_asleep
from moe_interp.engine.eval_mode import eval_mode
from moe_interp.engine.memory import out_of_memory_in_words
from moe_interp.hooks.attach import MoEHooks
from moe_interp.interventions.positions import merge_slots, merge_weights
from moe_interp.patching.cells import position_mask
from moe_interp.patching.inputs import (
    PatchInputs,
    cached_activation,
    check_cached,
    check_patch_inputs,
    check_positions,
)
from moe_interp.patching.metric import Metric, Metrics
from moe_interp.patching.result import EXAMPLE, METRIC, EffectResult, effect_dataset
from moe_interp.progress import Report, reporting
from moe_interp.types import Hooks, Layer

FACTORS = ("experts", "weights", "computation")
TOGETHER, INTERACTION = "together", "interaction"
_NEEDS = ("router_in", "router_logits", "expert_indices", "expert_weights")
Subset = frozenset[str]
SUBSETS: tuple[Subset, ...] = tuple(
    frozenset(chosen) for n in range(1, 4) for chosen in itertools.combinations(FACTORS, n)
)


def decompose(
    moe: MoEHooks,
    corrupted_tokens: Any,
    clean_cache: Any,
    metric: Metric | Mapping[str, Metric],
    layers: Layer | Sequence[Layer] | None = None,
    positions: Sequence[int] | None = None,
    *,
    attention_mask: Tensor | None = None,
    progress: bool | Report | None = None,
    **options: Any,
) -> Decomposition:
    """Split the effect of a layer's routed experts into which are chosen, their weights, and what they compute.

    At one layer after the other, the corrupted run takes from the clean run any of

    - ``experts``: which experts the token uses;
    - ``weights``: the router logits that weigh them, by the family's rule;
    - ``computation``: what the experts read;

    and keeps the rest as it is. With indices I, logits z and experts' input x of the clean (') and the corrupted run,

        routed = sum over i in I of  weight(z, I)_i E_i(x),

    each of I, z, x is replaced alone, in pairs, and all together: a full factorial, of eight values of the metric a
    layer. effect = patched - corrupted. "together" replaces the routed output by the clean one. "interaction" =
    together - sum of the three alone: what no factor does by itself. ``shapley`` shares the whole among the three:
    each factor's increase, averaged over the six orders of adding them; the three sum to "together".

    Args:
        moe: Attached hooks, with ``expert_outputs=True``.
        corrupted_tokens: ``[batch, pos]`` ids (or texts), as long as the clean ones, and padded alike.
        clean_cache: Of the clean run, with ``router_in``, ``router_logits``, ``expert_indices`` and ``expert_weights``:
            ``moe.bridge.run_with_cache(clean_tokens, names_filter=moe.filter("router_in", ...))``.
        metric: From logits ``[batch, pos, vocab]`` to a number, or to one an example ``[batch]``; or several by name.
        layers: MoE layers; all by default.
        positions: Absolute positions in the unpadded prompts, negative ones from each example's end; all by default.
        attention_mask: ``[batch, pos]``, 0 at padding, which is never patched.
        progress: As :func:`moe_interp.progress.reporting` takes it.
        options: Further keyword arguments of the forward pass, such as ``decoder_input`` of an encoder-decoder.

    Raises:
        DataError: prompts of different length, or tokens that the model cannot read.
        HookError: a layer that is not there or was attached without expert outputs, or a cache without a hook; by name.
        ConfigError: positions that are not there, or a metric of another form (after one pass).

    Weights depend on the experts they belong to: the weight of an expert that only one run uses is the family's own
    for it from the other run's logits, a value that neither run computed. Shared experts are not part of it, though
    they read the same input. A small effect of "experts" does not say that routing is unimportant: two routes may hold
    experts that compute much the same there. It takes one ``run_with_hooks`` for each of seven subsets and layer.

    Source: derived (a factorial of activation patching; Shapley 1953).
    """
    inputs = check_patch_inputs(moe, corrupted_tokens, layers, attention_mask, ("expert_out", *_NEEDS), options)
    metrics = Metrics(metric, len(inputs.tokens))
    where = position_mask(inputs, check_positions(inputs, positions))
    check_cached(inputs, clean_cache, _NEEDS)
    with torch.no_grad(), eval_mode(moe.bridge), threads_asleep(), out_of_memory_in_words():
        return _factorial(inputs, clean_cache, metrics, where, progress)


class Decomposition(EffectResult, kind="decomposition"):
    """The effect of a layer's routed experts, split three ways.

    ``data``: effect[metric?, layer, part, example?], parts "experts", "weights", "computation", their pairs joined by
    "+", "together" and "interaction"; shapley[metric?, layer, factor, example?]; baseline[metric?, example?] of the
    corrupted run; route_change[layer, example], the share of slots (at the positions patched) whose expert differs.
    """

    def by_layer(self, metric: str | None = None) -> pd.DataFrame:
        """Mean effects: one row a layer, one column a part, and the three Shapley values."""
        table = self.mean(metric).transpose("layer", "part").to_pandas()
        shapley = self.mean(metric, "shapley").transpose("layer", "factor").to_pandas()
        frame = table.join(shapley.add_prefix("shapley_"))
        frame["route_change"] = self.data["route_change"].mean(EXAMPLE).to_series()
        return frame.rename_axis(columns=None).reset_index()

    def summary(self) -> str:
        """The split at each layer."""
        lines = ["Routing against computation, mean effect (patched - corrupted) by layer:"]
        for row in self.by_layer().to_dict("records"):
            parts = ", ".join(f"{name} {row[name]:+.3g}" for name in (*FACTORS, INTERACTION))
            differ = f"{row['route_change']:.0%} of slots differ"
            lines.append(f"  layer {row['layer']}: together {row[TOGETHER]:+.3g} = {parts} ({differ})")
        return "\n".join(lines)


def subset_hooks(
    inputs: PatchInputs, layer: Layer, clean: Mapping[str, Tensor], where: Tensor, subset: Subset
) -> Hooks:
    """The hooks that give a layer of the corrupted run some of the three from the clean run.

    Args:
        inputs: The corrupted batch.
        layer: The layer.
        clean: The clean run's ``router_in``, ``router_logits``, ``expert_indices`` and ``expert_weights``.
        where: ``[batch, pos]`` bool, the tokens to patch.
        subset: Of :data:`FACTORS`.
    """
    moe, spec = inputs.moe, inputs.moe.spec(layer)

    def set_experts(value: Tensor, hook: Any) -> Tensor:
        return merge_slots(where, clean["expert_indices"], value)

    def set_weights(value: Tensor, hook: Any) -> Tensor:
        if "experts" in subset:
            return merge_weights(where, clean["expert_weights"], value)
        run = moe.running(layer)
        assert run.rule is not None
        assert run.indices is not None
        return merge_weights(where, run.rule.weights(clean["router_logits"].to(value), run.indices), value)

    def set_outputs(value: Tensor, hook: Any) -> Tensor:
        run = moe.running(layer)
        assert run.indices is not None
        assert run.weights is not None
        read = spec.experts_in(clean["router_in"].to(value.dtype))
        new = slot_outputs(spec, read, run.indices, run.weights)
        return torch.where(where[..., None, None], new.to(value.dtype), value)

    writers = {
        "experts": ("expert_indices", set_experts),
        "weights": ("expert_weights", set_weights),
        "computation": ("expert_out", set_outputs),
    }
    return [(moe.hook_name(writers[f][0], layer), writers[f][1]) for f in FACTORS if f in subset]


@torch.no_grad()
def slot_outputs(spec: MoESpec, read: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """What ``expert_out`` would hold if the experts of a route read something else; zero at empty slots.

    Args:
        spec: The layer.
        read: ``[batch, pos, d_in]``, what the experts read.
        indices, weights: ``[batch, pos, slot]``; the weights enter where the family scales its experts' input.

    Returns:
        ``[batch, pos, slot, d_model]``.
    """
    slots = indices.shape[-1]
    # pairs of a token and one of its slots, sorted by expert; empty slots come last and give zero
    order, groups = sort_by_expert(indices.reshape(-1), spec.n_experts)
    rows = read.reshape(-1, read.shape[-1])[order // slots]
    if spec.weight_on_input:
        rows = rows * weights.reshape(-1)[order].unsqueeze(-1).to(rows.dtype)
    pairs = spec.outputs_of_rows(rows, groups)
    return torch.empty_like(pairs).index_copy_(0, order, pairs).view(*indices.shape, -1)


def _factorial(
    inputs: PatchInputs, cache: Any, metrics: Metrics, where: Tensor, progress: bool | Report | None
) -> Decomposition:
    routes: dict[Layer, Tensor] = {}
    reads: Hooks = [
        (
            inputs.moe.hook_name("expert_indices", layer),
            lambda value, hook, layer=layer: routes.__setitem__(layer, value),
        )
        for layer in inputs.layers
    ]
    baseline = metrics.first(inputs.forward(hooks=reads), "the corrupted run")
    changes, values = [], []
    with reporting("decomposing layers", progress) as report:
        for number, layer in enumerate(inputs.layers):
            clean = {name: cached_activation(inputs, cache, name, layer) for name in _NEEDS}
            changes.append(_route_change(routes[layer], clean["expert_indices"], where))
            by_subset = {
                subset: metrics.noted(metrics(inputs.forward(hooks=subset_hooks(inputs, layer, clean, where, subset))))
                - baseline
                for subset in SUBSETS
            }
            values.append(by_subset)
            report(number + 1, len(inputs.layers))
    metrics.warn_of_nan()
    parts, effect = _parts(values)
    shapley = np.stack([_shapley(by_subset) for by_subset in values], axis=1)
    axes: dict[str, Sequence[Any]] = {"layer": list(inputs.layers), "part": parts}
    data = effect_dataset(
        metrics, axes, effect, len(inputs.tokens),
        baseline=((METRIC, EXAMPLE), baseline.cpu().double().numpy()),
        route_change=(("layer", EXAMPLE), torch.stack(changes).cpu().double().numpy()),
    )  # fmt: skip
    dims = [dim if dim != "part" else "factor" for dim in data["effect"].dims]
    keep = tuple(slice(None) if axis in data["effect"].dims else 0 for axis in (METRIC, "layer", "part", EXAMPLE))
    data["shapley"] = (dims, shapley[keep])
    data = data.assign_coords(factor=list(FACTORS))
    data.attrs = {"metrics": list(metrics.names), "n_examples": len(inputs.tokens)}
    return Decomposition(data, config={"layers": [str(layer) for layer in inputs.layers]})


def _parts(values: list[dict[Subset, Tensor]]) -> tuple[list[str], NDArray[np.float64]]:
    """Labels, and effects ``[metric, layer, part, example]``: the subsets, and the interaction."""
    labels = ["+".join(f for f in FACTORS if f in subset) for subset in SUBSETS]
    labels[-1] = TOGETHER
    rows = []
    for by_subset in values:
        parts = [by_subset[subset] for subset in SUBSETS]
        alone = sum(by_subset[frozenset([factor])] for factor in FACTORS)
        rows.append(torch.stack([*parts, parts[-1] - alone]).cpu().double().numpy())
    # shape: (layer, part, metric, example) -> (metric, layer, part, example)
    return [*labels, INTERACTION], np.stack(rows).transpose(2, 0, 1, 3)


def _shapley(by_subset: Mapping[Subset, Tensor]) -> NDArray[np.float64]:
    """``[metric, factor, example]``: each factor's increase, averaged over the orders of adding them."""
    nothing = torch.zeros_like(next(iter(by_subset.values())))
    effects = {frozenset[str](): nothing, **by_subset}
    found = []
    for factor in FACTORS:
        rest = [subset for subset in effects if factor not in subset]
        sizes = [math.factorial(len(subset)) * math.factorial(2 - len(subset)) / 6 for subset in rest]
        increases = [effects[subset | {factor}] - effects[subset] for subset in rest]
        found.append(sum(size * increase for size, increase in zip(sizes, increases)))
    return torch.stack([torch.as_tensor(value) for value in found], dim=1).cpu().double().numpy()


def _route_change(corrupted_route: Tensor, clean: Tensor, where: Tensor) -> Tensor:
    """``[batch]``: the share of the corrupted route's experts that the clean run does not use, at some tokens."""
    kept = ((corrupted_route.unsqueeze(-1) == clean.unsqueeze(-2)).any(dim=-1)) & (corrupted_route >= 0)
    used = (corrupted_route >= 0) & where.unsqueeze(-1)
    return 1 - (kept & used).sum(dim=(1, 2)) / used.sum(dim=(1, 2)).clamp(min=1)
