"""EPO's loss and gradient against full forward passes; what trains, and what stays as it was."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_interp as mi
from moe_interp.engine.memory import Memory
from moe_interp.experiments.inputs.sequences import read_sequences
from moe_interp.experiments.router_tuning import step
from moe_interp.experiments.router_tuning.delta import everything
from moe_interp.experiments.router_tuning.evaluation import HeldOut
from moe_interp.experiments.router_tuning.experiment import SlowTuningWarning
from moe_interp.experiments.router_tuning.options import TuningOptions
from moe_interp.experiments.router_tuning.routers import TunedRouter, frozen
from moe_interp.experiments.router_tuning.token_sources.sources import Sources
from moe_interp.experiments.router_tuning.training import Tuning
from moe_interp.hooks.attach import MoEHooks, attach
from tests import tiny

PAPER = ("olmoe", "qwen3_moe", "gpt_oss", "deepseek_v2")


def sequences(n: int = 4, pos: int = 7, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"id": f"s{i}", "tokens": tiny.random_tokens(1, pos + i % 3, seed=i)[0].tolist()}
        for i in range(first, first + n)
    ]


def attached(family: str, dtype: torch.dtype = torch.float32) -> MoEHooks:
    hf = tiny.build_hf(family, dtype=dtype)
    if dtype == torch.float64:  # grouped products refuse it on a processor
        tiny.set_experts_implementation(hf, "eager")
    return attach(tiny.build_bridge(hf, family, tiny.tiny_tokenizer()))


def tuning_of(moe: MoEHooks, layer: int, options: TuningOptions, given: list[dict[str, Any]]) -> Tuning:
    """A run before its first step."""
    routers = (TunedRouter.of(moe, layer),)
    sources = Sources(moe, routers, Memory(moe))
    source, why_not = sources.of(read_sequences(moe.bridge, given), options.is_selected)
    assert (why_not is None) == (layer == moe.layers[-1])
    held, _ = sources.of(read_sequences(moe.bridge, sequences(2, first=50)), torch.isfinite)
    start = {layer: routers[0].start()}
    return Tuning(source, routers, HeldOut(held, routers, start, options, 0), options, "")


def naive_epo(
    moe: MoEHooks, layer: int, tuning: Tuning, routes: Tensor, reference: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient by the router's weight, and cross-entropies, by one full forward pass a route."""
    table, rows = tuning.source.table, tuning.rows_of(0)
    router = TunedRouter.of(moe, layer)
    leaf = router.parameter.detach().clone().requires_grad_()
    total, every = torch.zeros(()), []
    for place, row in enumerate(rows.tolist()):
        sequence, pos = table.sequences[table.sequence[row]], int(table.pos[row])
        tokens = torch.tensor([sequence.tokens])
        with torch.no_grad():
            _, cache = moe.bridge.run_with_cache(tokens, names_filter=[moe.hook_name("router_in", layer)])
            ce = []
            for route in routes[place].tolist():
                hooks = mi.set_routes(moe, layer, torch.tensor(route), positions=[pos])
                logits = moe.bridge.run_with_hooks(tokens, fwd_hooks=hooks)[0, pos]
                ce.append(-torch.log_softmax(logits, -1)[tokens[0, pos + 1]])
        every.append(torch.stack(ce))
        best = min(range(1, len(ce)), key=lambda r: float(ce[r]))
        if ce[best] >= ce[0]:
            continue
        x = cache[moe.hook_name("router_in", layer)][0, pos]
        bias = 0.0 if router.bias is None else router.bias
        policy = torch.log_softmax(x @ leaf.T + bias, -1) - torch.log_softmax(x @ reference.T + bias, -1)
        margin = policy[routes[place, best]].sum() - policy[routes[place, 0]].sum()
        total = total - (ce[0] - ce[best]) * torch.log(torch.sigmoid(beta * margin))
    loss = total / len(rows)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad, torch.stack(every)


