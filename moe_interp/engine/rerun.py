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
from moe_interp.engine.attention import fused_attention, queried_only_at
from moe_interp.engine.cpu.fast_modules import FastModules
from moe_interp.engine.recorded_pass import RecordedLayer, recording
from moe_interp.engine.replaced_forward import swapped_forward
from moe_interp.errors import AttachError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.types import Hooks

_NONE_LEFT = object()


@dataclass(frozen=True, eq=False)
class TargetPredictions:
    """The predictions to read: at ``(row, column)`` of the token matrix, the log-probability of ``target``."""

    row: Tensor
    column: Tensor
    target: Tensor

    def repeat(self, times: int, n_rows: int) -> TargetPredictions:
        """The same predictions in ``times`` stacked copies of a batch of ``n_rows``."""
        copy = torch.arange(times, device=self.row.device).repeat_interleave(len(self.row))
        return TargetPredictions(
            self.row.repeat(times) + copy * n_rows, self.column.repeat(times), self.target.repeat(times)
        )


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
        self.fuses_attention = False
        self._fast = FastModules(moe)
        self._gives_tuple: dict[int, bool] = {}

    def base(
        self, tokens: Tensor, predictions: TargetPredictions, layers: Sequence[int], hooks: Hooks
    ) -> tuple[Tensor, dict[int, RecordedLayer]]:
        """One whole pass with given hooks: the predictions read, and what precedes each given layer's experts.

        Returns:
            ``[read]`` log-probabilities in nats; layer -> its prefix.
        """
        until = {index: self._experts_child(index) for index in layers}
        with recording(self.layers, until, with_last=False) as found:
            read = self._read(tokens, predictions, hooks, trim_after=None)
        self._gives_tuple = found.gives_tuple
        return read, found.layers

    def resume(
        self,
        layer: int,
        prefix: RecordedLayer,
        copies: int,
        tokens: Tensor,
        predictions: TargetPredictions,
        hooks: Hooks,
    ) -> Tensor:
        """The rest of a pass, from the experts of ``layer``: ``[read]`` log-probabilities in nats.

        Args:
            layer: Where the pass resumes.
            prefix: What :meth:`base` kept of it.
            copies: How many times the base pass's batch is stacked in ``tokens``.
            tokens, predictions, hooks: Of the stacked batch.
        """
        with ExitStack() as stack:
            if self.fuses_attention:
                stack.enter_context(fused_attention(self.moe))
            before = prefix.stacked(prefix.hidden, copies)
            for index in range(layer):
                stack.enter_context(swapped_forward(self.layers[index], self._skip(index, before)))
            children = dict(self.layers[layer].named_children())
            for name, answers in prefix.answers.items():
                known = [prefix.stacked(answer, copies) for answer in answers]
                stack.enter_context(swapped_forward(children[name], recorded_answers(known, children[name].forward)))
            return self._read(tokens, predictions, hooks, trim_after=layer)

    def _read(self, tokens: Tensor, predictions: TargetPredictions, hooks: Hooks, trim_after: int | None) -> Tensor:
        place = predictions.row * tokens.shape[1] + predictions.column
        head: Any = unwrap(self.model.get_output_embeddings())
        with ExitStack() as stack:
            stack.enter_context(self._fast.modules())
            native_head = head.forward

            def read_only(hidden: Tensor) -> Tensor:
                return native_head(hidden.reshape(-1, hidden.shape[-1])[place].unsqueeze(0))

            stack.enter_context(swapped_forward(head, read_only))
            stack.enter_context(self.moe.bridge.hooks(fwd_hooks=list(hooks)))
            if trim_after is not None:  # after the hooks, which may be at the last block
                stack.enter_context(self._trimmed_last_block(trim_after, place))
            stack.enter_context(self._fast.experts(tokens.numel()))
            logits = self.model(input_ids=tokens, use_cache=False).logits[0]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return torch.log_softmax(logits, dim=-1).gather(-1, predictions.target.unsqueeze(-1)).squeeze(-1)

    @contextmanager
    def _trimmed_last_block(self, layer: int, place: Tensor) -> Iterator[None]:
        """The last layer runs only where a prediction is read (keys and values aside): nothing else of it is used."""
        last = len(self.layers) - 1
        container: Any = self.moe.spec(last).container if last in self.moe.layers and last != layer else None
        if container is None or container is self.layers[last] or self.moe.hooks_active(last):
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(swapped_forward(container, only_at(lambda: place, container.forward)))
            if self.fuses_attention:
                stack.enter_context(queried_only_at(self.moe.bridge.blocks[last], place))
            yield

    def _experts_child(self, index: int) -> str | None:
        """The child that is the layer's experts' block; None where the layer is that itself."""
        container = self.moe.spec(index).container
        return next((n for n, child in self.layers[index].named_children() if unwrap(child) is container), None)

    def _skip(self, index: int, hidden: Tensor) -> Callable[..., Any]:
        is_tuple = self._gives_tuple[index]

        def skip(ignored: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden,) if is_tuple else hidden

        return skip


def only_at(place: Callable[[], Tensor], native: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward at some positions of the flattened tokens; zero elsewhere."""

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:  # a hash layer's token ids belong to all positions
            return native(hidden, *args, **kwargs)
        flat, where = hidden.reshape(-1, hidden.shape[-1]), place()
        out = native(flat[where].unsqueeze(0))
        found = (out[0] if isinstance(out, tuple) else out).reshape(-1, hidden.shape[-1])
        full = torch.zeros_like(flat).index_copy(0, where, found.to(flat.dtype)).view(hidden.shape)
        return (full, *out[1:]) if isinstance(out, tuple) else full

    return forward


def recorded_answers(known: list[Any], native: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that gives recorded answers, call after call; later calls, after the experts, run the module."""
    left = iter(known)

    def answer(*args: Any, **kwargs: Any) -> Any:
        found = next(left, _NONE_LEFT)
        return native(*args, **kwargs) if found is _NONE_LEFT else found

    return answer
