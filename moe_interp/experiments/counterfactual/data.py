"""The dataset of a counterfactual run: put together from its cells, and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from moe_interp.errors import DataError
from moe_interp.experiments.inputs.token_texts import token_texts
from moe_interp.hooks.attach import MoEHooks
from moe_interp.results.cells import Arrays

if TYPE_CHECKING:
    from moe_interp.experiments.inputs.sequences import ScoredSequence
    from moe_interp.routes import Method

CELL = ("token", "layer")
AXES = {
    "logp": (*CELL, "route"),
    "router_logp": (*CELL, "route"),
    "route": (*CELL, "route", "slot"),
    "logp_standard": ("token",),
    "logp_null": CELL,
    "router_logp_standard": CELL,
    "standard_route": (*CELL, "slot"),
    "entropy": ("token",),
    "exhausted": CELL,
    "heating": CELL,
}
CONTROLS = {
    "logp_second": (*CELL, "second"),
    "router_logp_second": (*CELL, "second"),
    "second_route": (*CELL, "second"),
    "second_share": CELL,
    "entropy_second": CELL,
    "logp_random": (*CELL, "random"),
    "logp_own": (*CELL, "route"),
    "logp_own_second": (*CELL, "second"),
    "logp_own_null": CELL,
    "logp_own_standard": ("token",),
}
# what a run of today has besides, and tables can do without
FURTHER = {"logp_top": ("token",), "is_top": ("token",)}
# controls that are of no use without each other
TOGETHER = (
    ("logp_second", "router_logp_second", "second_route", "second_share"),
    ("logp_own", "logp_own_standard", "logp_own_null"),
)
CELLS_VERSION = 3  # raised when cells change their meaning: 3 has the sampler's present law
LABELS = ("sequence", "pos")


@dataclass(frozen=True)
class CounterfactualPlan:
    """What a run computes.

    Attributes:
        model, weights: Name of the model, checksum of its parameters.
        sequences: Checksum of the sequences.
        layers: MoE layers.
        sampler: In words.
        n_routes, n_second, n_random: Routes a token of the main draw, of the second one and of the uniform one.
        seed: Seed of all draws.
        method: How routes are scored.
        batches: Indices of the sequences that run together.
        version: Of what cells hold.
    """

    model: str
    weights: str
    sequences: str
    layers: tuple[int, ...]
    sampler: str
    n_routes: int
    n_second: int
    n_random: int
    seed: int
    method: Method
    batches: tuple[tuple[int, ...], ...]
    version: int = CELLS_VERSION

    def stream(self, name: str) -> int:
        """The seed of one of the draws; the main draw's is the run's own."""
        if name == "main":
            return self.seed
        return int.from_bytes(hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:8], "little") >> 1


def stored_plan(plan: CounterfactualPlan, n_sequences: int, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What finished cells belong to: everything that changes a number in them, by the names of the options.

    Args:
        plan: The run.
        n_sequences: How many sequences there are.
        identity: Of the model, and of the sampler.
    """
    return {
        "model": plan.model,
        "sequences": {"count": n_sequences, "checksum": plan.sequences},
        "layers": plan.layers,
        "n_routes": plan.n_routes,
        "controls": plan.n_second > 0,
        "seed": plan.seed,
        "method": plan.method,
        "version": CELLS_VERSION,
        **identity,
        "batches": plan.batches,
    }


