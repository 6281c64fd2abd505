"""How strongly routers read the mean of their inputs: by hand, from a trained run, and between strategies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from moe_interp.errors import ConfigError, DataError, ResultError
from moe_interp.stats import mean_interval, shared_direction
from moe_interp.testbed.comparison import ComparisonResult, comparison
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.model import model_tensors
from moe_interp.testbed.presets import PRESETS
from moe_interp.testbed.shared_direction import GAINS, RouterInputs, shared_direction_gains
from moe_interp.testbed.training.train import TrainedRun, train
from moe_interp.testbed.training.trainer import Trainer
from tests.unit.testbed.tiny_runs import TINY as BASE
from tests.unit.testbed.tiny_runs import letters_and_numbers

TINY = BASE.model_copy(update={"steps": 4, "micro_batches": 2, "log_every": 2, "validate_every": 2})
DOMAINS = letters_and_numbers(12)
RNG = np.random.default_rng(0)
WEIGHTS, STATES = RNG.normal(size=(6, 10)), RNG.normal(size=(60, 10)) + 1.5
LABELS = RNG.integers(0, 3, 60)
STATES[LABELS == 1] += RNG.normal(size=10)


def inputs_of(states: np.ndarray, labels: np.ndarray, parts: int = 1) -> RouterInputs:
    found = RouterInputs.empty(int(labels.max()) + 1, states.shape[1])
    for some, own in zip(np.array_split(states, parts), np.array_split(labels, parts)):
        found.add(some, own)
    return found


def by_loops(weights: np.ndarray, states: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The six gains token by token, in float64."""
    n_experts, width = weights.shape
    project = np.eye(n_experts) - np.ones((n_experts, n_experts)) / n_experts
    read = project @ weights
    mean = sum(states) / len(states)
    moved = np.mean([np.sum((read @ (h - mean)) ** 2) for h in states])
    spread = np.mean([np.sum((h - mean) ** 2) for h in states])
    means = [states[labels == d].mean(0) - mean for d in set(labels.tolist())]
    axes = np.linalg.svd(states - mean)[2][:3]
    return {
        "shared_gain": float(np.linalg.norm(read @ mean) / np.linalg.norm(mean)),
        "random_gain": float(np.sqrt(np.mean([np.sum((read @ unit) ** 2) for unit in np.eye(width)]))),
        "principal_gain": float(np.sqrt(np.mean([np.sum((read @ axis) ** 2) for axis in axes]))),
        "centred_gain": float(np.sqrt(moved / spread)),
        "domain_gain": float(np.sqrt(sum(np.sum((read @ m) ** 2) for m in means) / sum(np.sum(m**2) for m in means))),
        "shared_offset": float(np.linalg.norm(read @ mean) / np.sqrt(moved)),
    }


@pytest.mark.parametrize("parts", [1, 7])
def test_gains_from_sums_equal_loops_over_tokens(parts: int) -> None:
    found = shared_direction_gains(WEIGHTS, inputs_of(STATES, LABELS, parts))
    assert found == pytest.approx(by_loops(WEIGHTS, STATES, LABELS), rel=1e-12)
    assert tuple(found) == GAINS


def test_gains_equal_those_of_states_kept_one_by_one() -> None:
    found, kept = shared_direction_gains(WEIGHTS, inputs_of(STATES, LABELS)), shared_direction(WEIGHTS, STATES)
    assert found["shared_gain"] == pytest.approx(kept.gain)
    assert found["random_gain"] == pytest.approx(kept.random_gain)
    assert found["centred_gain"] == pytest.approx(kept.centred_gain)
    assert found["principal_gain"] == pytest.approx(np.sqrt(np.mean(kept.component[:3] ** 2)))
    assert found["shared_offset"] == pytest.approx(kept.gain * kept.mean_norm / kept.centred_rms)


