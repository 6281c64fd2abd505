"""What figures and pages may ask of a result, whatever class it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Protocol

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray


class IsolationTables(Protocol):
    """Dataset and derived tables of an expert-isolation run; the columns are those of ``IsolationResult``."""

    data: xr.Dataset

    @property
    def domains(self) -> tuple[str, ...]: ...

    def specialization(self, baseline: str = ..., mass: str | None = ..., alpha: float = ...) -> pd.DataFrame: ...

    def mass_agreement(self, baseline: str = ..., alpha: float = ...) -> pd.DataFrame: ...

    def domain_effect(self) -> pd.DataFrame: ...

    def calibration(self, mass: str | None = ...) -> pd.DataFrame: ...

    def calibration_by_domain(self, mass: str | None = ...) -> pd.DataFrame: ...

    def calibration_points(self, mass: str | None = ...) -> pd.DataFrame: ...

    def item_calibration(self, mass: str | None = ...) -> pd.DataFrame: ...

    def dominance(self, by_layer: bool = ...) -> pd.DataFrame: ...

    def layer_impact(self, baseline: str = ..., mass: str | None = ...) -> pd.DataFrame: ...

    def findings_table(self) -> pd.DataFrame: ...

    def headlines(self) -> list[str]: ...

    def summary(self) -> str: ...


Classing = Literal["resampled", "standard", "entropy"]

"""Ways to class tokens by confidence: by other routes' mean p, by the standard route's own, by other routes' mean
prediction."""


def fresh_second(data: xr.Dataset) -> NDArray[np.bool_]:
    """``[token, layer, second]``: routes of the second draw that the main draw lacks, none without a second draw.

    Only these say nothing of the main draw's utilities: a route that both have would class a token by the very numbers
    that are then compared.
    """
    if "logp_second" not in data:
        return np.zeros((data.sizes["token"], data.sizes["layer"], 0), dtype=bool)
    return np.asarray((data["second_route"].values < 0) & ~np.isnan(data["logp_second"].values))


def unselected(data: xr.Dataset) -> Classing | None:
    """The way of classing that no utility enters which is then compared, where the run has data for it: "resampled".

    None where fewer than half of the tokens have a route of a second draw that the main one lacks.
    """
    return "resampled" if fresh_second(data).any(-1).mean() >= 0.5 else None


def classed_by(data: xr.Dataset) -> Classing:
    """The way to class tokens by in a table that must have one: without selection, or the published one, which
    selects."""
    return unselected(data) or "standard"


class CounterfactualTables(Protocol):
    """Dataset and derived tables of a counterfactual-routes run; the columns are those of ``CounterfactualResult``."""

    data: xr.Dataset

    def by_confidence(self, by: Classing = ..., thresholds: tuple[float, float] = ...) -> pd.DataFrame: ...

    def by_layer(self) -> pd.DataFrame: ...

    def by_token_type(self) -> pd.DataFrame: ...

    def by_position(self) -> pd.DataFrame: ...

    def regret_curve(self) -> pd.DataFrame: ...

    def controls(self) -> pd.DataFrame: ...

    def token_table(self) -> pd.DataFrame: ...

    def headlines(self) -> list[str]: ...

    def summary(self) -> str: ...


class RouterTables(Protocol):
    """Dataset and comparison of a run of other routers; the columns are those of ``DomainRouterResult``."""

    data: xr.Dataset

    def compare(self, against: str = ..., level: float = ...) -> pd.DataFrame: ...

    def headlines(self) -> list[str]: ...

    def summary(self) -> str: ...


class ContrastTables(Protocol):
    """Dataset and table of a contrast of two sets of prompts."""

    data: xr.Dataset

    def experts(self, alpha: float = ...) -> pd.DataFrame: ...


class GeometryTables(Protocol):
    """Dataset and derived tables of the geometry of routing; the columns are those of ``GeometryResult``."""

    data: xr.Dataset

    def similarity(self) -> pd.DataFrame: ...

    def explained(self) -> pd.DataFrame: ...

    def bound(self) -> pd.DataFrame: ...

    def shared_direction(self) -> pd.DataFrame: ...

    def depth(self) -> pd.DataFrame: ...

    def contexts(self) -> pd.DataFrame: ...

    def phases(self) -> pd.DataFrame: ...

    def answers(self) -> pd.DataFrame: ...

    def layer_overlap(self) -> pd.DataFrame: ...

    def findings(self) -> pd.DataFrame: ...

    def headlines(self) -> list[str]: ...

    def summary(self) -> str: ...


class PassAtKTables(Protocol):
    """Dataset and derived tables of a pass@K run; the columns are those of ``PassAtKResult``."""

    data: xr.Dataset

    def by_problem(self) -> pd.DataFrame: ...

    def curve(self, ks: Iterable[int] | None = ..., level: float = ..., seed: int = ...) -> pd.DataFrame: ...

    def by_domain(self, ks: Iterable[int] | None = ..., level: float = ..., seed: int = ...) -> pd.DataFrame: ...

    def headlines(self) -> list[str]: ...

    def summary(self) -> str: ...


class RouterTuningTables(Protocol):
    """Dataset and derived tables of router tuning; the columns are those of ``RouterTuningResult``."""

    data: xr.Dataset

    def held_out(self) -> pd.DataFrame: ...

    def curve(self) -> pd.DataFrame: ...

    def headlines(self) -> list[str]: ...

    def summary(self) -> str: ...


class AtlasTables(Protocol):
    """Dataset and derived tables of an atlas; the columns are those of ``AtlasResult``."""

    data: xr.Dataset

    @property
    def not_testable(self) -> dict[str, str]: ...

    def by_layer(self) -> pd.DataFrame: ...

    def busiest(self, top: int = ...) -> pd.DataFrame: ...

    def specialists(self, alpha: float = ...) -> pd.DataFrame: ...

    def pairs(self, top: int = ...) -> pd.DataFrame: ...

    def paths(self) -> pd.DataFrame: ...

    def headlines(self) -> list[str]: ...

    def summary(self) -> str: ...
