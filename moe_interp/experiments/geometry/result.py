"""The result of measuring the geometry of routing: tables by layer, the paper's findings, and a summary in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from moe_interp.errors import DataError, ResultError
from moe_interp.experiments.geometry.findings import findings
from moe_interp.results import Result

WANTED = {"correlation", "mantel_p", "explained", "overlap", "size_matched", "counts"}


class GeometryResult(Result, kind="geometry"):
    """How far routing follows from the geometry of states, layer by layer.

    ``data`` holds ``correlation, mantel_p[level, layer]`` of route against state similarity; ``explained[layer, level,
    source]``, the share of route similarity that linear maps of the states reproduce; the linear bound's constants,
    tightness and pairs; the gain along the shared direction with its controls; ``overlap[layer]`` of unrelated inputs
    with chance levels; where they could be measured, the same token across contexts, prefill against generation, and
    another model's overlap; and ``counts[sequence, layer, expert]``. Intervals (``_low``, ``_high``) are 95%, over
    sequences.
    """

    main = "correlation"

    @staticmethod
    def check(data: xr.Dataset) -> None:
        if missing := WANTED - {str(name) for name in data.data_vars}:
            raise ResultError(f"a dataset without {min(missing)}", "what mi.geometry.measure makes", "Make it anew.")

    def similarity(self) -> pd.DataFrame:
        """A row a level and layer: correlation of route and state similarity, interval, Mantel's p, null."""
        names = {
            "correlation": "correlation",
            "correlation_low": "low",
            "correlation_high": "high",
            "mantel_p": "p",
            "mantel_null_mean": "null_mean",
            "mantel_null_sd": "null_sd",
        }
        frame = self.data[list(names)].to_dataframe().reset_index().rename(columns=names)
        return frame[["level", "layer", *names.values()]].sort_values(["level", "layer"], ignore_index=True)

    def explained(self) -> pd.DataFrame:
        """A row a level, source and layer: the share of route similarity explained, its interval, and what random
        routers explain of one another (``of_random``)."""
        data = self.data
        frame = data[["explained", "explained_low", "explained_high"]].to_dataframe().reset_index()
        frame.columns = [str(name).replace("explained_", "") for name in frame.columns]
        of_random = data["explained_of_random"].to_series().rename("of_random").reset_index()
        frame = frame.merge(of_random, on=["layer", "level"]).dropna(subset=["explained"])
        return frame.sort_values(["level", "source", "layer"], ignore_index=True)

    def bound(self) -> pd.DataFrame:
        """A row a layer: the bound's constants, and the share of it that pairs of tokens use (median, 5% and 95%).

        Raises:
            DataError: the routers' weights were not known.
        """
        self._need("bound_upper", "the routers' weights", "Pass weights=, or the model itself.")
        data = self.data
        names = (
            "bound_upper",
            "bound_lower",
            "even_gain",
            "bound_rank",
            "seen_rank",
            "violations",
            "converse_violations",
        )
        columns: dict[str, Any] = {"layer": data["layer"].values} | {name: data[name].values for name in names}
        for name in ("tightness", "converse_tightness", "seen_share"):
            for quantile, suffix in ((0.5, ""), (0.05, "_low"), (0.95, "_high")):
                columns[name + suffix] = data[name].sel(quantile=quantile).values
        return pd.DataFrame(columns)

    def shared_direction(self) -> pd.DataFrame:
        """A row a layer: the gain along the shared direction, and along random ones, the first principal axis, and what
        is not shared; ``ratio`` is gain / random gain with its interval over sequences.

        Raises:
            DataError: the routers' weights were not known.
        """
        self._need("shared_gain", "the routers' weights", "Pass weights=, or the model itself.")
        data = self.data
        names = ("shared_gain", "random_gain", "random_low", "random_high", "centred_gain", "centred_rms", "mean_norm")
        columns: dict[str, Any] = {"layer": data["layer"].values} | {name: data[name].values for name in names}
        columns["first_component"] = data["component_gain"].values[:, 0]
        columns["p"] = data["shared_p"].values
        for suffix in ("", "_low", "_high"):
            columns[f"ratio{suffix}"] = np.exp(data[f"suppression{suffix}"].values)
        return pd.DataFrame(columns)

    def depth(self) -> pd.DataFrame:
        """A row a layer: Jaccard@p of unrelated inputs with its interval, and both chance levels."""
        names = ["overlap", "overlap_low", "overlap_high", "size_matched", "usage_matched", "set_size"]
        return self.data[names].to_dataframe().reset_index()

    def contexts(self) -> pd.DataFrame:
        """A row a layer: overlap of the same token in two contexts, of different tokens, and the difference.

        Raises:
            DataError: no token ids, or too few tokens that occur in several sequences.
        """
        self._need("same_token", "tokens that occur in several contexts", "Add or lengthen sequences.")
        names = [
            f"{n}{s}" for n in ("same_token", "different_token", "same_token_excess") for s in ("", "_low", "_high")
        ]
        return self.data[names].to_dataframe().reset_index()

    def phases(self) -> pd.DataFrame:
        """A row a layer: Jaccard@p of a prompt and its own generation, and of a prompt and another's generation.

        Raises:
            DataError: the trace has no phases.
        """
        self._need("phase_same", "phases (prefill and generation)", "Record a trace while generating.")
        names = [f"{n}{s}" for n in ("phase_same", "phase_other") for s in ("", "_low", "_high")]
        return self.data[names].to_dataframe().reset_index()

    def answers(self) -> pd.DataFrame:
        """A row a layer: overlap of two models on one question, of one model on two, of two on two, and by chance.

        Raises:
            DataError: no other model's trace was given.
        """
        self._need("answer_same", "another model's trace", "Pass other=, a trace of the same sequences.")
        names = [f"answer_{n}{s}" for n in ("same", "other", "crossed") for s in ("", "_low", "_high")]
        frame = self.data[[*names, "answer_chance"]].to_dataframe().reset_index()
        return frame.rename(columns=lambda name: str(name).removeprefix("answer_"))

    def layer_overlap(self) -> pd.DataFrame:
        """A row a ``run`` ("itself" or "other") and two layers: ``overlap`` (Jaccard@p of a sequence's experts at both,
        matched), ``crossed`` (of two sequences, under the same matching) and ``chance`` (of random sets of the sizes).

        Raises:
            DataError: a result without it.
        """
        self._need("layer_overlap", "the overlap of layers", "Measure anew.")
        frames = []
        for run, prefix in (("itself", "layer_"), ("other", "answer_layer_")):
            if f"{prefix}overlap" in self.data:
                names = {f"{prefix}{name}": name for name in ("overlap", "crossed", "chance")}
                frame = self.data[list(names)].to_dataframe().reset_index().rename(columns=names)
                frames.append(frame[["layer", "other_layer", *names.values()]].assign(run=run))
        return pd.concat(frames, ignore_index=True)

    def findings(self) -> pd.DataFrame:
        """The five findings of "The Myth of Expert Specialization in MoEs": ``finding, verdict, estimate, low, high,
        measure``. A verdict is "confirmed", "not confirmed" (the interval says otherwise), "not shown", or "not
        testable" with the reason."""
        return findings(self.data)

    def headlines(self) -> list[str]:
        """What was measured, then each finding, a sentence each."""
        data = self.data
        attrs = data.attrs
        layers = data.sizes["layer"]
        done = (
            f"Geometry of the routing of {attrs['model']}: {attrs['n_tokens']} tokens of {attrs['n_sequences']} "
            f"sequences at {layers} layer{'s' * (layers != 1)} of {attrs['n_experts']} experts, {attrs['n_slots']} a "
            "token. Intervals are 95%, over sequences."
        )
        lines = [done]
        for number, row in enumerate(self.findings().to_dict("records"), start=1):
            value = "" if np.isnan(row["estimate"]) else f": {row['measure']} {_interval(row)}"
            lines.append(f"{number}. {row['finding']}: {row['verdict']}{value}.")
        return [*lines, *_explained_words(self), *_phase_words(data)]

    def summary(self) -> str:
        """The five findings in words, and how much of route similarity geometry explains."""
        return "\n  ".join(self.headlines())

    def _need(self, name: str, what: str, remedy: str) -> None:
        if name not in self.data:
            raise DataError(f"a result without {what}", what, remedy)