def test_a_router_that_does_not_read_the_mean_has_no_gain_along_it() -> None:
    unit = STATES.mean(0) / np.linalg.norm(STATES.mean(0))
    found = shared_direction_gains(WEIGHTS - np.outer(WEIGHTS @ unit, unit), inputs_of(STATES, LABELS))
    assert found["shared_gain"] == pytest.approx(0, abs=1e-14)
    assert found["shared_offset"] == pytest.approx(0, abs=1e-14)
    assert found["domain_gain"] > 0.1
    # nor one that reads the same for every expert
    alike = shared_direction_gains(np.tile(WEIGHTS[:1].round(), (6, 1)), inputs_of(STATES, LABELS))
    assert alike["shared_gain"] == alike["random_gain"] == alike["domain_gain"] == 0
    assert np.isnan(alike["shared_offset"])


def test_gains_do_not_change_with_experts_names_nor_with_what_all_experts_read() -> None:
    found = shared_direction_gains(WEIGHTS, inputs_of(STATES, LABELS))
    for other in (WEIGHTS[RNG.permutation(6)], WEIGHTS + 3 * RNG.normal(size=10)):
        assert shared_direction_gains(other, inputs_of(STATES, LABELS)) == pytest.approx(found, rel=1e-10)


def test_what_has_no_direction_is_nan_and_what_does_not_fit_is_refused() -> None:
    centred = np.array([[1.0, 0.0], [-1.0, 0.0]])
    found = shared_direction_gains(np.eye(2), inputs_of(centred, np.zeros(2, int)))
    assert np.isnan(found["shared_gain"])
    assert np.isnan(found["domain_gain"])
    assert found["centred_gain"] == pytest.approx(np.sqrt(0.5))
    with pytest.raises(DataError, match="the inputs of 0 tokens of width 10"):
        shared_direction_gains(WEIGHTS, RouterInputs.empty(2, 10))
    with pytest.raises(DataError, match=r"\[expert, d_model\], and at least one token"):
        shared_direction_gains(WEIGHTS[:, 1:], inputs_of(STATES, LABELS))
    with pytest.raises(DataError, match=r"inputs of shape \(60, 10\) and domains of shape \(59,\)"):
        inputs_of(STATES, LABELS).add(STATES, LABELS[1:])


def weights_of(run: TrainedRun) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model_tensors(run.moe.bridge.original_model).items()}


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "deepseek_v3"])
def test_a_run_reports_the_gains_of_its_routers_on_held_out_text(family: str) -> None:
    sizes = TINY.model.model_copy(update={"family": family, "n_shared_experts": int(family == "deepseek_v3")})
    run = train(TINY.model_copy(update={"model": sizes}), domains=DOMAINS, progress=False)
    frame = run.shared_direction().set_index("layer")
    tokens = torch.as_tensor(run.validation.tokens, dtype=torch.long)
    names = [run.moe.hook_name("router_in", layer) for layer in (0, 1)]
    with torch.no_grad():
        cache = run.moe.bridge.run_with_cache(tokens, names_filter=names)[1]
    for layer, name in enumerate(names):
        read = cache[name].flatten(0, 1).double().numpy()
        weight = run.moe.spec(layer).router.weight.detach().double().numpy()
        expected = by_loops(weight, read, run.validation.domain.reshape(-1))
        assert frame.loc[layer].to_dict() == pytest.approx(expected, rel=1e-4), name
    validated = [record for record in run.history if "validation" in record]
    assert all(list(record["shared_direction"]) == ["layer", *GAINS] for record in validated)


def test_inputs_are_the_same_where_a_pass_goes_through_the_bridge() -> None:
    trainers = Trainer(TINY, DOMAINS, Accelerator()), Trainer(TINY, DOMAINS, Accelerator())
    trainers[1].bridge.add_hook("blocks.0.hook_resid_pre", lambda value, hook: None)
    lean, hooked = (trainer.evaluate().shared_direction for trainer in trainers)
    assert lean is not None
    assert hooked is not None
    np.testing.assert_allclose(lean.to_numpy(), hooked.to_numpy(), rtol=1e-4)
    # kept for a validation alone
    tokens, domain = trainers[0].micro_batch(0)
    assert all(record.inputs is None for record in trainers[0].forward(tokens, domain)[1].values())