@pytest.mark.parametrize(("family", "place"), [*((family, -1) for family in PAPER), ("olmoe", 0)])
def test_epo_is_that_of_full_forward_passes(family: str, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[step.ScoredRoutes] = []
    original = step.scored_routes
    monkeypatch.setattr(step, "scored_routes", lambda *args: recorded.append(original(*args)) or recorded[-1])
    moe, other = attached(family, torch.float64), attached(family, torch.float64)
    layer = moe.layers[place]
    with tiny.float64_casts():
        options = TuningOptions(n_routes=4, sampler=mi.GumbelTopK(2.0), beta=0.7, batch_size=4)
        with frozen(moe, [TunedRouter.of(moe, layer)]):
            tuning = tuning_of(moe, layer, options, sequences())
            noise = torch.randn(tuning.start[layer].shape, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():  # away from the reference
                tuning.weights[layer].add_(0.2 * tuning.start[layer].std() * noise)
                TunedRouter.of(other, layer).parameter.copy_(tuning.weights[layer])
            loss, n_better = tuning.loss(0)
            (gradient,) = torch.autograd.grad(loss, [tuning.weights[layer]])
        (found,) = recorded
        expected, by_hand, ce = naive_epo(other, layer, tuning, found.routes, tuning.start[layer], 0.7)
    assert n_better > 0
    assert float((found.ce - ce).abs().max()) < 1e-8
    assert float((loss.detach() - expected).abs()) < 1e-8
    assert float((gradient - by_hand).abs().max()) < 1e-8
    assert float(by_hand.abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("objective", "layers"),
    [("epo", -1), ("cross_entropy", -1), ("listwise", -1), ("distill", -1), ("epo", [1, 2]), ("cross_entropy", [1, 2])],
)
def test_the_router_alone_trains_and_the_model_is_left_as_it_was(objective: str, layers: Any) -> None:
    moe = attached("qwen3_moe")
    model = moe.bridge.original_model
    next(iter(model.parameters())).requires_grad_(False)
    required, before = [p.requires_grad for p in model.parameters()], everything(moe)[1]
    found = mi.tune_router(
        moe,
        sequences(6),
        layers,
        objective,
        n_routes=4,
        lr=0.01,
        batch_size=8,
        progress=False,  # type: ignore[arg-type]
    )
    assert everything(moe)[1] == before
    assert [p.requires_grad for p in model.parameters()] == required
    assert all(p.grad is None for p in model.parameters())
    assert sorted(found.delta) == sorted(
        TunedRouter.of(moe, moe.layer_label(one)).name for one in ([layers] if layers == -1 else layers)
    )
    assert all(float(delta.abs().max()) > 0 for delta in found.delta.values())


def test_cross_entropy_below_the_last_layer_has_the_gradient_of_the_model() -> None:
    moe = attached("olmoe", torch.float64)
    with tiny.float64_casts():
        options = TuningOptions("cross_entropy", batch_size=6)
        router = TunedRouter.of(moe, 0)
        with frozen(moe, [router]):
            tuning = tuning_of(moe, 0, options, sequences())
            loss, _ = tuning.loss(0)
            (gradient,) = torch.autograd.grad(loss, [tuning.weights[0]])
            rows, table = tuning.rows_of(0), tuning.source.table

            def value(weight: Tensor) -> float:
                with torch.no_grad():
                    router.parameter.copy_(weight)
                    ce = []
                    for row in rows.tolist():
                        tokens = torch.tensor([table.sequences[table.sequence[row]].tokens])
                        pos = int(table.pos[row])
                        ce.append(-torch.log_softmax(moe.bridge(tokens)[0, pos], -1)[tokens[0, pos + 1]])
                    return float(torch.stack(ce).mean())

            start = tuning.start[0]
            assert abs(value(start) - float(loss.detach())) < 1e-10
            direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(0))
            slope = (value(start + 1e-6 * direction) - value(start - 1e-6 * direction)) / 2e-6
            assert abs(slope - float((gradient * direction).sum())) < 1e-6
            assert abs(slope) > 1e-4


def test_every_decoder_family_tunes_its_last_layer_exactly(family: str) -> None:
    """From a cache, or through the model with a warning: the held-out numbers are those of the tuned model."""
    if family in tiny.ENCODER_DECODERS:
        pytest.skip("no causal decoder")
    moe = attached(family)
    options: dict[str, Any] = {"n_routes": 6, "sampler": mi.GumbelTopK(1.0), "max_steps": 1, "batch_size": 6}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = mi.tune_router(moe, sequences(3), lr=0.02, progress=False, **options)
    is_slow = any(issubclass(one.category, SlowTuningWarning) for one in caught)
    data = found.data
    assert is_slow == (not data.attrs["from_cache"])
    assert not (is_slow and family in PAPER)
    assert data["layer"].values.tolist() == [moe.layers[-1]]
    assert float(abs(data["delta"]).max()) > 1e-3
    found.apply(moe)
    tokens = torch.tensor([next(s["tokens"] for s in sequences(3) if s["id"] == data["sequence"].values[0])])
    with torch.no_grad():
        logits = moe.bridge(tokens)[0, :-1]
    ce = -torch.log_softmax(logits, -1).gather(-1, tokens[0, 1:, None])[:, 0]
    assert float((torch.from_numpy(data["ce"].values[-1]) - ce).abs().max()) < 2e-4