def _interval(row: Mapping[Any, Any], names: Sequence[str] = ("estimate", "low", "high")) -> str:
    value, low, high = (round(float(row[name]), 2) + 0.0 for name in names)
    return f"{value:.2f} (no interval)" if np.isnan(low) else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _explained_words(result: GeometryResult) -> list[str]:
    """The share explained at the sequence level, averaged over layers."""
    table = result.explained()
    table = table[table["level"] == "sequence"]
    lines = []
    parts = []
    for source in ("router", "random router", "whitened states"):
        rows = table[table["source"] == source]
        if len(rows):
            parts.append(f"{rows['explained'].mean():.2f} by {_NAMES[source]} ({_range(rows)})")
    if parts:
        of_random = float(table["of_random"].mean())
        lines.append(
            f"Of the similarity of sequences' routes, linear maps of the states explain {'; '.join(parts)}. Random "
            f"routers explain {of_random:.2f} of one another's. Means over layers; by layer, the range of intervals."
        )
        if "router" in set(table["source"]):
            lines.append(
                "The router's own share is 1 by construction, less only where biases, groups, capacities or rounding "
                "decide with its weights: it is a check. What random routers explain is the part that is geometry."
            )
    if "violations" in result.data:
        tight = result.data["tightness"].sel(quantile=0.5).values
        broken = int(result.data["violations"].sum() + result.data["converse_violations"].sum())
        lines.append(
            f"The linear bound is broken by {broken} of {result.data.attrs['n_pairs'] * len(tight)} pairs; the median "
            f"pair uses {tight.min():.2f} to {tight.max():.2f} of it, by layer."
        )
    return lines


def _phase_words(data: xr.Dataset) -> list[str]:
    """Prompt against generation, averaged over layers."""
    if "phase_same" not in data:
        return []
    same, other = (float(data[name].mean()) for name in ("phase_same", "phase_other"))
    return [
        f"The experts of a prompt and of its own generation overlap {same:.2f} (Jaccard@{data.attrs['p']:g}, mean over "
        f"layers), of a prompt and another's generation {other:.2f}."
    ]


_NAMES = {
    "router": "the router's own weights",
    "random router": "random routers on the same states",
    "whitened states": "random routers on whitened states",
}


def _range(rows: pd.DataFrame) -> str:
    if rows["low"].isna().all():
        return "no interval"
    return f"{rows['low'].min():.2f} to {rows['high'].max():.2f}"
