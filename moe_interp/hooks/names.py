"""Every hook: its name, its shape and what writing to it means. They fire in this order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_interp.arch.family import Family

Gate = Literal["always", "scores", "experts", "shared"]


@dataclass(frozen=True, kw_only=True)
class HookSpec:
    """One row.

    Attributes:
        name: The bare name; the hook point is ``blocks.{layer}.hook_{name}``.
        axes: Its axes.
        write: What writing to it means.
        on: Which layers have it: all; those with full-width scores before selection; those attached with
            ``expert_outputs=True``; those with shared experts.
    """

    name: str
    axes: str
    write: str
    on: Gate = "always"


HOOKS: tuple[HookSpec, ...] = (
    HookSpec(name="router_in", axes="batch pos d_model", write="the router (only) reads the edited tensor"),
    HookSpec(
        name="router_logits",
        axes="batch pos expert",
        write="the token is re-routed by the family's own rule: selection and weights",
    ),
    HookSpec(
        name="router_probs",
        axes="batch pos expert",
        write="re-selects and re-weights; correction bias and group limits are applied after",
        on="scores",
    ),
    HookSpec(
        name="expert_indices",
        axes="batch pos slot",
        write="these experts run, with the family's own weights for them; the number of slots may change; -1 is empty",
    ),
    HookSpec(name="expert_weights", axes="batch pos slot", write="used as they are, no renormalisation after"),
    HookSpec(
        name="expert_post",
        axes="batch pos slot d_expert",
        write="the expert's hidden neurons after the activation",
        on="experts",
    ),
    HookSpec(
        name="expert_out",
        axes="batch pos slot d_model",
        write="the expert's output before its weight is applied",
        on="experts",
    ),
    HookSpec(name="routed_out", axes="batch pos d_model", write="the weighted sum, as added (all scales applied)"),
    HookSpec(name="shared_out", axes="batch pos d_model", write="the shared experts' output, as added", on="shared"),
)

HOOK_NAMES = tuple(hook.name for hook in HOOKS)


def hooks_of(family: Family, *, has_shared: bool, expert_outputs: bool = True) -> tuple[str, ...]:
    """The bare names of the hooks a layer of this family has; ``expert_outputs`` where its experts can be read."""
    present = {"always": True, "scores": family.has_scores, "experts": expert_outputs, "shared": has_shared}
    return tuple(hook.name for hook in HOOKS if present[hook.on])


def absence(name: str, family: Family, unreadable: str | None = None) -> str:
    """Why a layer of this family has no such hook.

    Args:
        name: The hook's bare name.
        family: The layer's family.
        unreadable: Why its experts cannot be computed one by one, if they cannot.
    """
    if name not in HOOK_NAMES:
        return f"no hook is called {name!r}"
    return {
        "scores": f"{family.name} selects by its logits: it has no full-width scores before selecting",
        "experts": unreadable or "the model was attached with expert_outputs=False",
        "shared": f"this layer of {family.name} has no shared experts",
    }[next(hook.on for hook in HOOKS if hook.name == name)]
