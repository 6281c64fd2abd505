"""All measures of recorded routing at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from moe_interp.checks import check_seed, check_whole
from moe_interp.errors import DataError
from moe_interp.results import checksum
from moe_interp.stats import risk_differences
from moe_interp.traces.atlas.result import AtlasResult
from moe_interp.traces.atlas.sources import Source, Unlabelled, collect
from moe_interp.traces.counts import PATH_LENGTH, RoutingCounts
from moe_interp.traces.expert_use import co_activation, load, saturation, standing_committee, transitions
from moe_interp.traces.measures.comparison import sequence_shares, usage_correlation
from moe_interp.traces.measures.domains import domain_differences
from moe_interp.traces.measures.load_intervals import load_intervals
from moe_interp.traces.measures.outputs import expert_norms, router_margin
from moe_interp.traces.measures.paths import expert_paths
from moe_interp.traces.measures.vocabulary import vocabulary_specialization
from moe_interp.traces.specialization import domain_specialization, esft_scores
from moe_interp.traces.trace import RoutingTrace

MOST_SEQUENCES = 2000  # of a test whose permutations are held at once


@dataclass(frozen=True)
class Corpora:
    """What the measures are taken of.

    Attributes:
        counts, trace: The routes; the trace where it is a single one in memory.
        other, other_trace: Those that they are compared with, if any.
        n_permutations, seed, min_count: Options.
    """

    counts: RoutingCounts
    trace: RoutingTrace | None
    other: RoutingCounts | None
    other_trace: RoutingTrace | None
    n_permutations: int
    seed: int
    min_count: int


def atlas(
    source: Source | Mapping[str, Source | Unlabelled],
    against: Source | None = None,
    format: str | None = None,
    tables: Iterable[str] | None = None,
    path_length: int = PATH_LENGTH,
    min_count: int = 10,
    n_permutations: int = 9999,
    seed: int = 0,
    **reading: Any,
) -> AtlasResult:
    """Every measure of recorded routing that the routes allow, in one result. No model is needed.

    Load, domain and vocabulary specialization, co-activation, transitions, paths, standing committee, ESFT scores,
    output norms, margins, risk differences where there are two domains, and with ``against`` saturation and the
    correlation of use. Measures that the routes do not allow (no labels, a single sequence, no ids, ...) are named with
    their reason in ``summary()`` and in ``data.attrs["not_testable"]``; the rest is computed.

    Args:
        source: A :class:`RoutingTrace`, :class:`RoutingCounts`, a path (of a trace, of counts, or a folder of traces,
            read part by part), or ``{domain: any of these}``, where the keys become the labels.
        against: Routes of another model or checkpoint on the same tokens, in the same order, or its counts. For
            saturation the routes of both stay in memory; counts allow no comparison token by token.
        format: Of a path, as in :meth:`RoutingTrace.read`; by the suffix without.
        tables: What is counted, of :class:`RoutingCounts`; all without it.
        path_length: Layers of a path.
        min_count: Occurrences that a token id needs to count for vocabulary specialization.
        n_permutations, seed: Of the null of domains.
        reading: Further arguments of :meth:`RoutingTrace.read`.

    Raises:
        DataError, ResultError: no routes, or files that cannot be read.
        ConfigError: something else as a source, or options out of range.

    Sources of the measures: docs/atlas.md. What it does not show: what experts compute, or that routing causes
    anything.
    """
    n_permutations, seed = check_whole(n_permutations, "n_permutations", 1), check_seed(seed)
    min_count = check_whole(min_count, "min_count", 1)
    reading = reading | ({} if format is None else {"format": format})
    counts, trace = collect(source, tables, path_length, reading, side_by_side=against is not None)
    other, other_trace = (None, None)
    if against is not None:
        other, other_trace = collect(against, tables, path_length, reading, side_by_side=True)
    of = Corpora(counts, trace, other, other_trace, n_permutations, seed, min_count)
    data, missing = measured(of)
    data.attrs |= {
        "not_testable": missing,
        "n_tokens": counts.n_tokens,
        "n_sequences": counts.n_sequences,
        "n_slots": counts.n_slots,
        "path_length": counts.path_length,
    }
    config = {
        "tables": list(counts.tables),
        "path_length": counts.path_length,
        "min_count": min_count,
        "n_permutations": n_permutations,
    }
    identity = checksum([counts.slots.tolist(), counts.n_tokens, counts.n_sequences])
    return AtlasResult(data, config=config, seeds=seed, data_checksum=identity)


def measured(of: Corpora) -> tuple[xr.Dataset, dict[str, str]]:
    """All variables that can be had, and the reasons for the rest by measure."""
    layers = list(of.counts.layers)
    merged = xr.Dataset(coords={"layer": layers, "expert": np.arange(of.counts.n_experts)})
    missing: dict[str, str] = {}
    for name, measure in MEASURES.items():
        try:
            found = measure(of)
        except DataError as error:
            missing[name] = f"{error.given.rstrip('.')}; needs {error.expected}"
            continue
        if found is None:
            continue
        if "layer" in found.dims and found.sizes["layer"] < len(layers):
            fill = {str(name): -1 if v.dtype.kind in "iu" else np.nan for name, v in found.data_vars.items()}
            found = found.reindex(layer=layers, fill_value=fill)
        merged.attrs |= found.attrs
        merged = merged.merge(found.drop_attrs(deep=False), compat="no_conflicts")
    return merged, missing


def _renamed(found: xr.Dataset, prefix: str, keep: tuple[str, ...] = ()) -> xr.Dataset:
    return found.rename({name: f"{prefix}_{name}" for name in found.data_vars if name not in keep})


def _domains(of: Corpora) -> xr.Dataset:
    found = _renamed(domain_specialization(of.counts), "domain")
    if of.counts.has("top1"):
        first = of.counts.array("top1")
        total = np.where(first.sum(axis=2, keepdims=True) == 0, np.nan, first.sum(axis=2, keepdims=True))
        found["domain_top1_share"] = (("domain", "layer", "expert"), first / total)
    return found


def _vocabulary(of: Corpora, ids: Any) -> xr.Dataset:
    found = vocabulary_specialization(of.counts, ids, of.min_count)[["specialization", "chance"]]
    return found.rename({"specialization": f"vocabulary_{ids}", "chance": f"vocabulary_{ids}_chance"})


def _pairs(of: Corpora) -> xr.Dataset:
    found = co_activation(of.counts)[["co_activation", "chance"]].rename(chance="co_activation_chance")
    found["rank_adjacent"] = co_activation(of.counts, "adjacent")["co_activation"]
    return found.astype(np.float32)


def _transitions(of: Corpora) -> xr.Dataset:
    found = _renamed(transitions(of.counts), "transition")
    found["transition_probability"] = found["transition_probability"].astype(np.float32)
    return found


def _committee(of: Corpora) -> xr.Dataset:
    of.counts.check_domains(2)
    found = standing_committee(of.counts)
    names = {"rank": "committee_rank", "presence": "committee_presence", "member": "committee_member"}
    found = found.rename(names)
    found["committee_member"] = found["committee_member"].astype(np.int8)
    found.attrs = {f"committee_{name}": value for name, value in found.attrs.items()}
    return found


def _paths(of: Corpora) -> xr.Dataset:
    if of.counts.path_length < 2:
        raise DataError(f"{len(of.counts.layers)} layer", "at least two layers", "Record more layers.")
    found = expert_paths(of.counts, of.counts.path_length)
    found.attrs = {}
    return _renamed(found, "path", keep=("path",))


def _scores(of: Corpora) -> xr.Dataset:
    return esft_scores(of.counts)


def _saturation(of: Corpora) -> xr.Dataset | None:
    if of.other is None:
        return None
    if of.trace is None or of.other_trace is None:
        raise DataError("counts alone", "the routes of both, token by token", "Pass traces, or paths of traces.")
    return saturation(of.trace, of.other_trace).rename(chance="saturation_chance")


def _correlation(of: Corpora) -> xr.Dataset | None:
    if of.other is None:
        return None
    found = usage_correlation(of.counts, of.other).rename(correlation="usage_correlation")
    return found.rename({"domain": "compared_domain"})


def _risk(of: Corpora) -> xr.Dataset | None:
    """Of a corpus of two domains: the first label's mean share within sequences less the second's."""
    counts = of.counts
    if len(counts.domains) != 2:
        return None
    label, sequence = counts.array("row_domain"), counts.array("row_sequence")
    if len(np.unique(sequence)) < len(sequence) or len(sequence) > MOST_SEQUENCES:
        raise DataError(
            "sequences of several domains, or very many", f"up to {MOST_SEQUENCES} of one each", "Split them."
        )
    shares = sequence_shares(counts)
    found = risk_differences(shares[label == 0], shares[label == 1], seed=of.seed)
    names = ("difference", "low", "high", "q", "stability", "found")
    data = {f"risk_{name}": (("layer", "expert"), getattr(found, name)) for name in names}
    return xr.Dataset(data, coords={"layer": list(counts.layers), "expert": np.arange(counts.n_experts)})


def _sequences(of: Corpora) -> xr.Dataset:
    """Each sequence's own shares, for tests of the user's."""
    counts = of.counts
    shares = sequence_shares(counts).astype(np.float32)
    found = xr.Dataset({"sequence_share": (("sequence", "layer", "expert"), shares)})
    sequence, label = counts.array("row_sequence"), counts.array("row_domain")
    if counts.domains and len(np.unique(sequence)) == len(sequence):
        names = np.array(counts.domains, dtype=object)[label]
        found = found.assign_coords(sequence_domain=("sequence", names.astype(str)))
    return found


# name -> function; every variable's meaning stands with the measure
MEASURES: dict[str, Callable[[Corpora], xr.Dataset | None]] = {
    "load": lambda of: load(of.counts),
    "load intervals": lambda of: load_intervals(of.counts),
    "domain specialization": _domains,
    "domain differences": lambda of: _renamed(domain_differences(of.counts, of.n_permutations, of.seed), "domain"),
    "input vocabulary": partial(_vocabulary, ids="input"),
    "next vocabulary": partial(_vocabulary, ids="next"),
    "predicted vocabulary": partial(_vocabulary, ids="predicted"),
    "co-activation": _pairs,
    "transitions": _transitions,
    "paths": _paths,
    "standing committee": _committee,
    "ESFT scores": _scores,
    "output norms": lambda of: expert_norms(of.counts),
    "router margin": lambda of: router_margin(of.counts),
    "saturation": _saturation,
    "correlation of use": _correlation,
    "risk differences": _risk,
    "sequences": _sequences,
}


def from_paths(paths: Iterable[str | Path], **options: Any) -> AtlasResult:
    """The atlas of one path or of several.

    Of several, what has labels of its own keeps them, and the rest is a domain named by its file. ``law=path`` gives
    all of the path that label.

    Raises:
        DataError: two paths without labels of one name.
    """
    given = [str(path) for path in paths]
    if len(given) == 1 and not _name_of(given[0])[0]:
        return atlas(_name_of(given[0])[1], **options)
    named: dict[str, Source | Unlabelled] = {}
    for text in given:
        name, path = _name_of(text)
        key = name or f"path {path}"
        if key in named:
            raise DataError(f"{text!r} twice", "each path and name once", "Name them: law=path.")
        named[key] = path if name else Unlabelled(path, Path(path).stem or path)
    return atlas(named, **options)


def _name_of(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    return (name, path) if equals and name and not Path(text).exists() and "/" not in name else ("", text)
