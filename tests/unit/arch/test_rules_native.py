"""Every rule against the router it describes: transformers' own module, its logits injected, nothing of ours in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_interp.arch.families import build_spec, find_container
from moe_interp.arch.rules import (
    HashTable,
    RoutingRule,
    ScoreRule,
    SigmoidTopK,
    SoftmaxTopK,
    SparseMixer,
    SwitchTop1,
    TopKSigmoid,
    TopKSoftmax,
)
from moe_interp.arch.spec import MoESpec
from tests import tiny

SCALES = (0.01, 0.3, 1.0, 3.0, 10.0, 25.0)  # beyond, a softmax in float32 underflows and experts tie at zero
TOKENS = tiny.random_tokens(len(SCALES), 23, seed=5)  # an odd number, so that vectorised operations have a remainder
DTYPES = [torch.float32, torch.bfloat16]
# their routers compute in float32 whatever the number format of the model
FLOAT32_ROUTERS = (
    *("deepseek_v2", "deepseek_v2_greedy", "deepseek_v3", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "nemotron_h"),
    *("ernie4_5_moe", "switch_transformers", "granite_moe", "granite_moe_hybrid", "jetmoe", "afmoe"),
)
Route = tuple[Tensor, Tensor]


def spec_of(layer: tiny.NativeMoE) -> MoESpec:
    found = find_container(layer.block)
    assert found is not None
    return build_spec(*found, layer.block, layer.label)


def random_logits(dtype: torch.dtype, n_experts: int = 8) -> Tensor:
    """``[scale, pos, expert]``: every token a shuffle of distinct values, so that no two experts tie."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(SCALES), TOKENS.shape[1], n_experts)
    jitter = torch.rand(shape, generator=generator) / 3
    ranks = torch.rand(shape, generator=generator).argsort(-1)
    return ((ranks + jitter - n_experts / 2) / 2 * torch.tensor(SCALES)[:, None, None]).to(dtype)


