"""One plain forward pass, and what later passes read from it: branches, and passes that begin at a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import DynamicCache

from moe_interp.arch.modules import unwrap
from moe_interp.engine.cpu.fast_modules import FastModules
from moe_interp.hooks.attach import MoEHooks
from moe_interp.types import Hooks

_PLAIN_CACHES = ("DynamicLayer", "DynamicSlidingWindowLayer")  # by name: the classes move between versions


class RecordingCache(DynamicCache):
    """Keeps each layer's keys and values whole (a sliding layer of its own would trim them) and hands them on."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.recorded: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        # as transformers' own cache, which holds values in the format of the keys (where rotary embeddings raise these)
        value_states = value_states.to(torch.promote_types(key_states.dtype, value_states.dtype))
        self.recorded[layer_idx] = (key_states, value_states)
        return key_states, value_states

    def refusal(self, layer: int, n_pos: int) -> str | None:
        """Why a layer's state before a token is not its plain keys and values; None where it is."""
        kind = type(self.layers[layer]).__name__ if layer < len(self.layers) else "nothing"
        if kind == "DummyLayer":  # a layer without attention, which sees its own token only
            return None
        if kind not in _PLAIN_CACHES:
            return f"the state {kind} instead of plain keys and values"
        keys = self.recorded.get(layer, (None,))[0]
        if keys is None or keys.shape[-2] != n_pos:
            return "no keys of its own for every position"
        return None


@dataclass(frozen=True, eq=False)
class RecordedLayer:
    """What a pass computed in a layer before its experts.

    Attributes:
        hidden: The residual stream before the layer, ``[row, pos, d_model]`` (as the family's layers hand it on).
        answers: What the layer's children answered, by name, call after call; None in the place of tensors without
            positions, such as attention patterns.
    """

    hidden: Tensor
    answers: dict[str, list[Any]] = field(default_factory=dict)

    def keep(self, name: str, answer: Any) -> None:
        """Another answer of a child."""

        def has_positions(leaf: Tensor) -> bool:
            rows, width = self.hidden.shape[:2]
            return leaf.shape[:2] == (rows, width) or leaf.shape[:1] == (rows * width,)

        kept = tree_map(lambda leaf: leaf if not isinstance(leaf, Tensor) or has_positions(leaf) else None, answer)
        self.answers.setdefault(name, []).append(kept)

    @staticmethod
    def stacked(value: Any, copies: int) -> Any:
        """A value that is kept, once a copy of its batch."""
        return tree_map(lambda v: v.repeat(copies, *[1] * (v.ndim - 1)) if isinstance(v, Tensor) else v, value)


@dataclass(frozen=True, eq=False)
class Recording:
    """What a pass left behind, by number of the layer.

    Attributes:
        layers: The layers that were asked for.
        arguments: The keyword arguments that every layer was called with.
        gives_tuple: Whether a layer's output is a tuple.
    """

    layers: dict[int, RecordedLayer] = field(default_factory=dict)
    arguments: dict[int, dict[str, Any]] = field(default_factory=dict)
    gives_tuple: dict[int, bool] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Arguments:
    """The keyword arguments of all layers: each value once, as layers share masks and rotary tables.

    Attributes:
        values: The values.
        numbers: By layer and name, the number of its value.
    """

    values: list[Any]
    numbers: dict[int, dict[str, int]]

    @staticmethod
    def of(arguments: Mapping[int, Mapping[str, Any]]) -> Arguments:
        values: list[Any] = []

        def number(value: Any) -> int:
            known = next((at for at, other in enumerate(values) if other is value), None)
            if known is None:
                values.append(value)
            return len(values) - 1 if known is None else known

        return Arguments(values, {layer: {n: number(v) for n, v in a.items()} for layer, a in arguments.items()})

    def number(self, layer: int, name: str) -> int | None:
        """Of the value that a layer was called with; None where it was not, or with None."""
        number = self.numbers[layer].get(name)
        return None if self.value(number) is None else number

    def value(self, number: int | None) -> Any:
        return None if number is None else self.values[number]


