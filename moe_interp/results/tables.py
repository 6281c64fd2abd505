"""What figures and pages may ask of a result, whatever class it is."""

from __future__ import annotations

from typing import Literal, Protocol

import pandas as pd
import xarray as xr


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

    def summary(self) -> str: ...


Classing = Literal["resampled", "standard", "entropy"]

"""Ways to class tokens by confidence: by other routes' mean p, by the standard route's own, by the prediction."""


def unselected(data: xr.Dataset) -> Classing:
    """The best way of classing that a run has data for, free of the selection by the standard route's own p."""
    return "resampled" if "logp_second" in data else "entropy"


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

    def summary(self) -> str: ...
