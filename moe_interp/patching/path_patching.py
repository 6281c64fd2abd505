"""Path patching: how much of an upstream expert's effect on a downstream router is direct."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor
from torch.utils._pytree import tree_map

from moe_interp.checks import as_whole, check_whole
from moe_interp.engine import threads_asleep
from moe_interp.engine.eval_mode import eval_mode
from moe_interp.engine.memory import out_of_memory_in_words
from moe_interp.engine.residual_stream import FrozenSublayers, record_sublayers
from moe_interp.errors import ConfigError, RouteError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.patching.cells import position_mask
from moe_interp.patching.inputs import (
    PatchInputs,
    cached_activation,
    check_layers,
    check_patch_inputs,
    check_positions,
)
from moe_interp.patching.result import EXAMPLE, EffectResult
from moe_interp.progress import Report, reporting
from moe_interp.types import Hooks

Mode = Literal["zero", "mean", "clean"]
PATHS = ("direct", "total")
_NEEDS = ("expert_indices", "expert_weights", "expert_out")
_READ = ("router_logits", "expert_indices")


def path_patching(
    moe: MoEHooks,
    tokens: Any,
    sources: Any = None,
    targets: Any = None,
    mode: Mode = "zero",
    clean_cache: Any = None,
    positions: Sequence[int] | None = None,
    *,
    attention_mask: Tensor | None = None,
    by_expert: bool = False,
    batch_size: int = 64,
    progress: bool | Report | None = None,
) -> PathResult:
    """How an upstream expert moves the routers of later layers: directly, and in all.

    At a layer l the output of one expert e, weighted as applied, is replaced at the tokens that use it, and the routers
    of later layers m are read at these tokens.

    - ``total``: everything after follows (attention, experts and norms in between are computed anew).
    - ``direct``: attention, experts and MLPs in between keep what they gave without the patch; the change reaches
      ``router_in`` of layer m through the residual stream alone. Norms are computed anew: of layer m before its router,
      and any that the family puts after its experts. It acts on the token itself only.

    The rest, total - direct, is what goes through sublayers in between, and through other tokens.

    Args:
        moe: Attached hooks of a decoder, with ``expert_outputs=True``.
        tokens: ``[batch, pos]`` ids, or texts.
        sources: What is patched: pairs (layer, expert), or layers for all of their experts; by default all experts of
            all layers but the last.
        targets: Layers whose routers are read; all by default.
        mode: What stands in the place of the expert's weighted output: "zero"; "mean", its mean over the batch's real
            tokens that use it; "clean", what it contributes in the clean run at that token (nothing where that does
            not use it), for which ``tokens`` are the corrupted ones.
        clean_cache: For "clean": of a run of prompts of the same length, with ``expert_indices``, ``expert_weights``
            and ``expert_out``.
        positions: Where the expert is patched: absolute in the unpadded prompts, negative ones from each example's end;
            all by default.
        attention_mask: ``[batch, pos]``, 0 at padding, which is never patched.
        by_expert: Whether the changes of each downstream expert's logit are kept too.
        batch_size: Sequences a pass; patches of one layer share passes.
        progress: As :func:`moe_interp.progress.reporting` takes it.

    Returns:
        Per example, averaged over the tokens at which the expert was patched; NaN where there is none.

    Raises:
        HookError: a layer that is not there or was attached without expert outputs, or a cache without a hook; by name.
        RouteError: an expert that is not there.
        ConfigError: an encoder-decoder, a family with several residual streams, no pair of layers to compare, a clean
            cache without mode "clean" or the reverse.
        DataError: tokens that the model cannot read, or clean prompts of another length.

    A router reads a norm of the residual stream: the direct effects of several experts do not add up to that of all of
    them. A large direct effect says that the later router reads what the expert writes, not that it uses it as such: the
    patch also moves the norm's scale.

    Source: path patching (Wang et al. 2022; Goldowsky-Dill et al. 2023), from experts to routers. TransformerLens'
    ``get_act_patch_direct_path`` patches edges between attention heads and MLPs of models whose blocks it splits itself;
    it has no routers as receivers.
    """
    if mode not in get_args(Mode) or (mode == "clean") != (clean_cache is not None):
        given = f"mode={mode!r} {'without' if clean_cache is None else 'with'} a clean cache"
        expected = 'mode "zero" or "mean" alone, or "clean" with the cache of the clean run'
        raise ConfigError(given, expected, "Pass both or neither.")
    check_whole(batch_size, "batch_size", 1)
    inputs = check_patch_inputs(moe, tokens, None, attention_mask, _NEEDS)
    read = check_layers(moe, targets, _READ)
    experts = _check_sources(inputs, sources, read)
    where = position_mask(inputs, check_positions(inputs, positions))
    if mode == "clean":
        inputs_at = replace(inputs, layers=tuple(experts))
        for layer in inputs_at.layers:
            for name in _NEEDS:
                cached_activation(inputs_at, clean_cache, name, layer)
    with torch.no_grad(), eval_mode(moe.bridge), threads_asleep(), out_of_memory_in_words():
        return _Paths(inputs, read, where, mode, clean_cache, batch_size, by_expert).run(experts, progress)
