"""From what users hand in (texts, chat messages, lists of ids) to token ids: the one place that tokenises.

Here also stands how long a sequence may be, and the one check of it.

A sequence begins with what ``bridge.to_tokens`` puts in front of a text (BOS, where ``bridge.cfg.default_prepend_bos``
says so), exactly once: also where the text or a chat template writes it already.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from moe_interp.checks import check_text
from moe_interp.errors import DataError, warn

Messages = tuple[Mapping[str, Any], ...]
Text = str | tuple[int, ...]


class RepeatedBOSWarning(UserWarning):
    """Texts that begin with BOS themselves, or lists of ids that begin with two."""


class TextReader:
    """Turns what a user hands in into ids of one model, and warns once, after all of it is read.

    Args:
        bridge: The model, with its tokenizer or without.

    Attributes:
        begins_with_bos: The places whose text begins with BOS itself; it is kept once.
        begins_with_two: The places whose ids begin with two BOS; they are taken as they are.
    """

    def __init__(self, bridge: TransformerBridge) -> None:
        self.bridge, self.tokenizer = bridge, bridge.tokenizer
        self.vocabulary = int(getattr(bridge.cfg, "d_vocab", 0) or 0)
        config: Any = getattr(getattr(bridge, "original_model", None), "config", None)
        bos = getattr(config if self.tokenizer is None else self.tokenizer, "bos_token_id", None)
        self.bos = bos if isinstance(bos, int) else None
        self.begins_with_bos: list[str] = []
        self.begins_with_two: list[str] = []

    def start(self, value: Any, place: str, field: str = "text") -> tuple[int, ...]:
        """The ids of what a sequence begins with: a text, or ids, which are taken as they are.

        Raises:
            DataError: no tokenizer for a text, or neither a text nor ids of the vocabulary.
        """
        if not isinstance(value, str):
            ids = self.ids(value, place, field)
            if self.bos is not None and ids[:2] == (self.bos, self.bos):
                self.begins_with_two.append(place)
            return ids
        self._with_tokenizer(place, field)
        ids, begins_with_bos = self._read(value, place, field)
        if begins_with_bos:
            self.begins_with_bos.append(place)
        return ids

    def rest(self, value: Any, place: str, field: str = "answer") -> tuple[int, ...]:
        """The ids of what goes on a sequence, tokenised apart and without special tokens before or after it.

        Raises:
            DataError: as :meth:`start`, or a text whose first token is BOS.
        """
        if not isinstance(value, str):
            return self.ids(value, place, field)
        own = self._own(value, place, field)
        if self.bos is not None and own[:1] == (self.bos,) and not self._has_no_bos():
            given = f"{place}: {field} that begins with the special token {self._shown(self.bos)}"
            raise DataError(given, "BOS at the start of a sequence only", "Leave it out, or give ids.")
        return own

    def messages(self, messages: Messages, place: str, is_prompt: bool) -> tuple[int, ...]:
        """The ids of a conversation under the tokenizer's chat template, whole, with an EOS that the template writes.

        BOS comes first exactly once, also where the template writes none: as for a text. Only where the tokenizer has
        no BOS, and TransformerLens put EOS in its place, nothing is added to what the template writes.

        Args:
            messages: The conversation, such as ``({"role": "user", "content": "..."},)``.
            place: Where it stands, for errors.
            is_prompt: Open the assistant's turn after it (``add_generation_prompt``).

        Raises:
            DataError: no tokenizer, no chat template, or a template that refuses these messages.
        """
        tokenizer = self._with_tokenizer(place, "messages")
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{place}: messages, but the tokenizer has no chat template",
                "a tokenizer with a chat template, or text",
                "Give prompt and answer as text, or set bridge.tokenizer.chat_template.",
            )
        try:
            text = tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=is_prompt
            )
        except Exception as error:  # a template is a program of the model's makers: it raises what it likes
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            given = f"{place}: messages that the chat template refuses ({said})"
            raise DataError(given, "a conversation as this model's template has it", "Correct the messages.") from error
        return self._read(str(text), place, "messages", has_front=not self._has_no_bos())[0]

    def ids(self, value: Any, place: str, field: str) -> tuple[int, ...]:
        """A list of ids as it is.

        Raises:
            DataError: not one row of integers of the vocabulary, or none.
        """
        row = id_row(value)
        if row is None:
            given = f"{place}: {field} {str(value)[:40]} of type {type(value).__name__}"
            raise DataError(given, "a text, or a list of token ids", "Correct it, or tokenise it for this model.")
        if strange := [i for i in row if i < 0 or (self.vocabulary and i >= self.vocabulary)]:
            expected = f"ids from 0 to {self.vocabulary - 1}" if self.vocabulary else "ids from 0"
            given = f"{place}: token id {strange[0]} in {field}"
            raise DataError(given, expected, "Tokenise it for this model.")
        return row

    def warn(self, noun: str) -> None:
        """Say once what begins with BOS, and name it.

        Args:
            noun: What was read, such as "sequence".
        """
        if self.begins_with_bos:
            warn(
                f"{_named(self.begins_with_bos, noun)} with BOS ({self._shown(self.bos)}) in the text: it is kept "
                "once. Leave it out of texts; a conversation is given as `messages`.",
                RepeatedBOSWarning,
            )
        if self.begins_with_two:
            warn(
                f"{_named(self.begins_with_two, noun)} with two BOS (id {self.bos}): lists of ids are taken as they "
                "are. Tokenise without special tokens what a chat template has rendered.",
                RepeatedBOSWarning,
            )

    def _read(self, text: str, place: str, field: str, has_front: bool = True) -> tuple[tuple[int, ...], bool]:
        """A text's ids with what belongs in front of it, once, and whether the text begins with BOS itself."""
        put = has_front and self._is_put_in_front()
        if self.bos is not None and text.lstrip().startswith(self.tokenizer.bos_token):
            text = text.lstrip()  # white space before BOS is no text
        own = self._own(self.tokenizer.bos_token + text if put else text, place, field)
        front: tuple[int, ...] = ()
        if has_front and not put:
            full = tuple(self.tokenizer(text)["input_ids"])
            # what the tokenizer adds after a text (EOS) is left out, as by bridge.to_tokens
            n = next((n for n in range(max(0, len(full) - len(own)) + 1) if full[n : n + len(own)] == own), 0)
            front = full[:n] if self._wants_bos() or not self._prepends_bos() else full[1:n]
        begins_with_bos = self.bos is not None and own[put : put + 1] == (self.bos,)
        while front and own[: len(front)] == front:
            own = own[len(front) :]
        ids = front + own
        while self.bos is not None and ids[:2] == (self.bos, self.bos):
            ids = ids[1:]
        return ids, begins_with_bos

    def _wants_bos(self) -> bool:
        return bool(getattr(self.bridge.cfg, "default_prepend_bos", True))

    def _prepends_bos(self) -> bool:
        """Whether the tokenizer adds BOS by itself."""
        return bool(getattr(self.bridge.cfg, "tokenizer_prepends_bos", True))

    def _is_put_in_front(self) -> bool:
        """Whether TransformerLens writes BOS in front of a text, since the tokenizer does not add it."""
        if self.bos is None or not self._wants_bos() or self._prepends_bos():
            return False
        return len(self.tokenizer(self.tokenizer.bos_token, add_special_tokens=False)["input_ids"]) == 1

    def _has_no_bos(self) -> bool:
        """Whether BOS is EOS in its place, as TransformerLens sets it for a tokenizer without one."""
        return self.bos == getattr(self.tokenizer, "eos_token_id", None) and not self._prepends_bos()

    def _own(self, text: str, place: str, field: str) -> tuple[int, ...]:
        tokenizer = self._with_tokenizer(place, field)
        return tuple(tokenizer(check_text(text, f"{place}: {field}"), add_special_tokens=False)["input_ids"])

    def _with_tokenizer(self, place: str, field: str) -> Any:
        if self.tokenizer is None:
            raise DataError(f"{place}: {field} as text, but the model has no tokenizer", "ids", "Give ids.")
        return self.tokenizer

    def _shown(self, token: int | None) -> str:
        return f"{self.tokenizer.convert_ids_to_tokens(token)}, id {token}"