@contextmanager
def injected(layers: dict[tiny.Label, tiny.NativeMoE], logits: Tensor) -> Iterator[dict[tiny.Label, Any]]:
    """Make each router's linear map give these logits exactly (identity weight), and collect what it returns."""
    returned: dict[tiny.Label, Any] = {}
    handles = []

    def inject(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        x = args[0]
        padded = nn.functional.pad(logits.to(x.dtype), (0, x.shape[-1] - logits.shape[-1]))
        return padded.reshape(x.shape), *args[1:]

    for label, layer in layers.items():
        with torch.no_grad():
            layer.weight.copy_(torch.eye(*layer.weight.shape))
        handles += [
            layer.linear.register_forward_pre_hook(inject),
            layer.router.register_forward_hook(lambda m, a, out, label=label: returned.__setitem__(label, out)),
        ]
    try:
        yield returned
    finally:
        for handle in handles:
            handle.remove()


def dense(route: Route, n_experts: int = 8) -> Tensor:
    """``[*token, expert]`` weights, NaN where an expert is not chosen."""
    indices, weights = route
    full = torch.full((*indices.shape[:-1], n_experts + 1), torch.nan, dtype=weights.dtype)
    return full.scatter(-1, indices.masked_fill(indices < 0, n_experts), weights)[..., :n_experts]


def native_route(name: str, layer: tiny.NativeMoE, out: Any) -> Route:
    """What the router itself chose, ``[token, slot]``, read from its return value."""
    if name.startswith("llama4"):  # weights at full width, 0 elsewhere: its slots are by descending logit
        indices = out[1].sort(-1, descending=True).indices[:, : layer.router.top_k]
        return indices, out[0].gather(-1, indices)
    if name == "jetmoe":  # (token, slot) pairs sorted by expert
        order, _, gates, sizes, logits = out
        experts = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        indices, weights = torch.empty_like(experts), torch.empty_like(gates)
        indices[order], weights[order] = experts, gates
        return indices.view(len(logits), -1), weights.view(len(logits), -1)
    if name == "switch_transformers":
        chosen, weights, _ = out
        indices = torch.where(chosen.any(-1), chosen.argmax(-1), -1)
        return indices.unsqueeze(-1), torch.where(indices.unsqueeze(-1) < 0, 0.0, weights)
    _, weights, indices = out
    return indices, weights * 1.5 if name == "laguna" else weights  # the block applies its scale after the experts


def logits_of(layer: tiny.NativeMoE, logits: Tensor, indices: Tensor) -> Tensor:
    """The injected logits as the native linear map gives them: with its bias, in the shape of its route."""
    logits = logits if layer.bias is None else logits + layer.bias.detach()
    return logits.reshape(*indices.shape[:-1], -1)


def same(ours: Route, native: Route) -> bool:
    return (
        ours[0].dtype == native[0].dtype == torch.int64
        and ours[1].dtype == native[1].dtype
        and torch.equal(ours[0], native[0])
        and torch.equal(ours[1], native[1])
    )


def layers_run(name: str, dtype: torch.dtype, logits: Tensor, prepare: Callable[[Any], None] = lambda hf: None) -> Any:
    """``[(spec, injected logits, native route)]`` of every MoE layer that is not hash-routed."""
    hf = tiny.build_hf(name, dtype=dtype)
    prepare(hf)
    layers = tiny.native_layers(hf)
    try:
        with injected(layers, logits) as returned:
            tiny.native_logits(hf, name, TOKENS)
    except NotImplementedError as error:  # pragma: no cover - depends on the build of torch
        pytest.skip(f"{name} does not run in {dtype} here: {error}")
    runs = []
    for label, layer in layers.items():
        if not hasattr(layer.router, "tid2eid"):
            native = native_route(name, layer, returned[label])
            runs.append((spec_of(layer), logits_of(layer, logits, native[0]), native))
    assert runs
    return runs


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_route_is_the_router_s_own_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    for spec, logits, native in layers_run(family, dtype, random_logits(dtype)):
        rule = spec.rule_for(dtype)
        fed = logits.float() if family in FLOAT32_ROUTERS else logits
        ours = rule.route(fed)
        assert same(ours, native), (family, spec.layer, ours[1].dtype, native[1].dtype)
        assert torch.equal(rule.weights(fed, native[0]), native[1])
        assert spec.rule.dtype == rule.dtype


def test_hash_layers_take_their_experts_from_the_table() -> None:
    hf = tiny.build_hf("deepseek_v4")
    layers = {label: layer for label, layer in tiny.native_layers(hf).items() if hasattr(layer.router, "tid2eid")}
    assert list(layers) == [0]
    logits = random_logits(torch.float32)
    with injected(layers, logits) as returned:
        tiny.native_logits(hf, "deepseek_v4", TOKENS)
    _, weights, indices = returned[0]
    rule = spec_of(layers[0]).rule
    assert isinstance(rule, HashTable)
    assert same(rule.route(logits.flatten(0, 1), TOKENS.flatten()), (indices, weights))


# --- choice_logits ranks as the router does -------------------------------------------------------------------


def test_choice_logits_rank_as_the_router_does(family: str) -> None:
    # a sigmoid in float32 saturates at 17: the largest scales leave nothing to rank by
    injected_logits = random_logits(torch.float32)[[0, 1, 2, 3, 3, 3]]
    for spec, logits, (indices, _) in layers_run(family, torch.float32, injected_logits):
        ranked = spec.rule.choice_logits(logits).topk(spec.top_k, dim=-1).indices
        kept = (indices >= 0).all(-1)
        assert torch.equal(ranked.sort(-1).values[kept], indices.sort(-1).values[kept]), spec.layer
        excluded = spec.rule.choice_logits(logits).isneginf()
        assert int(excluded.sum(-1).unique()) == (4 if family in GROUPED else 0)


GROUPED = ("deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa")


def test_log_policy_sums_to_one(family: str) -> None:
    hf = tiny.build_hf(family)
    for layer in tiny.native_layers(hf).values():
        for logits in (random_logits(torch.float32), random_logits(torch.bfloat16)):
            policy = spec_of(layer).rule.log_policy(logits)
            assert policy.dtype == torch.float32
            assert policy.shape == logits.shape
            torch.testing.assert_close(policy.exp().sum(-1), torch.ones(policy.shape[:-1]), rtol=0, atol=1e-5)
            assert torch.isfinite(policy).all()
            # the order is that of the logits, wherever float32 can tell (the soft-cap of laguna saturates)
            gaps = policy.gather(-1, logits.argsort(-1)).diff(dim=-1)
            assert (gaps >= 0).all()


# --- one mutation per family must show ------------------------------------------------------------------------


def set_on_routers(**values: Any) -> Callable[[Any], None]:
    def prepare(hf: Any) -> None:
        for layer in tiny.native_layers(hf).values():
            for name, value in values.items():
                assert hasattr(layer.router, name)
                setattr(layer.router, name, value)

    return prepare


# with two groups open, the two best experts are never in a third; one group alone limits nothing
BINDING_GROUPS = {"deepseek_v2": {"topk_group": 1}, "nemotron_h": {"num_group": 4, "topk_group": 2}}


def natural_runs(name: str) -> list[tuple[MoESpec, Tensor, Route]]:
    """``(spec, the logits the tiny model itself computes, native route)`` of every MoE layer."""
    hf = tiny.build_hf(name)
    set_on_routers(**BINDING_GROUPS.get(name, {}))(hf)
    returned: dict[tiny.Label, Any] = {}
    layers = tiny.native_layers(hf)
    for label, layer in layers.items():
        layer.router.register_forward_hook(lambda m, a, out, label=label: returned.__setitem__(label, out))
    with tiny.recorded_inputs(hf) as inputs:
        tiny.native_logits(hf, name, TOKENS)
    runs = []
    for label, layer in layers.items():
        if not hasattr(layer.router, "tid2eid"):
            native = native_route(name, layer, returned[label])
            logits = tiny.raw_logits(layer, inputs[label])
            runs.append((spec_of(layer), logits.reshape(*native[0].shape[:-1], -1), native))
    return runs


def mutants(rule: RoutingRule) -> dict[str, RoutingRule]:
    """The rule with one of its parts left out or swapped."""
    found: dict[str, RoutingRule] = {}

    def put(what: str, **changes: Any) -> None:
        found[what] = dataclasses.replace(rule, **changes)

    if isinstance(rule, ScoreRule):
        put("normalisation", normalize=not rule.normalize)
        for part in ("bias", "expert_scale", "scale_after_cast", "group_score"):
            if getattr(rule, part) is not None:
                put(part, **{part: None})
        if rule.scale not in (None, 1.0):
            put("scale", scale=None)
        if rule.group_score is not None:
            put("group ranking", group_score="top2" if rule.group_score == "max" else "max")
            put("group limit", top_groups=1 if rule.top_groups > 1 else 2)
    if isinstance(rule, SigmoidTopK):
        if rule.softcap is not None:
            put("soft-cap", softcap=None)
        put("score", score=torch.exp if rule.score is torch.sigmoid else torch.sigmoid)
    if isinstance(rule, SoftmaxTopK):
        common = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}
        found["score"] = SigmoidTopK(**common)
    if isinstance(rule, TopKSoftmax):
        found["normalisation"] = SoftmaxTopK(n_experts=rule.n_experts, top_k=rule.top_k, dtype=rule.dtype)
    if isinstance(rule, TopKSigmoid):
        found["score"] = TopKSoftmax(n_experts=rule.n_experts, top_k=rule.top_k, dtype=rule.dtype)
    if isinstance(rule, SparseMixer):
        put("jitter", jitter=0.1)
        found["masked maxima"] = TopKSoftmax(n_experts=rule.n_experts, top_k=rule.top_k)
    if isinstance(rule, SwitchTop1):
        put("capacity", capacity=2)
        found["normalisation"] = SoftmaxTopK(n_experts=rule.n_experts, top_k=1, normalize=True)
    put("top_k", top_k=rule.top_k + 1) if not isinstance(rule, SwitchTop1) else None
    return found


