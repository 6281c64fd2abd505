"""What a patching experiment is given: tokens, layers, positions and the clean run's cache, refused before any pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_interp.checks import as_whole
from moe_interp.engine.pass_inputs import check_tokens
from moe_interp.errors import ConfigError, DataError, HookError
from moe_interp.hooks.attach import MoEHooks, check_attached
from moe_interp.hooks.layer import plain_label
from moe_interp.types import Layer


@dataclass(frozen=True, eq=False)
class PatchInputs:
    """A batch that patches are made in.

    A *position* counts the real tokens of an example, a *column* the tokens with their padding: so a prompt has the
    same positions however it is padded.

    Attributes:
        moe: The attached hooks.
        tokens: ``[batch, pos]`` ids.
        mask: ``[batch, pos]``, 0 at padding; None where there is none.
        layers: The layers of the experiment, in the model's order.
        options: Further keyword arguments of every forward pass.
    """

    moe: MoEHooks
    tokens: Tensor
    mask: Tensor | None
    layers: tuple[Layer, ...]
    options: dict[str, Any]

    @property
    def is_real(self) -> Tensor:
        """``[batch, pos]`` bool."""
        return torch.ones_like(self.tokens, dtype=torch.bool) if self.mask is None else self.mask.bool()

    @property
    def lengths(self) -> Tensor:
        """``[batch]``: real tokens of each example."""
        return self.is_real.sum(dim=1)

    def columns(self, positions: Sequence[int]) -> Tensor:
        """``[batch, position]``: the column of each position; -1 where an example is too short for it.

        Args:
            positions: From 0 on, or negative: from the end of each example.
        """
        asked = torch.as_tensor(list(positions), dtype=torch.long, device=self.tokens.device)
        lengths = self.lengths.unsqueeze(1)
        asked = torch.where(asked < 0, asked + lengths, asked.expand(len(lengths), -1))
        order = self.is_real.long().cumsum(dim=1) - 1
        order = torch.where(self.is_real, order, -2)
        # shape: (batch, position, pos)
        found = order.unsqueeze(1) == asked.unsqueeze(2)
        return torch.where(found.any(dim=-1), found.long().argmax(dim=-1), -1)

    def forward(self, tokens: Tensor | None = None, hooks: Sequence[Any] = ()) -> Tensor:
        """``[batch, pos, vocab]``: the logits of a plain ``run_with_hooks`` of the batch, or of others like it."""
        mask: dict[str, Any] = {} if self.mask is None else {"attention_mask": self.mask}
        given = self.tokens if tokens is None else tokens
        logits: Tensor = self.moe.bridge.run_with_hooks(given, fwd_hooks=list(hooks), **mask, **self.options)
        return logits


def check_patch_inputs(
    moe: MoEHooks,
    tokens: Any,
    layers: Any = None,
    attention_mask: Tensor | None = None,
    needs: Sequence[str] = (),
    options: dict[str, Any] | None = None,
) -> PatchInputs:
    """The batch of an experiment, checked without a forward pass.

    Args:
        moe: Attached hooks.
        tokens: ``[batch, pos]`` ids, or texts.
        layers: MoE layers: one, several, or all that have the hooks.
        attention_mask: ``[batch, pos]``, 0 at padding.
        needs: Bare names of the hooks that the experiment writes to or reads.
        options: Further keyword arguments of the forward pass.

    Raises:
        AttachError: hooks that were detached.
        DataError: tokens that the model cannot read, an example without a real token, or padding inside of one.
        HookError: a layer that is not there, or has not the hooks; the reason in words.
        ConfigError: no layer, or an option that no forward pass takes, such as a misspelt argument.
    """
    check_attached(moe)
    check_options(moe, options or {})
    chosen = check_layers(moe, layers, needs)
    ids, mask = check_tokens(moe, tokens, attention_mask)
    if mask is not None:
        real = mask.bool()
        edges = (real[:, 1:] != real[:, :-1]).sum(dim=1) + real[:, 0].long() + real[:, -1].long()
        if not bool((edges == 2).all()):
            row = int((edges != 2).nonzero()[0])
            what = "without a real token" if not bool(real[row].any()) else "with padding between its tokens"
            raise DataError(
                f"example {row} {what}", "real tokens in one piece", "Pad on one side, and leave empty examples out."
            )
        mask = None if bool(real.all()) else mask
    return PatchInputs(moe, ids, mask, chosen, dict(options or {}))


def check_options(moe: MoEHooks, options: Mapping[str, Any]) -> None:
    """Refuse keyword arguments that the forward pass would ignore, or that change what it returns.

    Both TransformerLens' and transformers' forward take any keyword, and drop what they do not know.

    Raises:
        ConfigError: such an option, by name.
    """
    model: Any = moe.bridge.original_model
    known = {*_NAMES_OF_FORWARD, *_named(type(moe.bridge).forward), *_named(type(model).forward)} - _NOT_OPTIONS
    if unknown := [name for name in options if name not in known]:
        raise ConfigError(
            f"an argument {unknown[0]!r}",
            "an argument of this function, or of the model's forward pass: " + ", ".join(sorted(known)),
            "Correct its name, or leave it out.",
        )


def _named(function: Any) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


# taken by name, though not in every signature
_NAMES_OF_FORWARD = ("decoder_input", "use_cache", "output_attentions", "output_hidden_states", "position_ids")
# given by the experiment itself, without effect on ids, or changing what is returned
_NOT_OPTIONS = frozenset(
    [
        "self",
        "input",
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        "prepend_bos",
        "padding_side",
        "return_type",
        "loss_per_token",
        "labels",
        "start_at_layer",
        "stop_at_layer",
        "past_key_values",
        "logits_to_keep",
        "return_dict",
    ]
)


def check_layers(moe: MoEHooks, layers: Any = None, needs: Sequence[str] = ()) -> tuple[Layer, ...]:
    """MoE layers that have the needed hooks, each once and in the model's order; all that have them by default.

    Raises:
        HookError: a layer that is dense, does not exist, or lacks a hook.
        ConfigError: no layer.
    """
    given = plain_label(layers)
    if given is None:
        found = [layer for layer in moe.layers if set(needs) <= set(moe.hooks(layer))]
        if not found:
            for name in needs:
                moe.hook_name(name, moe.layers[0])  # says why
        return tuple(found)
    several = given.tolist() if hasattr(given, "tolist") else given
    is_label = isinstance(several, tuple) and len(several) == 2 and isinstance(several[0], str)
    is_one = isinstance(several, str) or is_label or not isinstance(several, Iterable)
    chosen = {moe.layer_label(layer) for layer in ([several] if is_one else several)}
    if not chosen:
        raise ConfigError("no layers", f"at least one of {list(moe.layers)}", "Leave layers out for all of them.")
    for layer in chosen:
        for name in needs:
            moe.hook_name(name, layer)
    return tuple(layer for layer in moe.layers if layer in chosen)


def check_positions(inputs: PatchInputs, positions: Any = None) -> tuple[int, ...]:
    """Positions that at least one example has; by default all, from 0 to the longest example's last.

    Raises:
        ConfigError: positions that are no whole numbers, twice the same, none, or that no example has.
    """
    longest = int(inputs.lengths.max())
    if positions is None:
        return tuple(range(longest))
    several = positions.tolist() if hasattr(positions, "tolist") else positions
    several = several if isinstance(several, Iterable) and not isinstance(several, str) else [several]
    found = [as_whole(position) for position in several]
    chosen = tuple(position for position in found if position is not None)
    if len(chosen) < len(found) or not chosen or len(set(chosen)) < len(chosen):
        raise ConfigError(f"positions={positions!r}", "whole numbers, each once", "Name the positions to patch.")
    if beyond := [position for position in chosen if not -longest <= position < longest]:
        raise ConfigError(
            f"positions {beyond[:5]}, which no example has",
            f"positions from {-longest} to {longest - 1}; padding is not counted",
            "Leave them out.",
        )
    return chosen


def cached_activation(inputs: PatchInputs, cache: Any, name: str, layer: Layer) -> Tensor:
    """A hook's activation ``[batch, pos, ...]`` in the clean run's cache, on the model's device.

    Raises:
        HookError: the cache lacks it; the message names it, and says how to record it.
        DataError: it is of another shape than the batch: prompts of different length, or no batch axis.
    """
    full = inputs.moe.hook_name(name, layer)
    try:
        value = cache[full]
    except (KeyError, TypeError, AttributeError):
        value = None
    if not isinstance(value, Tensor):
        raise HookError(
            f"a clean cache without {full}",
            f"the clean run's {name} at each layer of the sweep",
            f"Record it: moe.bridge.run_with_cache(clean_tokens, names_filter=moe.filter({name!r}, ...)).",
        )
    if value.shape[:2] != inputs.tokens.shape:
        raise DataError(
            f"{full} of shape {tuple(value.shape)} in the clean cache, and corrupted tokens of shape "
            f"{tuple(inputs.tokens.shape)}",
            "a clean and a corrupted prompt of the same length for each example, padded alike, with the batch axis",
            "Choose prompts of equal length, and record the cache without remove_batch_dim.",
        )
    _check_of_this_model(inputs, value, name, layer)
    return value.detach().to(inputs.tokens.device)


def _check_of_this_model(inputs: PatchInputs, value: Tensor, name: str, layer: Layer) -> None:
    n_experts = inputs.moe.spec(layer).n_experts
    if name == "router_logits":
        found = value.shape[-1]
    elif name == "expert_indices":
        found = max(n_experts, int(value.max()) + 1) if value.numel() else n_experts
    else:
        return
    if found != n_experts:
        raise DataError(
            f"{inputs.moe.hook_name(name, layer)} of at least {found} experts in the clean cache",
            f"{n_experts} experts, as this model's layer has",
            "Record the cache with this model.",
        )


def check_cached(inputs: PatchInputs, cache: Any, names: Sequence[str]) -> None:
    """Refuse a cache that lacks one of these hooks at a layer, or has it in another shape; see the one above."""
    for layer in inputs.layers:
        for name in names:
            cached_activation(inputs, cache, name, layer)


def layer_name(layer: Layer) -> int | str:
    """A layer as an entry of an axis: its number, or ``encoder.1``."""
    return layer if isinstance(layer, int) else f"{layer[0]}.{layer[1]}"