def check_messages(value: Any, place: str) -> Messages:
    """A conversation: a list of messages, each with a role and its content.

    Raises:
        DataError: anything else; the message's number is named.
    """
    expected = 'a list of messages such as {"role": "user", "content": "..."}'
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        found = "none" if value == [] else f"of type {type(value).__name__}"
        raise DataError(f"{place}: messages {found}", expected, "Correct the messages.")
    for number, message in enumerate(value):
        is_message = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not is_message or not ({"content", "tool_calls"} & message.keys()):
            given = f"{place}: message {number} is {str(message)[:60]}"
            raise DataError(given, expected, "Give each message its role and its content.")
    return tuple(dict(message) for message in value)


def context_length(bridge: TransformerBridge) -> int | None:
    """The most tokens of a sequence, as the model's own configuration says (``max_position_embeddings``, of its text
    part); None where it says nothing, as in models with relative positions (T5)."""
    config: Any = getattr(getattr(bridge, "original_model", None), "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(text, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def check_context(bridge: TransformerBridge, lengths: Iterable[tuple[str, int]]) -> None:
    """Refuse sequences that are longer than the model's context. Rotary models run them, and compute something else.

    Args:
        bridge: The model.
        lengths: Of each sequence, where it stands, for the error, and how many tokens it has, padding included.

    Raises:
        DataError: it names the first five.
    """
    context = context_length(bridge)
    long = [(place, n) for place, n in lengths if context is not None and n > context]
    if long:
        named = "; ".join(f"{place}: {n} tokens" for place, n in long[:5])
        raise DataError(
            named + (f"; and {len(long) - 5} more" if len(long) > 5 else ""),
            f"at most the model's context of {context}",
            "Shorten what is longer, or leave it out.",
        )


def warn_of_two_bos(bridge: TransformerBridge, tokens: Tensor, attention_mask: Tensor | None = None) -> None:
    """Warn where real tokens ``[row, pos]`` begin with two BOS.

    Warns:
        RepeatedBOSWarning: once, naming the rows.
    """
    reader = TextReader(bridge)
    if reader.bos is None:
        return
    real = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    is_one_of_two = real & (real.long().cumsum(dim=1) <= 2)
    both = ((tokens == reader.bos) & is_one_of_two).sum(dim=1) == 2
    reader.begins_with_two += [f"row {row}" for row in both.nonzero()[:, 0].tolist()]
    reader.warn("sequence")


def prompt_of(fields: Mapping[str, Any], place: str, name: str = "prompt") -> tuple[Any, Messages | None]:
    """A record's prompt and its conversation, of which it has at most one; the prompt may be a conversation itself.

    Args:
        fields: The record.
        place: Where it stands, for errors.
        name: The prompt's field.

    Raises:
        DataError: both, or messages that are none.
    """
    prompt, messages = fields.get(name), fields.get("messages")
    if messages is not None and name != "messages" and prompt is not None:
        raise DataError(f"{place}: messages beside {name}", "one of them", "Leave one of them out.")
    is_conversation = isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], Mapping)
    if messages is None and not is_conversation:
        return prompt, None
    return None, check_messages(prompt if messages is None else messages, place)


