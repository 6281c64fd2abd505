"""`moe.verify()` finds mistakes of a model and of this library: each is planted, and the check that finds it named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_interp.arch.expert_functions import StackedExperts
from moe_interp.arch.rules import RoutingRule, ScoreRule, SigmoidTopK, SoftmaxTopK, TopKSigmoid, TopKSoftmax
from moe_interp.hooks import experts
from moe_interp.hooks import layer as layer_module
from moe_interp.hooks.attach import MoEHooks, attach
from moe_interp.hooks.layer import LayerPass, OpenLayer
from moe_interp.hooks.passes import PassContext
from moe_interp.types import Layer
from tests import tiny
from tests.integration.hooks.support import patch_mix

Patch = pytest.MonkeyPatch
Mistake = Callable[[MoEHooks, Patch], None]

WRITING, SHOWN = "writing does what the table says", "a hook shows the block's own value"
GRADIENT, THROUGH = "the gradient is the plain model's", "pass-through changes nothing"
RULE, OTHERS = "the rule is the router's", "weights of other experts are as defined"
CHOICE, POSITION = "choice logits are as defined", "a position is its token, with a cache"
LAYER = 1


# --- of the model's modules: what the family's own code does, but for one thing --------------------------------


def of_experts(change: Callable[..., Tensor]) -> Mistake:
    """``change(native, hidden, indices, weights)`` in the place of the experts' forward."""

    def plant(moe: MoEHooks, monkeypatch: Patch) -> None:
        with moe.suspended():
            for layer in moe.layers:
                module: Any = moe.spec(layer).experts
                native = module.forward
                module.forward = lambda h, i, w, native=native: change(native, h, i, w)

    return plant


def of_outputs(part: str, change: Callable[[Any], Any]) -> Mistake:
    """``change`` of what the router or the block (``container``) returns."""

    def plant(moe: MoEHooks, monkeypatch: Patch) -> None:
        with moe.suspended():
            for layer in moe.layers:
                module: Any = getattr(moe.spec(layer), part)
                native = module.forward
                module.forward = lambda *args, native=native, **kwargs: change(native(*args, **kwargs))

    return plant


def one_scaled(native: Any, h: Tensor, i: Tensor, w: Tensor) -> Tensor:
    return native(h, i, w) + 0.5 * native(h, i, w * (i == 3).to(w.dtype))


MODULES: dict[str, tuple[Mistake, str, torch.dtype, tuple[str, str]]] = {
    "experts that renormalise": (
        of_experts(lambda native, h, i, w: native(h, i, w / w.sum(-1, keepdim=True).clamp_min(1e-9))),
        "qwen3_moe",
        torch.float32,
        (WRITING, "expert_weights"),
    ),
    "experts that renormalise, with a scale": (
        of_experts(lambda native, h, i, w: native(h, i, 2.5 * w / w.sum(-1, keepdim=True).clamp_min(1e-9))),
        "deepseek_v3",
        torch.float32,
        (WRITING, "expert_weights"),
    ),
    "experts that square the weights": (
        of_experts(lambda native, h, i, w: native(h, i, w * w)),
        "gemma4_text",
        torch.float32,
        (THROUGH, "expert_out"),
    ),
    "experts that read k slots only": (
        of_experts(lambda native, h, i, w: native(h, i[:, :2], w[:, :2])),
        "mixtral",
        torch.float32,
        (WRITING, "expert_indices"),
    ),
    "experts under other numbers": (
        of_experts(lambda native, h, i, w: native(h, (i + 1) % 8, w)),
        "gpt_oss",
        torch.bfloat16,
        (SHOWN, "routed_out"),
    ),
    "one expert scaled": (of_experts(one_scaled), "qwen3_moe", torch.bfloat16, (WRITING, "expert_indices")),
    "one expert scaled, beside shared ones": (
        of_experts(one_scaled),
        "ernie4_5_moe",
        torch.bfloat16,
        (WRITING, "expert_indices"),
    ),
    "a block scaled": (
        of_outputs("container", lambda out: out * 1.1),
        "olmoe",
        torch.bfloat16,
        (WRITING, "routed_out"),
    ),
    "a block scaled whose own code is opened": (
        of_outputs("container", lambda out: out * 1.1),
        "jetmoe",
        torch.bfloat16,
        (WRITING, "expert_indices"),
    ),
    "a router that returns other logits": (
        of_outputs("router", lambda out: (out[0] * 1.1, *out[1:])),
        "qwen3_moe",
        torch.float32,
        (RULE, "expert_indices"),
    ),
    "a router that scales its weights": (
        of_outputs("router", lambda out: (out[0], out[1] * 1.001, out[2])),
        "deepseek_v3",
        torch.float32,
        (RULE, "expert_indices"),
    ),
    "a router that chooses the next expert": (
        of_outputs("router", lambda out: (out[0], out[1], (out[2] + 1) % 8)),
        "minimax_m2",
        torch.float32,
        (RULE, "expert_indices"),
    ),
}


