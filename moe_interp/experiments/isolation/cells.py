"""What an isolation run computes, and its finished cells put together to one dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xarray as xr

from moe_interp.experiments.expert_families import family_layers
from moe_interp.experiments.inputs.items import TokenizedItem
from moe_interp.experiments.isolation.natural_routing import POSITIONS
from moe_interp.experiments.isolation.variants import Mode, is_family, label
from moe_interp.hooks.attach import MoEHooks
from moe_interp.interventions.force import Mass
from moe_interp.results import checksum
from moe_interp.results.cells import Arrays

Baseline = Literal["natural", "uniform", "random"]
BASELINES: tuple[Baseline, ...] = ("natural", "uniform", "random")
CELLS_VERSION = 2  # raised when cells change their meaning


@dataclass(frozen=True)
class IsolationPlan:
    """What an isolation run computes.

    Attributes:
        model, weights, items: Name of the model, checksums of its weights and of the items.
        mode: "force" or "ablate".
        layers: MoE layers.
        sets: Sets of experts that stand alone, or are missing; or families over several layers.
        drawn: By layer, the sets of the random baseline; the same for all items.
        mass: The masses.
        baselines: What is subtracted.
    """

    model: str
    weights: str
    items: str
    mode: Mode
    layers: tuple[int, ...]
    sets: tuple[Any, ...]
    drawn: tuple[tuple[Any, ...], ...]
    mass: tuple[Mass, ...]
    baselines: tuple[Baseline, ...]

    @property
    def set_layers(self) -> list[int]:
        """The layers of all families, where the sets are families."""
        return family_layers(self.sets)

    def to_score(self, layer: int) -> list[Any]:
        """The sets to score at a layer: those asked for, then the drawn ones that are not among them."""
        return list(dict.fromkeys([*self.sets, *self.drawn[self.layers.index(layer)]]))


def stored_plan(
    plan: IsolationPlan,
    items: list[TokenizedItem],
    identity: Mapping[str, Any],
    options: Mapping[str, Any],
    batches: list[list[int]],
) -> dict[str, Any]:
    """What finished cells belong to: everything that changes a number in them, by the names of the options.

    Args:
        identity: Of the model.
        options: ``random_draws``, ``seed`` and ``method`` of the run.
        batches: Items that run together.
    """
    is_drawn = "random" in plan.baselines
    return {
        "model": plan.model,
        "items": {"count": len(items), "checksum": plan.items},
        "tokens": {"checksum": checksum([item.prompt, item.answer] for item in items)},
        "layers": plan.layers,
        "experts": [label(chosen) for chosen in plan.sets],
        "mode": plan.mode,
        "mass": plan.mass,
        "baselines": plan.baselines,
        "random_draws": options["random_draws"] if is_drawn else None,
        "seed": options["seed"] if is_drawn else None,
        "method": options["method"],
        "version": CELLS_VERSION,
        **identity,
        "batches": batches,
    }


def isolation_dataset(
    moe: MoEHooks,
    plan: IsolationPlan,
    items: list[TokenizedItem],
    batches: list[list[int]],
    cells: dict[tuple[int, int], Arrays],
) -> xr.Dataset:
    """The cells put together, with every delta."""
    gathered = _gathered(plan, batches, cells)
    is_of_families, labels = is_family(plan.sets[0]), [label(chosen) for chosen in plan.sets]
    if is_of_families:  # the arrays of natural routing are by family, the drawn ones last
        gathered |= {name: gathered[name][..., : len(plan.sets)] for name in ("routing", "share", "uses", "reaches")}
    natural, routing, share = gathered["natural"][:, :, 0], gathered["routing"], gathered["share"]
    forced = gathered["sets"][..., : len(plan.sets)]
    base, random_sd = _baseline_scores(plan, gathered)
    delta = forced[:, :, None] - base[..., None]
    names = np.array([item.item.domain for item in items])
    domains = sorted(set(names.tolist()))
    by_domain = [np.stack([v[0, names == d].mean(axis=0) for d in domains]) for v in (routing, share)]
    cube, flat = ("mass", "baseline", "item", "layer", "expert"), ("mass", "baseline", "item", "layer")
    per_item, per_domain = ("positions", "item", "layer", "routed_expert"), ("domain", "layer", "routed_expert")
    spec = moe.spec(plan.layers[0])
    return xr.Dataset(
        {
            "delta": (cube, delta[0]),
            "delta_first": (cube, delta[1]),
            "score": ("item", natural[0]),
            "score_first": ("item", natural[1]),
            "baseline_score": (flat, base[0]),
            "baseline_score_first": (flat, base[1]),
            "random_sd": (("mass", "item", "layer"), random_sd[0]),
            "routing_item": (per_item, routing),
            "share_item": (per_item, share),
            "uses_item": (per_item[1:], gathered["uses"]),
            "reaches_item": (per_item[1:], gathered["reaches"]),
            "routing_prob": (per_domain, by_domain[0]),
            "slot_share": (per_domain, by_domain[1]),
            "margin_min": ((), min(float(cell["margin"]) for cell in cells.values())),
        },
        coords={
            "item": [item.item.id for item in items],
            "domain": ("item", names),
            "domain_name": ("domain", domains),
            "n_prompt_tokens": ("item", [len(item.prompt) for item in items]),
            "n_answer_tokens": ("item", [len(item.answer) for item in items]),
            "layer": list(plan.layers),
            "expert": [
                chosen[0] if len(chosen) == 1 and not is_of_families else text
                for chosen, text in zip(plan.sets, labels)
            ],
            "routed_expert": labels if is_of_families else np.arange(spec.n_experts),
            "mass": list(plan.mass),
            "baseline": list(plan.baselines),
            "positions": list(POSITIONS),
        },
        attrs={"mode": plan.mode, "model": plan.model, "n_experts": spec.n_experts, "top_k": spec.top_k},
    )


def _gathered(plan: IsolationPlan, batches: list[list[int]], cells: dict[tuple[int, int], Arrays]) -> Arrays:
    """All cells by name, items in the order they were given, then layers.

    ``sets`` is ``[score, mass, item, layer, set]``: those asked for, then the drawn ones, whose number differs by
    layer; NaN behind them.
    """
    order = np.argsort([i for batch in batches for i in batch])
    widest = max(len(plan.to_score(layer)) for layer in plan.layers)
    item_axes = {"natural": 1, "routing": 1, "share": 1, "uses": 0, "reaches": 0, "sets": 2}
    item_axes |= {"uniform": 2} if "uniform" in plan.baselines else {}
    gathered = {}
    for name, axis in item_axes.items():
        by_layer = []
        for layer in plan.layers:
            whole = np.concatenate([cells[n, layer][name] for n in range(len(batches))], axis=axis)
            missing = widest - whole.shape[-1] if name == "sets" else 0
            pad = [(0, 0)] * (whole.ndim - 1) + [(0, missing)]
            by_layer.append(np.pad(whole, pad, constant_values=np.nan) if missing else whole)
        gathered[name] = np.stack(by_layer, axis=axis + 1).take(order, axis=axis)
    return gathered


def _baseline_scores(plan: IsolationPlan, gathered: Arrays) -> tuple[Any, Any]:
    """``[score, mass, baseline, item, layer]``, and the sd between random draws ``[score, mass, item, layer]``."""
    shape = gathered["sets"].shape[:-1]
    baselines = {"natural": np.broadcast_to(gathered["natural"][:, None, :, :1], shape)}
    random_sd = np.full(shape, np.nan)
    if "uniform" in plan.baselines:
        baselines["uniform"] = gathered["uniform"]
    if "random" in plan.baselines:
        drawn = _drawn_scores(plan, gathered["sets"])
        baselines["random"] = drawn.mean(axis=-1)
        random_sd = drawn.std(axis=-1, ddof=1) if drawn.shape[-1] > 1 else random_sd
    return np.stack([baselines[name] for name in plan.baselines], axis=2), random_sd


def _drawn_scores(plan: IsolationPlan, sets: Any) -> Any:
    """``[score, mass, item, layer, draw]``: the scores of each layer's drawn sets."""
    columns = []
    for position, layer in enumerate(plan.layers):
        known = plan.to_score(layer)
        columns.append(sets[..., position, [known.index(s) for s in plan.drawn[position]]])
    return np.stack(columns, axis=3)
