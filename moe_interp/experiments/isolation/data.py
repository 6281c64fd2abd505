"""Arrays out of the dataset of an isolation run, checked once and in one order: item, layer, expert."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from moe_interp.errors import ConfigError, DataError
from moe_interp.stats.checks import FloatArray

# the axis of natural routing where the isolated experts are not all experts, each alone; else that is `expert` too
ROUTED = "routed_expert"
REQUIRED = {
    "delta": {"mass", "baseline", "item", "layer", "expert"},
    "baseline_score": {"mass", "baseline", "item", "layer"},
    "score": {"item"},
    "routing_item": {"positions", "item", "layer", ROUTED},
    "share_item": {"positions", "item", "layer", ROUTED},
}
# below this many nats two deltas are the same number: without it the ranks of experts could hang on the rounding of
# whichever baseline was subtracted
DECIMALS = 10
PREFERRED = {"mass": "one", "baseline": "natural", "positions": "all"}


def check_isolation(data: xr.Dataset) -> None:
    """Refuse a dataset that is not one of an isolation run.

    Raises:
        DataError: Variables, axes or the items' domains are missing, ids occur twice, or delta has missing values.
    """
    for name, needed in REQUIRED.items():
        axes = {routed_axis(data) if axis == ROUTED else axis for axis in needed}
        if name not in data or set(data[name].dims) != axes:
            found = f"axes {list(data[name].dims)}" if name in data else "none"
            raise DataError(
                f"variable {name!r}: {found}", f"axes {sorted(axes)}", "Pass the dataset that isolate_experts makes."
            )
    if "domain" not in data.coords or data["domain"].dims != ("item",):
        raise DataError("items without domains", "a coordinate domain(item)", "Label every item with its domain.")
    ids, counts = np.unique(data["item"].values.astype(str), return_counts=True)
    if (counts > 1).any():
        raise DataError(f"item {str(ids[counts > 1][0])!r} more than once", "unique ids", "Rename or drop one of them.")
    missing = data["delta"].isnull().any([axis for axis in data["delta"].dims if axis != "item"]).values
    if missing.any():
        raise DataError(
            f"item {str(data['item'].values[missing][0])!r} and {missing.sum() - 1} more without all deltas",
            "a value for every item, layer and expert",
            "Finish the run, or drop these items.",
        )


def routed_axis(data: xr.Dataset) -> str:
    """The axis of the experts that natural routing chooses among."""
    return ROUTED if ROUTED in data.dims else "expert"


def with_one_expert_axis(data: xr.Dataset) -> xr.Dataset:
    """The dataset with whole numbers as experts, and natural routing on the axis of the deltas, wherever that can be.

    Experts are numbers unless sets of them were forced together. Natural routing has its own axis, ``routed_expert``,
    only where the isolated experts are not all of the model's, each alone. Files of earlier versions had texts and two
    axes always. A dataset that is not one of an isolation run is left to :func:`check_isolation`.
    """
    if "expert" not in data.coords or data["expert"].dims != ("expert",):
        return data
    labels = [str(label) for label in data["expert"].values]
    if not all(label.isdecimal() for label in labels):
        return data
    experts = [int(label) for label in labels]
    data = data.assign_coords(expert=experts)
    if ROUTED not in data.coords or sorted(map(int, data[ROUTED].values)) != sorted(experts):
        return data
    ordered = data.sel({ROUTED: experts}).drop_vars(ROUTED)
    return ordered.assign({name: v.rename({ROUTED: "expert"}) for name, v in ordered.items() if ROUTED in v.dims})


def items_by_domain(data: xr.Dataset) -> dict[str, NDArray[np.int64]]:
    """Positions of each domain's items, domains sorted by name."""
    labels = data["domain"].values.astype(str)
    return {str(name): np.flatnonzero(labels == name) for name in np.unique(labels)}


def pooled_name(domains: Iterable[str], usual: str) -> str:
    """What the row over all domains is called: ``usual``, or another name where a domain has that one."""
    taken, name = set(domains), usual
    while name in taken:
        name = f"{name} (pooled)"
    return name


def masses(data: xr.Dataset) -> list[str]:
    """The masses of the run, as text."""
    return [str(mass) for mass in data["mass"].values]


def chosen(data: xr.Dataset, axis: str, value: str | None) -> str:
    """``value`` where the run has it; where None is given, the preferred one, or else the run's first.

    Raises:
        ConfigError: The run does not have it.
    """
    known = [str(entry) for entry in data[axis].values]
    if value is None:
        return PREFERRED[axis] if PREFERRED[axis] in known else known[0]
    if value not in known:
        raise ConfigError(
            f"{axis}={value!r}", f"one of {known}, which this run has", f"Choose one, or run with {axis}={value!r} too."
        )
    return value


