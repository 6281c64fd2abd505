"""Runs of router tuning: resumed, refused, put into models and checkpoints; and known truths."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import moe_interp as mi
from moe_interp.errors import ConfigError, DataError, ResultError, TrainingError
from moe_interp.experiments.router_tuning import training
from moe_interp.experiments.router_tuning.delta import everything
from moe_interp.experiments.router_tuning.evaluation import HeldOut
from moe_interp.experiments.router_tuning.routers import TunedRouter
from moe_interp.hooks.attach import MoEHooks, attach
from moe_interp.routes import SlowRoutesWarning
from tests import tiny
from tests.integration.router_tuning.test_exact import attached, sequences

FAST: dict[str, Any] = {"n_routes": 4, "lr": 0.02, "batch_size": 8, "progress": False}


@pytest.fixture(scope="module")
def moe() -> MoEHooks:
    return attached("olmoe")


@pytest.fixture(scope="module")
def tuned(moe: MoEHooks) -> mi.RouterTuningResult:
    return mi.tune_router(
        moe, sequences(6), other_domains={"other": sequences(2, first=20)}, sampler=mi.GumbelTopK(1.0), **FAST
    )


def test_held_out_numbers_are_those_of_the_tuned_model(moe: MoEHooks, tuned: mi.RouterTuningResult) -> None:
    data = tuned.data
    assert {*data["domain"].values.tolist()} == {"held out", "other"}
    tuned.apply(moe)
    try:
        for name in {*data["sequence"].values.tolist()}:
            rows = data.isel(token=data["sequence"].values == name)
            tokens = torch.tensor([next(s["tokens"] for s in sequences(30) if s["id"] == name)])
            with torch.no_grad():
                logits, cache = moe.bridge.run_with_cache(tokens)
            ce = -torch.log_softmax(logits[0, :-1], -1).gather(-1, tokens[0, 1:, None])[:, 0]
            np.testing.assert_allclose(rows["ce"].values[-1], ce[rows["pos"].values], atol=2e-5)
            policy = torch.log_softmax(cache[moe.hook_name("router_logits", moe.layers[-1])][0], -1)
            entropy = -(policy.exp() * policy).sum(-1)
            np.testing.assert_allclose(rows["entropy"].values[-1, :, 0], entropy[rows["pos"].values], atol=2e-5)
    finally:
        tuned.revert(moe)
    table = tuned.held_out()
    assert table["tokens"].tolist().count("all") == 2
    row = table.iloc[0]
    assert row["ce_change"] == pytest.approx(row["ce"] - row["ce_before"])
    assert tuned.curve()["step"].tolist()[0] == 0
    assert tuned.curve()["preference"].iloc[0] == 0.5
    assert tuned.curve()["adoption"].iloc[0] == tuned.curve()["changed"].iloc[0] == 0


def test_apply_and_revert_are_exact_and_know_their_model(
    moe: MoEHooks, tuned: mi.RouterTuningResult, tmp_path: Path
) -> None:
    before = everything(moe)[1]
    saved = mi.load_result(tuned.save(tmp_path / "r.nc"))
    delta = mi.RouterDelta.load(tuned.save_delta(tmp_path / "d"))
    assert (tmp_path / "d.safetensors").is_file()
    assert delta.manifest["kind"] == "router_tuning"
    for one in (tuned, saved, delta):
        one.apply(moe)
        (name,) = tuned.delta
        assert {n for n, digest in everything(moe)[1].items() if digest != before[n]} == {name}
        with pytest.raises(ResultError, match="tuned already"):
            one.apply(moe)
        one.revert(moe)
        assert everything(moe)[1] == before
        with pytest.raises(ResultError, match="the very model that was tuned"):
            one.revert(moe)
    for other in (
        tiny.build_hf("olmoe", seed=1),
        tiny.build_hf("mixtral"),
        tiny.build_hf("olmoe", dtype=torch.bfloat16),
    ):
        name = "mixtral" if "Mixtral" in type(other).__name__ else "olmoe"
        stranger = attach(tiny.build_bridge(other, name))
        there = everything(stranger)[1]
        with pytest.raises(ResultError, match="the very model that was tuned"):
            tuned.apply(stranger)
        assert everything(stranger)[1] == there
    nearly = attached("olmoe")
    with torch.no_grad():
        nearly.bridge.original_model.get_output_embeddings().weight[0, 0] += 1
    with pytest.raises(ResultError, match="other weights than the tuned routers"):
        tuned.apply(nearly)
    content = bytearray((tmp_path / "d.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "d.safetensors").write_bytes(content)
    with pytest.raises(ResultError, match="cannot be read as a router delta"):
        mi.RouterDelta.load(tmp_path / "d.safetensors")


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "mixtral"])
def test_a_merged_checkpoint_gives_the_tuned_logits_with_transformers_alone(family: str, tmp_path: Path) -> None:
    hf = tiny.build_hf(family)
    hf.save_pretrained(tmp_path / "model")
    moe = attach(tiny.build_bridge(hf, family, tiny.tiny_tokenizer()))
    found = mi.tune_router(moe, sequences(4), sampler=mi.GumbelTopK(1.0), **FAST)
    merged = found.merge(tmp_path / "model", tmp_path / "merged")
    tokens = tiny.random_tokens(2, 9, seed=5)
    alone = type(hf).from_pretrained(merged, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        plain = moe.bridge(tokens)
        found.apply(moe)
        expected = moe.bridge(tokens)
        logits = alone(tokens).logits
    assert float((logits - expected).abs().max()) < 1e-6 * max(1.0, float(expected.abs().max()))
    assert float((plain - expected).abs().max()) > 1e-3
    with pytest.raises(ResultError, match="is there already"):
        found.merge(tmp_path / "model", tmp_path / "merged")
    with pytest.raises(ResultError, match="the very model that was tuned"):
        found.merge(merged)
    assert found.merge(tmp_path / "model") == tmp_path / "model"
    with pytest.raises(ResultError, match=r"without config\.json or safetensors"):
        found.merge(tmp_path)
    assert isinstance(alone, transformers.PreTrainedModel)


@pytest.mark.parametrize("fails", ["shutil.copytree", "moe_interp.experiments.router_tuning.delta.save"])
def test_a_merge_that_fails_leaves_no_checkpoint_that_looks_merged(
    tuned: mi.RouterTuningResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    tiny.build_hf("olmoe").save_pretrained(tmp_path / "model")
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    def full(*args: Any, **options: Any) -> None:
        if fails == "shutil.copytree":
            Path(args[1]).mkdir()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(fails, full)
        with pytest.raises(ResultError, match=r"could not be written: No space left on device"):
            tuned.merge(tmp_path / "model", tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert tuned.merge(tmp_path / "model", tmp_path / "new" / "merged").is_dir()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["merged"]


def test_a_resumed_run_equals_an_uninterrupted_one(moe: MoEHooks, tmp_path: Path) -> None:
    given, options = sequences(5), {**FAST, "epochs": 2, "schedule": "cosine", "warmup": 2, "evaluate_every": 3}
    whole = mi.tune_router(moe, given, **options)
    stopped = mi.tune_router(moe, given, out=tmp_path, checkpoint_every=2, stop_at=5, **options)
    assert stopped.data.sizes["step"] == 5
    with pytest.raises(ResultError, match="already holds a run"):
        mi.tune_router(moe, given, out=tmp_path, checkpoint_every=2, **options)
    with pytest.raises(ResultError, match="of another model, other sequences or other options"):
        mi.tune_router(moe, given, out=tmp_path, checkpoint_every=2, resume=True, **{**options, "lr": 0.01})
    resumed = mi.tune_router(moe, given, out=tmp_path, checkpoint_every=2, resume=True, **options)
    assert whole.data.drop_attrs().identical(resumed.data.drop_attrs())


def test_a_cache_on_the_disk_and_outputs_that_are_not_kept_give_the_same(
    moe: MoEHooks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from moe_interp.experiments.router_tuning.token_sources import sources

    given = sequences(5)
    kept = mi.tune_router(moe, given, **FAST)
    monkeypatch.setattr(sources, "KEPT_SHARE", 2**60)  # nothing fits
    made: list[Any] = []
    original = sources.FileOrMemory
    monkeypatch.setattr(sources, "FileOrMemory", lambda *args: made.append(original(*args)) or made[-1])
    streamed = mi.tune_router(moe, given, out=tmp_path, **FAST)
    assert made[0].is_on_disk
    for name in ("loss", "ce", "delta"):
        np.testing.assert_allclose(streamed.data[name], kept.data[name], atol=1e-5)


def test_a_loss_that_is_not_finite_names_step_and_rate_and_keeps_the_checkpoint(
    moe: MoEHooks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(moe)[1]
    original = training.step_loss
    calls: list[int] = []

    def broken(*args: Any) -> Any:
        loss, n = original(*args)
        calls.append(n)
        return (loss * float("nan"), n) if len(calls) == 4 else (loss, n)

    monkeypatch.setattr(training, "step_loss", broken)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 3, learning rate 0\.02.*state\.pt' is kept"):
        mi.tune_router(moe, sequences(5), out=tmp_path, checkpoint_every=1, **FAST)
    assert everything(moe)[1] == before
    monkeypatch.setattr(training, "step_loss", original)
    resumed = mi.tune_router(moe, sequences(5), out=tmp_path, checkpoint_every=1, resume=True, **FAST)
    assert resumed.data["loss"].notnull().all()


@pytest.mark.parametrize("what", ["tuned weight", "held-out cross-entropy"])
def test_a_bad_step_is_not_written_over_the_last_good_checkpoint(
    moe: MoEHooks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The loss is finite, and what comes of the step is not."""
    mi.tune_router(moe, sequences(5), out=tmp_path, checkpoint_every=1, stop_at=2, **FAST)
    kept = (tmp_path / "state.pt").read_bytes()
    if what == "tuned weight":

        def step(self: torch.optim.AdamW) -> None:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(float("inf"))

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
    else:
        evaluate = HeldOut.evaluate

        def broken(self: HeldOut, weights: Any) -> Any:
            found = evaluate(self, weights)
            return replace(found, ce=found.ce + np.nan)

        monkeypatch.setattr(HeldOut, "evaluate", broken)
    with pytest.raises(TrainingError, match=rf"the {what} is (inf|nan) at step \d, learning rate 0\.02.*is kept"):
        mi.tune_router(moe, sequences(5), out=tmp_path, checkpoint_every=1, resume=True, **FAST)
    assert (tmp_path / "state.pt").read_bytes() == kept


