"""Causal checks of every hook, on the user's own model.

A hook is right if passing its value through changes nothing, and if changing it does to the model what the table of
hooks says. Nothing here trusts that a hook fires: every check compares outputs of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from moe_interp.engine import threads_asleep
from moe_interp.engine.memory import is_out_of_memory, out_of_memory_in_words
from moe_interp.engine.policy import policy_of
from moe_interp.errors import AttachError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.hooks.verification_table import COLUMNS, Verification
from moe_interp.types import Layer
from moe_interp.verification.branch_checks import branches_equal_naive
from moe_interp.verification.cache_checks import past_is_counted
from moe_interp.verification.edit_checks import edits_do_what_they_say, edits_in_place_count, values_are_shown
from moe_interp.verification.finding import Check, Finding
from moe_interp.verification.gradient_checks import gradients_arrive
from moe_interp.verification.intervention_checks import edits_touch_their_token
from moe_interp.verification.model_under_test import ModelUnderTest, as_tokens, at_rest, run_under_test
from moe_interp.verification.reading_checks import (
    agrees_with_transformer_lens,
    detaching_restores,
    parts_sum,
    passes_through,
    reroutes_as_the_rule,
    unreadable_experts,
)
from moe_interp.verification.rule_checks import rules_hold

CHECKS: tuple[Check, ...] = (
    passes_through,
    values_are_shown,
    edits_do_what_they_say,
    edits_in_place_count,
    rules_hold,
    reroutes_as_the_rule,
    parts_sum,
    agrees_with_transformer_lens,
    gradients_arrive,
    past_is_counted,
    detaching_restores,
    unreadable_experts,
    edits_touch_their_token,
    branches_equal_naive,
)


@out_of_memory_in_words()
@threads_asleep()
def verify(
    moe: MoEHooks,
    tokens: Tensor | str | None = None,
    layers: Sequence[Layer] | None = None,
    checks: Sequence[Check] = CHECKS,
) -> Verification:
    """Check every hook of the attached layers by cause.

    Checks: passing a hook's value through changes nothing; each hook shows what the block computes with; an edit of
    every token and slot makes the block return what it returns by hand, from the experts' weights, and changes the
    logits; the router's own choice and weights are ``rule.route``'s bit for bit, those of other experts as defined;
    the parts sum to the whole; TransformerLens' own router hooks show the same; gradients are those of the plain
    model; choice logits are as defined; positions in a cache are counted, and an intervention at one touches that token
    alone; without the hook points the model computes the same, and they come back; branches score counterfactual routes
    as full forward passes do.

    Exact checks are bounded by twice what the model differs from itself when run again (0.0 where it is deterministic);
    others by rounding, see :func:`moe_interp.verification.finding.rounding`.

    Hooks that are on the model are set aside while checking, it runs in eval mode, and both are as before afterwards.
    Costs about twenty forward passes a layer, and six backward passes.

    Args:
        moe: The attached hooks.
        tokens: ``[batch, pos]`` ids, or text; by default two random sequences of eight ids, special ids left out.
        layers: The layers to check; all by default.
        checks: Which checks to make; each is a generator of findings about a
            :class:`~.model_under_test.ModelUnderTest`.

    Returns:
        A table that prints itself summed up over the layers. What it does not show: that the rule is right on logits
        that these tokens do not give.

    Raises:
        AttachError: the hooks have been detached.
        ConfigError: tokens of another shape.
        HookError: a layer that is not attached.
        DataError: no room for a pass of these tokens; a check that alone has none has failed, and says so.
    """
    if not moe.is_attached:
        raise AttachError("hooks that have been detached", "an attached model", "Attach anew, then verify.")
    chosen = moe.layers if layers is None else tuple(layers)
    ids = as_tokens(moe.bridge, tokens)
    with at_rest(moe.bridge):
        tested = run_under_test(moe, ids, chosen)
        findings = [finding for check in checks for finding in _guarded(check, tested)]
    rows = [{name: getattr(finding, name) for name in COLUMNS} for finding in findings]
    table = Verification(rows, columns=COLUMNS)
    table.attrs["policy"] = str(policy_of(moe))
    return table


def _guarded(check: Check, tested: ModelUnderTest) -> Iterator[Finding]:
    """A check that cannot be made has failed; the others go on."""
    try:
        yield from check(tested)
    except Exception as error:
        note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if is_out_of_memory(error):
            note += ". Give fewer or shorter tokens"
        name = check.__name__.replace("_", " ")
        yield Finding(check=name, layer=tested.layers[0], hook="all", figure=float("inf"), note=note)