def delta_array(data: xr.Dataset, mass: str, baseline: str, score: str = "mean") -> FloatArray:
    """delta ``[item, layer, expert]`` in nats; score ``"mean"`` per answer token, ``"first"`` of the first one."""
    if score not in ("mean", "first"):
        raise ConfigError(f"score={score!r}", "'mean' or 'first'", "Choose one of these.")
    name = "delta" if score == "mean" else "delta_first"
    if name not in data:
        raise DataError(f"a result without {name}", f"the variable {name}", "Run the isolation again, or use 'mean'.")
    picked = data[name].sel(mass=chosen(data, "mass", mass), baseline=chosen(data, "baseline", baseline))
    return np.asarray(picked.transpose("item", "layer", "expert").values, dtype=np.float64)


def sign(data: xr.Dataset) -> int:
    """+1 where experts were forced; -1 where they were ablated, as a good expert's removal lowers the score."""
    return -1 if data.attrs.get("mode", "force") == "ablate" else 1


def quality_array(data: xr.Dataset, mass: str | None = None, score: str = "mean") -> FloatArray:
    """How good an expert is for an item, ``[item, layer, expert]`` in nats: delta centred over experts, the sign turned
    under ablation.

    The baseline is the same number for all experts of an item and layer, so it drops out: every baseline gives this.
    """
    delta = sign(data) * delta_array(data, chosen(data, "mass", mass), chosen(data, "baseline", None), score)
    return np.round(delta - delta.mean(-1, keepdims=True), DECIMALS)


def members(label: str) -> tuple[Any, ...]:
    """The entries of natural routing for an expert label: (3,) for ``"3"``, (3, 5) for ``"3+5"``; one for a family."""
    return (str(label),) if "." in str(label) else tuple(int(part) for part in str(label).split("+"))


def single_experts(data: xr.Dataset) -> list[int]:
    """Ids of the forced experts.

    Raises:
        DataError: Sets of experts were forced together.
    """
    sets = [members(label) for label in data["expert"].values]
    if together := [entry for entry in sets if len(entry) > 1 or isinstance(entry[0], str)]:
        raise DataError(
            f"experts forced together, such as {'+'.join(map(str, together[0]))}",
            "single experts",
            "Run isolate_experts on single experts for this.",
        )
    return [entry[0] for entry in sets]


def routing_array(data: xr.Dataset, positions: str = "all", measure: str = "probability") -> FloatArray:
    """Natural routing to each forced expert, ``[item, layer, expert]``: a set's is the sum over its members.

    Args:
        positions: ``"all"`` | ``"prompt"`` | ``"answer"`` (those that predict the answer).
        measure: ``"probability"``, the mean routing probability, or ``"share"``, the share of slots.
    """
    if measure not in ("probability", "share"):
        raise ConfigError(f"measure={measure!r}", "'probability' or 'share'", "Choose one of these.")
    axis = routed_axis(data)
    variable = data["routing_item" if measure == "probability" else "share_item"]
    picked = variable.sel(positions=chosen(data, "positions", positions)).transpose("item", "layer", axis)
    routed = [str(expert) if "." in str(expert) else int(expert) for expert in data[axis].values]
    taken = np.zeros((len(routed), data.sizes["expert"]))
    for column, label in enumerate(data["expert"].values):
        taken[[routed.index(expert) for expert in members(label)], column] = 1
    return np.asarray(picked.values, dtype=np.float64) @ taken


def per_domain(array: FloatArray, groups: dict[str, NDArray[np.int64]]) -> dict[str, FloatArray]:
    """The rows of ``array`` (item first) by domain."""
    return {name: array[index] for name, index in groups.items()}


def item_positions(data: xr.Dataset, items: Sequence[str] | None) -> NDArray[np.int64]:
    """Positions of the ids ``items``; all where None.

    Raises:
        DataError: An id that the result does not have.
    """
    ids = [str(entry) for entry in data["item"].values]
    if items is None:
        return np.arange(len(ids))
    place = {name: index for index, name in enumerate(ids)}
    if unknown := [str(entry) for entry in items if str(entry) not in place]:
        raise DataError(f"item {unknown[0]!r}", f"ids of the result's {len(ids)} items", "Correct the id.")
    return np.array([place[str(entry)] for entry in items], dtype=np.int64)
