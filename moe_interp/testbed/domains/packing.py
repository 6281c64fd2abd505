"""Sequences of one length, packed from documents, with the domain of every token."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from moe_interp.errors import ConfigError
from moe_interp.testbed.domains.domain import Domain, check_domains
from moe_interp.tokenization import bos_first


@dataclass(frozen=True)
class PackedSequences:
    """``tokens`` and ``domain`` of shape ``[sequence, pos]``; ``domain`` is an index into ``names``. No padding."""

    tokens: np.ndarray
    domain: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens)


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], length: int) -> list[np.ndarray]:
    """``<bos> document <eos>``, cut into pieces of at most ``length`` tokens that each start with ``<bos>``, once."""
    pieces = []
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for encoding in tokenizer.backend_tokenizer.encode_batch(list(documents), add_special_tokens=False):
        ids = [*encoding.ids, eos]
        cuts = [ids[i : i + length - 1] for i in range(0, len(ids), length - 1)]
        pieces += [np.array(bos_first(bos, cut), np.int32) for cut in cuts]
    return pieces


def pack(
    pieces: Sequence[Sequence[np.ndarray]],
    names: Sequence[str],
    *,
    n_sequences: int,
    length: int,
    shares: Sequence[float] | None = None,
    mixed: bool = False,
    domains_per_group: int | None = None,
    group: int = 1,
    seed: int = 0,
) -> PackedSequences:
    """Sequences filled with whole pieces; the last piece of a sequence is cut where it does not fit.

    Args:
        pieces: Per domain, from :func:`encode_documents`; gone through in a new random order each time round.
        n_sequences, length: The shape of what comes out.
        shares: Expected share of the sequences (pure) or pieces (mixed) of each domain.
        mixed: Each piece's domain is drawn afresh; otherwise a sequence has one domain.
        domains_per_group: Domain draws that a run of ``group`` sequences (a micro-batch) shares: 1 makes micro-batches
            of one domain, None draws for every sequence. Expected shares are the same; draws are systematic.
        seed: Fixes everything.

    Raises:
        ConfigError: A length below 8, or shares that do not fit.
    """
    if length < 8 or n_sequences < 1:
        raise ConfigError(
            f"length {length}, {n_sequences} sequences", "length >= 8 and at least one sequence", "Raise it."
        )
    p = np.ones(len(names)) if shares is None else np.asarray(shares, float)
    rng = np.random.default_rng(seed)
    p = p / p.sum()
    draws = _domain_of_sequences(rng, p, n_sequences, group, domains_per_group or group)
    streams = [_endless(pieces[d], f"{seed}/{names[d]}") for d in range(len(names))]
    tokens, domain = np.empty((2, n_sequences, length), np.int32)
    for i in range(n_sequences):
        at = 0
        while at < length:
            d = int(rng.choice(len(names), p=p)) if mixed else int(draws[i])
            piece = next(streams[d])[: length - at]
            tokens[i, at : at + len(piece)] = piece
            domain[i, at : at + len(piece)] = d
            at += len(piece)
    return PackedSequences(tokens, domain.astype(np.int16), tuple(names))


def _domain_of_sequences(
    rng: np.random.Generator, p: np.ndarray, n_sequences: int, group: int, n_draws: int
) -> np.ndarray:
    """Domain of each sequence: per group ``n_draws`` systematic draws, so that a group is as close to p as can be."""
    n_groups = -(-n_sequences // group)
    # shape: (group, draw); one random offset a group, so that each draw's law is p
    u = (rng.random((n_groups, 1)) + np.arange(n_draws)) / n_draws
    draws = rng.permuted(np.minimum(np.searchsorted(np.cumsum(p), u, side="right"), len(p) - 1), axis=1)
    return draws[:, np.arange(group) % n_draws].reshape(-1)[:n_sequences]


def _endless(pieces: Sequence[np.ndarray], seed: str) -> Iterator[np.ndarray]:
    rng = random.Random(seed)
    order = list(range(len(pieces)))
    while True:
        rng.shuffle(order)
        yield from (pieces[i] for i in order)


def training_sequences(
    domains: Sequence[Domain],
    tokenizer: PreTrainedTokenizerFast,
    *,
    n_sequences: int,
    length: int,
    shares: Sequence[float] | None = None,
    mixed: bool = False,
    domains_per_group: int | None = None,
    group: int = 1,
    seed: int = 0,
) -> PackedSequences:
    """Encode and pack the training documents; arguments as in :func:`pack`."""
    weights = check_domains(domains, shares)
    return pack(
        [encode_documents(tokenizer, d.train, length) for d in domains],
        [d.name for d in domains],
        n_sequences=n_sequences,
        length=length,
        shares=weights,
        mixed=mixed,
        domains_per_group=domains_per_group,
        group=group,
        seed=seed,
    )


def validation_sequences(
    domains: Sequence[Domain], tokenizer: PreTrainedTokenizerFast, *, n_per_domain: int, length: int, seed: int = 0
) -> PackedSequences:
    """``n_per_domain`` pure sequences of validation documents of each domain, domain after domain."""
    check_domains(domains)
    parts = [
        pack(
            [encode_documents(tokenizer, d.validation, length)],
            [d.name],
            n_sequences=n_per_domain,
            length=length,
            seed=seed,
        )
        for d in domains
    ]
    labels = np.repeat(np.arange(len(domains), dtype=np.int16), n_per_domain)[:, None].repeat(length, axis=1)
    return PackedSequences(np.concatenate([p.tokens for p in parts]), labels, tuple(d.name for d in domains))
