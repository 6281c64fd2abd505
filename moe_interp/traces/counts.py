"""Counts of recorded routing: all that the measures need of a corpus of any size, added up part by part."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_interp.checks import check_name, check_whole
from moe_interp.disk import parse_json
from moe_interp.errors import ConfigError, DataError, MoEInterpError, ResultError
from moe_interp.results.files import replacing
from moe_interp.results.npz import npz_arrays, npz_bytes
from moe_interp.results.seals import read_sealed
from moe_interp.traces.checks import as_array, checked_layers
from moe_interp.traces.tallies import part as tally
from moe_interp.traces.tallies.fixed_point import as_float
from moe_interp.traces.tallies.sparse import SparseCounts
from moe_interp.traces.trace import RoutingTrace

TABLES = ("sequences", "weights", "co_activation", "transitions", "vocabulary", "paths", "norms", "margin")
PATH_LENGTH = 3
VERSION = 1
VERSION_KEY = "moe_interp_counts_version"
AGAIN = "Restore it from a copy, or count again."
OPTIONAL = ("expert_weights", "domain", "token_ids", "predicted_ids", "expert_norms", "router_logits")
BY_DOMAIN = ("served", "tokens_by_width", "top1", "domain_tokens", "weight")  # their first axis
ROWS = "row_"  # arrays of one entry a run of a sequence


class RoutingCounts:
    """What the measures need of a corpus, without its tokens; memory grows only with the sequences and the vocabulary.

    Use by domain is always counted: slots by domain, layer, expert and number of experts of the token, and top-1
    experts. ``tables`` names what else is. All but sums over a single sequence are integers (weights and norms in
    multiples of 2^-52), so that the parts of a corpus add up to the whole exactly, in whatever order. Empty slots
    (-1) and tokens that a trace does not cover (-2) are skipped.

    Args:
        layers: The model's index of each layer.
        n_experts: Experts per layer.
        tables: Some of ``"sequences"`` (slots of each sequence, for intervals and nulls over sequences), ``"weights"``,
            ``"co_activation"``, ``"transitions"``, ``"vocabulary"``, ``"paths"``, ``"norms"``, ``"margin"``; all
            without it. What the traces do not hold is left out.
        path_length: Layers of a path; the number of layers where there are fewer.

    Raises:
        ConfigError: a table that there is not, or a path too long to be coded (experts^length of 2^62 and more).

    What it does not show: anything that needs the tokens side by side, such as saturation between two traces.
    """

    def __init__(
        self,
        layers: Sequence[int],
        n_experts: int,
        tables: Iterable[str] | None = None,
        path_length: int = PATH_LENGTH,
    ) -> None:
        given = tuple(layers) if isinstance(layers, Iterable) else ()
        if not given:
            raise ConfigError(f"layers={layers!r}", "the model's index of each layer, at least one", "Pass a list.")
        self.layers = checked_layers(given, len(given))
        self.n_experts = check_whole(n_experts, "n_experts", 1)
        if tables is not None and (isinstance(tables, str) or not isinstance(tables, Iterable)):
            raise ConfigError(f"tables={tables!r}", f"a list, of {', '.join(TABLES)}", "Choose among these.")
        chosen = TABLES if tables is None else tuple(tables)
        if unknown := [name for name in chosen if name not in TABLES]:
            raise ConfigError(f"table {unknown[0]!r}", f"of {', '.join(TABLES)}", "Choose among these.")
        self.tables = tuple(name for name in TABLES if name in chosen)
        self.path_length = min(check_whole(path_length, "path_length", 1), len(self.layers))
        if len(self.layers) * float(self.n_experts) ** self.path_length >= 2**62:
            raise ConfigError(f"paths of {path_length} layers of {n_experts} experts", "shorter paths", "Take fewer.")
        self.domains: tuple[str, ...] = ()
        self.n_sequences = 0
        self.fields: frozenset[str] | None = None
        self._arrays: dict[str, NDArray[Any]] = {}
        self._rows: dict[str, list[NDArray[Any]]] = {}
        self._sparse: dict[str, SparseCounts] = {}

    @classmethod
    def of(
        cls, trace: RoutingTrace, tables: Iterable[str] | None = None, path_length: int = PATH_LENGTH
    ) -> RoutingCounts:
        """The counts of one trace."""
        return cls(trace.layers, trace.n_experts, tables, path_length).update(trace)

    @classmethod
    def from_counts(
        cls,
        slots: ArrayLike,
        n_tokens: ArrayLike,
        n_slots: int,
        layers: Sequence[int] | None = None,
        domains: Sequence[str] | None = None,
        top1: ArrayLike | None = None,
    ) -> RoutingCounts:
        """Counts that were made elsewhere, without tokens: use by domain, and nothing else.

        Args:
            slots: ``[domain, layer, expert]`` tokens whose route holds the expert; ``[layer, expert]`` for one corpus.
            n_tokens: ``[domain]``, or one number for all.
            n_slots: Experts of a token, k.
            layers: The model's index of each layer; 0, 1, ... without it.
            domains: Names of the first axis; needed where it has more than one entry.
            top1: Like ``slots``, for the expert of largest weight alone.

        Raises:
            DataError: no integers, or an expert that serves more tokens than there are, or more slots than
                ``n_tokens * n_slots``. Fewer are empty slots.
        """
        table = as_array(slots)
        table = table[None] if table.ndim == 2 else table
        if table.ndim != 3 or 0 in table.shape or table.dtype.kind not in "iu" or table.min() < 0:
            raise DataError(
                f"slots of shape {table.shape} and type {table.dtype}",
                "counts [domain, layer, expert]",
                "Correct them.",
            )
        n_domains, n_layers, n_experts = table.shape
        k = check_whole(n_slots, "n_slots", 1, n_experts, error=DataError)
        names = () if domains is None else tuple(check_name(name, "domain") for name in domains)
        if (names or n_domains > 1) and (len(names) != n_domains or len(set(names)) != n_domains):
            raise DataError(
                f"{len(set(names))} domains for {n_domains} tables", "a name of its own for each", "Name them."
            )
        tokens = as_array(n_tokens)
        if tokens.shape not in {(), (1,), (n_domains,)} or tokens.dtype.kind not in "iu":
            raise DataError(
                f"n_tokens of shape {tokens.shape} and type {tokens.dtype}",
                f"whole numbers, one for all or one for each of {n_domains} domains",
                "Pass the number of tokens that were counted.",
            )
        tokens = np.broadcast_to(tokens, (n_domains,)).astype(np.int64)
        over = (table > tokens[:, None, None]).any() or (table.sum(axis=2) > (tokens * k)[:, None]).any()
        if over or (tokens < 1).any():
            raise DataError(
                f"counts of up to {int(table.max())}, and {int(table.sum(axis=2).max())} a layer, of "
                f"{tokens.tolist()} tokens with {k} slots",
                "at most n_tokens for an expert, and n_tokens * n_slots for a layer",
                "Pass the number of tokens that were counted, and k.",
            )
        made = cls(range(n_layers) if layers is None else layers, n_experts, ())
        served = np.zeros((n_domains, n_layers, k + 1, n_experts), dtype=np.int64)
        served[:, :, k] = table
        by_width = np.zeros((n_domains, n_layers, k + 1), dtype=np.int64)
        by_width[:, :, k] = tokens[:, None]
        arrays = {"served": served, "tokens_by_width": by_width, "domain_tokens": tokens}
        if top1 is not None:
            first = as_array(top1)
            first = first[None] if first.ndim == 2 else first
            if first.shape != table.shape or first.dtype.kind not in "iu" or (first > table).any() or first.min() < 0:
                raise DataError(
                    f"top1 of shape {first.shape}, or above slots of shape {table.shape}",
                    "of each expert's tokens, those it is first for",
                    "Correct it.",
                )
            arrays["top1"] = first.astype(np.int64)
        order = np.argsort(names) if names else np.arange(n_domains)
        made._arrays = {name: values[order] for name, values in arrays.items()}
        made.domains = tuple(sorted(names))
        made.fields = frozenset({"domain"} if names else ())
        return made

    def update(self, trace: RoutingTrace) -> RoutingCounts:
        """Count a part of the corpus, whole sequences, and return these counts.

        Raises:
            DataError: other layers or experts, or a part that lacks a field (weights, labels, ids, norms, logits) that
                the others have, or has one more.
        """
        part = tally.Part(trace)
        new = RoutingCounts(trace.layers, trace.n_experts, self.tables, self.path_length)
        new.domains, new.n_sequences = trace.domains, len(trace.sequence_lengths)
        new.fields = frozenset(name for name in OPTIONAL if getattr(trace, name, None) is not None)
        found: dict[str, Any] = tally.count_use(part)
        rows = len(part.row_domain)
        found |= {"row_sequence": part.row_sequence, "row_domain": part.row_domain}
        found["row_tokens"] = np.bincount(part.row, minlength=rows)
        counted: dict[str, Callable[[tally.Part], Any]] = {
            "sequences": tally.count_rows,
            "weights": tally.sum_weights,
            "co_activation": tally.count_pairs,
            "transitions": tally.count_transitions,
            "vocabulary": tally.count_vocabulary,
            "paths": lambda p: tally.count_paths(p, self.path_length),
            "norms": tally.sum_norms,
            "margin": tally.sum_margins,
        }
        for name in self.tables:
            found |= counted[name](part)
        for name, values in found.items():
            if isinstance(values, SparseCounts):
                new._sparse[name] = values
            elif name.startswith(ROWS):
                new._rows[name] = [values]
            else:
                new._arrays[name] = values
        return self.merge(new)

    def merge(self, other: RoutingCounts) -> RoutingCounts:
        """Add the counts of another part of the corpus, whose sequences follow these, and return these counts.

        Raises:
            DataError: other layers, experts, tables, length of paths, or recorded fields.
        """
        if not isinstance(other, RoutingCounts):
            raise DataError(f"counts of type {type(other).__name__}", "a RoutingCounts", "Merge counts with counts.")
        mine, theirs = ((c.layers, c.n_experts, c.tables, c.path_length) for c in (self, other))
        if mine != theirs:
            raise DataError(
                f"{other!r} to {self!r}", "counts of the same layers, experts, tables and path length", "Count alike."
            )
        if other.fields is None:
            return self
        if self.fields is not None and self.fields != other.fields:
            odd = ", ".join(sorted(self.fields ^ other.fields))
            raise DataError(
                f"parts of a corpus of which some have {odd} and some have not",
                "the same fields recorded in all",
                "Count them apart, or record the same in all.",
            )
        self._add(other)
        return self

    def _add(self, other: RoutingCounts) -> None:
        """The sums of both; ``other`` stays as it is."""
        first = self.fields is None
        domains = other.domains if first else tuple(sorted({*self.domains, *other.domains}))
        most = max(self.n_slots, other.n_slots)
        for name, values in other._arrays.items():
            added = _aligned(name, values, other.domains, domains, most)
            if first:
                self._arrays[name] = added.copy()
            else:
                self._arrays[name] = _aligned(name, self._arrays[name], self.domains, domains, most)
                self._arrays[name] = self._arrays[name] + added
        for name, chunks in self._rows.items():
            if name == "row_domain":
                self._rows[name] = [_renumbered(c, self.domains, domains) for c in chunks]
        for name, chunks in other._rows.items():
            if name == "row_domain":
                chunks = [_renumbered(c, other.domains, domains) for c in chunks]
            if name == "row_sequence":
                chunks = [c + self.n_sequences for c in chunks]
            self._rows.setdefault(name, []).extend(chunks)
        for name, counts in other._sparse.items():
            self._sparse.setdefault(name, SparseCounts()).add(counts)
        self.domains, self.fields = domains, other.fields
        self.n_sequences += other.n_sequences

    def labelled(self, domain: str) -> RoutingCounts:
        """The same counts of a corpus without labels, under one.

        Raises:
            DataError: they have labels already.
        """
        if self.domains or self.fields is None:
            raise DataError(f"{self!r}", "counts without labels, of at least one token", "Pass them as they are.")
        made = RoutingCounts(self.layers, self.n_experts, self.tables, self.path_length).merge(self)
        made.domains, made.fields = (check_name(domain, "domain"),), self.fields | {"domain"}
        return made

    def has(self, name: str) -> bool:
        """Whether an array, or a table of sparse counts, was counted."""
        return name in self._arrays or name in self._rows or name in self._sparse

    def array(self, name: str) -> NDArray[Any]:
        """An array by name; those of one entry a run of a sequence are joined.

        Raises:
            DataError: it was not counted.
        """
        if name in self._rows:
            chunks = self._rows[name]
            if len(chunks) > 1:
                self._rows[name] = [np.concatenate(chunks)]
            return self._rows[name][0]
        if name not in self._arrays:
            self._refuse(name)
        return self._arrays[name]

    def sums(self, name: str) -> NDArray[np.float64]:
        """A fixed-point array as float64."""
        return as_float(self.array(name))

    def sparse(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Codes in ascending order, and their counts.

        Raises:
            DataError: not counted.
        """
        if name not in self._sparse:
            self._refuse(name)
        return self._sparse[name].table()

    def _refuse(self, name: str) -> None:
        raise DataError(
            f"{self!r} without {name}",
            "counts with that table, of traces that record what it counts",
            f"Record and count it (RoutingCounts(tables=...), of {', '.join(TABLES)}).",
        )

    @property
    def n_slots(self) -> int:
        """Width of the widest route."""
        return self._arrays["served"].shape[2] - 1 if "served" in self._arrays else 0

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences together."""
        return int(self._arrays["domain_tokens"].sum()) if "domain_tokens" in self._arrays else 0

    @property
    def slots(self) -> NDArray[np.int64]:
        """``[domain, layer, expert]`` slots in use; one entry on the first axis without labels."""
        return np.asarray(self.array("served").sum(axis=2))

    @property
    def tokens(self) -> NDArray[np.int64]:
        """``[domain, layer]`` tokens that the traces cover."""
        return np.asarray(self.array("tokens_by_width").sum(axis=2))

    def check_domains(self, at_least: int = 1) -> None:
        """Refuse counts of fewer labelled domains.

        Raises:
            DataError: fewer.
        """
        if len(self.domains) < at_least:
            found = (
                f"a corpus with the single domain {self.domains[0]!r}"
                if self.domains
                else "a corpus without domain labels"
            )
            raise DataError(
                found.capitalize(),
                "a label per sequence or token" if at_least == 1 else f"at least {at_least} domains",
                "Pass domain=... to RoutingTrace.from_arrays, set it with trace.with_domain(labels), or pass "
                "{domain: trace}.",
            )

    def save(self, path: str | Path) -> Path:
        """Write the counts to one npz file, which appears whole or not at all, and return its path.

        Raises:
            ResultError: The file cannot be written.
        """
        described = {
            "layers": list(self.layers),
            "n_experts": self.n_experts,
            "tables": list(self.tables),
            "path_length": self.path_length,
            "domains": list(self.domains),
            "n_sequences": self.n_sequences,
            "fields": None if self.fields is None else sorted(self.fields),
        }
        arrays: dict[str, Any] = {VERSION_KEY: VERSION, "described": json.dumps(described)}
        arrays |= {f"array/{name}": values for name, values in self._arrays.items()}
        arrays |= {f"rows/{name}": self.array(name) for name in self._rows}
        for name in self._sparse:
            arrays[f"codes/{name}"], arrays[f"counts/{name}"] = self.sparse(name)
        target = Path(path)
        with replacing(target) as file:
            file.write(npz_bytes(arrays, compressed=True))
        return target

    @classmethod
    def load(cls, path: str | Path) -> RoutingCounts:
        """Counts that :meth:`save` wrote.

        Raises:
            ResultError: No such file, damaged, another version, or a file of something else.
        """
        try:
            arrays = dict(npz_arrays(read_sealed(path, "routing counts", AGAIN)))
            version = int(arrays.pop(VERSION_KEY))
            about = parse_json(str(arrays.pop("described")))
            made = cls(about["layers"], about["n_experts"], about["tables"], about["path_length"])
            made.domains, made.n_sequences = tuple(about["domains"]), about["n_sequences"]
            made.fields = None if about["fields"] is None else frozenset(about["fields"])
            for key, values in arrays.items():
                group, _, name = key.partition("/")
                if group == "array":
                    made._arrays[name] = values
                elif group == "rows":
                    made._rows[name] = [values]
                elif group == "codes":
                    made._sparse[name] = SparseCounts(values, arrays[f"counts/{name}"])
        except MoEInterpError:
            raise
        except Exception as error:  # zipfile and numpy raise errors of any class
            raise ResultError(
                f"{str(path)!r} cannot be read as routing counts ({type(error).__name__}: {error})",
                "a whole file written by RoutingCounts.save",
                AGAIN,
            ) from error
        if version != VERSION:
            raise ResultError(f"{str(path)!r} of version {version}", f"version {VERSION}", AGAIN)
        return made

    def __repr__(self) -> str:
        domains = f", domains {', '.join(self.domains)}" if self.domains else ""
        size = f"{self.n_tokens} tokens in {self.n_sequences} sequences, {len(self.layers)} layers"
        return f"RoutingCounts({size}, {self.n_experts} experts{domains}; {', '.join(self.tables) or 'use alone'})"


def _aligned(name: str, values: NDArray[Any], old: tuple[str, ...], new: tuple[str, ...], most: int) -> NDArray[Any]:
    """An array with the domains of ``new``, and room for routes of ``most`` experts."""
    if name in ("served", "tokens_by_width") and values.shape[2] < most + 1:
        room = [(0, 0)] * values.ndim
        room[2] = (0, most + 1 - values.shape[2])
        values = np.pad(values, room)
    if name in BY_DOMAIN and old != new:
        moved = np.zeros((len(new), *values.shape[1:]), dtype=values.dtype)
        moved[[new.index(domain) for domain in old]] = values
        return moved
    return values


def _renumbered(codes: NDArray[Any], old: tuple[str, ...], new: tuple[str, ...]) -> NDArray[Any]:
    """Numbers of domains in ``old`` as those in ``new``."""
    return codes if old == new or not old else np.array([new.index(domain) for domain in old])[codes]


def counted(source: RoutingTrace | RoutingCounts, *tables: str, path_length: int = PATH_LENGTH) -> RoutingCounts:
    """The counts themselves, or those of a trace with the tables that a measure needs.

    Raises:
        DataError: neither, or counts of nothing.
    """
    if isinstance(source, RoutingCounts):
        if source.fields is None:
            raise DataError(f"{source!r}, which count nothing yet", "counts of a trace", "Call update(trace) first.")
        return source
    if not isinstance(source, RoutingTrace):
        raise DataError(f"routing of type {type(source).__name__}", "a RoutingTrace or RoutingCounts", "Pass one.")
    return RoutingCounts.of(source, tables, path_length)
