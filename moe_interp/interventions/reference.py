"""What an expert gives on other tokens, to put in the place of what it gives on one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_interp.errors import ConfigError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.hooks.passes import StateBetweenPasses
from moe_interp.interventions.positions import TokenSelection
from moe_interp.tokenization import TextReader, check_context
from moe_interp.types import Layer

Reference = Tensor | str | Sequence[Any] | Mapping[str, Tensor] | None


class RunningPassOutputs:
    """An expert's outputs on the prompt tokens of the running pass.

    Args:
        selection: The tokens of the intervention.
        mode: The mode that asks, for messages.
        is_kept: Whether generated tokens are served as well, from the prompt that ran before them.
    """

    def __init__(self, selection: TokenSelection, mode: str, is_kept: bool = False) -> None:
        self.selection, self.mode, self.is_kept = selection, mode, is_kept
        # of each expert, its outputs on the prompt, and the pass that they were seen in last
        self._between_passes = StateBetweenPasses()

    def outputs(self, expert: int, value: Tensor, used: Tensor, asked: Tensor) -> Tensor:
        """``[token, d_model]`` outputs of an expert, at ``used`` slots of ``value``; asked for the slots at ``asked``.

        Raises:
            ConfigError: no other token of the prompt is known to use the expert.
        """
        is_prompt = self.selection.is_prompt(value).view(1, -1, 1)
        own = value[used & is_prompt]
        kept = self._keep(expert, own) if self.is_kept else own
        if bool((asked & is_prompt).any()):
            if self.selection.is_piece(value):
                raise self._nothing(expert, "a prompt that runs in several passes, each of which knows its own tokens")
            if len(own) < 2:
                raise self._nothing(expert, "a pass without another token that uses it")
        if bool((asked & ~is_prompt).any()):
            if not self.is_kept:
                raise self._nothing(expert, "a generated token")
            if not len(kept):
                raise self._nothing(expert, "a token generated from a prompt of which none uses it")
            return kept
        return own

    def _keep(self, expert: int, own: Tensor) -> Tensor:
        """Adds a piece of the prompt to what is known of it, and gives that; the first piece begins anew."""
        context = self.selection.moe.pass_context(self.selection.layer)
        memory = self._between_passes.before(context)
        kept, seen = memory.get(expert, (own[:0], None))
        if seen is not context:
            is_first = context.n_past <= context.prompt_cached
            kept = own.detach() if is_first else torch.cat([kept, own.detach()])
            memory[expert] = kept, context
        return kept

    def _nothing(self, expert: int, where: str) -> ConfigError:
        return ConfigError(
            f"mode={self.mode!r} for expert {expert} at layer {self.selection.layer!r} in {where}",
            "other tokens that use the expert, to take its output from",
            "Pass reference=: tokens to run, or a cache with expert_indices and expert_out"
            + ("." if self.is_kept else '; reference="prompt" serves generated tokens from their prompt.'),
        )


class ReferenceOutputs:
    """An expert's outputs on tokens of reference, by expert: ``[token, d_model]`` each."""

    def __init__(self, pools: dict[int, Tensor], layer: Layer) -> None:
        self.pools, self.layer = pools, layer

    def outputs(self, expert: int, value: Tensor, used: Tensor, asked: Tensor) -> Tensor:
        """``[token, d_model]``, asked for the slots at ``asked``.

        Raises:
            ConfigError: no token of reference uses the expert, but one of these does.
        """
        if not len(self.pools[expert]) and bool(asked.any()):
            raise ConfigError(
                f"a reference without a token that uses expert {expert} at layer {self.layer!r}",
                "at least one token of each ablated expert",
                "Give more tokens of reference, or ablate other experts.",
            )
        return self.pools[expert].to(value.device)


