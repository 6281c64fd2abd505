"""``result.plot()`` and ``result.report()`` of every kind of result."""

from __future__ import annotations

import re
import struct
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

import moe_interp as mi
from moe_interp.errors import ConfigError
from moe_interp.plots import FIGURES
from moe_interp.results import Result
from moe_interp.testbed.comparison import ROUTING
from moe_interp.testbed.shared_direction import GAINS
from tests.unit.experiments.planted_geometry import planted as planted_states
from tests.unit.experiments.planted_isolation import planted_isolation
from tests.unit.experiments.test_contrast_tables import dataset as contrast_dataset
from tests.unit.experiments.test_contrast_tables import planted as planted_contrast
from tests.unit.experiments.test_contrast_tables import steering as planted_steering
from tests.unit.experiments.test_pass_at_k_result import many as planted_pass_at_k
from tests.unit.experiments.test_router_tuning_tables import planted as planted_tuning
from tests.unit.patching import planted_effects as patching
from tests.unit.plots.planted_routes import planted_routes
from tests.unit.traces.planted import planted_trace as planted_routing


def routers(n: int = 12) -> mi.DomainRouterResult:
    rng = np.random.default_rng(0)
    score = rng.normal([[0.0], [-3.0], [-5.0]], 1, (3, n))
    coords = {
        "router": ["natural", "domain", "random"],
        "item": [f"i{i}" for i in range(n)],
        "domain": ("item", [f"<{'ab'[i % 2]}>" for i in range(n)]),
    }
    axes = ("router", "item")
    data = xr.Dataset({"score": (axes, score), "score_first": (axes, score)}, coords=coords)
    return mi.DomainRouterResult(data.assign_attrs(k=2, random_draws=1))


def strategies() -> Result:
    axes, per_run = ("strategy", "seed", "step", "layer"), ("strategy", "seed", "step")
    data = xr.Dataset(
        {
            name: (axes, np.random.default_rng(0).random((2, 3, 2, 2)))
            for name in (*ROUTING, *GAINS)
            if name != "dropped_tokens"
        }
        | {"dropped_tokens": (axes, np.zeros((2, 3, 2, 2)))}
        | {"domain_loss": ((*per_run, "domain"), np.ones((2, 3, 2, 2))), "tokens": ("step", [0, 10])}
        | {"dropped_slots": (per_run, np.zeros((2, 3, 2)))},
        coords={"strategy": ["aux", "bias"], "seed": [0, 1, 2], "step": [0, 5], "layer": [0, 1], "domain": ["a", "b"]},
    )
    return mi.testbed.ComparisonResult(data)


def geometry() -> mi.GeometryResult:
    trace, weights = planted_states(n_sequences=6, n_layers=1)
    return mi.geometry.measure(
        trace, weights=weights, max_pairs=40, n_permutations=9, n_random_routers=2, n_random_directions=9
    )


MADE: dict[str, Any] = {
    "isolation": lambda: planted_isolation(n_items={"code": 12, "math": 14}, n_layers=3),
    "counterfactual": planted_routes,
    "domain_router": routers,
    "geometry": geometry,
    "testbed": strategies,
    "contrast": lambda: mi.ContrastResult(contrast_dataset(planted_contrast(), 12)),
    "steering": lambda: planted_steering(np.random.default_rng(0).normal(2, 1, (4, 12)), ["x"] * 6 + ["y"] * 6),
    "router_tuning": lambda: planted_tuning(0.1),
    "atlas": lambda: mi.atlas(planted_routing(), n_permutations=99),
    "pass_at_k": lambda: planted_pass_at_k(0.1, 0),
    "patching": patching.planted_sweep,
    "attribution": patching.planted_attribution,
    "decomposition": patching.planted_decomposition,
    "paths": patching.planted_paths,
    "trace": patching.planted_trace,
    "logit_attribution": patching.planted_logit_attribution,
    "expert_tokens": patching.planted_expert_tokens,
    "dataset": lambda: Result(xr.Dataset({"x": ("item", [1.0, 2.0])})),
}


@cache
def made(kind: str) -> Any:
    """Shared by the tests, which change nothing about it."""
    return MADE[kind]()


def test_every_kind_that_exists_is_tried_here() -> None:
    for home in mi.RESULT_KINDS.values():
        import_module(home)
    own = {kind for kind, cls in Result.registry.items() if cls.__module__.startswith("moe_interp.")}
    sources = Path(mi.__file__).parent.rglob("*.py")
    named = {kind for path in sources for kind in re.findall(r"^class .*, kind=\"(\w+)\"\):", path.read_text(), re.M)}
    assert named <= set(mi.RESULT_KINDS)  # else load_result does not know it before its module is imported
    assert set(MADE) == own
    assert set(FIGURES) <= own
    assert set(mi.RESULT_KINDS) <= own
    assert all(resolve_name(view) for view in mi.RESULT_VIEWS.values())


@pytest.mark.parametrize("kind", [kind for kind in MADE if kind in FIGURES])
def test_every_figure_is_shown_by_a_notebook_as_it_is(kind: str) -> None:
    result = made(kind)
    figure = result.plot()
    assert isinstance(figure, Figure)
    for name in FIGURES[kind]:
        image, shown_at = result.plot(name)._repr_png_()
        assert image.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", image[16:24])
        assert (width, height) == pytest.approx((2 * shown_at["width"], 2 * shown_at["height"]), abs=2)
    with pytest.raises(ConfigError, match=f"figure 'maps'. Expected: one of {next(iter(FIGURES[kind]))}"):
        result.plot("maps")


@pytest.mark.parametrize("kind", MADE)
def test_every_result_is_the_same_after_it_was_saved(kind: str, tmp_path: Path) -> None:
    result = made(kind)
    again = mi.load_result(result.save(tmp_path / "result.nc"))
    assert type(again) is type(result)
    assert again.summary() == result.summary()
    assert len(again.to_dataframe()) == len(result.to_dataframe())


@pytest.mark.parametrize("kind", MADE)
def test_every_result_writes_its_page(kind: str, tmp_path: Path) -> None:
    result = made(kind)
    assert result.report(tmp_path) == tmp_path / "index.html"
    path = result.report(tmp_path / "page.html")
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert page.count("<svg") == len(FIGURES.get(kind, {}))
    assert "Where this comes from" in page
    assert "<a>" not in page


def test_options_reach_the_figure_and_a_kind_without_figures_says_so() -> None:
    result = MADE["isolation"]()
    label = result.plot("layer_impact", baseline="uniform").axes[0].get_ylabel()
    assert "uniform" in label
    with pytest.raises(ConfigError, match="a kind with figures"):
        MADE["dataset"]().plot()