def test_a_rule_with_a_part_left_out_is_caught(family: str) -> None:
    """In every layer, on the logits that the tiny model itself computes."""
    for spec, logits, native in natural_runs(family):
        assert torch.equal(spec.rule.route(logits)[0], native[0])
        torch.testing.assert_close(spec.rule.route(logits)[1], native[1], rtol=1e-5, atol=1e-6)
        broken = mutants(spec.rule)
        assert len(broken) >= 2
        for what, rule in broken.items():
            indices, weights = rule.route(logits)
            if indices.shape == native[0].shape and torch.equal(indices, native[0]):
                assert (weights - native[1]).abs().max() >= 1e-3, (family, spec.layer, what)


def test_the_logits_bias_of_gpt_oss_is_part_of_the_logits() -> None:
    hf = tiny.build_hf("gpt_oss")
    biases = {label: layer.bias.detach() for label, layer in tiny.native_layers(hf).items()}
    for spec, logits, (indices, _) in natural_runs("gpt_oss"):
        assert not torch.equal(spec.rule.route(logits - biases[spec.layer])[0], indices)


# --- options that the tiny configurations leave at their default ----------------------------------------------


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("olmoe", {"norm_topk_prob": True}),
    ("qwen3_moe", {"norm_topk_prob": False, "top_k": 4}),
    ("deepseek_v3", {"norm_topk_prob": False}),
    ("deepseek_v3", {"top_k": 4, "num_group": 2, "topk_group": 1}),
    ("deepseek_v2", {"top_k": 4, "num_group": 2, "topk_group": 1}),
    ("lfm2_moe", {"norm_topk_prob": False, "use_expert_bias": False, "routed_scaling_factor": 1.7}),
    ("laguna", {"router_logit_softcapping": 0.0, "top_k": 3}),
    ("ernie4_5_moe", {"norm_min": 0.5}),
    ("gpt_oss", {"top_k": 5}),
    ("granite_moe", {"top_k": 5}),
    ("jetmoe", {"top_k": 5}),
    ("llama4", {"top_k": 1}),
    ("phimoe", {"router_jitter_noise": 0.3}),
    ("switch_transformers", {"expert_capacity": 2}),
    ("switch_transformers", {"dtype": torch.bfloat16}),
    ("deepseek_v4", {"top_k": 6}),
    ("mixtral", {"top_k": 8}),
]


@pytest.mark.parametrize(
    "name, options", OPTIONS, ids=lambda value: "-".join([value] if isinstance(value, str) else value)
)
def test_options_of_the_router_reach_its_rule(name: str, options: dict[str, Any]) -> None:
    """Read from the router, as a checkpoint's configuration sets them."""
    logits = random_logits(torch.float32)
    for spec, fed, native in layers_run(name, torch.float32, logits, set_on_routers(**options)):
        fed = fed.to(torch.bfloat16) if options.get("dtype") == torch.bfloat16 else fed
        assert same(spec.rule.route(fed), native), spec.layer


def test_switch_counts_capacity_along_each_sequence() -> None:
    prepare = set_on_routers(expert_capacity=2)
    for spec, logits, (indices, weights) in layers_run(
        "switch_transformers", torch.float32, random_logits(torch.float32), prepare
    ):
        ours = spec.rule.route(logits)
        assert same(ours, (indices, weights))
        overflown = indices < 0
        assert 0 < int(overflown.sum()) < overflown.numel()
        assert (weights[overflown] == 0).all()
        per_sequence = nn.functional.one_hot(indices.squeeze(-1) + 1, 9).sum(1)[:, 1:]
        assert int(per_sequence.max()) == 2
