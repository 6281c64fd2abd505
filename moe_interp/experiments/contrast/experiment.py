"""Contrast two sets of prompts: the experts whose selection differs between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
import xarray as xr

from moe_interp.checks import check_seed, check_whole
from moe_interp.engine import threads_asleep
from moe_interp.engine.eval_mode import in_eval_mode
from moe_interp.engine.memory import out_of_memory_in_words
from moe_interp.errors import ConfigError, DataError
from moe_interp.experiments.contrast.prompts import (
    Prompt,
    continued,
    read_prompts,
    same_number_of_experts,
    selection_shares,
)
from moe_interp.experiments.contrast.result import ContrastResult
from moe_interp.experiments.identity.naming import model_name
from moe_interp.experiments.inputs.repeats import Merged, merge_repeats
from moe_interp.hooks.attach import MoEHooks, check_attached
from moe_interp.interventions.named import chosen_layers
from moe_interp.progress import Report, reporting
from moe_interp.results import checksum
from moe_interp.types import Layer

Phase = Literal["prompt", "generated"]


@out_of_memory_in_words()
@threads_asleep()
@in_eval_mode
def contrast_experts(
    moe: MoEHooks,
    prompts_a: Sequence[Any],
    prompts_b: Sequence[Any],
    phase: Phase = "prompt",
    paired: bool = False,
    layers: Sequence[Layer] | None = None,
    max_new_tokens: int = 32,
    memory_budget: int | None = None,
    seed: int = 0,
    progress: bool | Report | None = None,
) -> ContrastResult:
    """Find the experts that one set of prompts uses more than another.

    The share of a prompt's tokens that use an expert is taken within the prompt, then averaged over prompts; an
    expert's **risk difference** is the mean share on ``prompts_a`` less that on ``prompts_b``, from -1 to 1. Prompts
    are the units: p is by permutation of prompts between the sets (of signs within pairs), q by Benjamini-Hochberg over
    all layers and experts.

    Args:
        moe: Attached hooks of a decoder-only model.
        prompts_a, prompts_b: At least two each: texts, lists of ids, items, or mappings with ``prompt`` or
            ``messages`` and an ``id``; answers are not read. Prompts of a set that have the same tokens count once,
            with a warning.
        phase: "prompt": the tokens of the prompt, BOS left out. "generated": the tokens that the model continues it
            with, greedily, up to and with EOS; how the prompt itself is routed does not count.
        paired: The i-th prompts of both sets belong together, and are compared within the pair.
        layers: MoE layers; all by default.
        max_new_tokens: At most so many are generated.
        memory_budget: Bytes a forward pass may use; by default what is free (on a processor half of it).
        seed: Of the permutations and resamples.
        progress: See :func:`moe_interp.progress.reporting`.

    Raises:
        DataError: fewer than two prompts in a set, sets of different length that are paired, one prompt in both sets,
            or what cannot be read; before any forward pass.
        ConfigError, HookError: options out of range, or layers that are not there.

    Source: SteerMoE for the risk difference; there tokens are pooled, so that a long prompt counts for many. Here the
    prompt is the unit, and tests and stability are derived. What it does not show: that an expert has anything to do
    with what distinguishes the sets; see :func:`moe_interp.steering_effect`. Sets that differ in topic, length or
    format differ in experts for that reason.
    """
    check_attached(moe)
    max_new_tokens, seed = check_whole(max_new_tokens, "max_new_tokens", 1), check_seed(seed)
    if phase not in get_args(Phase):
        raise ConfigError(f"phase={phase!r}", '"prompt" or "generated"', "Contrast one phase at a time.")
    chosen = chosen_layers(moe, layers)
    n_experts = same_number_of_experts(moe, chosen)
    a, b = read_prompts(moe, prompts_a, "prompts_a"), read_prompts(moe, prompts_b, "prompts_b")
    paired = bool(paired)
    (a, b), merged = _pairs(a, b) if paired else _sets(a, b)
    prompts = [replace(p, name=f"{group}:{p.name}") for group, some in (("a", a), ("b", b)) for p in some]
    shares = np.empty((len(prompts), len(chosen), n_experts))
    n_tokens = np.empty(len(prompts), dtype=np.int64)
    with reporting("contrasting experts", progress) as report, torch.no_grad():
        report(0, len(prompts))
        if phase == "generated":
            prompts = continued(moe, prompts, max_new_tokens, memory_budget)
        done = 0
        for index, found, counted in selection_shares(moe, prompts, chosen, phase, memory_budget):
            shares[index], n_tokens[index] = found, counted
            done += len(index)
            report(done, len(prompts))
    data = xr.Dataset(
        {"selection": (("prompt", "layer", "expert"), shares), "n_tokens": ("prompt", n_tokens)},
        coords={
            "prompt": [prompt.name for prompt in prompts],
            "group": ("prompt", ["a"] * len(a) + ["b"] * len(b)),
            "layer": [label if isinstance(label, int) else ".".join(map(str, label)) for label in chosen],
            "expert": np.arange(n_experts),
        },
        attrs={
            "model": model_name(moe),
            "phase": phase,
            "paired": int(paired),
            "top_k": [moe.spec(layer).top_k for layer in chosen],
            "seed": seed,
            "max_new_tokens": max_new_tokens if phase == "generated" else 0,
        },
    )
    if merged:
        data.attrs["merged"] = merged
    config = {"phase": phase, "paired": paired, "layers": chosen, "max_new_tokens": max_new_tokens}
    return ContrastResult(data, config=config, seeds=seed, data_checksum=checksum([p.tokens for p in prompts]))


def _sets(a: list[Prompt], b: list[Prompt]) -> tuple[tuple[list[Prompt], list[Prompt]], Merged]:
    """Each set's prompts, once.

    Raises:
        DataError: fewer than two in a set, or a prompt in both.
    """
    kept: list[list[Prompt]] = []
    merged: Merged = {}
    for name, prompts in (("a", a), ("b", b)):
        places, repeats = merge_repeats([p.tokens for p in prompts], [f"{name}:{p.name}" for p in prompts], "prompts")
        kept.append([prompts[i] for i in places])
        merged |= repeats
        _check_enough(kept[-1], f"prompts_{name}", "prompts")
    of_b = {prompt.tokens: prompt.name for prompt in kept[1]}
    if both := [(prompt.name, of_b[prompt.tokens]) for prompt in kept[0] if prompt.tokens in of_b]:
        raise DataError(
            f"prompt {both[0][0]!r} of prompts_a, which is {both[0][1]!r} of prompts_b",
            "different prompts in the two sets",
            "Leave it out of one.",
        )
    return (kept[0], kept[1]), merged


def _pairs(a: list[Prompt], b: list[Prompt]) -> tuple[tuple[list[Prompt], list[Prompt]], Merged]:
    """Both sets, each pair once."""
    if len(a) != len(b):
        raise DataError(
            f"{len(a)} and {len(b)} prompts that are paired",
            "as many in both sets",
            "Leave `paired` out, or pair them.",
        )
    places, merged = merge_repeats(
        [(p.tokens, q.tokens) for p, q in zip(a, b)], [p.name for p in a], "pairs of prompts"
    )
    kept = [a[i] for i in places], [b[i] for i in places]
    _check_enough(kept[0], "prompts_a and prompts_b", "pairs")
    return kept, merged


def _check_enough(prompts: list[Prompt], which: str, units: str) -> None:
    if len(prompts) < 2:
        raise DataError(
            f"{which}: {len(prompts)} different {units}",
            "at least two, since prompts are what varies; six for a verdict",
            "Add prompts: no number of tokens of one prompt says what another would do.",
        )