def test_a_run_goes_on_with_other_checkpoints(moe: MoEHooks, tmp_path: Path) -> None:
    whole = mi.tune_router(moe, sequences(5), **FAST)
    mi.tune_router(moe, sequences(5), out=tmp_path, checkpoint_every=1, stop_at=2, **FAST)
    resumed = mi.tune_router(moe, sequences(5), out=tmp_path, checkpoint_every=3, resume=True, **FAST)
    assert whole.data.drop_attrs().identical(resumed.data.drop_attrs())


def test_a_sequence_that_was_trained_on_is_not_held_out_when_a_run_goes_on(moe: MoEHooks, tmp_path: Path) -> None:
    given = sequences(5)
    options = {**FAST, "out": tmp_path, "max_steps": 3}
    mi.tune_router(moe, given[:4], held_out=given[4:], stop_at=1, **options)
    with pytest.raises(ResultError, match="other sequences"):
        mi.tune_router(moe, given[:3], held_out=given[3:], resume=True, **options)


def test_a_run_under_interventions_does_not_go_on_without_them(tmp_path: Path) -> None:
    moe, given = attached("olmoe"), sequences(5)
    options = {**FAST, "out": tmp_path, "max_steps": 2}
    first, last = moe.layers[0], moe.layers[-1]
    with moe.bridge.hooks(fwd_hooks=mi.uniform_routing(moe, [last])):
        with pytest.warns(SlowRoutesWarning):
            mi.tune_router(moe, given, first, "cross_entropy", stop_at=1, **options)
        # the warning comes once a model
        whole = mi.tune_router(moe, given, first, "cross_entropy", resume=True, **options)
    assert whole.data.sizes["step"] == 2
    with pytest.raises(ResultError, match="of another model"):
        mi.tune_router(moe, given, first, "cross_entropy", resume=True, **options)


