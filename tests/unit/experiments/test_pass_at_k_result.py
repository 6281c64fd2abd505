"""pass@K over problems: means, intervals, domains and comparisons."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import moe_interp as mi
from moe_interp.errors import ConfigError, DataError, ResultError
from moe_interp.experiments.pass_at_k.result import OtherSamplingWarning, PassAtKResult


def result(c: object, n: object = 16, ks: tuple[int, ...] = (1, 4), **kwargs: object) -> PassAtKResult:
    return PassAtKResult.from_counts(n, c, ks, **kwargs)  # type: ignore[arg-type]


def many(shift: float, seed: int, n_problems: int = 40, n: int = 32) -> PassAtKResult:
    rng = np.random.default_rng(0)
    p = np.clip(rng.beta(1, 2, n_problems) + shift, 0, 1)
    return result(np.random.default_rng(seed).binomial(n, p), n, (1, 8))


def test_tables_are_means_of_the_estimates() -> None:
    found = result([0, 4, 16], domains=["a", "b", "b"])
    table = found.by_problem()
    assert table["pass@1"].tolist() == [0, 0.25, 1]
    curve = found.curve([1, 4, 16])
    assert curve["mean"].tolist() == pytest.approx([np.mean(mi.pass_at_k(16, [0, 4, 16], k)) for k in (1, 4, 16)])
    assert ((curve["ci_low"] <= curve["mean"]) & (curve["mean"] <= curve["ci_high"])).all()
    assert curve["ci_low"].between(0, 1).all()
    assert curve["ci_high"].between(0, 1).all()
    domains = found.by_domain([1])
    assert domains["domain"].tolist() == ["a", "b"]
    assert domains["mean"].tolist() == [0, 0.625]
    assert domains["n"].tolist() == [1, 2]
    assert np.isnan(domains["ci_low"][0])  # one problem gives no interval


def test_intervals_cover_the_mean_of_the_problems_population() -> None:
    hits = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        row = result(rng.binomial(8, rng.beta(1, 2, 15)), 8, (1,)).curve().iloc[0]
        hits += row["ci_low"] <= 1 / 3 <= row["ci_high"]
    assert hits >= 52  # P(fewer | 95%) = .006


def test_a_run_without_spread_has_an_interval_all_the_same() -> None:
    sure, none = result([16] * 20).curve().iloc[0], result([0] * 20).curve().iloc[0]
    # P(20 of 20 right) = .025 at this share
    assert sure["ci_low"] == pytest.approx(0.025 ** (1 / 20))
    assert sure["ci_high"] == 1
    assert none["ci_low"] == 0
    assert none["ci_high"] == pytest.approx(1 - 0.025 ** (1 / 20))


def test_a_difference_without_spread_is_not_known_exactly() -> None:
    # 12 problems of 12 without a difference: P = .025 where a share 1 - .025^(1/12) of all problems has one
    same = result([8] * 12).compare(result([8] * 12), ks=[1]).iloc[0]
    assert same["mean"] == 0
    assert same["ci_high"] == pytest.approx(1 - 0.025 ** (1 / 12))
    assert same["ci_low"] == -same["ci_high"]
    assert same["verdict"] == "no difference shown"
    half = result([8] * 12).curve([1]).iloc[0]
    assert (half["ci_low"], half["ci_high"]) == pytest.approx((0.5 * 0.025 ** (1 / 12), 1 - 0.5 * 0.025 ** (1 / 12)))


def test_ks_are_checked_everywhere_alike() -> None:
    counts = PassAtKResult.from_counts
    assert counts(4, [1, 2], ks=2).ks == (2,)  # type: ignore[arg-type]
    assert counts(4, [1, 2], ks=(2, 1, 2)).ks == (1, 2)
    for ks, message in (((), "without a number"), (None, "ks=None"), ((0,), "k=0"), ((1.0,), "k=1.0"), ("1", "k='1'")):
        with pytest.raises(ConfigError, match=message):
            counts(4, [1, 2], ks=ks)  # type: ignore[arg-type]
        if ks is not None:
            with pytest.raises(ConfigError, match=message):
                counts(4, [1, 2], ks=1).curve(ks)  # type: ignore[arg-type]
    assert len(counts(4, [1, 2], ks=1).compare(counts(4, [1, 2], ks=1), ks=[1, 1])) == 1  # type: ignore[arg-type]
    for n, c, message in (([], [], "at least one problem"), ([4, 4], [1, 1, 1], r"\(2,\) and c of shape \(3,\)")):
        with pytest.raises(DataError, match=message):
            counts(n, c, ks=(1,))


def test_k_above_n_is_refused() -> None:
    with pytest.raises(DataError, match="k=17 with n=16"):
        result([1, 2]).curve([17])
    with pytest.raises(DataError, match="k=64 with n=16"):
        PassAtKResult.from_counts(16, [1, 2])
    with pytest.raises(DataError, match="c=17 with n=16"):
        result([17])
    with pytest.raises(DataError, match=r"one id of its own"):
        result([1, 2], problems=["a", "a"])


def test_comparisons_pair_problems_and_find_what_is_there() -> None:
    base, better, same = many(0.0, 1), many(0.2, 2), many(0.0, 3)
    table = better.compare(base)
    assert (table["domain"] == "all problems").all()
    assert table["verdict"].tolist() == ["better", "better"]
    d = better.by_problem()["pass@8"] - base.by_problem()["pass@8"]
    assert table.set_index("k")["mean"][8] == pytest.approx(d.mean())
    assert base.compare(better)["verdict"].tolist() == ["worse", "worse"]
    assert same.compare(base)["verdict"].tolist() == ["no difference shown"] * 2
    assert (table["p_holm"] >= table["p"]).all()


def test_comparisons_follow_ids_not_places_and_n_may_differ() -> None:
    names = [f"p{i}" for i in range(8)]
    one = result(np.arange(8), 16, problems=names)
    other = result(2 * np.arange(8)[::-1], 32, problems=names[::-1])
    table = one.compare(other)
    assert table.set_index("k")["mean"][1] == 0
    assert table.set_index("k")["ci_high"][1] == pytest.approx(1 - 0.025 ** (1 / 8))


def test_comparisons_by_domain_have_a_row_over_all() -> None:
    labels = ["a"] * 6 + ["b"] * 6
    one, other = (result(np.arange(12) % 5 + i, domains=labels) for i in (1, 0))
    table = one.compare(other, ks=[1])
    assert table["domain"].tolist() == ["a", "b", "all problems"]
    assert table["n"].tolist() == [6, 6, 12]


def test_other_problems_and_other_sampling() -> None:
    with pytest.raises(DataError, match="problem 'b', which only one"):
        result([1], problems=["b"]).compare(result([1], problems=["a"]))
    with pytest.raises(DataError, match="problem 'b', which only one"):
        result([1], problems=["a"]).compare(result([1, 2], problems=["a", "b"]))
    changed = result([1], problems=["a"])
    changed.data = changed.data.assign_coords(content=("problem", ["other"]))
    with pytest.raises(DataError, match="problem 'a', whose prompt or answer differs"):
        changed.compare(result([1], problems=["a"]))
    with pytest.raises(ConfigError, match="other of type int"):
        result([1]).compare(1)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="a K of both runs"):
        result([1], ks=(1,)).compare(result([1], ks=(2,)))
    hot, cold = result([1, 2]), result([1, 2])
    hot.manifest.config["temperature"], cold.manifest.config["temperature"] = 1.0, 0.6
    with pytest.warns(OtherSamplingWarning, match=r"temperature \(1.0 here, 0.6 there\)"):
        hot.compare(cold)


def test_saved_and_loaded(tmp_path: Path) -> None:
    found = many(0.0, 1)
    again = mi.load_result(found.save(tmp_path / "x.nc"))
    assert isinstance(again, mi.PassAtKResult)
    assert again.summary() == found.summary()
    assert again.data.identical(found.data)
    assert set(found.to_dataframe().columns) >= {"problem", "k", "pass_at_k", "n", "c", "domain"}
    with pytest.raises(ResultError, match="without c"):
        PassAtKResult(found.data.drop_vars("c"))


def test_figure_and_page(tmp_path: Path) -> None:
    found = many(0.0, 1)
    axis = found.plot().axes[0]
    line = axis.lines[0]
    assert line.get_xdata().tolist() == [1, 2, 4, 8, 16, 32]
    np.testing.assert_allclose(line.get_ydata(), found.curve([1, 2, 4, 8, 16, 32])["mean"])
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(found.curve([1, 2, 4, 8, 16, 32])["ci_high"].max())
    assert len(found.plot(others={"after": many(0.2, 2)}, label="before").axes[0].lines) == 5
    page = found.report(tmp_path).read_text()
    assert "pass@8" in page
    assert "<svg" in page