def test_measuring_changes_nothing_else_and_can_be_left_out() -> None:
    measured = train(TINY, domains=DOMAINS, progress=False)
    plain = train(TINY.model_copy(update={"shared_direction": False}), domains=DOMAINS, progress=False)
    for name, tensor in weights_of(measured).items():
        assert torch.equal(tensor, weights_of(plain)[name]), name
    for with_gains, without in zip(measured.history, plain.history, strict=True):
        ignored = {"shared_direction", "tokens_per_s"}
        assert without.keys() == with_gains.keys() - {"shared_direction"}
        assert all(with_gains[name] == without[name] for name in without.keys() - ignored)
    with pytest.raises(ConfigError, match="a run that measured it"):
        plain.shared_direction()


def test_a_step_holds_as_many_domains_as_asked() -> None:
    config = TINY.model_copy(update={"steps": 40, "domains_per_step": 1})
    few, all_of_them = (
        Trainer(c, DOMAINS, Accelerator()).data for c in (config, config.model_copy(update={"domains_per_step": None}))
    )
    steps = few.domain[:, 0].reshape(40, 8)
    assert {len(set(step)) for step in steps.tolist()} == {1}
    assert set(steps[:, 0].tolist()) == {0, 1}
    assert all(set(step) == {0, 1} for step in all_of_them.domain[:, 0].reshape(80, 4).tolist())


def test_a_run_of_few_domains_a_step_resumes_exactly_and_is_another_run(tmp_path: Path) -> None:
    config = TINY.model_copy(update={"domains_per_step": 1})
    whole = train(config, domains=DOMAINS, progress=False)
    train(config, domains=DOMAINS, out=tmp_path, progress=False, stop_at=2)
    with pytest.raises(ResultError, match="domains_per_step 1 there, None here"):
        train(TINY, domains=DOMAINS, out=tmp_path, progress=False, resume=True)
    resumed = train(config, domains=DOMAINS, out=tmp_path, progress=False, resume=True)
    for name, tensor in weights_of(whole).items():
        assert torch.equal(tensor, weights_of(resumed)[name]), name
    assert [r.get("shared_direction") for r in whole.history] == [r.get("shared_direction") for r in resumed.history]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains_per_step": 0}, "domains_per_step=0 of 8 sequences"),
        ({"domains_per_step": 9}, "domains_per_step=9 of 8 sequences"),
        ({"domains_per_step": -1}, "domains_per_step=-1"),
        ({"domains_per_step": 1.5}, "domains_per_step"),
        ({"domains_per_micro_batch": 0}, "domains_per_micro_batch=0 of 4 sequences"),
        ({"domains_per_micro_batch": 5}, "domains_per_micro_batch=5 of 4 sequences"),
        ({"domains_per_micro_batch": 1, "domains_per_step": 1}, "domains_per_micro_batch with domains_per_step"),
        ({"domains_per_step": 1, "mixed_sequences": True}, "domains_per_step with mixed_sequences"),
        ({"domains_per_micro_batch": 1, "mixed_sequences": True}, "domains_per_micro_batch with mixed_sequences"),
    ],
)
def test_draws_of_domains_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TestbedConfig(**{**dict(TINY), **changes})


def test_checkpoints_of_earlier_versions_go_on() -> None:
    # hashes of these configurations before there were other fields
    assert PRESETS["smoke"].fingerprint() == "dcaa021218a3f5bb"
    assert PRESETS["demo"].fingerprint() == "e149f95b4f5b48fe"
    for change in ({"domains_per_step": 1}, {"shared_direction": False}):
        assert PRESETS["demo"].model_copy(update=change).fingerprint() != "e149f95b4f5b48fe"


# the balanced strategy reads the mean half as strongly as the other in layer 0, a quarter as strongly in layer 1
SPREAD = (0.9, 1.0, 1.1, 0.95, 1.05, 1.0)


