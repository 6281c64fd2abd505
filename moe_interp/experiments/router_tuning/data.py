"""The dataset of a tuning run: put together from its history, and checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from moe_interp.errors import DataError
from moe_interp.experiments.router_tuning.evaluation import PER_TOKEN
from moe_interp.experiments.router_tuning.routers import TunedRouter
from moe_interp.experiments.router_tuning.token_sources.tokens import TokenTable
from moe_interp.experiments.router_tuning.training import STEP, History

HELD_OUT = "held out"
AXES = {
    **dict.fromkeys(STEP, ("step",)),
    "ce": ("evaluation", "token"),
    **dict.fromkeys(PER_TOKEN, ("evaluation", "token", "layer")),
    "load": ("evaluation", "layer", "expert"),
    "weight_change": ("evaluation", "layer"),
    "original": ("layer", "expert", "d_model"),
    "delta": ("layer", "expert", "d_model"),
}


def tuning_dataset(
    history: History,
    table: TokenTable,
    domains: list[str],
    routers: tuple[TunedRouter, ...],
    start: dict[int, Tensor],
    tuned: dict[int, Tensor],
) -> xr.Dataset:
    """Everything that a run has seen, and the weights before it and their change."""
    steps, changes, found = zip(*history.evaluations)
    layers = [router.layer for router in routers]
    variables: dict[str, Any] = {name: (("step",), np.array(history.steps[name], dtype=np.float64)) for name in STEP}
    variables["ce"] = (AXES["ce"], np.stack([one.ce for one in found]))
    for name in PER_TOKEN:
        variables[name] = (AXES[name], np.stack([one.per_token[name] for one in found]))
    variables["load"] = (AXES["load"], np.stack([one.load for one in found]))
    variables["weight_change"] = (AXES["weight_change"], np.array(changes))
    variables["original"] = (AXES["original"], torch.stack([start[layer] for layer in layers]).cpu().numpy())
    delta = torch.stack([tuned[layer].detach() - start[layer] for layer in layers])
    variables["delta"] = (AXES["delta"], delta.cpu().numpy())
    names = [table.sequences[s].id for s in table.sequence.tolist()]
    return xr.Dataset(
        variables,
        coords={
            "step": np.arange(1, len(history.steps["loss"]) + 1),
            "evaluation": np.array(steps),
            "layer": layers,
            "sequence": ("token", np.array(names)),
            "pos": ("token", table.pos),
            "domain": ("token", np.array([domains[s] for s in table.sequence.tolist()])),
        },
    )


def check_tuning(data: xr.Dataset) -> None:
    """Refuse a dataset that is not one of a tuning run.

    Raises:
        DataError: variables, axes or labels are missing, or a cross-entropy is not finite.
    """
    for name, axes in AXES.items():
        if name not in data or data[name].dims != axes:
            found = f"axes {list(data[name].dims)}" if name in data else "none"
            remedy = "Pass the dataset that tune_router makes."
            raise DataError(f"variable {name!r}: {found}", f"axes {list(axes)}", remedy)
    for name in ("sequence", "domain"):
        if name not in data.coords or data[name].dims != ("token",):
            raise DataError(f"tokens without the coordinate {name!r}", f"{name}(token)", "Label every token with it.")
    if not np.isfinite(data["ce"].values).all():
        raise DataError("held-out cross-entropies that are not finite", "finite numbers", "Finish the run.")
