"""Running a part of the model: a layer's prefix is computed once, and every variant of the layer starts from there.

What comes out equals a full forward pass with the same hooks. Sequences are padded on the right: in a causal model
padding is then never attended to, whatever its layers are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_interp.arch.modules import unwrap
from moe_interp.errors import AttachError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.types import Hooks


@dataclass(frozen=True, eq=False)
class Reads:
    """The predictions to read: at ``(row, column)`` of the token matrix, the log-probability of ``target``."""

    row: Tensor
    column: Tensor
    target: Tensor

    def repeat(self, times: int, n_rows: int) -> Reads:
        """The same reads in ``times`` stacked copies of a batch of ``n_rows``."""
        copy = torch.arange(times, device=self.row.device).repeat_interleave(len(self.row))
        return Reads(self.row.repeat(times) + copy * n_rows, self.column.repeat(times), self.target.repeat(times))


class PrefixRunner:
    """Forward passes that start at a layer, and read a few predictions.

    Args:
        moe: Attached hooks of a decoder-only model.

    Raises:
        AttachError: an encoder-decoder.
    """

    def __init__(self, moe: MoEHooks) -> None:
        self.moe = moe
        blocks: Any = moe.bridge._modules.get("blocks")
        if blocks is None:
            raise AttachError(
                f"{type(moe.bridge.original_model).__name__}, an encoder-decoder",
                "a decoder-only model",
                "Use run_with_hooks with the interventions; this experiment is for decoder-only models.",
            )
        self.layers: list[nn.Module] = [unwrap(block) for block in blocks]
        self.model: Any = moe.bridge.original_model
        self._returns_tuple: dict[int, bool] = {}

    def base(
        self, tokens: Tensor, reads: Reads, layers: Sequence[int], hooks: Hooks
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """One whole pass with given hooks: the predictions read, and the residual stream before each given layer.

        Returns:
            ``[read]`` log-probabilities in nats; layer -> ``[row, pos, d_model]`` (as the family's layers hand it on).
        """
        before: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                stack.enter_context(swapped_forward(layer, self._recorder(index, layer.forward, before, set(layers))))
            return self._read(tokens, reads, hooks, trim_after=None), before

    def resume(self, layer: int, before: Tensor, tokens: Tensor, reads: Reads, hooks: Hooks) -> Tensor:
        """The rest of a pass, from the residual stream before ``layer``: ``[read]`` log-probabilities in nats."""
        with ExitStack() as stack:
            for index in range(layer):
                stack.enter_context(swapped_forward(self.layers[index], self._skip(index, before)))
            return self._read(tokens, reads, hooks, trim_after=layer)

    def _read(self, tokens: Tensor, reads: Reads, hooks: Hooks, trim_after: int | None) -> Tensor:
        place = reads.row * tokens.shape[1] + reads.column
        head: Any = unwrap(self.model.get_output_embeddings())
        native_head = head.forward

        def read_only(hidden: Tensor) -> Tensor:
            return native_head(hidden.reshape(-1, hidden.shape[-1])[place].unsqueeze(0))

        with ExitStack() as stack:
            stack.enter_context(swapped_forward(head, read_only))
            if trim_after is not None:
                stack.enter_context(self._trimmed_last_block(trim_after, place))
            stack.enter_context(self.moe.bridge.hooks(fwd_hooks=list(hooks)))
            logits = self.model(input_ids=tokens, use_cache=False).logits[0]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return torch.log_softmax(logits, dim=-1).gather(-1, reads.target.unsqueeze(-1)).squeeze(-1)

    @contextmanager
    def _trimmed_last_block(self, layer: int, place: Tensor) -> Iterator[None]:
        """The last layer's experts run only where a prediction is read: nothing else of its output is used."""
        last = len(self.layers) - 1
        container: Any = self.moe.spec(last).container if last in self.moe.layers and last != layer else None
        if container is None or container is self.layers[last] or self.moe.hooks_active(last):
            yield
            return
        native = container.forward

        def trimmed(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if args or kwargs:  # a hash layer's token ids belong to all positions
                return native(hidden, *args, **kwargs)
            flat = hidden.reshape(-1, hidden.shape[-1])
            out = native(flat[place].unsqueeze(0))
            read = (out[0] if isinstance(out, tuple) else out).reshape(-1, hidden.shape[-1])
            full = torch.zeros_like(flat).index_copy(0, place, read.to(flat.dtype)).view(hidden.shape)
            return (full, *out[1:]) if isinstance(out, tuple) else full

        with swapped_forward(container, trimmed):
            yield

    def _recorder(
        self, index: int, native: Callable[..., Any], before: dict[int, Tensor], wanted: set[int]
    ) -> Callable[..., Any]:
        def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if index in wanted:
                before[index] = hidden
            out = native(hidden, *args, **kwargs)
            self._returns_tuple[index] = isinstance(out, tuple)
            return out

        return record

    def _skip(self, index: int, hidden: Tensor) -> Callable[..., Any]:
        is_tuple = self._returns_tuple[index]

        def skip(ignored: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden,) if is_tuple else hidden

        return skip


@contextmanager
def swapped_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for a module inside the ``with``; its own again after, also after an exception."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before