def id_row(value: Any) -> tuple[int, ...] | None:
    """One row of integers, of a list, a tuple, an array or a tensor, as Python's; None for anything else or none."""
    if isinstance(value, str | bytes):
        return None
    if isinstance(value, list | tuple) and any(isinstance(each, bool | np.bool_) for each in value):
        return None
    try:
        ids = np.asarray(value.cpu() if isinstance(value, Tensor) else value)
    except (ValueError, TypeError, RuntimeError):  # such as rows of different lengths
        return None
    return tuple(ids.tolist()) if ids.dtype.kind in "iu" and ids.ndim == 1 and ids.size else None


def bos_first(bos: int | None, ids: Sequence[int]) -> list[int]:
    """``bos`` and then the ids, without those that repeat it at their start; the ids alone where there is no BOS."""
    start = 0
    while bos is not None and start < len(ids) and ids[start] == bos:
        start += 1
    return [*(() if bos is None else (bos,)), *ids[start:]]


def padded_ids(rows: Sequence[Sequence[int]], at_end: bool) -> tuple[Tensor, Tensor]:
    """``[row, pos]`` ids and their mask; the id at padding is 0, and the mask is 0 there."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for row, own in enumerate(rows):
        place = slice(0, len(own)) if at_end else slice(width - len(own), width)
        ids[row, place], mask[row, place] = torch.tensor(own, dtype=torch.long), 1
    return ids, mask


def _named(places: Sequence[str], noun: str) -> str:
    shown = ", ".join(places[:5]) + (f" and {len(places) - 5} more" if len(places) > 5 else "")
    verb = "begins" if len(places) == 1 else "begin"
    return f"{len(places)} {noun}{'' if len(places) == 1 else 's'} ({shown}) {verb}"
