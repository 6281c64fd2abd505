"""Several threads, or several passes of one thread, on one attached bridge: never mixed up."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import moe_interp as mi
from moe_interp.engine.branches import BranchRunner
from moe_interp.errors import HookError, RouteError
from moe_interp.hooks.attach import MoEHooks, attached
from moe_interp.types import Hooks
from tests import tiny
from tests.integration.surface.helpers import attach_to, cache_of, logits_of, negate, run_hooked

ONE, OTHER = tiny.random_tokens(2, 8, seed=1), tiny.random_tokens(3, 5, seed=2)


def edits(moe: MoEHooks) -> list[Any]:
    return [(moe.hook_name("router_logits", layer), negate) for layer in moe.layers]


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """Runs each in a thread of its own; errors are returned."""

    def call(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except HookError as error:
            return error

    with ThreadPoolExecutor(len(works)) as pool:
        return [each.result() for each in [pool.submit(call, work) for work in works]]


def test_passes_without_hooks_run_side_by_side() -> None:
    moe = attach_to("qwen2_moe")
    alone = [logits_of(moe.bridge, "qwen2_moe", tokens) for tokens in (ONE, OTHER)]
    for _ in range(5):
        found = at_once(*(lambda t=t: logits_of(moe.bridge, "qwen2_moe", t) for t in (ONE, OTHER)))
        assert all(torch.equal(a, b) for a, b in zip(found, alone))


@pytest.mark.parametrize("family", ["olmoe", "jetmoe"])
def test_a_pass_with_hooks_and_another_one_are_right_or_refused(family: str) -> None:
    moe = attach_to(family)
    plain, hooked = logits_of(moe.bridge, family, ONE), run_hooked(moe, family, edits(moe), OTHER)
    cache = cache_of(moe, family, tokens=OTHER)
    right = 0
    for _ in range(8):
        results = at_once(
            lambda: run_hooked(moe, family, edits(moe), OTHER),
            lambda: logits_of(moe.bridge, family, ONE),
            lambda: cache_of(moe, family, tokens=OTHER),
        )
        for result, expected in zip(results, (hooked, plain, cache)):
            if isinstance(result, HookError):
                assert "one thread at a time" in str(result)
            elif isinstance(expected, dict):
                assert result.keys() == expected.keys()
                assert all(torch.equal(result[name], expected[name]) for name in expected)
                right += 1
            else:
                assert torch.equal(result, expected)
                right += 1
    assert right >= 8
    # a refusal leaves nothing
    assert torch.equal(logits_of(moe.bridge, family, ONE), plain)
    assert torch.equal(run_hooked(moe, family, edits(moe), OTHER), hooked)
    assert not any(moe.hooks_active(layer) for layer in moe.layers)


def held(work: Callable[[Callable[..., None]], Any]) -> tuple[threading.Thread, threading.Event]:
    """A thread whose pass waits inside of a hook; the event lets it go on."""
    inside, go_on = threading.Event(), threading.Event()

    def wait(value: Tensor, hook: Any) -> None:
        inside.set()
        assert go_on.wait(30)

    thread = threading.Thread(target=work, args=(wait,))
    thread.start()
    assert inside.wait(30)
    return thread, go_on


def test_while_a_thread_runs_with_hooks_every_other_pass_is_refused() -> None:
    moe = attach_to("olmoe")
    plain = logits_of(moe.bridge, "olmoe", ONE)
    expected = run_hooked(moe, "olmoe", edits(moe), OTHER)
    found: list[Tensor] = []
    name = moe.hook_name("router_in", 1)
    thread, go_on = held(lambda wait: found.append(run_hooked(moe, "olmoe", [(name, wait), *edits(moe)], OTHER)))
    with pytest.raises(HookError, match=r"a second thread, while thread .* has hooks of its own"):
        logits_of(moe.bridge, "olmoe", ONE)
    with pytest.raises(HookError, match="one thread at a time with hooks of its own"):
        run_hooked(moe, "olmoe", edits(moe), ONE)
    with pytest.raises(HookError, match=r"copy\.deepcopy"):
        cache_of(moe, "olmoe", tokens=ONE)
    own = attached(copy.deepcopy(moe.bridge))
    assert own is not None
    go_on.set()
    thread.join()
    assert torch.equal(found[0], expected)
    assert torch.equal(logits_of(moe.bridge, "olmoe", ONE), plain)


def test_while_a_plain_pass_runs_hooks_of_another_thread_are_refused() -> None:
    moe = attach_to("olmoe")
    plain = logits_of(moe.bridge, "olmoe", OTHER)
    found: list[Tensor] = []

    def run(wait: Callable[..., None]) -> None:
        # a hook of TransformerLens', which says nothing of ours
        with moe.bridge.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", wait)]):
            found.append(logits_of(moe.bridge, "olmoe", OTHER))

    thread, go_on = held(run)
    with pytest.raises(HookError, match=r"hooks for a pass in this thread, while thread .* runs one"):
        run_hooked(moe, "olmoe", edits(moe), ONE)
    go_on.set()
    thread.join()
    assert torch.equal(found[0], plain)
    assert not any(moe.hooks_active(layer) for layer in moe.layers)


def test_hooks_that_threads_share_serve_each_pass_with_its_own_state() -> None:
    moe = attach_to("deepseek_v3")
    hooks = mi.force_experts(moe, moe.layers[-1], [3, 5])
    alone = [run_hooked(moe, "deepseek_v3", hooks, tokens) for tokens in (ONE, OTHER)]
    for name, function in hooks:
        moe.bridge.add_hook(name, function)
    for _ in range(5):
        found = at_once(*(lambda t=t: logits_of(moe.bridge, "deepseek_v3", t) for t in (ONE, OTHER)))
        assert all(torch.equal(a, b) for a, b in zip(found, alone))
    moe.bridge.reset_hooks()


# interventions that carry something from one hook of a pass to the next, or from one pass to the next
CARRYING: dict[str, tuple[str, Callable[[MoEHooks], Hooks]]] = {
    "a route and its weights": ("olmoe", lambda moe: mi.set_routes(moe, moe.layers[-1], [6, 1], [0.9, 0.3])),
    "the natural mass": ("mixtral", lambda moe: mi.force_experts(moe, moe.layers[-1], 3, mass="natural")),
    "where a mean is taken": ("llama4", lambda moe: mi.uniform_routing(moe, moe.layers[-1:], mass="natural")),
    "the outputs of a prompt": (
        "qwen2_moe",
        lambda moe: mi.ablate_experts(moe, moe.layers[-1], [2, 5, 7], "mean", positions="new", reference="prompt"),
    ),
}
TOGETHER = tiny.random_tokens(3, 7, seed=3)


def meeting(threads: int) -> Callable[..., None]:
    """A hook in which so many threads wait for each other."""
    barrier = threading.Barrier(threads)

    def wait(value: Tensor, hook: Any) -> None:
        barrier.wait(30)

    return wait


def generated(moe: MoEHooks, tokens: Tensor) -> Tensor:
    """The logits of three greedy steps."""
    out = moe.bridge.original_model.generate(
        tokens, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(out.logits)


@pytest.mark.parametrize("carried", CARRYING)
def test_what_an_intervention_carries_belongs_to_the_thread(carried: str) -> None:
    family, intervene = CARRYING[carried]
    moe = attach_to(family)
    hooks = intervene(moe)
    with moe.bridge.hooks(fwd_hooks=hooks):
        alone = [generated(moe, tokens) for tokens in (TOGETHER, TOGETHER[:, 2:])]
    between = (moe.hook_name("expert_indices", moe.layers[-1]), meeting(2))
    for at, function in [*hooks[:1], between, *hooks[1:]]:
        moe.bridge.add_hook(at, function)
    found = at_once(*(lambda t=t: generated(moe, t) for t in (TOGETHER, TOGETHER[:, 2:])))
    assert all(torch.equal(a, b) for a, b in zip(found, alone))
    moe.bridge.reset_hooks()


@pytest.mark.parametrize("carried", CARRYING)
def test_what_an_intervention_carries_is_not_that_of_a_pass_inside_of_a_hook(carried: str) -> None:
    family, intervene = CARRYING[carried]
    moe = attach_to(family)
    hooks = intervene(moe)
    with moe.bridge.hooks(fwd_hooks=hooks):
        alone = generated(moe, TOGETHER)
    inside: list[Tensor] = []

    def run_another(value: Tensor, hook: Any) -> None:
        if not inside:
            inside.append(value)
            inside[0] = moe.bridge(OTHER)
            inside.clear()

    between = (moe.hook_name("expert_indices", moe.layers[-1]), run_another)
    with moe.bridge.hooks(fwd_hooks=[*hooks[:1], between, *hooks[1:]]):
        assert torch.equal(generated(moe, TOGETHER), alone)


def test_a_pass_inside_of_a_hook_does_not_end_the_prompt_in_pieces_around_it() -> None:
    moe = attach_to("olmoe")
    routes = (torch.arange(8) % 8).unsqueeze(-1)
    seen: list[Tensor] = []

    def record(value: Tensor, hook: Any) -> None:
        seen.append(value.clone())
        if len(seen) in (1, 3):  # once in each piece
            moe.bridge(ONE)

    hooks = [*mi.set_routes(moe, 1, routes), (moe.hook_name("expert_indices", 1), record)]
    cache = DynamicCache(config=moe.bridge.original_model.config)
    with torch.no_grad(), moe.bridge.hooks(fwd_hooks=hooks):
        for piece in ONE.split([5, 3], dim=1):
            moe.bridge.original_model(piece, past_key_values=cache)
    assert torch.equal(torch.cat([seen[0], seen[2]], dim=1)[0], routes)
    # routes as wide as the second piece are that piece's own only if the first was not given them too
    short = mi.set_routes(moe, 1, routes[:3])

    def run_inside(value: Tensor, hook: Any) -> None:
        if not moe.pass_context(1).depth:
            moe.bridge(ONE[:, :3])

    inner = (moe.hook_name("expert_indices", 1), run_inside)
    cache = DynamicCache(config=moe.bridge.original_model.config)
    with torch.no_grad(), moe.bridge.hooks(fwd_hooks=[*short, inner]):
        moe.bridge.original_model(ONE[:, :3], past_key_values=cache)
        with pytest.raises(RouteError, match="for a pass of 2 x 3 tokens after 3 in the cache"):
            moe.bridge.original_model(ONE[:, 3:6], past_key_values=cache)


@pytest.mark.parametrize("positions", [None, "new", [0, -1, 6]])
def test_threads_that_generate_touch_their_own_tokens(positions: Any) -> None:
    moe = attach_to("olmoe")
    prompts, touched = (ONE[:, :4], ONE), threading.local()
    record = (moe.hook_name("expert_indices", 1), lambda value, hook: touched.found.append((value >= 0).sum(-1) == 3))

    def run(tokens: Tensor, of_bridge: bool) -> list[str]:
        touched.found = []
        if of_bridge:
            options: Any = {"stop_at_eos": False, "verbose": False, "return_type": "tokens"}
            moe.bridge.generate(tokens, max_new_tokens=4, do_sample=False, **options)
        else:
            generated(moe, tokens)
        return ["".join(".x"[hit] for hit in row) for row in torch.cat(touched.found, dim=1).int().tolist()]

    meet = (moe.hook_name("router_in", 1), meeting(2))
    hooks = [*mi.force_experts(moe, 1, [1, 2, 7], positions=positions), record]
    for of_bridge in (False, True):
        with moe.bridge.hooks(fwd_hooks=hooks):
            alone = [run(tokens, of_bridge) for tokens in prompts]
        for name, function in [meet, *hooks]:
            moe.bridge.add_hook(name, function)
        assert at_once(*(lambda t=t, b=of_bridge: run(t, b) for t in prompts)) == alone
        moe.bridge.reset_hooks()
    new = len(alone[0][0]) - 4
    expected = {None: "xxxx" + "." * new, "new": "...." + "x" * new}
    assert positions not in (None, "new") or alone[0] == [expected[positions]] * 2


@pytest.mark.filterwarnings("ignore:.*use_cache.*")
def test_a_thread_of_autograd_that_computes_layers_again_knows_their_pass() -> None:
    """As on a GPU, where the backward pass has a thread of its own: positions are still those of padded sequences."""
    moe = attach_to("olmoe")
    model: Any = moe.bridge.original_model
    mask = torch.ones_like(ONE)
    mask[0, :3] = 0
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()

    def gradient(backward: Callable[[Tensor], None]) -> Tensor:
        model.zero_grad(set_to_none=True)
        with moe.bridge.hooks(fwd_hooks=mi.force_experts(moe, 1, [1, 2], positions=[0, 2])):
            backward(model(ONE, attention_mask=mask, use_cache=False).logits.square().mean())
        return moe.spec(1).experts.down_proj.grad.clone()

    def elsewhere(loss: Tensor) -> None:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()

    assert torch.equal(gradient(elsewhere), gradient(lambda loss: loss.backward()))


def test_a_pass_inside_of_a_hook_is_a_pass_of_its_own(family: str) -> None:
    moe = attach_to(family)
    layer = moe.layers[-1]
    hooks = edits(moe)
    inner, outer = logits_of(moe.bridge, family), run_hooked(moe, family, hooks)
    found: list[Tensor] = []
    lengths: list[int] = []

    def run_another(value: Tensor, hook: Any) -> None:
        if not found:
            found.append(value)  # once: the pass below comes here too
            found.append(logits_of(moe.bridge, family))
            lengths.append(moe.n_past)

    logits = run_hooked(moe, family, [(moe.hook_name("router_logits", layer), run_another), *hooks])
    assert torch.equal(logits, outer)
    assert torch.equal(found[1], outer)  # the hooks are on the model for it as well
    assert not torch.equal(outer, inner)
    assert lengths == [0]


def test_an_error_in_a_hook_leaves_no_pass_behind() -> None:
    moe = attach_to("olmoe")
    plain = logits_of(moe.bridge, "olmoe", ONE)

    def fail(value: Tensor, hook: Any) -> None:
        raise KeyboardInterrupt if interrupts else ValueError("a hook's own")

    for interrupts in (False, True):
        with pytest.raises(KeyboardInterrupt if interrupts else ValueError):
            run_hooked(moe, "olmoe", [(moe.hook_name("expert_out", 1), fail)], ONE)
        with pytest.raises(HookError, match="no running pass"):
            moe.running(1)
        assert moe.n_past == 0
        # nor is another thread refused
        (found,) = at_once(lambda: run_hooked(moe, "olmoe", edits(moe), ONE))
        assert torch.equal(found, run_hooked(moe, "olmoe", edits(moe), ONE))
        assert torch.equal(logits_of(moe.bridge, "olmoe", ONE), plain)


@pytest.mark.parametrize("inner", ["a pass", "generate"])
def test_what_a_hook_runs_inside_of_generate_has_a_prompt_of_its_own(inner: str) -> None:
    moe = attach_to("olmoe")
    touched: list[Tensor] = []
    is_inside: list[bool] = []

    def run_another(value: Tensor, hook: Any) -> None:
        if is_inside:
            touched.append((value >= 0).sum(-1) == 3)
            return
        is_inside.append(True)
        moe.bridge(ONE[:, :5]) if inner == "a pass" else generated(moe, ONE[:, :5])
        is_inside.clear()

    hooks = [*mi.force_experts(moe, 1, [1, 2, 7]), (moe.hook_name("expert_indices", 1), run_another)]
    with moe.bridge.hooks(fwd_hooks=hooks):
        generated(moe, ONE[:, :3])
    n = 3 if inner == "generate" else 1
    for start in range(0, len(touched), n):
        assert touched[start].shape[1] == 5
        assert touched[start].all()  # all of its own prompt
        assert not torch.cat([*touched[start + 1 : start + n], touched[start][:, :0]], dim=1).any()
    assert len(touched) == 3 * n


def test_a_thread_that_scores_routes_has_the_model_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """It puts other forwards and modes into the modules, which the passes of other threads would run through."""
    moe = attach_to("olmoe")
    moe.bridge.train()
    training = {name: module.training for name, module in moe.bridge.original_model.named_modules()}
    routes = torch.tensor([[0, 1], [2, 3]]).expand(*ONE.shape, 2, 2)
    expected, through = mi.score_routes(moe, ONE, 0, routes), BranchRunner.through
    found: list[Any] = []

    def interrupted(self: BranchRunner, rows: Any, hooks: Any = None) -> Tensor:
        if not found:
            found.extend(
                at_once(
                    lambda: mi.score_routes(moe, ONE, 0, routes),
                    lambda: moe.bridge(ONE),
                    lambda: moe.bridge.run_with_cache(ONE),
                )
            )
        return through(self, rows, hooks)

    monkeypatch.setattr(BranchRunner, "through", interrupted)
    scores = mi.score_routes(moe, ONE, 0, routes)
    assert torch.equal(scores.nan_to_num(), expected.nan_to_num())
    assert len(found) == 3
    assert all("a second thread, while thread" in str(each) for each in found)
    assert {name: module.training for name, module in moe.bridge.original_model.named_modules()} == training
    assert at_once(lambda: moe.bridge(ONE).shape)[0][:2] == ONE.shape