def test_a_checkpoint_of_a_gpu_goes_on_without_one(
    moe: MoEHooks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = sequences(5)
    with monkeypatch.context() as patched:  # the tensors say that they were on a GPU
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        mi.tune_router(moe, given, out=tmp_path, stop_at=2, **FAST)
    resumed = mi.tune_router(moe, given, out=tmp_path, resume=True, **FAST)
    assert mi.tune_router(moe, given, **FAST).data.drop_attrs().identical(resumed.data.drop_attrs())


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"stop_at": 0}, ConfigError, "stop_at=0"),
        ({"lr": 1e38}, ConfigError, "lr=1e"),
        ({"other_domains": [[1, 2, 3]]}, ConfigError, "other_domains of type list"),
        ({"out": 5}, ResultError, "5 of type int"),
        ({"objective": "dpo"}, ConfigError, "objective='dpo'"),
        ({"select": 1e9}, DataError, "no token selected"),
        ({"select": "sure"}, ConfigError, "select='sure'"),
        ({"lr": float("nan")}, ConfigError, "lr=nan"),
        ({"n_routes": 0}, ConfigError, "n_routes=0"),
        ({"sampler": mi.GumbelTopK}, ConfigError, "sampler="),
        ({"sampler": mi.GumbelTopK(pool=2)}, ConfigError, "pool=2"),
        ({"held_out": sequences(1)}, DataError, "which has the tokens of"),
        ({"layer": 77}, mi.MoEInterpError, "layer 77"),
    ],
)
def test_bad_options_are_refused_in_words(moe: MoEHooks, options: dict[str, Any], error: Any, text: str) -> None:
    before = everything(moe)[1]
    with pytest.raises(error, match=text):
        mi.tune_router(moe, sequences(3), **{**FAST, **options})
    assert everything(moe)[1] == before


def test_one_sequence_alone_leaves_nothing_to_hold_out(moe: MoEHooks) -> None:
    with pytest.raises(DataError, match="none held out"):
        mi.tune_router(moe, sequences(1), **FAST)


def test_hash_layers_are_refused() -> None:
    hashed = attached("deepseek_v4")
    layer = next(one for one in hashed.layers if type(hashed.spec(one).rule).__name__ == "HashTable")
    with pytest.raises(ConfigError, match="a hash layer"):
        TunedRouter.of(hashed, layer)
    with pytest.raises(ConfigError, match="a hash layer"):
        mi.tune_router(hashed, sequences(3), layer, **FAST)
