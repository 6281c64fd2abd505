"""What a running pass continues: the positions in its cache, and the prompt of the ``generate`` that runs it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from moe_interp.hooks.thread_ownership import PerThread, is_in_backward
from moe_interp.types import Layer


@dataclass(frozen=True, eq=False)
class PassContext:
    """Where the tokens of one pass through a stack of layers lie in their sequences.

    Attributes:
        n_past: Columns that the pass found in its cache.
        fills_cache: Whether the pass was asked for a cache, so that another pass may continue it.
        attention_mask: The pass's own mask ``[batch, column]``, of the cached columns too; None without a 2-D one.
        prompt: Columns of the prompt, padding included, where ``generate`` runs the pass; None outside ``generate``.
        prompt_cached: Columns of the prompt that were in the cache when ``generate`` began.
        prompt_mask: The mask ``[batch, prompt]`` that ``generate`` was given.
        depth: In how many other passes through the stack it runs: of a pass that a hook runs, 1 or more.
        row_keys: ``[row]`` int64 that tell the rows apart wherever they stand in a batch; None where their numbers do.
    """

    n_past: int = 0
    fills_cache: bool = False
    attention_mask: Tensor | None = None
    prompt: int | None = None
    prompt_cached: int = 0
    prompt_mask: Tensor | None = None
    depth: int = 0
    row_keys: Tensor | None = None


class StateBetweenPasses(PerThread):
    """What a hook's function keeps from one pass for the next: apart for each thread, and for passes inside of a hook.

    What it keeps within a pass belongs in the ``notes`` of :class:`~moe_interp.hooks.layer.LayerPass`.
    """

    def __init__(self) -> None:
        self._by_depth: dict[int, dict[Any, Any]] = {}

    def before(self, context: PassContext) -> dict[Any, Any]:
        """What passes as deep as this one have left in this thread; to be written to."""
        return self._by_depth.setdefault(context.depth, {})


@dataclass
class Generation:
    """One running call of ``generate``; ``prompt`` is None until the first pass tells it.

    Attributes:
        cached: Columns in the cache at its first pass.
        depth: How many passes ran around it when it began: a pass that runs in a hook of one of its own is not its.
        row_keys: Of its next pass, see :class:`PassContext`.
    """

    prompt: int | None = None
    prompt_mask: Tensor | None = None
    cached: int | None = None
    depth: int = 0
    row_keys: Tensor | None = None


class _ThreadState(PerThread):
    """What a thread runs.

    Attributes:
        generation: Its call of ``generate``.
        spans: By stack, the passes that run, the innermost last; the last one stays when it has ended.
        running: By stack, how many of them run.
    """

    def __init__(self) -> None:
        self.generation: Generation | None = None
        self.contexts: dict[str, list[PassContext]] = {}
        self.running: dict[str, int] = {}

    @property
    def depth(self) -> int:
        return sum(self.running.values())


class Passes:
    """Follows the passes through a model's stacks of layers, and the calls of ``generate`` that run them.

    Outside ``generate`` every token of a pass belongs to the prompt, whatever is cached. Within it, the columns of the
    prompt do: the prefill, in one piece or in chunks, also on a cache that holds a part of the prompt already.
    """

    def __init__(self, bridge: TransformerBridge, layers: dict[Layer, nn.Module]) -> None:
        self._now = _ThreadState()
        self._last: dict[str, PassContext] = {}  # by stack, the pass that began last in any thread
        model = bridge.original_model
        stacks = {stack_of(layer): _stack_module(model, container) for layer, container in layers.items()}
        self._handles = []
        for name, module in stacks.items():
            watch = _StackHooks(self, name)
            self._handles.append(module.register_forward_pre_hook(watch.begin, with_kwargs=True))
            self._handles.append(module.register_forward_hook(watch.end, always_call=True))
        self._replaced: list[tuple[Any, str, Any]] = []
        self._open(model, "generate", OpenedGenerate)
        self._open(bridge, "generate", OpenedGenerate)
        self._open(bridge, "generate_stream", OpenedStream)

    def pass_context(self, layer: Layer) -> PassContext:
        """Of this thread's running (or last) pass through the layer's stack."""
        stack = stack_of(layer)
        if stack in self._now.contexts:
            return self._now.contexts[stack][-1]
        # a thread of autograd that computes a layer again runs no pass of its own
        return self._last.get(stack, PassContext()) if is_in_backward() else PassContext()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for owner, name, before in reversed(self._replaced):
            del owner.__dict__[name]
            if before is not None:
                owner.__dict__[name] = before
        self._replaced.clear()

    @contextmanager
    def generating(self, generation: Generation) -> Iterator[None]:
        """A call of ``generate``; one inside another adds what the outer did not know, unless a hook calls it."""
        outer = self._now.generation
        if outer is None or outer.depth < self._now.depth:
            generation.depth = self._now.depth
            self._now.generation = generation
        elif outer.prompt is None and outer.cached is None:
            outer.prompt, outer.prompt_mask = generation.prompt, generation.prompt_mask
        try:
            yield
        finally:
            self._now.generation = outer

    def begin(self, stack: str, inputs: dict[str, Any]) -> None:
        """A pass through a stack begins."""
        n_past, mask = _n_past(inputs), inputs.get("attention_mask")
        known: dict[str, Any] = {
            "n_past": n_past,
            "fills_cache": bool(inputs.get("use_cache")) or inputs.get("past_key_values") is not None,
            "attention_mask": mask if isinstance(mask, Tensor) and mask.ndim == 2 else None,
        }
        generation = self._now.generation
        if generation is not None and generation.depth == self._now.depth and stack != "encoder":
            if generation.cached is None:
                generation.cached = n_past
                if generation.prompt is None or generation.prompt <= n_past:
                    generation.prompt = n_past + _width(inputs)
            known |= {
                "prompt": generation.prompt,
                "prompt_cached": generation.cached,
                "prompt_mask": generation.prompt_mask,
                "row_keys": generation.row_keys,
            }
        now = self._now
        outer = now.contexts[stack] if now.running.get(stack) else []
        context = self._last[stack] = PassContext(**known, depth=len(outer))
        now.contexts[stack], now.running[stack] = [*outer, context], len(outer) + 1

    def end(self, stack: str) -> None:
        """It has ended, also by an exception; a pass around it, in whose hook it ran, goes on."""
        now = self._now
        now.running[stack] = max(now.running.get(stack, 0) - 1, 0)
        if now.running[stack]:
            now.contexts[stack].pop()

    def _open(self, owner: Any, name: str, opened: Callable[..., Any]) -> None:
        native = getattr(owner, name, None)
        if native is not None:
            self._replaced.append((owner, name, owner.__dict__.get(name)))
            owner.__dict__[name] = opened(self, native)


class OpenedGenerate:
    """A model's ``generate``, of transformers or of TransformerLens; a plain object, so that deep copies work."""

    def __init__(self, passes: Passes, native: Any) -> None:
        self.passes, self.native = passes, native
        update_wrapper(self, native)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.passes.generating(_generation(self.native, args, kwargs)):
            return self.native(*args, **kwargs)