def counterfactual_dataset(
    moe: MoEHooks,
    plan: CounterfactualPlan,
    sequences: Sequence[ScoredSequence],
    cells: Mapping[tuple[int, Any], Arrays],
) -> xr.Dataset:
    """The cells put together: tokens by the order of their sequences, then by position."""
    places = [
        (i, pos) for batch in plan.batches for i in batch for pos in np.flatnonzero(sequences[i].is_scored).tolist()
    ]
    order = np.lexsort(np.array(places).T[::-1])
    sequence, pos = np.array(places)[order].T
    numbers = range(len(plan.batches))
    axes = AXES | FURTHER | (CONTROLS if plan.n_second else {})
    variables = {}
    for name, axis in axes.items():
        if axis == ("token",):
            value = np.concatenate([cells[n, "tokens"][name] for n in numbers])
        else:
            by_layer = [np.concatenate([cells[n, layer][name] for n in numbers]) for layer in plan.layers]
            value = np.stack(by_layer, axis=1)
        variables[name] = (axis, value[order])
    token = np.array([sequences[i].tokens[p] for i, p in zip(sequence, pos)])
    target = np.array([sequences[i].tokens[p + 1] for i, p in zip(sequence, pos)])
    texts = token_texts(moe.bridge.tokenizer, {*token.tolist(), *target.tolist()})
    slow = [any(bool(cells[n, layer]["is_slow"]) for n in numbers) for layer in plan.layers]
    spec = moe.spec(plan.layers[0])
    data = xr.Dataset(
        variables,
        coords={
            "layer": list(plan.layers),
            "sequence": ("token", np.array([s.id for s in sequences])[sequence]),
            "pos": ("token", pos),
            "token_id": ("token", token),
            "target_id": ("token", target),
            "token_text": ("token", np.array([texts[i] for i in token.tolist()])),
            "target_text": ("token", np.array([texts[i] for i in target.tolist()])),
            "token_type": ("token", np.array([token_type(texts[i]) for i in target.tolist()])),
        },
        attrs={
            "model": plan.model,
            "sampler": plan.sampler,
            "n_routes": plan.n_routes,
            "n_experts": spec.n_experts,
            "top_k": spec.top_k,
            "method": {str(layer): "naive" if s else "branch" for layer, s in zip(plan.layers, slow)},
            "seeds": {"seed": plan.seed},
        },
    )
    data.attrs["null_distance"] = float(abs(data["logp_null"] - data["logp_standard"]).max())
    return data


def token_type(text: str) -> str:
    """ "word" (letters, also with a leading space), "number", "punctuation", "space" or "other" (derived).

    Tokens that are part of a character only (bytes, decoded as U+FFFD) are "other".
    """
    bare = text.strip()
    if not bare or "\ufffd" in bare:
        return "space" if text and not bare else "other"
    if bare.isdecimal():
        return "number"
    if bare.replace("'", "").replace("\u2019", "").isalpha():
        return "word"
    return "other" if any(character.isalnum() for character in bare) else "punctuation"


def check_counterfactual(data: xr.Dataset) -> None:
    """Refuse a dataset that is not one of a counterfactual run.

    Raises:
        DataError: variables, axes or labels are missing, controls are there in part, a score under the standard route
            is missing, or no token has another route.
    """
    wanted = AXES | {name: axes for name, axes in (CONTROLS | FURTHER).items() if name in data}
    for name, axes in wanted.items():
        if name not in data or data[name].dims != axes:
            found = f"axes {list(data[name].dims)}" if name in data else "none"
            remedy = "Pass the dataset that counterfactual_routes makes."
            raise DataError(f"variable {name!r}: {found}", f"axes {list(axes)}", remedy)
    wanted_together: list[tuple[str, ...]] = [names for names in TOGETHER if any(name in data for name in names)]
    if len(wanted_together) == len(TOGETHER):
        wanted_together.append(("logp_own_second",))
    lacking = [name for names in wanted_together for name in names if name not in data]
    if lacking:
        given = f"controls without {', '.join(map(repr, lacking))}"
        raise DataError(given, "all variables of a control, or none", "Repeat the run, or drop the rest of them.")
    for name in LABELS:
        if name not in data.coords or data[name].dims != ("token",):
            raise DataError(f"tokens without the coordinate {name!r}", f"{name}(token)", "Label every token with it.")
    scores = np.concatenate([data["logp_standard"].values[:, None], data["logp_null"].values], axis=1)
    missing = ~np.isfinite(scores).all(axis=1)
    if missing.any() or not data.sizes["token"]:
        given = f"{int(missing.sum())} of {data.sizes['token']} tokens without a score under the standard route"
        raise DataError(given, "a finite score for each of at least one token", "Finish the run, or drop these tokens.")
    if data["logp"].isnull().all():
        given = f"no token with another route than the standard one (sampler {data.attrs.get('sampler')})"
        raise DataError(given, "at least one token with another route", "Widen the sampler's pool.")


def sequence_codes(data: xr.Dataset) -> NDArray[np.int64]:
    """``[token]``: the number of each token's sequence."""
    return np.unique(data["sequence"].values.astype(str), return_inverse=True)[1].astype(np.int64)
