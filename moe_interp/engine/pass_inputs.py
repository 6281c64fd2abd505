"""What a pass is given: tokens with their mask, and a memory budget; refused where the model cannot read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_interp.arch.offload import device_of
from moe_interp.engine.memory import Memory
from moe_interp.errors import ConfigError, DataError
from moe_interp.hooks.attach import MoEHooks, check_attached
from moe_interp.tokenization import TextReader, check_context, padded_ids, warn_of_two_bos

Tokens = Tensor | str | Sequence[str]


def check_tokens(moe: MoEHooks, tokens: Tokens, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Token ids and their mask as ``[batch, pos]`` on the model's device, refused where the model cannot read them.

    A text, or several, become the ids that ``bridge.to_tokens`` makes of them, with BOS once, also where a text begins
    with it, and a mask of their padding. Ids are taken as they are.

    Raises:
        AttachError: hooks that were detached, or something else in their place.
        DataError: no integer ids, ids outside of the vocabulary, a mask of another shape, text without a tokenizer, or
            sequences beyond the context.

    Warns:
        RepeatedBOSWarning: texts that begin with BOS themselves, or ids that begin with two.
    """
    check_attached(moe)
    expected = "integer ids [batch, pos], and a mask of that shape if any; or texts alone"
    remedy = "Tokenise the text and pad it to one width."
    device = device_of(moe.bridge.original_model)
    is_text = isinstance(tokens, str) or (
        isinstance(tokens, list | tuple) and any(isinstance(text, str) for text in tokens)
    )
    if is_text:
        if attention_mask is not None or not all(isinstance(text, str) for text in tokens):
            raise DataError("texts with an attention mask, or among other things", expected, remedy)
        tokens, attention_mask = _tokenised(moe, [tokens] if isinstance(tokens, str) else list(tokens))
    try:
        ids = torch.as_tensor(tokens).to(device)
        mask = None if attention_mask is None else torch.as_tensor(attention_mask).to(device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"tokens or a mask that make no tensor ({error})", expected, remedy) from error
    ids = ids.unsqueeze(0) if ids.ndim == 1 else ids
    if ids.ndim != 2 or not ids.numel() or not is_integer(ids) or (mask is not None and mask.shape != ids.shape):
        with_mask = "" if mask is None else f" with a mask of shape {tuple(mask.shape)}"
        raise DataError(f"tokens of shape {tuple(ids.shape)} and dtype {ids.dtype}{with_mask}", expected, remedy)
    _check_ids(ids, int(getattr(moe.bridge.cfg, "d_vocab", 0) or 2**31))
    check_context(moe.bridge, [("each sequence" if len(ids) > 1 else "the sequence", ids.shape[1])])
    if not is_text:
        warn_of_two_bos(moe.bridge, ids, mask)
    return ids.long(), mask


def _tokenised(moe: MoEHooks, texts: list[str]) -> tuple[Tensor, Tensor | None]:
    """Ids of texts and the mask of their padding, on the side that the tokenizer pads; None where there is none.

    One by one: in a batch, padding cannot be told from a text's own tokens where they share an id.
    """
    reader = TextReader(moe.bridge)
    rows = [reader.start(text, f"text {number}", "tokens") for number, text in enumerate(texts)]
    reader.warn("text")
    ids, mask = padded_ids(rows, getattr(moe.bridge.tokenizer, "padding_side", "right") != "left")
    return ids, None if bool(mask.all()) else mask


def _check_ids(ids: Tensor, vocabulary: int) -> None:
    is_out = (ids < 0) | (ids >= vocabulary)
    if bool(is_out.any()):
        sequence, pos = is_out.nonzero()[0].tolist()
        raise DataError(
            f"token id {int(ids[sequence, pos])} of sequence {sequence}, position {pos}",
            f"ids from 0 to {vocabulary - 1}, also at padding",
            "Tokenise the text for this model.",
        )


def check_budget(memory_budget: Any) -> int | None:
    """A memory budget in bytes; None for the default.

    Raises:
        ConfigError: no finite number of at least 1.
    """
    if memory_budget is None:
        return None
    try:
        if isinstance(memory_budget, str | bool):
            raise TypeError(memory_budget)
        if (budget := int(memory_budget)) < 1:
            raise ValueError(memory_budget)
        return budget
    except (TypeError, ValueError, OverflowError, RuntimeError):  # as nan and inf do
        given = f"memory_budget={memory_budget!r}"
        raise ConfigError(given, "a number of bytes, at least 1", "Pass such as 2**30 for one GiB.") from None


def check_memory(moe: MoEHooks, memory_budget: Any) -> Memory:
    """The memory of a run, of a budget in bytes, or of None for the default; a run's own memory as it is.

    Raises:
        ConfigError: no finite number.
    """
    return Memory.of(moe, memory_budget if isinstance(memory_budget, Memory) else check_budget(memory_budget))


def is_integer(values: Tensor) -> bool:
    """Whether a tensor holds whole numbers; bools are none."""
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
