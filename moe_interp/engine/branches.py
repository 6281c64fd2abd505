"""Running branches: single tokens whose route at one layer differs, through the rest of the model.

A token's route at layer l changes nothing before its position, and only its own prediction is read. So one token passes
layers l+1.., attending to the keys and values that a base pass cached for earlier positions, and to itself. This is
exact. The model's own modules run; what a module has answered in the base pass is read from there:

- layers below l hand their input on;
- in layer l, the children called before the experts' block answer as in the base pass, and the block answers with the
  branch's own output; what follows in the layer (norms, scales, sums) runs;
- layers above l run on the branches, with the base pass's masks, rotary tables and keys, gathered at each branch's
  sequence and position.

The rows reach the modules as arguments: they are part of the cache, which the model hands to every layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from moe_interp.arch.modules import is_watched, unwrap
from moe_interp.engine.attention import attention_function
from moe_interp.engine.branch_attention import NAME, RowsOverSharedKeys
from moe_interp.engine.branch_rows import CompactRows, Rows
from moe_interp.engine.cpu.matmul import linear
from moe_interp.engine.cuda.compiled import compiled_layers
from moe_interp.engine.memory import Memory, is_out_of_memory
from moe_interp.engine.policy import policy_of
from moe_interp.engine.recorded_pass import RecordedPass
from moe_interp.engine.replaced_forward import forward_slot, swapped_forward
from moe_interp.hooks.attach import MoEHooks
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
    except Exception as error:  # a model that reads the mask or the keys in a way of its own, whatever it then says
        if is_out_of_memory(error):
            raise
        return False
    # a near-tie of a later router fails the trial too: copies are exact as well
    return float((found - plain).abs().max()) <= tolerance * float(plain.abs().max())


class BranchRunner:
    """Runs branches of one layer; a context manager that leaves the model as it was, also after an exception.

    Calls may run side by side, in a thread each, where no hooks are given.

    Args:
        base: The base pass.
        layer: The first layer at which the branches' routes differ.
        at_once: About how many branches a call will get: with many, experts run as :class:`FastModules` has them.
        shares_keys: Whether branches read their sequence's keys without a copy, which cannot be differentiated; by
            default where that is exact.
        scores_at_once: How many attention scores to hold together over shared keys; one row's at least.
        compile: Whether layers above that nobody hooks are compiled, where they can be; for grids.
    """

    def __init__(
        self,
        base: RecordedPass,
        layer: int,
        at_once: int = 1,
        shares_keys: bool | None = None,
        scores_at_once: int = 2**18,
        compile: bool = False,
    ) -> None:
        self.compiled = compiled_layers(base.moe, NAME) if compile else None
        self.scores_at_once = scores_at_once
        self.base, self.layer, self.at_once = base, layer, at_once
        self.shares_keys = shares_keys
        self._unembed = _unembedding(base.head)
        self._stack = ExitStack()

    def __enter__(self) -> BranchRunner:
        base, layer = self.base, self.layer
        if self.shares_keys is None:
            self.shares_keys = can_share_keys(base)
        with ExitStack() as stack:
            if self.shares_keys:
                stack.enter_context(attention_function(base.moe, NAME))
            if base.ends_in_head:
                stack.enter_context(swapped_forward(base.head, lambda hidden, *args, **kwargs: hidden))
            for block in base.blocks[:layer]:
                stack.enter_context(swapped_forward(block, lambda hidden, *args, **kwargs: hidden))
            own = base.blocks[layer]
            stack.enter_context(swapped_forward(own, self._first_layer(own), forward_slot(own)))
            for index in range(layer + 1, len(base.blocks)):
                block = base.blocks[index]
                if self.compiled is not None and (forward := self.compiled.forward(base.moe, index, block)) is not None:
                    stack.enter_context(swapped_forward(block, forward))
                stack.callback(block.register_forward_pre_hook(self._feeder(index), with_kwargs=True).remove)
            stack.enter_context(base.fast.modules())
            stack.enter_context(base.fast.experts(self.at_once))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def __call__(self, sequence: Tensor, position: Tensor, block_out: Tensor, hooks: Hooks | None = None) -> Tensor:
        """What the model gives at branches in compact rows, to be read with :meth:`logits`.

        Args:
            sequence: ``[row]``, which sequence of the batch a row's branches belong to.
            position: ``[row, n]``, their positions.
            block_out: ``[row, n, d_model]``, the output of their layer's experts' block.
            hooks: Of this call, for the layers above (routes of the branches there).

        Returns:
            ``[row, n, width]``: the unembedding's input where nothing follows the unembedding (so that logits need not
            be held for all branches at once), else the logits.
        """
        given = (self.base, sequence, position, block_out)
        rows = RowsOverSharedKeys(*given, self.scores_at_once) if self.shares_keys else CompactRows(*given)
        return self.through(rows, hooks)

    def through(self, rows: Rows, hooks: Hooks | None = None) -> Tensor:
        """As a call, of any rows; those that do not copy their keys need ``shares_keys``."""
        # 4-D, so that the model does not make a mask of its own; the layers get theirs below
        no_mask = rows.block_out.new_zeros(1, 1, 1, 1)
        with self.base.moe.bridge.hooks(fwd_hooks=hooks) if hooks else nullcontext():
            return self.base.moe.bridge.original_model(
                input_ids=rows.tokens,
                attention_mask=no_mask,
                position_ids=rows.positions,
                past_key_values=rows.cache(),
                use_cache=True,
            ).logits

    def logits(self, states: Tensor) -> Tensor:
        """``[branch, width]`` of what a call gave to logits ``[branch, vocab]``."""
        return self._unembed(states) if self.base.ends_in_head else states

    # -- what the modules are made to answer and to read ------------------------------------------------------------
    def _first_layer(self, block: nn.Module) -> Callable[..., Any]:
        """Its forward, in which children give their recorded answers at the branches, call after call."""
        recorded, target = self.base.recording.layers[self.layer], self.base.targets[self.layer]

        def forward(*args: Any, **kwargs: Any) -> Any:
            rows: Rows = kwargs["past_key_values"].rows
            kwargs.pop("hidden_states", None)  # what the layers below hand on is not read
            answering = copy.copy(block)
            answering.__dict__.pop(forward_slot(block), None)
            answering._modules = dict(block._modules)
            for name, answers in recorded.answers.items():
                child: Any = copy.copy(block._modules[name])
                child.__dict__["forward"] = _answer(rows, answers, is_experts=name == target)
                answering._modules[name] = child
            return type(block).forward(answering, rows.gathered(recorded.hidden), *args[1:], **kwargs)

        return forward

    def _feeder(self, index: int) -> Callable[..., Any]:
        """Gives a layer above the base pass's arguments at the branches."""
        base = self.base
        numbers = base.arguments.numbers[index]
        fed = {name: number for name, number in numbers.items() if _is_positional(base, base.arguments.values[number])}
        fed.pop("attention_mask", None)

        def feed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            rows: Rows = kwargs["past_key_values"].rows
            given = kwargs | {name: rows.argument(number) for name, number in fed.items()}
            if "attention_mask" in numbers:
                given["attention_mask"] = rows.attention_mask(index)
            return args, given

        return feed


