"""Running branches: single tokens whose route at one layer differs, through the rest of the model.

A token's route at layer l changes nothing before its position, and only its own prediction is read. So one token passes
layers l+1.., attending to the keys and values that a base pass cached for earlier positions, and to itself. This is
exact. The model's own modules run; what a module has answered in the base pass is read from there:

- layers below l hand their input on;
- in layer l, the children called before the experts' block answer as in the base pass, and the block answers with the
  branch's own output; what follows in the layer (norms, scales, sums) runs;
- layers above l run on the branches, with the base pass's masks, rotary tables and keys, gathered at each branch's
  sequence and position.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from moe_interp.arch.modules import is_watched, unwrap
from moe_interp.engine import branch_attention
from moe_interp.engine.attention import attention_function
from moe_interp.engine.branch_attention import Rows
from moe_interp.engine.cached_keys import BranchCache, SharedCache
from moe_interp.engine.cpu.matmul import linear
from moe_interp.engine.memory import Memory
from moe_interp.engine.policy import policy_of
from moe_interp.engine.recorded_pass import RecordedPass
from moe_interp.engine.replaced_forward import swapped_forward
from moe_interp.types import Hooks

_TRIED = 16  # branches


def can_share_keys(base: RecordedPass) -> bool:
    """Whether branches may read their sequence's keys without copies: tried once on a few, beside the plain forward.

    Not where attention is more than a softmax over keys, is no function in transformers' table, or has other keys than
    those that TransformerLens' own steps, which the recorded pass took, have put in the cache; nor at half precision,
    where another order of the same steps would be further from the recorded pass.
    """
    if base.shares_keys is None:
        base.shares_keys = _shares_keys(base)
    return base.shares_keys


def _shares_keys(base: RecordedPass) -> bool:
    layer = min((layer for layer in base.layers if base.refusal(layer) is None), default=None)
    tolerance = policy_of(base.moe).shared_keys_tolerance(base.logits.dtype)
    if layer is None or tolerance is None:
        return False
    sequence, position = base.is_real.nonzero().unbind(-1)
    some = torch.linspace(0, len(sequence) - 1, _TRIED, device=sequence.device).long()
    sequence, position = sequence[some], position[some].unsqueeze(1)
    token = sequence.unsqueeze(1) * base.tokens.shape[1] + position
    plain = base.logits.flatten(0, 1)[token[:, 0]]
    try:
        with torch.no_grad(), BranchRunner(base, layer, shares_keys=True) as run:
            block_out = base.block_out(layer)[token]
            parts = Memory(base.moe).in_parts(
                lambda part: run.logits(run(sequence[part], position[part], block_out[part])[:, 0]), _TRIED, "tried"
            )
            found = torch.cat(parts)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model that reads the mask or the keys in a way of its own, whatever it then says
        return False
    # a near-tie of a later router fails the trial too: copies are exact as well
    return float((found - plain).abs().max()) <= tolerance * float(plain.abs().max())


class _Running(threading.local):
    """What runs in a thread."""

    rows: Rows | None = None


class BranchRunner:
    """Runs branches of one layer; a context manager that leaves the model as it was, also after an exception.

    Calls may run side by side, in a thread each, where no hooks are given.

    Args:
        base: The base pass.
        layer: The first layer at which the branches' routes differ.
        hooks: Further hooks for the layers above (routes of the branches there).
        at_once: About how many branches a call will get: with many, experts run as :class:`FastModules` has them.
        shares_keys: Whether branches read their sequence's keys without a copy, which cannot be differentiated; by
            default where that is exact.
        scores_at_once: How many attention scores to hold together over shared keys; one row's at least.
    """

    def __init__(
        self,
        base: RecordedPass,
        layer: int,
        hooks: Hooks | None = None,
        at_once: int = 1,
        shares_keys: bool | None = None,
        scores_at_once: int = 2**18,
    ) -> None:
        self.scores_at_once = scores_at_once
        self.base, self.layer, self.hooks, self.at_once = base, layer, hooks or [], at_once
        self.shares_keys = can_share_keys(base) if shares_keys is None else shares_keys
        self._running = _Running()
        self._hides: dict[int, bool] = {}
        self._unembed = _unembedding(base.head)
        self._stack = ExitStack()

    def __enter__(self) -> BranchRunner:
        base, layer = self.base, self.layer
        with ExitStack() as stack:
            if self.shares_keys:  # before the attention of the first layer gets its recorded answer
                stack.enter_context(attention_function(base.moe, branch_attention.NAME))
            if base.ends_in_head:
                stack.enter_context(swapped_forward(base.head, lambda hidden, *args, **kwargs: hidden))
            for block in base.blocks[:layer]:
                stack.enter_context(swapped_forward(block, lambda hidden, *args, **kwargs: hidden))
            children = dict(base.blocks[layer].named_children())
            for name, answers in base.recording.layers[layer].answers.items():
                stack.enter_context(swapped_forward(children[name], self._answer(name, answers)))
            for index in range(layer, len(base.blocks)):
                handle = base.blocks[index].register_forward_pre_hook(self._feeder(index), with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(base.moe.bridge.hooks(fwd_hooks=self.hooks))
            stack.enter_context(base.fast.modules())
            stack.enter_context(base.fast.experts(self.at_once))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def __call__(self, sequence: Tensor, position: Tensor, block_out: Tensor) -> Tensor:
        """What the model gives at branches, to be read with :meth:`logits`.

        Args:
            sequence: ``[row]``, which sequence of the batch a row's branches belong to.
            position: ``[row, n]``, their positions.
            block_out: ``[row, n, d_model]``, the output of their layer's experts' block.

        Returns:
            ``[row, n, width]``: the unembedding's input where nothing follows the unembedding (so that logits need not
            be held for all branches at once), else the logits.
        """
        base = self.base
        token = sequence.unsqueeze(1) * base.tokens.shape[1] + position
        rows = Rows(sequence, position, token, int(position.max()), block_out, self.scores_at_once)
        cache = SharedCache if self.shares_keys else BranchCache
        self._running.rows = rows
        # 4-D, so that the model does not make a mask of its own; the layers get theirs below
        no_mask = block_out.new_zeros(1, 1, 1, 1)
        try:
            return base.moe.bridge.original_model(
                input_ids=base.tokens.reshape(-1)[token],
                attention_mask=no_mask,
                position_ids=position,
                past_key_values=cache(base.cache.recorded, rows),
                use_cache=True,
            ).logits
        finally:
            self._running.rows = None
            branch_attention.forget()

    @property
    def rows(self) -> Rows:
        """The branches that run in this thread."""
        assert self._running.rows is not None
        return self._running.rows

    def logits(self, states: Tensor) -> Tensor:
        """``[branch, width]`` of what a call gave to logits ``[branch, vocab]``."""
        return self._unembed(states) if self.base.ends_in_head else states

    # -- what the modules are made to answer and to read ------------------------------------------------------------
    def _answer(self, name: str, answers: list[Any]) -> Callable[..., Any]:
        """A child's forward: its recorded answers at the branches, call after call; the experts' block has theirs."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.rows.calls[name] += 1
            gathered = self._at_branches(answers[min(self.rows.calls[name], len(answers)) - 1])
            if name != self.base.targets[self.layer]:
                return gathered
            shape = _first(gathered).shape
            block_out = self.rows.block_out.reshape(shape)
            return (block_out, *gathered[1:]) if isinstance(gathered, tuple) else block_out

        return forward

    def _feeder(self, index: int) -> Callable[..., Any]:
        def feed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if index == self.layer:
                hidden = self._at_branches(self.base.recording.layers[index].hidden)
                return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
            recorded = self.base.recording.arguments[index]
            fed = {name: self._at_branches(value) for name, value in recorded.items() if self._is_positional(value)}
            if "attention_mask" in recorded:
                mask = recorded["attention_mask"]
                # over shared keys, attention finds in the base pass's own mask what its rows read
                fed["attention_mask"] = self._hiding(mask) if self.shares_keys else self._mask(mask)
            return args, {**kwargs, **fed}

        return feed

    def _hiding(self, mask: Tensor | None) -> Tensor | None:
        """A recorded attention mask; None where it only says that real tokens read all earlier ones."""
        if mask is None:
            return None
        if id(mask) not in self._hides:  # the recording holds the mask
            self._hides[id(mask)] = self.base.hides_keys(mask)
        return mask if self._hides[id(mask)] else None

    def _is_positional(self, value: Any) -> bool:
        return any(isinstance(leaf, Tensor) and self._index(leaf) is not None for leaf in tree_leaves(value))

    def _index(self, value: Tensor) -> Tensor | None:
        """Where the branches are in a tensor of the base pass; None for one without a position axis."""
        batch, pos = self.base.tokens.shape
        if value.shape[:2] == (batch, pos) or value.shape[:1] == (batch * pos,):
            return self.rows.token
        return self.rows.position if value.shape[:2] == (1, pos) else None

    def _at_branches(self, value: Any) -> Any:
        """A value of the base pass, gathered at the branches; None in the place of tensors without positions."""
        if id(value) not in self.rows.gathered:
            self.rows.gathered[id(value)] = tree_map(self._gather, value)
        return self.rows.gathered[id(value)]

    def _gather(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        index = self._index(leaf)
        if index is None:
            return None
        is_flat = leaf.shape[:2] != (leaf.shape[0], self.base.tokens.shape[1])
        flat = leaf if is_flat else leaf.reshape(-1, *leaf.shape[2:])
        return flat[index.reshape(-1)] if is_flat else flat[index]

    def _mask(self, base_mask: Tensor | None) -> Tensor:
        """``[row, 1, n, crop + n]``: a branch reads what its token read before its position, and itself."""
        rows = self.rows
        if id(base_mask) in rows.gathered:
            return rows.gathered[id(base_mask)]
        dtype, device = rows.block_out.dtype, rows.block_out.device
        never, n = torch.finfo(dtype).min, rows.position.shape[1]
        is_later = torch.arange(rows.crop, device=device) >= rows.position.unsqueeze(-1)
        if base_mask is None:
            before = torch.zeros(is_later.shape, dtype=dtype, device=device)
        else:
            index = rows.position if len(base_mask) == 1 else rows.token
            before = base_mask.flatten(0, 2)[:, : rows.crop][index]
            if before.dtype == torch.bool:
                before = torch.zeros(is_later.shape, dtype=dtype, device=device).masked_fill(~before, never)
        own = torch.full((n, n), never, dtype=dtype, device=device).fill_diagonal_(0.0)
        mask = torch.cat([before.masked_fill(is_later, never), own.expand(len(before), n, n)], dim=-1).unsqueeze(1)
        rows.gathered[id(base_mask)] = mask
        return mask


def _unembedding(head: nn.Module) -> Callable[[Tensor], Tensor]:
    native = unwrap(head)
    # TransformerLens gives a head without a bias one of zeros, which would be copied into every logit
    if type(native) is nn.Linear and native.bias is not None and not is_watched(native) and not bool(native.bias.any()):
        return partial(linear, weight=native.weight)
    return head.forward


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value
