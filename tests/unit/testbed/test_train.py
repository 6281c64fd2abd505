"""The loop: exact resume, accumulation, the balance loss by hand, the optimisers, and what stops a run."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from moe_interp.errors import ConfigError, ResultError, TrainingError
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.domains.packing import PackedSequences
from moe_interp.testbed.domains.registry import load_domains
from moe_interp.testbed.evaluate import token_losses, unigram_loss
from moe_interp.testbed.model import model_tensors
from moe_interp.testbed.presets import PRESETS
from moe_interp.testbed.training.optimizers import Muon, orthogonalise
from moe_interp.testbed.training.train import train
from moe_interp.testbed.training.trainer import Trainer
from tests.unit.testbed.tiny_runs import TINY as BASE
from tests.unit.testbed.tiny_runs import letters_and_numbers

TINY = BASE.model_copy(
    update={
        "length": 32,
        "steps": 6,
        "log_every": 2,
        "validate_every": 3,
        "checkpoint_every": 2,
        "optimizer": "muon",
    }
)
DOMAINS = letters_and_numbers(20)


def weights(run):
    return {name: tensor.clone() for name, tensor in model_tensors(run.moe.bridge.original_model).items()}


def test_a_run_stopped_and_resumed_equals_an_uninterrupted_one(tmp_path):
    whole = train(TINY, domains=DOMAINS, out=tmp_path / "whole", progress=False)
    train(TINY, domains=DOMAINS, out=tmp_path / "parts", progress=False, stop_at=3)
    assert not (tmp_path / "parts" / "model").exists()
    resumed = train(TINY, domains=DOMAINS, out=tmp_path / "parts", progress=False, resume=True)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
    assert whole.history[-1]["validation"] == resumed.history[-1]["validation"]
    log = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [2, 3, 4, 6]
    assert log == resumed.history
    assert (resumed.path / "model.safetensors").is_file()

    with pytest.raises(ResultError, match="already holds a run"):
        train(TINY, domains=DOMAINS, out=tmp_path / "parts", progress=False)
    other = TINY.model_copy(update={"lr": 1e-3})
    with pytest.raises(ResultError, match="the very same configuration"):
        train(other, domains=DOMAINS, out=tmp_path / "parts", progress=False, resume=True)


def test_a_run_learns_and_reports(tmp_path):
    longer = {"steps": 60, "validate_every": 60, "lr": 1e-2}
    run = train(TINY.model_copy(update=longer), domains=DOMAINS, progress=False)
    last = run.history[-1]
    assert all(loss < 0.9 * last["unigram"][name] for name, loss in last["validation"].items())
    assert run.path is None
    assert last["tokens"] == 60 * 4 * 32
    frame = run.specialization()
    assert frame["layer"].tolist() == [0, 1]
    assert last["routing"]["specialization"] == pytest.approx(frame["specialization"].tolist())
    # the trace is that of the validation tokens
    assert run.trace.n_tokens == 2 * 3 * 32
    assert run.moe.hooks(0)[0] == "router_in"
    assert not run.moe.bridge.training


def test_accumulated_micro_batches_equal_one_large_batch():
    options = {"strategy": "none", "steps": 2, "optimizer": "adamw", "domains_per_micro_batch": 1}
    small = TINY.model_copy(update={**options, "micro_batch": 4, "micro_batches": 2})
    large = TINY.model_copy(update={**options, "micro_batch": 8, "micro_batches": 1})
    trainers = [Trainer(config, DOMAINS, Accelerator()) for config in (small, large)]
    trainers[1].data = trainers[0].data
    steps = [trainer.train_step() for trainer in trainers]
    assert steps[0]["loss"] == pytest.approx(steps[1]["loss"], abs=1e-6)
    for layer, load in steps[0]["loads"].items():
        torch.testing.assert_close(load, steps[1]["loads"][layer])
    one, two = (model_tensors(t.bridge.original_model) for t in trainers)
    for name in one:
        # AdamW's first step is the gradient's sign: it magnifies rounding where a gradient is almost zero
        assert (one[name] - two[name]).abs().float().mean() < 1e-5, name


def test_a_non_finite_loss_stops_with_the_step_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    calls = []

    def losses(logits, tokens):
        calls.append(1)
        return token_losses(logits, tokens) * (math.nan if len(calls) == 4 else 1.0)

    monkeypatch.setattr(sys.modules["moe_interp.testbed.training.trainer"], "token_losses", losses)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 3, learning rate 0\.00"):
        train(TINY, domains=DOMAINS, out=tmp_path, progress=False)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 2


@pytest.mark.parametrize("where", ["auxiliary loss", "gradient's norm"])
def test_no_checkpoint_holds_a_step_whose_balance_loss_or_gradient_is_not_finite(tmp_path, monkeypatch, where):
    honest = Trainer.train_step

    def broken(trainer):
        if trainer.step == 3 and where == "auxiliary loss":
            monkeypatch.setattr(trainer.strategy, "auxiliary_loss", lambda *_: torch.tensor(math.inf))
        elif trainer.step == 3:
            parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
            parameter.register_hook(lambda gradient: gradient * math.nan)
        return honest(trainer)

    config = TINY.model_copy(update={"checkpoint_every": 1})
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", broken)
        with pytest.raises(TrainingError, match=rf"the {where} is (inf|nan) at step 3, learning rate .* is kept"):
            train(config, domains=DOMAINS, out=tmp_path, progress=False)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 3
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    resumed = train(config, domains=DOMAINS, out=tmp_path, progress=False, resume=True)
    assert resumed.history[-1]["step"] == TINY.steps


def test_each_run_has_its_own_precision_and_float32_weights():
    short = TINY.model_copy(update={"steps": 2})
    full, half, again = (
        train(short, domains=DOMAINS, progress=False, mixed_precision=precision) for precision in ("no", "bf16", "no")
    )
    losses = [run.history[-1]["loss"] for run in (full, half, again)]
    assert losses[0] == losses[2] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)  # bfloat16 has 8 bits
    assert {p.dtype for p in half.moe.bridge.original_model.parameters()} == {torch.float32}
    with pytest.raises(ConfigError, match="mixed_precision 'fp8'"):
        train(short, domains=DOMAINS, progress=False, mixed_precision="fp8")


def test_unigram_loss_is_the_cross_entropy_of_training_frequencies():
    train_data = PackedSequences(np.array([[0, 0, 1, 2]]), np.zeros((1, 4), int), ("a",))
    held_out = PackedSequences(np.array([[9, 0, 0, 2]]), np.zeros((1, 4), int), ("a",))
    # add-one counts of 3 types: 3, 2, 2 of 7; the first position is not predicted
    expected = -(2 * math.log(3 / 7) + math.log(2 / 7)) / 3
    assert unigram_loss(train_data, held_out, 3)["a"] == pytest.approx(expected)


def test_orthogonalise_keeps_the_singular_vectors_and_evens_the_values():
    g = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = orthogonalise(g)
    for one, whole in zip(g, out):
        u, _, vh = torch.linalg.svd(one, full_matrices=False)
        inner = u.T @ whole @ vh.T
        assert torch.dist(inner, torch.diag(inner.diag())) < 1e-8
        assert 0.5 < inner.diag().min() <= inner.diag().max() < 1.3
        torch.testing.assert_close(orthogonalise(one), whole)
    torch.testing.assert_close(orthogonalise(g.mT), out.mT)


def test_muon_takes_a_nesterov_step_along_the_orthogonalised_gradient():
    p = torch.nn.Parameter(torch.zeros(6, 3))
    optimizer = Muon([p], lr=0.1, momentum=0.5)
    first, second = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1))
    p.grad = first
    optimizer.step()
    # momentum .5 g1, look-ahead g1 + .5 (m - g1) = .75 g1: the same direction; scaled by sqrt(6 / 3)
    torch.testing.assert_close(p.detach(), -0.1 * math.sqrt(2) * orthogonalise(0.75 * first))
    before = p.detach().clone()
    p.grad = second
    optimizer.step()
    momentum = 0.25 * first + 0.5 * second
    expected = before - 0.1 * math.sqrt(2) * orthogonalise(0.5 * second + 0.5 * momentum)
    torch.testing.assert_close(p.detach(), expected)


def test_schedules_by_hand():
    linear = TINY.model_copy(update={"schedule": "linear", "steps": 100, "warmup_steps": 10, "decay_from": 0.6})
    assert [linear.lr_factor(s) for s in (0, 4, 10, 59)] == pytest.approx([0.1, 0.5, 1, 1])
    assert linear.lr_factor(80) == pytest.approx(0.5)
    assert linear.lr_factor(100) == pytest.approx(0)
    cosine = linear.model_copy(update={"schedule": "cosine"})
    assert cosine.lr_factor(10) == pytest.approx(1)
    assert cosine.lr_factor(55) == pytest.approx(0.55)
    assert cosine.lr_factor(100) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "steps=0"),
        ({"lr": -1.0}, r"lr=-1\.0"),
        ({"seed": -1}, "seed=-1"),
        ({"shares": (1.0,)}, "1 shares for domains"),
        ({"length": 128}, "length=128"),
        ({"decay_from": 1.5}, r"decay_from=1\.5"),
        ({"domains": ()}, "one share a domain"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TestbedConfig(**{**dict(TINY), **changes})


def test_unknown_strategies_and_domains_are_refused():
    with pytest.raises(ConfigError, match="strategy 'magic'"):
        train(TINY.model_copy(update={"strategy": "magic"}), domains=DOMAINS, progress=False)
    with pytest.raises(ConfigError, match="domain 'letters'"):
        load_domains(TINY)


def test_presets_are_what_they_say():
    assert set(PRESETS) == {"smoke", "demo", "paper"}
    demo = PRESETS["demo"]
    assert (demo.model.n_layers, demo.model.n_experts, demo.model.top_k, len(demo.domains)) == (4, 16, 2, 4)
