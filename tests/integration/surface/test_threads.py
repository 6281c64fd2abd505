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

from moe_interp.errors import HookError
from moe_interp.hooks.attach import MoEHooks, attached
from moe_interp.interventions.force import force_experts
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
    hooks = force_experts(moe, moe.layers[-1], [3, 5])
    alone = [run_hooked(moe, "deepseek_v3", hooks, tokens) for tokens in (ONE, OTHER)]
    for name, function in hooks:
        moe.bridge.add_hook(name, function)
    for _ in range(5):
        found = at_once(*(lambda t=t: logits_of(moe.bridge, "deepseek_v3", t) for t in (ONE, OTHER)))
        assert all(torch.equal(a, b) for a, b in zip(found, alone))
    moe.bridge.reset_hooks()


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