def outputs_of(
    moe: MoEHooks, layer: Layer, experts: Sequence[int], reference: Any, mask: Tensor | None
) -> ReferenceOutputs:
    """The experts' outputs in a recorded run, or on tokens or texts, which run once, now.

    Raises:
        ConfigError: no such thing, or a mask that does not fit.
    """
    texts = [reference] if isinstance(reference, str) else reference
    if hasattr(reference, "keys"):
        runs = [reference]
    elif isinstance(texts, list | tuple) and texts and all(isinstance(text, str) for text in texts):
        runs, mask = [_run(moe, layer, ids, None) for ids in _read(moe, texts)], None
    else:
        runs = [_run(moe, layer, _tokens(reference), mask)]
    found = [_by_expert(moe, layer, experts, run, mask) for run in runs]
    pools = {expert: torch.cat([each[expert] for each in found]) for expert in experts}
    return ReferenceOutputs(pools, layer)


def _read(moe: MoEHooks, texts: Sequence[str]) -> list[Tensor]:
    """Each text's ids ``[1, pos]``."""
    reader = TextReader(moe.bridge)
    read = [torch.tensor([reader.start(text, f"text {n} of the reference")]) for n, text in enumerate(texts)]
    reader.warn("text")
    return read


def _tokens(reference: Any) -> Tensor:
    """``[row, pos]`` ids."""
    try:
        tokens = torch.as_tensor(reference)
    except (TypeError, ValueError, RuntimeError):
        tokens = torch.empty(0)
    if tokens.is_floating_point() or tokens.dtype == torch.bool or tokens.ndim not in (1, 2) or not tokens.numel():
        raise ConfigError(
            f"reference={type(reference).__name__}" + (f" of shape {tuple(tokens.shape)}" if tokens.numel() else ""),
            'token ids [row, pos], text, a cache with expert_indices and expert_out, or "prompt"',
            "Record one with run_with_cache(names_filter=moe.filter('expert_indices', 'expert_out')); a RoutingTrace "
            "holds no outputs.",
        )
    return tokens.reshape(-1, tokens.shape[-1])


@torch.no_grad()
def _run(moe: MoEHooks, layer: Layer, tokens: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """One pass of the model as it is, hooks included; what the layer's experts give in it."""
    _check_mask(mask, tuple(tokens.shape))
    check_context(moe.bridge, [("the reference", tokens.shape[1])])
    found: dict[str, Tensor] = {}
    names = [moe.hook_name(name, layer) for name in ("expert_indices", "expert_out")]
    recorders: Any = [(name, lambda value, hook, name=name: found.__setitem__(name, value.clone())) for name in names]
    options: dict[str, Any] = {} if mask is None else {"attention_mask": torch.as_tensor(mask).long()}
    moe.bridge.run_with_hooks(tokens, fwd_hooks=recorders, **options)
    return found


def _by_expert(
    moe: MoEHooks, layer: Layer, experts: Sequence[int], run: Mapping[str, Tensor], mask: Tensor | None
) -> dict[int, Tensor]:
    names = [moe.hook_name(name, layer) for name in ("expert_indices", "expert_out")]
    if missing := [name for name in names if name not in run]:
        raise ConfigError(
            f"a reference without {' and '.join(missing)}",
            "a cache with both hooks of the layer",
            'Record it with run_with_cache(names_filter=moe.filter("expert_indices", "expert_out")).',
        )
    has_batch = getattr(run, "has_batch_dim", True)
    indices, outputs = (run[name] if has_batch else run[name].unsqueeze(0) for name in names)
    if indices.ndim != 3 or outputs.shape[:3] != indices.shape:
        raise ConfigError(
            f"a reference of shapes {tuple(indices.shape)} and {tuple(outputs.shape)}",
            "expert_indices [row, pos, slot] and expert_out [row, pos, slot, d_model] of one run",
            "Record both in the same run.",
        )
    _check_mask(mask, tuple(indices.shape[:2]))
    real = torch.ones(indices.shape[:2]) if mask is None else torch.as_tensor(mask)
    used = real.bool().to(indices.device).unsqueeze(-1)
    return {expert: outputs[((indices == expert) & used).to(outputs.device)].detach() for expert in experts}


def _check_mask(mask: Any, shape: tuple[int, ...]) -> None:
    given = None if mask is None else tuple(torch.as_tensor(mask).shape)
    if given is not None and given != shape:
        raise ConfigError(
            f"a reference_mask of shape {given} for a reference of {shape}", "[row, pos], 1 at real tokens", "Fit it."
        )
