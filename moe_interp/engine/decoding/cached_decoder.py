"""Decoding with a cache: a prompt is read once, and any number of rows go on from it, one token a pass."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer

from moe_interp.arch.modules import unwrap
from moe_interp.arch.offload import device_of
from moe_interp.engine.cpu.batch_invariant import FEWEST_ROWS, BatchInvariance
from moe_interp.engine.cpu.fast_modules import FastModules
from moe_interp.engine.decoding.native_modules import NativeModules
from moe_interp.engine.decoding.preallocated_cache import PreallocatedLayer
from moe_interp.engine.replaced_forward import swapped_forward
from moe_interp.errors import AttachError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.hooks.passes import Generation
from moe_interp.types import Hooks


class CachedDecoder:
    """Forward passes of an attached model that prompts and what is generated from them go through.

    They are the model's own passes with the bridge's hooks, as ``bridge.generate`` runs them: interventions see the
    prompt's pass as the prompt, and later ones as new tokens. Without any hook they go through transformers' modules,
    past TransformerLens' components: the same bits, but for deepseek_v2 and phimoe, whose attention TransformerLens
    computes in another order. The rows of a batch have one length, so nothing is
    padded. In float32 on a processor a row's numbers do not depend on the batch (see
    :class:`moe_interp.engine.cpu.batch_invariant.BatchInvariance`); with hooks on experts' neurons or outputs, and on
    other devices, they do by rounding.

    Args:
        moe: Attached hooks of a decoder-only model.
        hooks: Interventions, in place while :meth:`running`.
        plain: The model's own modules as they are: numbers are those of ``run_with_cache``, which depend on the batch
            by rounding, and every position has its prediction.

    Raises:
        AttachError: an encoder-decoder.
    """

    def __init__(self, moe: MoEHooks, hooks: Hooks = (), plain: bool = False) -> None:  # type: ignore[assignment]
        self.moe, self.hooks, self.is_plain = moe, list(hooks), plain
        model: Any = moe.bridge.original_model
        self.model = model
        if moe.bridge._modules.get("blocks") is None:
            raise AttachError(
                f"{type(self.model).__name__}, an encoder-decoder", "a decoder-only model", "Use bridge.generate."
            )
        self.device = device_of(self.model)
        self._invariance, self._fast, self._native = BatchInvariance(moe), FastModules(moe), NativeModules(moe)
        self._head: Any = unwrap(model.get_output_embeddings())

    @contextmanager
    def running(self) -> Iterator[None]:
        """With the interventions, and the passes' own ways, in place; without gradients."""
        native = self._head.forward
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.moe.bridge.hooks(fwd_hooks=self.hooks))
            if not self.is_plain:
                self._native.look()
                stack.enter_context(self._fast.norms())
                stack.enter_context(self._fast.native_norms())
                stack.enter_context(self._invariance.experts())
                stack.enter_context(swapped_forward(self._head, lambda hidden: self._last(native, hidden)))
            yield

    def prompts(self, tokens: Tensor, keys: Tensor) -> PromptCache:
        """Read prompts of one length.

        Args:
            tokens: ``[prompt, pos]`` ids.
            keys: ``[prompt]`` numbers that tell them apart, for interventions that draw.
        """
        for module in self.model.modules():
            if getattr(module, "rope_deltas", None) is not None:  # of an image in an earlier pass
                module.rope_deltas = None
        generation = Generation(prompt=tokens.shape[1], row_keys=keys)
        with self.moe.generating(generation):
            logits, cache, predicted = self._pass(tokens, None)
        return PromptCache(tokens, logits, cache, predicted)

    def rows(self, prompts: PromptCache, of: Tensor, keys: Tensor) -> DecodedRows:
        """Rows that go on from prompts.

        Args:
            prompts: Prompts that were read.
            of: ``[row]`` the number of each row's prompt among them.
            keys: ``[row]`` numbers that tell the rows apart, for interventions that draw.
        """
        cache = copy.deepcopy(prompts.cache)
        if cache is not None:
            cache.reorder_cache(of)
            cache.layers = [
                PreallocatedLayer.of(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers
            ]
        return DecodedRows(self, prompts.tokens[of], prompts.logits[of], cache, keys)

    def _pass(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Any, Tensor | None]:
        """Logits ``[row, vocabulary]`` of the last position, the cache, and what plain passes predict everywhere."""
        with nullcontext() if self.is_plain else self._short_pass(tokens.numel()):
            out = self.model(input_ids=tokens, past_key_values=cache, use_cache=True)
        predicted = out.logits.argmax(dim=-1) if self.is_plain else None
        return out.logits[:, -1], getattr(out, "past_key_values", None), predicted

    @contextmanager
    def _short_pass(self, n_tokens: int) -> Iterator[None]:
        """One pass alone: what runs between two passes, such as a checker, finds the model as it was."""
        with self._native.in_place(), self._invariance.products(n_tokens):
            yield

    def step(self, rows: DecodedRows, tokens: Tensor) -> None:
        """Rows go on by a token each, ``[row]``; without a cache they are run anew."""
        rows.tokens = torch.cat([rows.tokens, tokens.unsqueeze(1)], dim=1)
        feed = rows.tokens if rows.cache is None else rows.tokens[:, -1:]
        with self.moe.generating(Generation(prompt=rows.n_prompt, cached=0, row_keys=rows.keys)):
            rows.logits, rows.cache, rows.predicted = self._pass(feed, rows.cache)

    def _last(self, native: nn.Module, hidden: Tensor) -> Tensor:
        """The unembedding of the last position alone, of as many rows as products that do not depend on the batch."""
        last = hidden[:, -1:]
        missing = FEWEST_ROWS - len(last) if self._invariance.is_served else 0
        return native(pad(last, (0, 0, 0, 0, 0, missing)))[: len(last)] if missing > 0 else native(last)


class PromptCache:
    """Prompts that were read.

    Attributes:
        tokens: ``[prompt, pos]``.
        logits: ``[prompt, vocabulary]`` of what comes next.
        cache: What the model keeps of them; None where it keeps nothing.
        predicted: ``[prompt, pos]`` the likeliest next ids, of plain passes.
    """

    def __init__(self, tokens: Tensor, logits: Tensor, cache: Any, predicted: Tensor | None = None) -> None:
        self.tokens, self.logits, self.cache, self.predicted = tokens, logits, cache, predicted


class DecodedRows:
    """Rows of one length that are being decoded.

    Attributes:
        tokens: ``[row, pos]`` prompt and generated tokens.
        logits: ``[row, vocabulary]`` of what comes next.
        cache: What the model keeps of them.
        keys: ``[row]`` numbers that tell them apart.
        n_prompt: Tokens of the prompt.
        predicted: ``[row, pos]`` the likeliest next ids of the last step's tokens, of plain passes.
    """

    def __init__(self, decoder: CachedDecoder, tokens: Tensor, logits: Tensor, cache: Any, keys: Tensor) -> None:
        self._decoder, self.tokens, self.logits, self.cache, self.keys = decoder, tokens, logits, cache, keys
        self.n_prompt = tokens.shape[1]
        self.predicted: Tensor | None = None

    def step(self, tokens: Tensor) -> None:
        """Go on by a token each, ``[row]``."""
        self._decoder.step(self, tokens)

    def keep(self, rows: Tensor) -> None:
        """Leave out all but some rows, by their numbers."""
        self.tokens, self.logits, self.keys = self.tokens[rows], self.logits[rows], self.keys[rows]
        if self.cache is not None:
            self.cache.reorder_cache(rows)
