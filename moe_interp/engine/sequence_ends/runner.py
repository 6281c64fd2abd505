"""Running ends of sequences, and whether that is exact on a model."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moe_interp.arch.modules import unwrap
from moe_interp.engine.attention import attention_function, can_fuse
from moe_interp.engine.branches import BranchRunner
from moe_interp.engine.memory import is_out_of_memory
from moe_interp.engine.policy import policy_of
from moe_interp.engine.recorded_pass import RecordedPass
from moe_interp.engine.replaced_forward import swapped_forward
from moe_interp.engine.rerun import only_at, recorded_answers
from moe_interp.engine.sequence_ends.rows import EndRows
from moe_interp.types import Hooks

# what a pass may differ by from another of the same input, in nats; half precision: .1
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
_TRIED = 4  # sequences


class EndRunner(BranchRunner):
    """Runs sequences from a position on, with given outputs of one layer's experts' block; one call at a time.

    Args:
        base: The recorded pass.
        layer: Where the outputs are given.
        at_once: About how many tokens a call will get.
        is_fused: Whether attention is transformers' scaled dot product, in the place of TransformerLens' steps.
        reads: ``[batch]``, the one position of each sequence whose logits are wanted; by default all are. The last
            layer's experts then run there alone.
    """

    def __init__(
        self,
        base: RecordedPass,
        layer: int,
        at_once: int = 1,
        is_fused: bool = False,
        reads: Tensor | None = None,
    ) -> None:
        super().__init__(base, layer, at_once=at_once, shares_keys=False)
        self.is_fused, self.reads = is_fused, reads
        self._place = torch.empty(0)  # of the running call
        self._more = ExitStack()

    def __enter__(self) -> EndRunner:
        super().__enter__()
        with ExitStack() as stack:
            stack.push(super().__exit__)  # where what follows fails
            if self.is_fused:
                stack.enter_context(attention_function(self.base.moe, "sdpa"))
            if self.reads is not None:
                stack.enter_context(self._trimmed_last_block())
            self._more = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._more.close()

    def ends(self, sequence: Tensor, start: int, block_out: Tensor) -> Tensor:
        """The logits: ``[row, pos - start, vocab]``, or ``[row, 1, vocab]`` where one position is read.

        Args:
            sequence: ``[row]``, which sequence of the batch each row is.
            start: The first position that runs.
            block_out: ``[row, pos - start, d_model]``.
        """
        if self.reads is not None:
            first = torch.arange(len(sequence), device=sequence.device) * block_out.shape[1]
            self._place = first + self.reads[sequence] - start
        states = self.through(EndRows(self.base, sequence, start, block_out))
        if self.reads is not None:
            states = states.flatten(0, 1)[self._place].unsqueeze(1)
        return self.logits(states.flatten(0, 1)).view(*states.shape[:2], -1)

    def _trimmed_last_block(self) -> AbstractContextManager[None]:
        base, last = self.base, len(self.base.blocks) - 1
        container: Any = base.moe.spec(last).container if last in base.moe.layers and last != self.layer else None
        if container is None or container is base.blocks[last] or base.moe.hooks_active(last):
            return nullcontext()
        return swapped_forward(container, only_at(lambda: self._place, container.forward))


def end_refusal(base: RecordedPass, layer: int) -> str | None:
    """Why ends from a layer would not be exact on this model, in words; None where they are."""
    if reason := base.refusal(layer):
        return reason
    rule = base.moe.spec(layer).rule
    return "experts have a capacity" if rule.has_capacity else None


def fuses_attention(base: RecordedPass) -> bool:
    """Whether fused attention may be tried."""
    return policy_of(base.moe).fused_tolerance is not None and can_fuse(base.moe)


def null_difference(base: RecordedPass, layer: int, is_fused: bool) -> float:
    """The largest change of a log-probability by running ends of a few sequences with nothing changed, in nats.

    From the middle position on; infinite where it fails.
    """
    n_pos = base.tokens.shape[1]
    start = n_pos // 2
    sequence = torch.arange(min(_TRIED, len(base.tokens)), device=base.tokens.device)
    block_out = base.block_out(layer).view(*base.tokens.shape, -1)[sequence, start:]
    try:
        with torch.no_grad(), EndRunner(base, layer, is_fused=is_fused) as run:
            found = run.ends(sequence, start, block_out)
    except Exception as error:  # whatever a model's layers miss, or a model that reads its mask in a way of its own
        if is_out_of_memory(error):
            raise
        return float("inf")
    real = base.is_real[sequence, start:]
    plain = base.logits[sequence, start:]
    distance = (found.log_softmax(dim=-1) - plain.log_softmax(dim=-1)).abs().amax(dim=-1)
    return float(distance[real].max()) if bool(real.any()) else float("inf")


def block_out_with(base: RecordedPass, layer: int, hooks: Hooks) -> Tensor:
    """``[batch, pos, d_model]``: the output of a layer's experts' block with hooks on it, all before it as recorded."""
    block, found = base.blocks[layer], []
    children, target = dict(block.named_children()), base.targets[layer]
    hidden = base.recording.layers[layer].hidden

    def feed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def same(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden

    with torch.no_grad(), ExitStack() as stack:
        for index, other in enumerate(base.blocks):
            if index != layer:
                stack.enter_context(swapped_forward(other, same))
        for name, answers in base.recording.layers[layer].answers.items():
            # a router that is a child of the layer runs: the hooks may be on it
            if name != target and unwrap(children[name]) is not base.moe.spec(layer).router:
                forward = recorded_answers(list(answers), children[name].forward)
                stack.enter_context(swapped_forward(children[name], forward))
        stack.callback(block.register_forward_pre_hook(feed, with_kwargs=True).remove)
        keep = children[target].register_forward_hook(lambda module, args, output: found.append(output))
        stack.callback(keep.remove)
        stack.enter_context(swapped_forward(base.head, same))
        stack.enter_context(base.moe.bridge.hooks(fwd_hooks=list(hooks)))
        mask = None if bool(base.is_real.all()) else base.is_real.long()
        base.moe.bridge.original_model(input_ids=base.tokens, attention_mask=mask, use_cache=False)
    out = found[-1][0] if isinstance(found[-1], tuple) else found[-1]
    return out.reshape(*base.tokens.shape, -1)
