"""What cannot be done is refused in words, and the model stays exactly as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import LlamaConfig, LlamaForCausalLM

import moe_interp as mi
from moe_interp.errors import AttachError, ConfigError, HookError, MoEInterpError, RouteError
from moe_interp.hooks.attach import MoEHooks, attach, attached
from tests.integration.surface.helpers import TOKENS, attach_to, build, cache_of, logits_of, run_hooked
from tests.integration.surface.test_detaching import assert_same, build_used, snapshot


def refusal(error: MoEInterpError) -> tuple[str, str, str]:
    """The three parts of a message: what was given, what was expected, what to do."""
    assert str(error) == f"{error.given}. Expected: {error.expected}. {error.remedy}"
    return error.given, error.expected, error.remedy


# --- attaching ------------------------------------------------------------------------------------------------


def dense_bridge() -> TransformerBridge:
    config = LlamaConfig(
        vocab_size=101, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return build_bridge_from_module(LlamaForCausalLM(config).eval(), "LlamaForCausalLM", hf_config=config)


def test_attaching_twice() -> None:
    bridge = build_used("olmoe")
    moe = attach(bridge)
    before = snapshot(bridge)
    with pytest.raises(AttachError) as caught:
        attach(bridge)
    assert refusal(caught.value) == (
        "a bridge that is already attached",
        "an unattached bridge",
        "Go on with its hooks, moe = moe_interp.attached(bridge), or take them off first, moe.detach(): also where "
        "a cell of a notebook runs again.",
    )
    assert_same(before, snapshot(bridge))
    assert attached(bridge) is moe


def test_a_model_without_moe_layers() -> None:
    bridge = dense_bridge()
    before = snapshot(bridge)
    with pytest.raises(AttachError) as caught:
        attach(bridge)
    assert refusal(caught.value) == (
        "LlamaForCausalLM, a model without MoE layers",
        "a Mixture-of-Experts model",
        "See moe_interp.support_table() for the families.",
    )
    assert_same(before, snapshot(bridge))


@pytest.mark.parametrize("thing", [None, nn.Linear(2, 2), "olmoe", 3])
def test_what_is_not_a_bridge(thing: Any) -> None:
    with pytest.raises(AttachError) as caught:
        attach(thing)
    given, expected, remedy = refusal(caught.value)
    assert given == f"a {type(thing).__module__}.{type(thing).__name__}"
    assert expected == "a transformer_lens TransformerBridge"
    assert "TransformerBridge.boot_transformers(name)" in remedy


def test_a_transformers_model_in_the_place_of_its_bridge() -> None:
    with pytest.raises(AttachError, match=r"^a transformers\.models\.olmoe\.modeling_olmoe\.OlmoeForCausalLM"):
        attach(build("olmoe").original_model)


@pytest.fixture
def novel_bridge() -> Iterator[TransformerBridge]:
    """A bridge whose MoE layers are of a class that nobody knows."""
    bridge = build_used("olmoe")
    container = type(bridge.blocks[0].mlp.original_component)
    name, container.__name__ = container.__name__, "NovelSparseMoeBlock"
    yield bridge
    container.__name__ = name


def test_an_unknown_family_is_named_and_never_guessed(novel_bridge: TransformerBridge) -> None:
    before = snapshot(novel_bridge)
    with pytest.raises(AttachError) as caught:
        attach(novel_bridge)
    given, expected, remedy = refusal(caught.value)
    assert given == "OlmoeForCausalLM, whose MoE layers are of the unknown class NovelSparseMoeBlock"
    assert expected == "a family of moe_interp.support_table()"
    assert remedy.startswith("A routing rule cannot be guessed")
    assert_same(before, snapshot(novel_bridge))


@pytest.mark.parametrize(
    "layers, given",
    [
        ([0], "layer 0, which is not attached, or is dense"),
        ([1, 0], "layer 0, which is not attached, or is dense"),
        ([7], "layer 7, which does not exist"),
        ([("encoder", 1)], "layer ('encoder', 1), which does not exist"),
        (["one"], "layer 'one', which does not exist"),
        ([[1]], "layer [1], which does not exist"),
        ([True], "layer True, which does not exist"),
        ([1.0], "layer 1.0, which does not exist"),
    ],
)
def test_layers_that_are_dense_or_do_not_exist(layers: list[Any], given: str) -> None:
    bridge = build_used("qwen2_moe")
    before = snapshot(bridge)
    with pytest.raises(AttachError) as caught:
        attach(bridge, layers=layers)
    assert refusal(caught.value) == (
        given,
        "MoE layers, here [1, 2]",
        "Leave `layers` out to attach to all of them.",
    )
    assert_same(before, snapshot(bridge))


@pytest.mark.parametrize("layers", [1, "1"])
def test_layers_that_are_no_sequence(layers: Any) -> None:
    with pytest.raises(AttachError, match=r"^layers=.*\. Expected: a sequence of layers among \[1, 2\]"):
        attach(build("qwen2_moe"), layers=layers)


def test_no_layers_at_all() -> None:
    with pytest.raises(AttachError, match=r"^no layers\. Expected: at least one of \[1, 2\]"):
        attach(build("qwen2_moe"), layers=[])


# --- asking for hooks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, options, name, reason",
    [
        ("gpt_oss", {}, "router_probs", "gpt_oss selects by its logits: it has no full-width scores before selecting"),
        ("olmoe", {}, "shared_out", "this layer of olmoe has no shared experts"),
        ("olmoe", {"expert_outputs": False}, "expert_out", "the model was attached with expert_outputs=False"),
        ("olmoe", {}, "router_logit", "no hook is called 'router_logit'"),
    ],
)
def test_a_hook_that_a_layer_does_not_have(family: str, options: Any, name: str, reason: str) -> None:
    moe = attach_to(family, **options)
    for ask in (lambda: moe.hook_name(name, 1), lambda: moe.filter(name), lambda: moe.cached({}, name, 1)):
        with pytest.raises(HookError) as caught:
            ask()
        given, expected, remedy = refusal(caught.value)
        assert given.startswith(f"hook {name!r} at layer ")
        assert given.endswith(reason)
        assert expected == f"one of {', '.join(moe.hooks(1))}"
        assert "support_table()" in remedy
    full = f"blocks.1.hook_{name}"
    assert full not in moe.bridge.hook_dict
    with pytest.raises(KeyError, match=name):
        moe.bridge.run_with_hooks(TOKENS, fwd_hooks=[(full, lambda activation, hook: None)])


@pytest.mark.parametrize("label", [0, 5, -3, ("encoder", 1), "decoder.1", "first", None, [2, 1], 1.5])
def test_a_layer_that_is_not_attached(label: Any) -> None:
    moe = attach_to("qwen2_moe")
    for ask in (moe.spec, moe.hooks, moe.layer_label, lambda at: moe.hook_name("router_logits", at)):
        with pytest.raises(HookError) as caught:
            ask(label)
        given, expected, remedy = refusal(caught.value)
        assert given.startswith("layer ")
        assert expected == "one of the attached MoE layers [1, 2]"
        assert remedy == "Choose one of moe.layers."


def test_a_patching_sweep_without_positions_or_over_an_unknown_axis() -> None:
    moe = attach_to("olmoe")
    with pytest.raises(ConfigError) as caught:
        moe.patch_index()
    assert refusal(caught.value) == (
        "axes ('layer', 'pos', 'expert') before any forward pass",
        "the number of positions",
        "Pass n_pos, or run the model on the tokens first.",
    )
    with pytest.raises(ConfigError, match=r"^axes \('layer', 'head'\)\. Expected: axes among layer, pos, expert"):
        moe.patch_index(axes=("layer", "head"))
    logits_of(moe.bridge, "olmoe")
    assert set(moe.patch_index().pos) == set(range(TOKENS.shape[1]))


def test_use_after_detaching() -> None:
    moe = attach_to("olmoe")
    moe.detach()
    with pytest.raises(AttachError) as caught:
        moe.detach()
    assert refusal(caught.value) == (
        "a model that these hooks are no longer attached to",
        "an attached model",
        "Call moe_interp.attach(bridge) to attach anew.",
    )
    assert repr(moe).endswith("detached)")
    assert moe.spec(1).n_experts == 8  # what the layer is can still be read
    again = attach(moe.bridge)
    for use in (
        lambda: moe.filter("expert_out"),
        lambda: mi.force_experts(moe, 1, 3),
        lambda: mi.random_routing(moe),
        lambda: mi.score_routes(moe, TOKENS, 1, torch.zeros(2, 8, 1, 2)),
        lambda: mi.screen_routes(moe, TOKENS, [1], {}),
        lambda: mi.isolate_experts(moe, []),
        lambda: mi.score_domain_router(moe, [], None),  # type: ignore[arg-type]
    ):
        with pytest.raises(AttachError, match=r"no longer attached to.*attach\(bridge\) to attach anew"):
            use()
    assert again.is_attached


def test_a_bridge_in_place_of_its_hooks() -> None:
    moe = attach_to("olmoe")
    for given in (moe.bridge, None):
        for use in (
            lambda given: mi.force_experts(given, 1, 3),
            lambda given: mi.set_routes(given, 1, [0, 1]),
            lambda given: mi.ablate_experts(given, 1, 3),
            lambda given: mi.uniform_routing(given),
            lambda given: mi.random_routing(given),
            lambda given: mi.bias_router(given, 1, [0.0] * 8),
            lambda given: mi.replay_routes(given, {}),
            lambda given: mi.score_routes(given, TOKENS, 1, torch.zeros(2, 8, 1, 2)),
            lambda given: mi.screen_routes(given, TOKENS, [1], {}),
            lambda given: mi.isolate_experts(given, []),
        ):
            with pytest.raises(AttachError, match=r"Expected: what moe_interp\.attach\(bridge\) returns"):
                use(given)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.array, torch.tensor])
def test_layers_as_numpy_and_torch_count_them(kind: Any) -> None:
    moe = attach_to("qwen2_moe")
    label = moe.layer_label(kind(2))
    assert (label, type(label)) == (2, int)
    assert moe.spec(kind(2)) is moe.spec(2)
    assert moe.hook_name("router_logits", kind(2)) == "blocks.2.hook_router_logits"
    assert [name for name, _ in mi.force_experts(moe, kind(2), 1)] == [n for n, _ in mi.force_experts(moe, 2, 1)]
    assert attach_to("qwen2_moe", layers=[kind(2)]).layers == (2,)
    assert moe.layer_label(np.int64(-1)) == 2
    for no_label in (True, np.bool_(True), 1.0, torch.tensor(1.0)):
        with pytest.raises(HookError, match="does not exist"):
            moe.layer_label(no_label)


# --- edits ----------------------------------------------------------------------------------------------------

EDITED = ["olmoe", "qwen2_moe", "deepseek_v3", "laguna", "llama4", "jetmoe", "nemotron_h"]


def refused(moe: MoEHooks, family: str, name: str, edit: Any, error: type[MoEInterpError]) -> tuple[str, str, str]:
    """The error of an edit at the last layer; afterwards the model must be as it was."""
    plain = logits_of(moe.bridge, family)
    with pytest.raises(error) as caught:
        run_hooked(moe, family, [(moe.hook_name(name, moe.layers[-1]), edit)])
    points = moe.bridge.hook_points()
    assert not any(point._forward_hooks or point._backward_hooks or point.fwd_hooks for point in points)
    assert torch.equal(logits_of(moe.bridge, family), plain)
    return refusal(caught.value)


def test_edits_of_the_wrong_shape_at_every_hook() -> None:
    for family in EDITED:
        moe = attach_to(family)
        layer = moe.layers[-1]
        for name in moe.hooks(layer):
            given, expected, remedy = refused(moe, family, name, lambda activation, hook: activation[:, :-1], HookError)
            full = moe.hook_name(name, layer)
            assert given.startswith(f"a hook at {full} returned shape (2, {TOKENS.shape[1] - 1}, ")
            assert f"2, {TOKENS.shape[1]}, " in expected
            assert remedy == "Return the edited tensor, or None after editing in place; the model was left as it was."


@pytest.mark.parametrize("value", ["logits", 3, (1, 2), [1.0]])
def test_edits_that_are_no_tensor(value: Any) -> None:
    moe = attach_to("olmoe")
    for name in moe.hooks(1):
        given, expected, _ = refused(moe, "olmoe", name, lambda activation, hook: value, HookError)
        assert given == f"a hook at blocks.2.hook_{name} returned a {type(value).__name__}"
        assert expected.startswith("a tensor like (2, 8, ")


@pytest.mark.parametrize("kind", [torch.float32, torch.bool])
def test_indices_that_are_no_integers(kind: torch.dtype) -> None:
    moe = attach_to("olmoe")
    given, expected, _ = refused(moe, "olmoe", "expert_indices", lambda indices, hook: indices.to(kind), HookError)
    assert given == f"a hook at blocks.2.hook_expert_indices returned dtype {kind}"
    assert expected == "integer expert ids"


@pytest.mark.parametrize(
    "shape, shown", [((8, 2), "(8, 2)"), ((2, 8), "(2, 8)"), ((1, 8, 2), "(1, 8, 2)"), ((2, 8, 0), "(2, 8, 0)")]
)
def test_indices_without_slots_or_tokens(shape: tuple[int, ...], shown: str) -> None:
    moe = attach_to("olmoe")
    given, expected, _ = refused(
        moe, "olmoe", "expert_indices", lambda indices, hook: torch.zeros(shape, dtype=torch.int64), HookError
    )
    assert given == f"a hook at blocks.2.hook_expert_indices returned shape {shown}"
    assert expected == "[2, 8, slots] with at least one slot"


@pytest.mark.parametrize("expert", [8, -2])
def test_experts_out_of_range(expert: int) -> None:
    def write(indices: Tensor, hook: Any) -> None:
        indices[1, 3, 0] = expert

    for family in EDITED:
        moe = attach_to(family)
        full = moe.hook_name("expert_indices", moe.layers[-1])
        assert refused(moe, family, "expert_indices", write, RouteError) == (
            f"expert id {expert} at {full}, sequence 1, position 3",
            "ids from 0 to 7, or -1 for an empty slot",
            "Correct the id; the model was left as it was.",
        )


def test_an_expert_twice_in_a_route() -> None:
    def write(indices: Tensor, hook: Any) -> Tensor:
        indices[0, 5] = 6
        return indices

    for family in EDITED:
        moe = attach_to(family)
        given, expected, remedy = refused(moe, family, "expert_indices", write, RouteError)
        full = moe.hook_name("expert_indices", moe.layers[-1])
        assert given == f"expert 6 twice in the route of sequence 0, position 5 at {full}"
        assert expected == "each expert at most once a token"
        assert remedy.startswith("Remove the duplicate")


def test_empty_slots_are_no_duplicates() -> None:
    moe = attach_to("olmoe")
    run_hooked(moe, "olmoe", [(moe.hook_name("expert_indices", 1), lambda indices, hook: torch.full_like(indices, -1))])


def test_nan_in_edited_router_logits() -> None:
    def write(activation: Tensor, hook: Any) -> None:
        activation[1, 2, 4] = torch.nan

    for family in EDITED:
        moe = attach_to(family)
        for name in ("router_logits", "router_probs"):
            if name in moe.hooks(moe.layers[-1]):
                full = moe.hook_name(name, moe.layers[-1])
                assert refused(moe, family, name, write, RouteError) == (
                    f"a hook wrote nan to {full} at batch 1, pos 2, column 4",
                    "numbers (-inf gives an expert the score 0)",
                    "Mend the hook; the model was left as it was.",
                )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite(value: float) -> None:
    def write(weights: Tensor, hook: Any) -> None:
        weights[0, 7, 1] = value

    moe = attach_to("qwen2_moe")
    assert refused(moe, "qwen2_moe", "expert_weights", write, RouteError) == (
        f"a hook wrote {value} to blocks.2.hook_expert_weights at batch 0, pos 7, column 1",
        "finite values",
        "Mend the hook; the model was left as it was.",
    )


def test_logits_that_shut_nearly_every_expert_out() -> None:
    def shut(logits: Tensor, hook: Any) -> Tensor:
        return torch.full_like(logits, -torch.inf)

    moe = attach_to("olmoe")
    given, expected, _ = refused(moe, "olmoe", "router_logits", shut, RouteError)
    assert given == "the edited router of layer 2 gives weight nan at batch 0, pos 0"
    assert "at least as many finite logits as experts per token" in expected


def test_a_refused_edit_in_generation_leaves_no_state() -> None:
    moe = attach_to("olmoe")
    options = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    expected = moe.bridge.generate(TOKENS, **options)
    steps: list[int] = []

    def fail_later(indices: Tensor, hook: Any) -> None:
        steps.append(1)
        if len(steps) == 2:
            indices[:] = 99

    with (
        moe.bridge.hooks(fwd_hooks=[(moe.hook_name("expert_indices", 1), fail_later)]),
        pytest.raises(RouteError, match="expert id 99"),
    ):
        moe.bridge.generate(TOKENS, **options)
    assert torch.equal(moe.bridge.generate(TOKENS, **options), expected)
    assert cache_of(moe, "olmoe", "router_logits")
