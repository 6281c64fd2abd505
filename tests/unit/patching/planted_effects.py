"""Results of every kind of patching by hand, small, with the variables that the experiments write."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr

from moe_interp.patching.attribution_result import AttributionResult
from moe_interp.patching.effects.causal_tracing import ExpertTrace
from moe_interp.patching.effects.decomposition import FACTORS, INTERACTION, SUBSETS, TOGETHER, Decomposition
from moe_interp.patching.effects.path_patching import PATHS, PathResult
from moe_interp.patching.logits.attribution import LogitAttribution
from moe_interp.patching.logits.expert_tokens import ExpertTokens
from moe_interp.patching.metric import Metrics
from moe_interp.patching.result import EXAMPLE, METRIC, PatchingSweep, effect_dataset

LAYERS, N_EXPERTS, N_EXAMPLES = (1, 3), 4, 5
_ATTRS: dict[str, Any] = {"metrics": ["metric"], "n_examples": N_EXAMPLES}


def planted_sweep() -> PatchingSweep:
    data = _effects({"layer": list(LAYERS), "pos": [0, 1, 2]}, baseline=0.0, clean=1.0)
    shape = (len(LAYERS), 3, N_EXAMPLES)
    counts = {"n_patched": np.ones(shape, dtype=int), "n_unmatched": np.zeros(shape, dtype=int)}
    data = data.assign({name: (("layer", "pos", EXAMPLE), values) for name, values in counts.items()})
    data.attrs = {**_ATTRS, "what": "router_logits", "n_skipped": 0, "method": "rerun", "null_difference": 0.0}
    return PatchingSweep(data)


def planted_attribution() -> AttributionResult:
    axes = {"layer": list(LAYERS), "expert": range(N_EXPERTS), "pos": [0, 1, 2]}
    data = _effects(axes, baseline=0.0, clean=1.0)
    data["is_used"] = data["effect"].astype(bool).astype(int)
    data.attrs = {**_ATTRS, "method": "gradient", "agreement": None}
    return AttributionResult(data)


def planted_decomposition() -> Decomposition:
    parts = ["+".join(f for f in FACTORS if f in some) if len(some) < 3 else TOGETHER for some in SUBSETS]
    data = _effects({"layer": list(LAYERS), "part": [*parts, INTERACTION]}, baseline=0.0)
    data["shapley"] = (("layer", "factor", EXAMPLE), _normal(len(LAYERS), len(FACTORS), N_EXAMPLES))
    data["route_change"] = (("layer", EXAMPLE), np.full((len(LAYERS), N_EXAMPLES), 0.5))
    data = data.assign_coords(factor=list(FACTORS))
    data.attrs = dict(_ATTRS)
    return Decomposition(data)


def planted_paths() -> PathResult:
    sources = [(1, 0), (1, 2)]
    axes = ("path", "source", "layer", EXAMPLE)
    shape = (len(PATHS), len(sources), 1, N_EXAMPLES)
    variables: dict[str, Any] = {name: (axes, _normal(*shape)) for name in ("effect", "probability", "changed")}
    variables |= {name: (axes[1:], _normal(*shape[1:])) for name in ("share", "changed_elsewhere")}
    variables["n_tokens"] = (("source", EXAMPLE), np.ones((len(sources), N_EXAMPLES), dtype=int))
    coords = {
        "path": list(PATHS),
        "source": [f"{layer} expert {expert}" for layer, expert in sources],
        "layer": [3],
        EXAMPLE: np.arange(N_EXAMPLES),
        "source_layer": ("source", [layer for layer, _ in sources]),
        "source_expert": ("source", [expert for _, expert in sources]),
    }
    return PathResult(xr.Dataset(variables, coords=coords, attrs={"mode": "zero"}))


def planted_trace() -> ExpertTrace:
    kinds = [("expert", layer, expert) for layer in LAYERS for expert in range(N_EXPERTS)]
    kinds += [("layer", layer, -1) for layer in LAYERS]
    data = _effects({"cell": [f"{layer} {kind} {expert}" for kind, layer, expert in kinds]}, clean=1.0)
    data["by_draw"] = data["effect"].expand_dims(draw=2, axis=1)
    data["noised"] = (("draw", EXAMPLE), np.zeros((2, N_EXAMPLES)))
    data["n_restored"] = (("cell", EXAMPLE), np.ones((len(kinds), N_EXAMPLES), dtype=int))
    columns = {name: ("cell", list(values)) for name, values in zip(("kind", "layer", "expert"), zip(*kinds))}
    data = data.assign_coords(columns)
    data.attrs = {**_ATTRS, "noise": 3.0, "draws": 2}
    return ExpertTrace(data)


def planted_logit_attribution() -> LogitAttribution:
    parts = [("embedding", "embedding", -1, -1)]
    for layer in LAYERS:
        parts.append((f"{layer} attention", "attention", layer, -1))
        parts += [(f"{layer} expert {expert}", "expert", layer, expert) for expert in range(N_EXPERTS)]
    names, kinds, layers, experts = (list(column) for column in zip(*parts))
    effect, is_expert = _normal(len(parts), N_EXAMPLES), np.array(kinds)[:, None] == "expert"
    variables: dict[str, Any] = {"effect": effect, "weight": np.where(is_expert, 0.5, np.nan) + 0 * effect}
    data = xr.Dataset(
        {name: (("component", EXAMPLE), values) for name, values in variables.items()}
        | {name: (EXAMPLE, effect.sum(0)) for name in ("logit_difference", "before_cap")}
        | {"position": (EXAMPLE, np.arange(N_EXAMPLES))},
        coords={"component": names, EXAMPLE: np.arange(N_EXAMPLES), "kind": ("component", kinds)}
        | {"layer": ("component", layers), "expert": ("component", experts)},
        attrs={"is_capped": False, "answer_tokens": list(range(N_EXAMPLES)), "wrong_tokens": None},
    )
    return LogitAttribution(data)


def planted_expert_tokens() -> ExpertTokens:
    axes, shape = ("layer", "expert", "rank"), (len(LAYERS), N_EXPERTS, 3)
    token = np.arange(np.prod(shape)).reshape(shape)
    data = xr.Dataset(
        {
            "logit": (axes, -np.sort(-_normal(*shape), axis=-1)),
            "token": (axes, token),
            "text": (axes, np.array([f"<w{each}>" for each in token.ravel()], dtype=object).reshape(shape)),
            "n_tokens": (axes[:2], np.ones(shape[:2], dtype=int)),
        },
        coords={"layer": list(LAYERS), "expert": np.arange(N_EXPERTS), "rank": np.arange(3)},
        attrs={"centre": "mean"},
    )
    return ExpertTokens(data)


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


def _effects(axes: dict[str, Any], **constant: float) -> xr.Dataset:
    """effect[axes, example] at random, and variables [example] of one number."""
    metrics = Metrics(lambda logits: logits.sum(dim=(1, 2)), N_EXAMPLES)
    metrics.first(torch.zeros(N_EXAMPLES, 2, 2), "zeros")
    effect = _normal(1, *[len(axis) for axis in axes.values()], N_EXAMPLES)
    more = {name: ((METRIC, EXAMPLE), np.full((1, N_EXAMPLES), value)) for name, value in constant.items()}
    return effect_dataset(metrics, axes, effect, N_EXAMPLES, **more)
