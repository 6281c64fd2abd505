"""Prompts as they are handed in, their greedy continuations, and the experts that their tokens use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_interp.arch.offload import device_of
from moe_interp.engine.memory import tokens_per_pass
from moe_interp.engine.rerun import PrefixRunner, TargetPredictions
from moe_interp.errors import ConfigError, DataError
from moe_interp.experiments.inputs.batches import batches_of_like_length
from moe_interp.hooks.attach import MoEHooks
from moe_interp.tokenization import TextReader, check_context, padded_ids, prompt_of
from moe_interp.types import Hooks, Layer


@dataclass(frozen=True, eq=False)
class Prompt:
    """A tokenised prompt.

    Attributes:
        name: Unique name within its set.
        tokens: Ids, with BOS first where text was given and the model expects it.
        continuation: The ids of what was generated after it, EOS included.
    """

    name: str
    tokens: tuple[int, ...]
    continuation: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens) + len(self.continuation)


def read_prompts(moe: MoEHooks, prompts: Any, which: str) -> list[Prompt]:
    """Tokenised prompts from texts, lists of ids, items, or mappings with ``prompt`` (or ``text``, ``tokens``) or
    ``messages``; of items and mappings the answer is not read.

    Args:
        moe: Attached hooks.
        prompts: A list of them.
        which: Whose they are, for errors.

    Raises:
        DataError: no list, an entry that is no prompt, ids that occur twice, or a prompt beyond the model's context.
    """
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Sequence | np.ndarray | Tensor):
        given = "one text" if isinstance(prompts, str) else f"a {type(prompts).__name__}"
        raise DataError(f"{which}: {given}", "a list of texts, of lists of ids, or of mappings", "Wrap it in a list.")
    reader = TextReader(moe.bridge)
    read = [_read(reader, entry, number, which) for number, entry in enumerate(prompts)]
    names = [prompt.name for prompt in read]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{which}: id {twice[0]!r} more than once", "unique ids", "Rename one of them.")
    if empty := [prompt.name for prompt in read if not prompt.tokens]:
        raise DataError(f"{which}, prompt {empty[0]!r} without a token", "at least one token", "Leave it out.")
    check_context(moe.bridge, [(f"{which}, prompt {prompt.name!r}", len(prompt)) for prompt in read])
    reader.warn("prompt")
    return read


def _read(reader: TextReader, entry: Any, number: int, which: str) -> Prompt:
    place = f"{which}, prompt {number}"
    if not isinstance(entry, str | Mapping) and hasattr(entry, "prompt"):  # an item
        entry = {name: getattr(entry, name, None) for name in ("id", "prompt", "messages")}
        entry = {**entry, "prompt": None} if entry["messages"] else entry
    if not isinstance(entry, Mapping):
        return Prompt(str(number), reader.start(entry, place, "prompt"))
    fields = {key: value for key, value in entry.items() if value is not None}
    name = str(fields.get("id", number))
    prompt, messages = prompt_of(fields, place)
    if messages is not None:
        return Prompt(name, reader.messages(messages, place, is_prompt=True))
    starts = [value for value in (prompt, fields.get("text"), fields.get("tokens")) if value is not None]
    if len(starts) != 1:
        raise DataError(
            f"{place} with the fields {', '.join(map(str, entry))}",
            "one of prompt, text, tokens and messages",
            "Correct the fields.",
        )
    return Prompt(name, reader.start(starts[0], place, "prompt"))


def end_of_text(moe: MoEHooks) -> int | None:
    """The id that ends a text, if the model has one."""
    tokenizer: Any = moe.bridge.tokenizer
    config: Any = moe.bridge.original_model.config
    found = getattr(config.get_text_config() if tokenizer is None else tokenizer, "eos_token_id", None)
    return found if isinstance(found, int) else None


def continued(
    moe: MoEHooks, prompts: Sequence[Prompt], max_new_tokens: int, budget: int | None, hooks: Sequence[Any] = ()
) -> list[Prompt]:
    """The prompts with their greedy continuations under hooks; prompts of one length run together, without padding."""
    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt.tokens), []).append(number)
    check_context(
        moe.bridge, [(f"prompt {p.name!r} and what it generates", len(p.tokens) + max_new_tokens) for p in prompts]
    )
    found, end = list(prompts), end_of_text(moe)
    device = device_of(moe.bridge.original_model)
    for length, numbers in by_length.items():
        width = length + max_new_tokens
        rows = max(1, tokens_per_pass(moe, width, budget, predictions_per_token=1.0) // width)
        for start in range(0, len(numbers), rows):
            chunk = numbers[start : start + rows]
            tokens = torch.tensor([prompts[i].tokens for i in chunk], device=device)
            with moe.bridge.hooks(fwd_hooks=list(hooks)):
                out: Any = moe.bridge.generate(
                    tokens,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    stop_at_eos=end is not None,
                    eos_token_id=end,
                    return_type="tokens",
                    verbose=False,
                )
            for i, row in zip(chunk, out[:, length:].tolist()):
                found[i] = replace(prompts[i], continuation=tuple(_until(row, end)))
    return found


def _until(row: list[int], end: int | None) -> list[int]:
    return row[: row.index(end) + 1] if end in row else row


class SelectionCounts:
    """Counts, by row and expert, of the tokens at which an expert is chosen; hooks that only read.

    Args:
        moe: Attached hooks.
        layers: MoE layers.
        counted: ``[row, pos]`` bool.
    """

    def __init__(self, moe: MoEHooks, layers: Sequence[Layer], counted: Tensor) -> None:
        self.moe, self.layers, self.counted = moe, list(layers), counted
        self.found: dict[Layer, Tensor] = {}

    @property
    def hooks(self) -> Hooks:
        return [(self.moe.hook_name("expert_indices", layer), self._reader(layer)) for layer in self.layers]

    def _reader(self, layer: Layer) -> Callable[..., None]:
        n_experts = self.moe.spec(layer).n_experts

        def read(route: Tensor, hook: Any) -> None:
            # shape: (row, pos, slot) -> (row, pos * slot); empty slots and tokens that do not count go to a last column
            places = route.masked_fill((route < 0) | ~self.counted.unsqueeze(-1), n_experts).flatten(1)
            sums = torch.zeros(len(route), n_experts + 1, dtype=torch.float64, device=route.device)
            self.found[layer] = sums.scatter_add_(1, places, torch.ones_like(places, dtype=torch.float64))[:, :-1]

        return read

    def array(self) -> NDArray[np.float64]:
        """``[row, layer, expert]``."""
        return torch.stack([self.found[layer] for layer in self.layers], dim=1).cpu().numpy()


def selection_shares(
    moe: MoEHooks, prompts: Sequence[Prompt], layers: Sequence[Layer], phase: str, budget: int | None
) -> Iterator[tuple[list[int], NDArray[np.float64], NDArray[np.int64]]]:
    """Batch by batch: the prompts' numbers, the share of their tokens that use each expert, and how many tokens those
    are. BOS is no token of the prompt: it is the same in all.

    Yields:
        Numbers; ``[row, layer, expert]``; ``[row]``.
    """
    runner, device, reader = PrefixRunner(moe), device_of(moe.bridge.original_model), TextReader(moe.bridge)
    width = max(map(len, prompts))
    for index in batches_of_like_length(prompts, tokens_per_pass(moe, width, budget)):
        rows = [[*prompts[i].tokens, *prompts[i].continuation] for i in index]
        tokens, mask = padded_ids(rows, at_end=True)
        tokens, column = tokens.to(device), torch.arange(tokens.shape[1])
        starts = torch.tensor([len(prompts[i].tokens) for i in index]).unsqueeze(1)
        if phase == "generated":
            counted = mask.bool() & (column >= starts)
        else:
            has_bos = torch.tensor([reader.bos is not None and row[0] == reader.bos for row in rows]).unsqueeze(1)
            counted = mask.bool() & (column < starts) & ((column > 0) | ~has_bos)
        n_tokens = counted.sum(dim=1).numpy()
        if not n_tokens.all():
            name = prompts[index[int(np.argmin(n_tokens))]].name
            raise DataError(f"prompt {name!r} without a token that counts", "at least one beside BOS", "Leave it out.")
        counts = SelectionCounts(moe, layers, counted.to(device))
        first = torch.zeros(1, dtype=torch.int64, device=device)
        runner.base(tokens, TargetPredictions(first, first, first), [], counts.hooks)
        yield index, counts.array() / n_tokens[:, None, None], n_tokens


def same_number_of_experts(moe: MoEHooks, layers: Sequence[Layer]) -> int:
    """How many experts each of the layers has.

    Raises:
        ConfigError: not all have as many.
    """
    numbers = {moe.spec(layer).n_experts for layer in layers}
    if len(numbers) > 1:
        raise ConfigError(f"layers with {sorted(numbers)} experts", "one number", "Contrast them one after the other.")
    return numbers.pop()