# --- of the rules ----------------------------------------------------------------------------------------------


def method(owner: type, name: str, change: Callable[..., Any]) -> Mistake:
    """``change(native, self, *arguments)`` in the place of a method."""

    def plant(moe: MoEHooks, monkeypatch: Patch) -> None:
        native = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, *args, **kwargs: change(native, self, *args, **kwargs))

    return plant


def chosen_ones_only(native: Any, rule: RoutingRule, logits: Tensor, indices: Tensor) -> Tensor:
    """Right for the router's own set, wrong by a fifth for every other."""
    weights, own = native(rule, logits, indices), rule._select(logits)
    if own.shape != indices.shape:
        return weights * 1.2
    is_own = (own.sort(-1).values == indices.sort(-1).values).all(-1, keepdim=True)
    return torch.where(is_own, weights, weights * 1.2)


def doubled(value: Tensor) -> Tensor:
    return value + (value - value.detach())


RULES: dict[str, tuple[Mistake, str, torch.dtype, tuple[str, str]]] = {
    "weights off by a thousandth": (
        method(ScoreRule, "_weigh_scores", lambda native, self, s, i: native(self, s, i) * 1.001),
        "olmoe",
        torch.float32,
        (RULE, "expert_indices"),
    ),
    "weights of unchosen experts": (
        method(SoftmaxTopK, "weights", chosen_ones_only),
        "jamba",
        torch.float32,
        (OTHERS, "router_logits"),
    ),
    "weights of unchosen experts, by sigmoid": (
        method(SigmoidTopK, "weights", chosen_ones_only),
        "lfm2_moe",
        torch.bfloat16,
        (OTHERS, "router_logits"),
    ),
    "weights of unchosen experts, of the chosen logits": (
        method(TopKSoftmax, "weights", chosen_ones_only),
        "granite_moe",
        torch.float32,
        (OTHERS, "router_logits"),
    ),
    "a ranking without the bias": (
        method(ScoreRule, "choice_logits", lambda native, self, logits: logits),
        "ernie4_5_moe",
        torch.float32,
        ("ranked as the router ranks", "router_logits"),
    ),
    "a ranking without the groups": (
        method(SigmoidTopK, "choice_logits", lambda native, self, logits: self._scores(logits) + self.bias),
        "deepseek_v3",
        torch.float32,
        ("ranked as the router ranks", "router_logits"),
    ),
    "a ranking upside down": (
        method(RoutingRule, "choice_logits", lambda native, self, logits: -logits),
        "gpt_oss",
        torch.float32,
        ("ranked as the router ranks", "router_logits"),
    ),
    "choice scores in the place of their logs": (
        method(ScoreRule, "choice_logits", lambda native, self, logits: native(self, logits).exp()),
        "qwen3_moe",
        torch.float32,
        (CHOICE, "router_logits"),
    ),
    "choice logits twice as far apart": (
        method(ScoreRule, "choice_logits", lambda native, self, logits: 2 * native(self, logits)),
        "deepseek_v3",
        torch.bfloat16,
        (CHOICE, "router_logits"),
    ),
    "choice logits of a sigmoid taken as they are": (
        method(TopKSigmoid, "choice_logits", lambda native, self, logits: logits),
        "llama4",
        torch.float32,
        (CHOICE, "router_logits"),
    ),
    "a policy of another temperature": (
        method(RoutingRule, "log_policy", lambda native, self, logits: native(self, 2 * logits)),
        "mixtral",
        torch.float32,
        ("the policy is as defined", "router_logits"),
    ),
    "a policy of the logits": (
        method(SigmoidTopK, "log_policy", lambda native, self, logits: RoutingRule.log_policy(self, logits)),
        "glm4_moe",
        torch.bfloat16,
        ("the policy is as defined", "router_logits"),
    ),
    "a rule that fails": (
        method(RoutingRule, "route", lambda native, self, *args: {}["no such thing"]),
        "olmoe",
        torch.float32,
        ("rules hold", "all"),
    ),
    "a gradient of the rule doubled": (
        method(ScoreRule, "_weigh_scores", lambda native, self, s, i: doubled(native(self, s, i))),
        "olmoe",
        torch.float32,
        (GRADIENT, "router_logits"),
    ),
}


# --- of the hooks ----------------------------------------------------------------------------------------------


