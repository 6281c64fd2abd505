"""Tables, words and figures of a planted tuning run, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from moe_interp import stats
from moe_interp.errors import DataError
from moe_interp.experiments.router_tuning.result import RouterTuningResult

N_SEQUENCES, LENGTH = 8, 5


def planted(adopted: float = 0.0, worse_when_sure: float = 0.0) -> RouterTuningResult:
    """Two evaluations of 40 held-out and 10 other tokens; every second token has a better route, which all prefer."""
    rng = np.random.default_rng(0)
    n = N_SEQUENCES * LENGTH + 10
    sequence = np.repeat([f"s{i}" for i in range(N_SEQUENCES + 2)], LENGTH)
    before = np.where(np.arange(n) % 5 == 0, 0.05, rng.exponential(1.0, n) + 0.2)
    after = before - 0.1 + np.where(before < 0.1, 0.1 + worse_when_sure, 0.0)
    has_better = np.arange(n) % 2 == 0
    measures = {
        "changed": np.array([0.0, 0.5]),
        "preference": np.array([0.5, 1.0]),
        "adoption": np.array([0.0, adopted]),
        "overlap": np.array([0.25, 0.5]),
        "entropy": np.array([1.0, 1.2]),
    }
    variables = {}
    for name, values in measures.items():
        cells = np.broadcast_to(values[:, None, None], (2, n, 1)).copy()
        if name in ("preference", "adoption", "overlap"):
            cells[:, ~has_better] = np.nan
        variables[name] = (("evaluation", "token", "layer"), cells)
    load = np.array([[[0.25] * 4], [[0.7, 0.1, 0.1, 0.1]]])
    steps = np.arange(1, 11)
    return RouterTuningResult(
        xr.Dataset(
            {
                **variables,
                "ce": (("evaluation", "token"), np.stack([before, after])),
                "load": (("evaluation", "layer", "expert"), load),
                "weight_change": (("evaluation", "layer"), np.array([[0.0], [0.02]])),
                "original": (("layer", "expert", "d_model"), np.ones((1, 4, 3), np.float32)),
                "delta": (("layer", "expert", "d_model"), np.full((1, 4, 3), 0.5, np.float32)),
                **dict.fromkeys(("loss", "lr", "gradient_norm", "better"), ("step", steps / 10.0)),
            },
            coords={
                "step": steps,
                "evaluation": [0, 10],
                "layer": [3],
                "sequence": ("token", sequence),
                "pos": ("token", np.tile(np.arange(LENGTH), N_SEQUENCES + 2)),
                "domain": ("token", np.where(np.arange(n) < N_SEQUENCES * LENGTH, "held out", "rhymes")),
            },
            attrs={
                "model": "planted",
                "objective": "epo",
                "n_tokens": 160,
                "parameters": ["gate.weight"],
                "dtype": "bfloat16",
                "fingerprint": "f",
            },
        )
    )


def test_held_out_measures_and_their_intervals() -> None:
    result = planted(adopted=0.5)
    data, table = result.data, result.held_out()
    rows = {(row["domain"], row["tokens"]): row for row in table.to_dict("records")}
    assert {domain for domain, _ in rows} == {"held out", "rhymes"}
    own = rows["held out", "all"]
    is_own = data["domain"].values == "held out"
    change = (data["ce"].values[1] - data["ce"].values[0])[is_own].reshape(N_SEQUENCES, LENGTH)
    found = stats.ratio_interval(change.sum(1), np.full(N_SEQUENCES, LENGTH))
    assert own["ce_change"] == pytest.approx(change.mean())
    assert (own["ce_change_low"], own["ce_change_high"]) == pytest.approx((float(found.low), float(found.high)))
    assert own["preference"] == 1.0
    assert own["adoption"] == own["overlap"] == own["changed"] == 0.5
    assert own["overlap_before"] == 0.25
    sure = rows["held out", "confident"]
    assert sure["n_tokens"] == int((np.exp(-data["ce"].values[0]) >= 0.9)[is_own].sum())
    assert sure["ce_change"] == pytest.approx(0.0)
    curve = result.curve()
    assert curve["step"].tolist() == [0, 10]
    assert curve["max_violation"].tolist() == pytest.approx([0.0, 1.8])
    load = np.array([0.7, 0.1, 0.1, 0.1])
    assert curve["effective_experts"].tolist() == pytest.approx([1.0, np.exp(-(load * np.log(load)).sum()) / 4])


def test_the_summary_says_preference_without_adoption_and_harm() -> None:
    text = planted(worse_when_sure=0.05).summary()
    assert "Held-out cross-entropy fell: " in text
    assert "Preference rose without adoption: preference accuracy 1.00" in text
    assert "sure of (p >= .9): rose: 0.0500 to 0.1000 nats" in text
    assert "In rhymes, another domain: changed (too few sequences to say more)" in text
    assert ", and better routes are taken" in planted(adopted=0.5).summary()


def test_the_delta_adds_up_in_the_models_own_format() -> None:
    found = planted().router_delta
    assert str(found.tuned("gate.weight").dtype) == "torch.bfloat16"
    assert found.tuned("gate.weight").float().unique().tolist() == [1.5]
    assert planted().delta["gate.weight"].shape == (4, 3)


def test_figures_draw_the_tables() -> None:
    result = planted()
    curves = result.plot().axes
    table = result.curve()
    assert curves[0].lines[0].get_ydata().tolist() == table["ce"].tolist()
    drawn = {line.get_label(): line.get_ydata().tolist() for line in curves[1].lines}
    assert drawn["preference"] == [0.5, 1.0]
    assert drawn["adoption"] == [0.0, 0.0]
    assert curves[2].lines[0].get_ydata().tolist() == result.data["loss"].values.tolist()
    (axis,) = result.plot("held_out").axes
    assert len(axis.get_yticklabels()) == len(result.held_out())
    points = axis.containers[0].lines[0].get_xdata()
    assert points.tolist() == result.held_out()["ce_change"].tolist()


def test_a_dataset_of_another_kind_is_refused() -> None:
    data = planted().data
    with pytest.raises(DataError, match="variable 'load'"):
        RouterTuningResult(data.drop_vars("load"))
    with pytest.raises(DataError, match="not finite"):
        RouterTuningResult(data.assign(ce=data["ce"] * np.nan))