def say_not_compiled(moe: MoEHooks, why: str) -> None:
    """Warn, once a model, why branches are not compiled although that was asked for."""
    compiled_layers(moe, NAME).say_once(why)


def _answer(rows: Rows, answers: list[Any], *, is_experts: bool) -> Callable[..., Any]:
    """A child's forward in the first layer; the experts' block answers with the branches' own output."""
    left = iter(answers)
    last = answers[-1]

    def forward(*args: Any, **kwargs: Any) -> Any:
        gathered = rows.gathered(next(left, last))
        if not is_experts:
            return gathered
        shape = (gathered[0] if isinstance(gathered, tuple) else gathered).shape
        block_out = rows.block_out.reshape(shape)
        return (block_out, *gathered[1:]) if isinstance(gathered, tuple) else block_out

    return forward


def _is_positional(base: RecordedPass, value: Any) -> bool:
    """Whether a value of the base pass has tensors that are to be gathered at branches."""
    (batch, pos), leaves = base.tokens.shape, tree_leaves(value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return any(t.shape[:2] in ((batch, pos), (1, pos)) or t.shape[:1] == (batch * pos,) for t in tensors)


def _unembedding(head: nn.Module) -> Callable[[Tensor], Tensor]:
    native = unwrap(head)
    # TransformerLens gives a head without a bias one of zeros, which would be copied into every logit
    if type(native) is nn.Linear and native.bias is not None and not is_watched(native) and not bool(native.bias.any()):
        return partial(linear, weight=native.weight)
    return head.forward