def planted(seeds: int, with_gains: bool = True) -> ComparisonResult:
    def log(strategy: str, seed: int) -> list[dict[str, object]]:
        routing = {"layer": [0, 1], "specialization": [seed, 0.5], "dead_experts": [0, 0]}
        record = {"tokens": 8, "dropped_slots": 0.0, "validation": {"x": 1.0, "y": 2.0 + seed}, "routing": routing}
        size = 1.0 if strategy == "none" else SPREAD[seed]
        shared = {"none": [2.0, 4.0], "global": [1.0 * size, 1.0 / size]}[strategy]
        gains = {"layer": [0, 1], "random_gain": [2.0, 2.0]} | {
            name: [1.0, 1.0] for name in GAINS if name != "random_gain"
        }
        if with_gains:
            record["shared_direction"] = gains | {"shared_gain": shared}
        return [{"step": step, **record} for step in (1, 2)]

    return comparison(TINY, {(s, seed): log(s, seed) for s in ("none", "global") for seed in range(seeds)})


def test_gains_of_two_strategies_are_compared_seed_by_seed() -> None:
    result = planted(6)
    table = result.gains("global", "none")
    assert table["step"].tolist() == [1, 1, 2, 2]
    last = table.iloc[-2]
    expected = mean_interval(np.log(np.array(SPREAD) / 2))
    assert last[["ratio", "low", "high"]].tolist() == pytest.approx(
        np.exp([expected.estimate, expected.low, expected.high]).tolist()
    )
    assert last["verdict"] == "smaller"
    both = result.gains("global", "none", by_layer=False)
    assert list(both)[:2] == ["step", "ratio"]
    # the spread has opposite signs in the two layers
    assert both[["ratio", "low", "high"]].iloc[-1].tolist() == pytest.approx([8**-0.5] * 3)
    alone = result.gains("none")
    assert alone["ratio"].tolist() == pytest.approx([1, 2, 1, 2])
    assert alone["verdict"].tolist() == ["no difference shown", "larger"] * 2
    assert result.gains("none", against=None)["ratio"].tolist() == pytest.approx([2, 4, 2, 4])
    assert result.runs["shared_direction"].tolist()[:6] == pytest.approx([1.5] * 6)
    assert result.difference("shared_direction", "none", "global")["seeds"] == 6
    assert "  global: 0.35 [0.35, 0.35], smaller" in result.summary()
    assert max(map(len, result.summary().splitlines())) <= 80


def test_three_seeds_have_an_interval_and_no_verdict() -> None:
    last = planted(3).gains("global", "none").iloc[-2]
    assert last["low"] < last["ratio"] < last["high"] < 1
    assert last["verdict"] == "too few seeds to say (n = 3)"
    assert planted(1).gains("global", "none")[["low", "high"]].isna().all(axis=None)
    assert "paired by seed" not in planted(1).summary()


def test_a_gain_of_nothing_is_no_ratio() -> None:
    result = planted(6)
    result.data["shared_gain"][{"strategy": 1, "seed": 0, "layer": 0}] = 0.0
    table = result.gains("global", "none")
    assert table["ratio"].isna().tolist() == [True, False] * 2
    assert table["verdict"].iloc[0].startswith("too few")


def test_comparisons_without_gains_say_so_and_are_shown_without(tmp_path: Path) -> None:
    result = planted(2, with_gains=False)
    assert "runs that measured gains" in result.report(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "shared_direction" not in result.runs
    assert "shared dir" not in result.summary()
    for show in (lambda: result.gains("none"), lambda: result.plot("shared_direction")):
        with pytest.raises(DataError, match="runs that measured gains"):
            show()
    with pytest.raises(ConfigError, match="gain 'mean'"):
        planted(2).gains("none", gain="mean")
    with pytest.raises(ConfigError, match="strategy 'random'"):
        planted(2).gains("random")


def test_the_figure_draws_the_table() -> None:
    result = planted(6)
    for baseline in (None, "none"):
        axes = result.plot("shared_direction", baseline=baseline).axes
        lines = [line for line in axes[1].lines if not line.get_label().startswith("_")]
        names = ["none", "global"] if baseline is None else ["global"]
        assert [line.get_label() for line in lines] == names
        for line in lines:
            table = result.gains(line.get_label(), baseline)
            assert line.get_ydata() == pytest.approx(table[table["layer"] == 1]["ratio"])
            assert line.get_xdata() == pytest.approx([1, 2])
        assert len(axes[1].collections) == len(names)