class OpenedStream(OpenedGenerate):
    """TransformerLens' ``generate_stream``: what the caller runs between two pieces is not part of it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        generation = _generation(self.native, args, kwargs)
        stream = self.native(*args, **kwargs)
        try:
            while True:
                with self.passes.generating(generation):
                    try:
                        piece = next(stream)
                    except StopIteration:
                        return
                yield piece
        finally:
            stream.close()


class _StackHooks:
    """The hook on one stack of layers."""

    def __init__(self, passes: Passes, stack: str) -> None:
        self.passes, self.stack = passes, stack

    @torch.compiler.disable
    def begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = kwargs
        if args:
            inputs = dict(inspect.signature(module.forward).bind_partial(*args).arguments) | kwargs
        self.passes.begin(self.stack, inputs)

    @torch.compiler.disable
    def end(self, module: Any, args: Any, output: Any) -> None:
        self.passes.end(self.stack)


def stack_of(layer: Layer) -> str:
    """ "encoder" or "decoder"; "" in a model with one stack."""
    return layer[0] if isinstance(layer, tuple) else ""


def _stack_module(model: nn.Module, container: nn.Module) -> nn.Module:
    """The module whose forward runs the list of layers that holds ``container``."""
    path = next(name for name, module in model.named_modules() if module is container)
    module = model
    for name in path.split("."):
        inner = module.get_submodule(name)
        if isinstance(inner, nn.ModuleList):
            return module
        module = inner
    return model


def _n_past(inputs: dict[str, Any]) -> int:
    count = getattr(inputs.get("past_key_values"), "get_seq_length", None)
    if count is not None:
        return int(count())
    position = inputs.get("cache_position")
    return 0 if position is None else int(position[0])


def _width(inputs: dict[str, Any]) -> int:
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(inputs.get(name), Tensor):
            return int(inputs[name].shape[1])
    return 0


def _generation(native: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generation:
    """What the arguments of ``generate`` tell of its prompt."""
    config = getattr(native.__self__, "config", None)
    if config is None or isinstance(native.__self__, TransformerBridge):
        return Generation()  # TransformerLens runs the whole prompt in its first pass
    if config.is_encoder_decoder:
        return Generation(_decoder_prompt(native.__self__, kwargs.get("decoder_input_ids")))
    mask = kwargs.get("attention_mask")
    mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
    given = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")), mask]
    widths = [tensor.shape[1] for tensor in given if isinstance(tensor, Tensor)]
    return Generation(max(widths) if widths else None, mask)


def decoder_start_token(model: Any) -> int:
    """What the decoder of an encoder-decoder begins with: as its generation config has it, else its config; where
    neither says, its padding (as T5 begins)."""
    for owner in (getattr(model, "generation_config", None), model.config):
        start = getattr(owner, "decoder_start_token_id", None)
        if isinstance(start, int):
            return start
    return int(getattr(model.config, "pad_token_id", None) or 0)


def _decoder_prompt(model: Any, tokens: Tensor | None) -> int | None:
    """The decoder's prompt; transformers puts the start token before one that lacks it."""
    if not isinstance(tokens, Tensor):
        return None
    return tokens.shape[1] + int(bool((tokens[:, 0] != decoder_start_token(model)).all()))