def of_firing(change: Callable[[Tensor, Tensor], Tensor], *names: str) -> Mistake:
    """``change(result, value)`` of what a hook returned, at some hooks or at all; others pass as they are."""

    def plant(moe: MoEHooks, monkeypatch: Patch) -> None:
        native = OpenLayer._run_hooks

        def run_hooks(self: OpenLayer, name: str, value: Tensor, owned: bool) -> tuple[Tensor, bool]:
            result, is_written = native(self, name, value, owned)
            at = (not names or name in names) and name in self.points and self.is_hooked(name)
            return (change(result, value), True) if at else (result, is_written)

        monkeypatch.setattr(OpenLayer, "_run_hooks", run_hooks)

    return plant


def where_edited(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The same for edits only: what is handed on as it was stays right."""
    return lambda new, old: new if new.shape == old.shape and torch.equal(new, old) else change(new)


def in_mix(before: Callable[[LayerPass], None]) -> Mistake:
    return lambda moe, monkeypatch: patch_mix(monkeypatch, before)


def weights_twice(run: LayerPass) -> None:
    assert run.weights is not None
    run.weights = run.weights * run.weights


def empty_slots_run(run: LayerPass) -> None:
    assert run.indices is not None
    assert run.weights is not None
    run.weights = run.weights.masked_fill(run.indices < 0, 0.3)
    run.indices = run.indices.clamp(min=0)


def shared_twice(moe: MoEHooks, monkeypatch: Patch) -> None:
    """The edited shared output is added to the block's own instead of replacing it."""
    monkeypatch.setattr(layer_module, "is_edited", lambda new, old: True)
    native = experts.fire_block_outputs

    def fire_block_outputs(layer: OpenLayer, run: LayerPass, routed: Tensor) -> Tensor:
        shared = run.shared_out
        out = native(layer, run, routed)
        return out if shared is None or not layer.is_hooked("shared_out") else out + shared.reshape(out.shape)

    monkeypatch.setattr(experts, "fire_block_outputs", fire_block_outputs)


def aliased(moe: MoEHooks, monkeypatch: Patch) -> None:
    """Hooks are handed the model's own tensors: an edit in place reaches what else reads them."""

    def run_hooks(self: OpenLayer, name: str, value: Tensor, owned: bool) -> tuple[Tensor, bool]:
        return (self.points[name](value), True) if name in self.points and self.is_hooked(name) else (value, False)

    monkeypatch.setattr(OpenLayer, "_run_hooks", run_hooks)


def past_off_by_one(moe: MoEHooks, monkeypatch: Patch) -> None:
    native = MoEHooks.n_past.fget
    assert native is not None
    monkeypatch.setattr(MoEHooks, "n_past", property(lambda self: max(native(self) - 1, 0)))


def past_forgotten(moe: MoEHooks, monkeypatch: Patch) -> None:
    monkeypatch.setattr(MoEHooks, "n_past", property(lambda self: 0))


def span_with(past: Callable[[int], int]) -> Mistake:
    """Every pass is taken to continue another number of tokens than it does."""

    def plant(moe: MoEHooks, monkeypatch: Patch) -> None:
        native = MoEHooks.pass_context

        def pass_context(self: MoEHooks, layer: Layer) -> PassContext:
            right = native(self, layer)
            return replace(right, n_past=past(right.n_past))

        monkeypatch.setattr(MoEHooks, "pass_context", pass_context)

    return plant


def other_expert_functions(moe: MoEHooks, monkeypatch: Patch) -> None:
    native = StackedExperts.output
    monkeypatch.setattr(StackedExperts, "output", lambda self, h, e: native(self, h, e) * (1.5 if e == 3 else 1.0))


HOOKS: dict[str, tuple[Mistake, str, torch.dtype, tuple[str, str]]] = {
    "logits that nobody reads": (
        of_firing(lambda new, old: old, "router_logits"),
        "olmoe",
        torch.float32,
        ("an edit changes the logits", "router_logits"),
    ),
    "outputs off by a hundredth": (
        of_firing(lambda new, old: new * 1.01, "expert_out"),
        "olmoe",
        torch.float32,
        (THROUGH, "expert_out"),
    ),
    "logits at the next token": (
        of_firing(where_edited(lambda new: new.roll(1, 1)), "router_logits"),
        "mixtral",
        torch.float32,
        (WRITING, "router_logits"),
    ),
    "weights in the other sequence": (
        of_firing(where_edited(lambda new: new.flip(0)), "expert_weights"),
        "granite_moe",
        torch.float32,
        (WRITING, "expert_weights"),
    ),
    "weights in the next slot": (
        of_firing(where_edited(lambda new: new.roll(1, -1)), "expert_weights"),
        "deepseek_v3",
        torch.bfloat16,
        (WRITING, "expert_weights"),
    ),
    "outputs in the next slot": (
        of_firing(where_edited(lambda new: new.roll(1, 2)), "expert_out"),
        "gpt_oss",
        torch.float32,
        (WRITING, "expert_out"),
    ),
    "neurons in the next slot": (
        of_firing(lambda new, old: new.roll(1, 2), "expert_post"),
        "llama4",
        torch.float32,
        (THROUGH, "expert_post"),
    ),
    "router's input at the token before": (
        of_firing(where_edited(lambda new: new.roll(-1, 1)), "router_in"),
        "minimax_m2",
        torch.float32,
        (WRITING, "router_in"),
    ),
    "probabilities at the next token": (
        of_firing(where_edited(lambda new: new.roll(1, 1)), "router_probs"),
        "qwen3_moe",
        torch.float32,
        (WRITING, "router_probs"),
    ),
    "the sum at the next token": (
        of_firing(where_edited(lambda new: new.roll(1, 1)), "routed_out"),
        "laguna",
        torch.float32,
        (WRITING, "routed_out"),
    ),
    "an edit half as large": (
        of_firing(lambda new, old: (new + old) / 2, "shared_out"),
        "deepseek_v2",
        torch.float32,
        (WRITING, "shared_out"),
    ),
    "shared experts beside the block unedited": (
        of_firing(lambda new, old: (new + old) / 2, "shared_out"),
        "granite_moe_hybrid",
        torch.float32,
        (WRITING, "shared_out"),
    ),
    "weights applied twice": (in_mix(weights_twice), "jamba", torch.bfloat16, (THROUGH, "expert_out")),
    "empty slots that run": (in_mix(empty_slots_run), "olmoe", torch.float32, (WRITING, "expert_indices")),
    "shared experts counted twice": (shared_twice, "ernie4_5_moe", torch.float32, (WRITING, "shared_out")),
    "edits in the model's own tensors": (aliased, "olmoe", torch.float32, ("an edit in place counts", "router_logits")),
    "an expert's functions scaled": (
        other_expert_functions,
        "qwen3_moe",
        torch.bfloat16,
        (WRITING, "expert_indices"),
    ),
    "one past token too few": (
        past_off_by_one,
        "olmoe",
        torch.float32,
        ("positions in the cache are counted", "expert_indices"),
    ),
    "no past tokens": (
        past_forgotten,
        "deepseek_v3",
        torch.float32,
        ("positions in the cache are counted", "expert_indices"),
    ),
    "interventions one token early": (
        span_with(lambda n: max(n - 1, 0)),
        "olmoe",
        torch.float32,
        (POSITION, "expert_indices"),
    ),
    "interventions without a past": (span_with(lambda n: 0), "llama4", torch.float32, (POSITION, "expert_indices")),
    **{
        f"a gradient stopped at {hook} of {name}": (
            of_firing(lambda new, old: new.detach(), hook),
            name,
            dtype,
            (GRADIENT, earlier),
        )
        for hook, earlier, name, dtype in (
            ("router_logits", "router_in", "deepseek_v3", torch.float32),
            ("expert_out", "expert_post", "gpt_oss", torch.bfloat16),
            ("routed_out", "expert_out", "nemotron_h", torch.float32),
        )
    },
    **{
        f"a gradient doubled at {hook} of {name}": (
            of_firing(lambda new, old: doubled(new), hook),
            name,
            dtype,
            (GRADIENT, hook),
        )
        for hook, name, dtype in (
            ("router_in", "glm4_moe", torch.float32),
            ("router_logits", "mixtral", torch.bfloat16),
            ("router_probs", "olmoe", torch.float32),
            ("expert_weights", "llama4", torch.float32),
            ("expert_post", "afmoe", torch.float32),
            ("expert_out", "switch_transformers", torch.float32),
            ("routed_out", "gemma4_text", torch.bfloat16),
            ("shared_out", "qwen2_moe", torch.float32),
        )
    },
}

MISTAKES = MODULES | RULES | HOOKS


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(name: str, monkeypatch: Patch) -> None:
    plant, family, dtype, found = MISTAKES[name]
    moe = attach(tiny.build_bridge(tiny.build_hf(family, dtype=dtype), family))
    layer = moe.layers[min(LAYER, len(moe.layers) - 1)]
    plant(moe, monkeypatch)
    table = moe.verify(layers=[layer])
    assert not table.ok
    bad = table[~table["passed"]]
    assert found in set(zip(bad["check"], bad["hook"])), bad[["check", "hook", "figure", "bound", "note"]].to_string()
    assert "NO" in repr(table)
