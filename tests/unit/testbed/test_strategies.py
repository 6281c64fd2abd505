"""Each strategy routes and balances as it says: by hand, and on a small model in training."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from moe_interp.errors import ConfigError
from moe_interp.testbed.evaluate import max_violation
from moe_interp.testbed.metrics import routing_metrics
from moe_interp.testbed.model import model_tensors
from moe_interp.testbed.strategies.balancing import balance_loss
from moe_interp.testbed.strategies.reference import reference_blocks
from moe_interp.testbed.strategies.rerouting import within_capacity
from moe_interp.testbed.strategies.strategy import Batch, RouterRecord, Setting, by_score, recorded
from moe_interp.testbed.strategies.table import STRATEGIES, check_strategy, make_strategy
from moe_interp.testbed.training.trainer import Trainer
from tests.unit.testbed.tiny_runs import TINY as BASE
from tests.unit.testbed.tiny_runs import letters_and_numbers

TINY = BASE.model_copy(update={"capacity_factor": 0.6})
DOMAINS = letters_and_numbers(12)


def trainer_of(strategy: str, **changes) -> Trainer:
    return Trainer(TINY.model_copy(update={"strategy": strategy, **changes}), DOMAINS, Accelerator())


def records_of(trainer: Trainer, training: bool = True):
    tokens, domain = trainer.micro_batch(0)
    with torch.no_grad():
        return tokens, domain, trainer.forward(tokens, domain, training)[1]


def auxiliary(name: str, records, config=TINY, step_load=None, domain=None) -> float:
    """The auxiliary loss of given records, on a setting without a model."""
    batch = Batch(torch.zeros(1, 2).long(), domain, 0, True)
    strategy = make_strategy(name, Setting(None, config, ("a", "b")))
    return float(strategy.auxiliary_loss(records, batch, step_load))


def record(probs, indices) -> RouterRecord:
    return RouterRecord(torch.tensor(probs).log(), torch.tensor(indices), torch.tensor(indices))


# two sequences of two tokens, three experts, k = 2
BY_HAND = record(
    [[[0.6, 0.3, 0.1], [0.4, 0.3, 0.3]], [[0.2, 0.2, 0.6], [0.2, 0.4, 0.4]]],
    [[[0, 1], [0, 1]], [[2, 0], [2, -1]]],
)


def test_balance_loss_is_one_when_balanced_and_e_when_collapsed():
    third = torch.full((5, 3), 1 / 3)
    assert float(balance_loss(third, third[0])) == pytest.approx(1)
    collapsed = torch.tensor([[1.0, 0.0, 0.0]] * 5)
    assert float(balance_loss(collapsed, collapsed[0])) == pytest.approx(3)


def test_scopes_of_the_auxiliary_loss_by_hand():
    # f = (3, 2, 2)/7 over filled slots, P = (.35, .3, .35)
    micro = 3 * (3 * 0.35 + 2 * 0.3 + 2 * 0.35) / 7
    assert auxiliary("micro_batch", {0: BY_HAND}) == pytest.approx(0.01 * micro, rel=1e-6)
    assert auxiliary("micro_batch", {0: BY_HAND, 1: BY_HAND}) == pytest.approx(0.02 * micro, rel=1e-6)
    # sequences: f = (.5, .5, 0), P = (.5, .3, .2) and f = (1, 0, 2)/3, P = (.2, .3, .5)
    sequence = (3 * (0.25 + 0.15) + 3 * (0.2 + 1.0) / 3) / 2
    assert auxiliary("sequence", {0: BY_HAND}) == pytest.approx(0.01 * sequence, rel=1e-6)
    step_load = {0: torch.tensor([0.1, 0.1, 0.8])}
    over_step = 3 * (0.035 + 0.03 + 0.28)
    assert auxiliary("global", {0: BY_HAND}, step_load=step_load) == pytest.approx(0.01 * over_step, rel=1e-6)
    assert auxiliary("none", {0: BY_HAND}) == 0
    used = torch.tensor([[[0], [1]]])
    uneven = RouterRecord(torch.tensor([[[0.0, 1.0], [2.0, 0.0]]]), used, used)
    squares = (np.logaddexp(0, 1) ** 2 + np.logaddexp(2, 0) ** 2) / 2
    assert auxiliary("z_loss", {0: uneven}) == pytest.approx(1e-3 * squares, rel=1e-6)
    both = auxiliary("micro_batch", {0: uneven}) + auxiliary("z_loss", {0: uneven})
    assert auxiliary("micro_batch+z_loss", {0: uneven}) == pytest.approx(both, rel=1e-6)


def test_the_reference_loss_is_that_of_each_domain_in_its_own_block():
    sizes = TINY.model.model_copy(update={"n_experts": 8})
    config = TINY.model_copy(update={"domains": ("a", "b", "c"), "balance": 1.0, "model": sizes})
    spec = SimpleNamespace(n_experts=8, top_k=2)
    moe = SimpleNamespace(spec=lambda layer: spec, layers=(0,))
    strategy = make_strategy("reference", Setting(moe, config, ("a", "b", "c")))
    generator = torch.Generator().manual_seed(0)
    domain = torch.tensor([[0, 0, 2, 2, 2], [0, 2, 2, 0, 0]])  # nothing of b
    logits = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    blocks = reference_blocks(("a", "b", "c"), 8, 2)
    chosen = logits.masked_fill(~blocks[domain], -1e9).topk(2, dim=-1).indices
    chosen[0, 1, 1] = -1
    expected = 0.0
    for d in (0, 2):
        here, block = domain == d, blocks[d].nonzero()[:, 0]
        taken = torch.tensor([float((chosen[here] == e).sum()) for e in block])
        probs = logits[here][:, block].softmax(-1)
        expected += here.double().mean() * balance_loss(probs, taken.double() / taken.sum())
    batch = Batch(torch.zeros(2, 5).long(), domain, 0, True)
    found = strategy.auxiliary_loss({0: RouterRecord(logits, chosen, chosen)}, batch, None)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_the_running_load_moves_towards_each_steps_load():
    strategy = make_strategy("global_running", Setting(None, TINY, ("a", "b")))
    batch = Batch(torch.zeros(1, 2).long(), None, 0, True)
    first = strategy.auxiliary_loss({0: BY_HAND}, batch, None)
    assert float(first) == pytest.approx(auxiliary("micro_batch", {0: BY_HAND}))
    strategy.after_step({0: torch.tensor([1.0, 0.0, 0.0])})
    # f = .9 (1, 0, 0) + .1 (3, 2, 2)/7
    expected = 3 * (0.9 * 0.35 + 0.1 * (3 * 0.35 + 2 * 0.3 + 2 * 0.35) / 7)
    assert float(strategy.auxiliary_loss({0: BY_HAND}, batch, None)) == pytest.approx(0.01 * expected, rel=1e-6)


def test_capacity_keeps_first_choices_and_early_positions():
    # one sequence of four tokens, two experts, factor .5: two slots an expert
    indices = torch.tensor([[[0, 1], [0, 1], [0, 1], [1, 0]]])
    kept = within_capacity(indices, 2, 0.5)
    # expert 0: first choices of tokens 0, 1; expert 1: first choice of token 3, then second choice of token 0
    assert kept.tolist() == [[[True, True], [True, False], [False, False], [True, False]]]
    assert within_capacity(indices, 2, 1.0).all()
    assert not within_capacity(torch.full((1, 4, 2), -1), 2, 1.0).any()


def test_experts_by_score_are_ordered_and_padded():
    scores = torch.tensor([[0.1, 0.5, 0.4], [0.2, 0.3, 0.5]])
    chosen = torch.tensor([[True, True, False], [False, False, False]])
    assert by_score(scores, chosen).tolist() == [[1, 0], [-1, -1]]


def test_reference_blocks_are_as_equal_as_possible_and_named_in_order():
    blocks = reference_blocks(("z", "a", "m"), 8, 2)
    assert blocks.sum(1).tolist() == [2, 3, 3]
    assert blocks[1].nonzero()[:, 0].tolist() == [0, 1, 2]
    assert blocks.sum(0).tolist() == [1] * 8
    for n_experts, top_k in ((2, 1), (8, 3)):
        with pytest.raises(ConfigError, match=f"{n_experts} experts for 3 domains with top_k={top_k}"):
            reference_blocks(("z", "a", "m"), n_experts, top_k)


@pytest.mark.parametrize("name", [*STRATEGIES, "global+capacity", "loss_free+z_loss"])
def test_every_strategy_trains_and_resumes_exactly(name, tmp_path):
    one, other = trainer_of(name), trainer_of(name)
    for _ in range(2):
        made = one.train_step()
    assert np.isfinite(made["loss"])
    one.save_state(tmp_path / "state.pt")
    other.load_state(tmp_path / "state.pt")
    made = [trainer.train_step() for trainer in (one, other)]
    assert made[0]["loss"] == made[1]["loss"]
    after = [model_tensors(t.bridge.original_model) for t in (one, other)]
    assert all(torch.equal(after[0][key], after[1][key]) for key in after[0])
    assert one.evaluate().losses == other.evaluate().losses


def test_reference_routing_is_specialised_by_construction():
    trainer = trainer_of("reference", micro_batches=2)
    trainer.train_step()
    frame = routing_metrics(trainer.evaluate().trace)
    assert frame["specialization"].tolist() == [1.0, 1.0]
    assert frame["mutual_information"].tolist() == pytest.approx([1, 1])


def test_the_block_loss_is_the_cross_entropy_of_the_domains_block_and_teaches_it():
    trainer = trainer_of("block_loss")
    tokens, domain = trainer.micro_batch(0)
    records = trainer.forward(tokens, domain)[1]
    found = trainer.strategy.auxiliary_loss(records, Batch(tokens, domain, 0, True), None)

    def blocks_of(domain: torch.Tensor) -> torch.Tensor:
        return reference_blocks(("letters", "numbers"), 4, 2)[domain]

    expected = sum(-(r.logits.softmax(-1) * blocks_of(domain)).sum(-1).log().mean() for r in records.values())
    assert found.item() == pytest.approx(0.1 * expected.item(), rel=1e-5)

    def share_inside(name: str) -> float:
        """Of the slots that the router fills by itself, the mask taken off."""
        trainer = trainer_of(name, steps=60, micro_batch=8)
        for _ in range(20):
            trainer.train_step()
        tokens, domain = trainer.micro_batch(-1)
        with torch.no_grad():
            records = recorded(trainer.moe, lambda: trainer.moe.bridge(tokens))[1]
        return min(float(blocks_of(domain).gather(-1, r.indices).float().mean()) for r in records.values())

    assert share_inside("reference+block_loss") > 0.9
    assert share_inside("reference") < 0.75


def test_hash_routing_is_a_function_of_the_token_and_random_routing_is_even():
    tokens, _, records = records_of(trainer_of("hash"))
    seen: dict[int, set[tuple[int, ...]]] = {}
    for token, experts in zip(tokens.flatten().tolist(), records[0].indices.flatten(0, 1).tolist()):
        assert len(set(experts)) == 2
        seen.setdefault(token, set()).add(tuple(experts))
    assert all(len(routes) == 1 for routes in seen.values())
    assert len({next(iter(routes)) for routes in seen.values()}) > 3

    trainer = trainer_of("random", micro_batch=64)
    _, _, records = records_of(trainer)
    # 2048 slots: a share's standard deviation is below .011
    torch.testing.assert_close(records[0].load(), torch.full((4,), 0.25), atol=0.045, rtol=0)
    trainer.step = 0
    again = records_of(trainer)[2]
    assert torch.equal(records[1].indices, again[1].indices)
    assert not torch.equal(records[0].indices, records[1].indices)


def test_expert_choice_is_balanced_in_training_and_causal_outside():
    trainer = trainer_of("expert_choice")
    _, _, records = records_of(trainer)
    for entry in records.values():
        assert entry.load().tolist() == [0.25] * 4
    trainer.train_step()
    tokens, domain = trainer.micro_batch(0)
    changed = tokens.clone()
    changed[:, 9:] = 3
    with torch.no_grad():
        one, other = (trainer.forward(t, domain, training=False)[1] for t in (tokens, changed))
    for layer in one:
        routes = [
            {frozenset(e for e in slot if e >= 0) for slot in r[layer].indices[:, :9].flatten(0, 1).tolist()}
            for r in (one, other)
        ]
        assert routes[0] == routes[1]


def test_dropped_slots_have_no_weight_and_the_others_keep_theirs():
    plain, capped = trainer_of("none"), trainer_of("capacity")
    weights = {}
    for name, trainer in (("plain", plain), ("capped", capped)):
        hook = trainer.moe.hook_name("expert_weights", 0)
        batch = Batch(*trainer.micro_batch(0), 0, True)
        read = (hook, lambda value, hook, name=name: weights.__setitem__(name, value.detach().clone()))
        with torch.no_grad(), trainer.bridge.hooks(fwd_hooks=[*trainer.strategy.dropping_hooks(batch), read]):
            trainer.model(batch.tokens, use_cache=False)
    kept = records_of(capped)[2][0].indices >= 0
    assert 0 < int((~kept).sum()) < kept.numel()
    torch.testing.assert_close(weights["capped"], weights["plain"] * kept)
    # outside training nothing is dropped
    assert (records_of(capped, training=False)[2][0].indices >= 0).all()


def test_balance_counts_slots_before_they_are_dropped():
    # a lopsided first layer, so that dropping would even it out
    trainers = [trainer_of(name) for name in ("micro_batch", "capacity+micro_batch")]
    for trainer in trainers:
        shut_expert(trainer, 0)
    plain, capped = (records_of(trainer)[2] for trainer in trainers)
    assert torch.equal(capped[0].chosen, plain[0].indices)
    assert not torch.equal(capped[0].indices, capped[0].chosen)
    assert torch.equal(capped[0].load(), plain[0].load())
    batch = Batch(*trainers[0].micro_batch(0), 0, True)
    losses = [
        trainer.strategy.auxiliary_loss({0: records[0]}, batch, None)
        for trainer, records in zip(trainers, (plain, capped))
    ]
    assert float(losses[0]) == pytest.approx(float(losses[1]))


def test_sigmoid_scores_choose_the_same_experts_with_other_weights():
    trainer = trainer_of("sigmoid")
    tokens, domain = trainer.micro_batch(0)
    kept = {}
    read = (trainer.moe.hook_name("expert_weights", 0), lambda value, hook: kept.update(weights=value.detach().clone()))
    batch = Batch(tokens, domain, 0, True)
    with torch.no_grad(), trainer.bridge.hooks(fwd_hooks=[*trainer.strategy.fwd_hooks(batch), read]):
        trainer.model(tokens, use_cache=False)
    records = records_of(trainer)[2]
    chosen = records[0].logits.topk(2, dim=-1)
    assert torch.equal(chosen.indices, records[0].indices)
    expected = chosen.values.sigmoid() / chosen.values.sigmoid().sum(-1, keepdim=True)
    torch.testing.assert_close(kept["weights"], expected, atol=1e-6, rtol=1e-5)


def test_the_bias_moves_against_the_load_and_balances_a_lopsided_router():
    trainer = trainer_of("loss_free", bias_rate=0.01, lr=1e-9, micro_batch=16, steps=60)
    seen = {}
    read = (trainer.moe.hook_name("router_in", 0), lambda value, hook: seen.update(mean=value.flatten(0, -2).mean(0)))
    with torch.no_grad():
        with trainer.bridge.hooks(fwd_hooks=[read]):
            trainer.model(trainer.micro_batch(0)[0], use_cache=False)
        gate = model_tensors(trainer.bridge.original_model)["model.layers.0.mlp.gate.weight"]
        gate[0] += 0.5 * seen["mean"] / seen["mean"].square().sum()  # half a nat for expert 0, for the average token
    loads = [trainer.train_step()["loads"][0]]
    before = copy.deepcopy(trainer.strategy.bias[0])
    loads.append(trainer.train_step()["loads"][0])
    torch.testing.assert_close(trainer.strategy.bias[0] - before, 0.01 * torch.sign(0.25 - loads[1]))
    loads += [trainer.train_step()["loads"][0] for _ in range(50)]
    assert max_violation(loads[0]) > 0.6
    assert max_violation(torch.stack(loads[-10:]).mean(0)) < 0.15


def test_exact_global_load_is_that_of_the_whole_step():
    trainer = trainer_of("global", micro_batches=3, domains_per_micro_batch=1)
    made = trainer._load_of_step(range(3))
    with torch.no_grad():
        every = [trainer.forward(*trainer.micro_batch(micro))[1] for micro in range(3)]
    for layer, load in made.items():
        joined = torch.cat([r[layer].indices.flatten() for r in every])
        torch.testing.assert_close(load, torch.bincount(joined, minlength=4) / joined.numel())


def test_unknown_strategies_are_refused():
    for bad in ("magic", "global+magic", "global+global", ""):
        with pytest.raises(ConfigError, match="several joined by"):
            check_strategy(bad, TINY, ("letters", "numbers"))


def loads_after_a_shut_start(name: str) -> torch.Tensor:
    """[layer, expert]: loads over the last 8 of 30 steps, where no token took expert 0 in the beginning."""
    trainer = trainer_of(name, bias_rate=0.02, balance=0.3, lr=0.02, micro_batch=8, steps=30)
    for layer in (0, 1):
        shut_expert(trainer, layer)
    made = [torch.stack(list(trainer.train_step()["loads"].values())) for _ in range(30)]
    assert made[0][:, 0].max() < 0.05
    return torch.stack(made[-8:]).mean(0)


def test_without_balancing_experts_stay_dead():
    assert loads_after_a_shut_start("none")[1, 0] < 0.01


@pytest.mark.parametrize("name", ["sequence", "micro_batch", "global", "global_running", "loss_free", "sigmoid"])
def test_balanced_strategies_have_no_dead_expert_even_from_a_start_with_one(name):
    assert loads_after_a_shut_start(name).min() > 0.1


def shut_expert(trainer: Trainer, layer: int) -> None:
    """Lower expert 0's logit, for the average token, by so much that it is nowhere among the top k."""
    seen = {}
    read = (trainer.moe.hook_name("router_in", layer), lambda value, hook: seen.update(x=value.flatten(0, -2)))
    with torch.no_grad():
        with trainer.bridge.hooks(fwd_hooks=[read]):
            trainer.model(trainer.micro_batch(0)[0], use_cache=False)
        mean = seen["x"].mean(0)
        gate = model_tensors(trainer.bridge.original_model)[f"model.layers.{layer}.mlp.gate.weight"]
        gate[0] -= 4 * mean / mean.square().sum()