@contextmanager
def recording(blocks: Sequence[nn.Module], until: Mapping[int, str | None], *, with_last: bool) -> Iterator[Recording]:
    """Records the pass that runs inside the ``with``.

    Args:
        blocks: The model's layers.
        until: The layers to record: up to which child their answers are kept; none where that is None.
        with_last: Whether that child's own answer is kept too.
    """
    found = Recording()

    def begin(index: int) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.arguments[index] = kwargs
            if index in until:
                found.layers[index] = RecordedLayer(args[0] if args else kwargs["hidden_states"])

        return record

    def end(index: int) -> Callable[..., None]:
        return lambda module, args, output: found.gives_tuple.__setitem__(index, isinstance(output, tuple))

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(begin(index), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(end(index)).remove)
        for index, last in until.items():
            if last is not None:
                _record_children(stack, blocks[index], last, with_last, partial(found.layers.__getitem__, index))
        yield found


def _record_children(
    stack: ExitStack, block: nn.Module, last: str, with_last: bool, layer: Callable[[], RecordedLayer]
) -> None:
    reached: list[bool] = []

    def keeper(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if not reached or (name == last and with_last and name not in layer().answers):
                layer().keep(name, output)

        return keep

    children = dict(block.named_children())
    stack.callback(children[last].register_forward_pre_hook(lambda module, args: reached.append(True)).remove)
    for name, child in children.items():
        stack.callback(child.register_forward_hook(keeper(name)).remove)


@dataclass(eq=False)
class RecordedPass:
    """One plain forward pass of a batch, and what branches need of it.

    Attributes:
        moe: The attached hooks.
        tokens: ``[batch, pos]``.
        is_real: ``[batch, pos]`` bool, False at padding.
        layers: The MoE layers that routes may be scored at.
        blocks: The model's layers.
        targets: By layer, the name of its child whose output depends on the route: the experts' block.
        head: The unembedding.
        cache: Every layer's keys and values.
        fast: The model's modules in their fastest form.
        logits: ``[batch, pos, vocab]`` of the plain forward.
        ends_in_head: Whether the logits are the unembedding's output as it is, without a scale or a soft-cap after it.
        recording: What the layers computed.
        router_logits: By layer, ``[batch, pos, expert]``.
        indices, weights: By layer, the standard route, ``[batch, pos, slot]``.
        experts_in: By layer, what the experts read, ``[batch, pos, d_in]``.
        shares_keys: Whether branches may read their sequence's keys without copies; None until it has been tried.
        runs_grid: The same of branches that run as a grid.
        hiding: By number of a mask among the layers' arguments, whether it hides keys, as far as that has been asked.
        sequence_masks: By the same number, the mask of each sequence, for a grid.
    """

    moe: MoEHooks
    tokens: Tensor
    is_real: Tensor
    layers: tuple[int, ...]
    blocks: list[nn.Module]
    targets: dict[int, str]
    head: nn.Module
    cache: RecordingCache
    fast: FastModules
    logits: Tensor
    ends_in_head: bool
    recording: Recording
    router_logits: dict[int, Tensor]
    indices: dict[int, Tensor]
    weights: dict[int, Tensor]
    experts_in: dict[int, Tensor]
    shares_keys: bool | None = None
    runs_grid: bool | None = None
    hiding: dict[int, bool] = field(default_factory=dict)
    sequence_masks: dict[int | None, list[Any]] = field(default_factory=dict)

    @cached_property
    def arguments(self) -> Arguments:
        """What the layers were called with."""
        return Arguments.of(self.recording.arguments)

    def refusal(self, layer: int) -> str | None:
        """Why branches from a layer could not be exact on this model, in words; None where they are."""
        if self.recording.layers[layer].hidden.ndim != 3:
            return f"layer {layer} carries several residual streams"
        if any(self.recording.gives_tuple.values()):
            return "layers hand on more than the residual stream"
        if reason := self.moe.spec(layer).unreadable:
            return f"at layer {layer} {reason}"
        config: Any = self.moe.bridge.original_model.config
        attention = getattr(config.get_text_config(), "_attn_implementation", None)
        if attention not in (None, "eager", "sdpa") and layer + 1 < len(self.blocks):
            return f"attention {attention!r}, which takes no mask of each token's own"
        for above in range(layer + 1, len(self.blocks)):
            mask = self.recording.arguments[above].get("attention_mask")
            why = self.cache.refusal(above, self.tokens.shape[1])
            if why is None and mask is not None and (mask.ndim != 4 or mask.shape[1] != 1):
                why = f"an attention mask of shape {tuple(mask.shape)}"
            if why is not None:
                return f"layer {above} has {why}"
        return None

    def block_out(self, layer: int) -> Tensor:
        """The output of the layer's experts' block, ``[token, d_model]``."""
        answer = self.recording.layers[layer].answers[self.targets[layer]][-1]
        out = answer[0] if isinstance(answer, tuple) else answer
        return out.reshape(-1, out.shape[-1])

    def hides_keys(self, number: int) -> bool:
        """Whether a recorded attention mask says more than that real tokens read all earlier ones.

        Args:
            number: Of the mask among :attr:`arguments`.
        """
        if number not in self.hiding:
            self.hiding[number] = self._hides_keys(self.arguments.values[number])
        return self.hiding[number]

    def _hides_keys(self, mask: Tensor) -> bool:
        n_pos = mask.shape[-1]
        earlier = torch.ones(n_pos, n_pos, dtype=torch.bool, device=mask.device).tril()
        is_read = (mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0) | ~earlier
        return not bool((is_read.all(dim=-1) | ~self.is_real).all())


def record_pass(
    moe: MoEHooks, tokens: Tensor, layers: Sequence[int], attention_mask: Tensor | None = None
) -> RecordedPass:
    """Runs the model once, plainly, and keeps what branches from some of its MoE layers need.

    Args:
        moe: The attached hooks.
        tokens: ``[batch, pos]``.
        layers: The layers that routes may be scored at.
        attention_mask: ``[batch, pos]``, 0 at padding.
    """
    is_real = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    blocks = [unwrap(block) for block in moe.bridge.blocks]
    targets = {layer: _target(blocks[layer], moe, layer) for layer in layers}
    model: Any = moe.bridge.original_model
    head, cache = model.get_output_embeddings(), RecordingCache(config=model.config)
    fast = FastModules(moe)
    kept: dict[str, dict[int, Tensor]] = {"router_logits": {}, "expert_indices": {}, "expert_weights": {}}
    experts_in: dict[int, Tensor] = {}
    unembedded: list[tuple[Tensor, int]] = []
    # a mask without padding would only make the passes slower
    mask = None if attention_mask is None or bool(is_real.all()) else attention_mask
    # inference mode is one thread's, and another may not write its tensors
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        stack.enter_context(moe.bridge.hooks(fwd_hooks=_route_hooks(moe, layers, kept)))
        for layer in layers:
            spec = moe.spec(layer)
            reader = spec.container if spec.family.routes_at_router else spec.experts
            keep_input = _keep_input(experts_in, layer, tokens.shape)
            stack.callback(reader.register_forward_pre_hook(keep_input, with_kwargs=True).remove)
        found = stack.enter_context(recording(blocks, targets, with_last=True))
        keep = head.register_forward_hook(lambda m, args, out: unembedded.append((out, out._version)))
        stack.callback(keep.remove)
        logits: Tensor = moe.bridge(tokens, attention_mask=mask, past_key_values=cache)
    return RecordedPass(
        moe, tokens, is_real, tuple(layers), blocks, targets, head, cache, fast, logits,
        ends_in_head=len(unembedded) == 1 and _is_same(logits, *unembedded[0]),
        recording=found,
        router_logits=kept["router_logits"],
        indices=kept["expert_indices"],
        weights=kept["expert_weights"],
        experts_in=experts_in,
    )  # fmt: skip


def _route_hooks(moe: MoEHooks, layers: Sequence[int], kept: dict[str, dict[int, Tensor]]) -> Hooks:
    def keep(found: dict[int, Tensor], layer: int) -> Callable[[Tensor, Any], None]:
        return lambda value, hook: found.__setitem__(layer, value)

    return [(moe.hook_name(name, layer), keep(found, layer)) for layer in layers for name, found in kept.items()]


def _keep_input(kept: dict[int, Tensor], layer: int, shape: torch.Size) -> Callable[..., None]:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        kept[layer] = x.reshape(*shape, -1)

    return record


def _target(block: nn.Module, moe: MoEHooks, layer: int) -> str:
    """The name of the layer's child whose output depends on the route: the experts' block."""
    spec = moe.spec(layer)
    wanted = spec.experts if spec.container is block else spec.container
    return next(name for name, child in block.named_children() if unwrap(child) is wanted)


def _is_same(logits: Tensor, output: Tensor, version: int) -> bool:
    """Whether logits are an earlier output, unchanged."""
    return logits.shape == output.shape and logits.data_ptr() == output.data_ptr() and output._version == version
