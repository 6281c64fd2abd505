"""What tokens look like in words, also those that are a part of a character."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Any

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_texts(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """The text of each token by itself, ``<id>`` without a tokenizer.

    A token that is not whole characters shows the bytes that make none by their values, such as ``<E2><82>``: by itself
    it would decode to U+FFFD, whatever it is. Control characters but tabs and line ends are shown likewise (``<1B>``):
    files cannot hold all of them, and a terminal would obey them.
    """
    return {i: f"<{i}>" if tokenizer is None else _shown(_text(tokenizer, i)) for i in ids}


def _shown(text: str) -> str:
    return "".join(
        f"<{ord(c):02X}>" if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r" else c for c in text
    )


def _text(tokenizer: Any, token_id: int) -> str:
    text = str(tokenizer.decode([token_id]))
    raw = _bytes(tokenizer.convert_ids_to_tokens(token_id)) if "\ufffd" in text else None
    if raw is None:
        return text
    characters = raw.decode("utf-8", "surrogateescape")  # a byte b of no character becomes U+DC00 + b
    return "".join(f"<{ord(c) - 0xDC00:02X}>" if "\udc80" <= c <= "\udcff" else c for c in characters)


def _bytes(token: Any) -> bytes | None:
    """The bytes that a token of the vocabulary stands for; None where it is not written in bytes."""
    if isinstance(token, bytes):
        return token
    if not isinstance(token, str):
        return None
    if fallback := _FALLBACK.fullmatch(token):  # of SentencePiece
        return bytes([int(fallback[1], 16)])
    return bytes(map(_BYTES.__getitem__, token)) if set(token) <= _BYTES.keys() else None


def _byte_table() -> dict[str, int]:
    """How byte-level BPE writes bytes: those that print as themselves, the others from U+0100 on (GPT-2)."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + n): byte for n, byte in enumerate(moved)}


_BYTES = _byte_table()
