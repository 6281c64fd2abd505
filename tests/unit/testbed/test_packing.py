"""Packed sequences: every token carries its document's domain, micro-batches are as pure or mixed as asked."""

from __future__ import annotations

import numpy as np
import pytest

from moe_interp.errors import ConfigError
from moe_interp.testbed.domains.domain import Domain
from moe_interp.testbed.domains.packing import encode_documents, pack, training_sequences, validation_sequences
from moe_interp.testbed.model import train_tokenizer

LETTERS = ("ab", "mn", "yz")  # each domain has letters of its own, so that a token shows its domain


@pytest.fixture(scope="module")
def domains():
    def texts(letters: str, start: int) -> tuple[str, ...]:
        return tuple(letters[0] * (i % 7 + 1) + letters[1] * i for i in range(start, start + 12))

    return [Domain(letters, texts(letters, 0), texts(letters, 100)) for letters in LETTERS]


@pytest.fixture(scope="module")
def tokenizer(domains):
    return train_tokenizer(domains, vocab_size=262)


def pieces_of(*, length: int = 8, n: int = 3):
    return [[np.full(length, d, np.int32)] for d in range(n)]


def test_documents_become_pieces_that_each_start_with_bos(tokenizer):
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    pieces = encode_documents(tokenizer, ["ab", "b" * 40], length=16)
    plain = tokenizer("b" * 40, add_special_tokens=False).input_ids
    assert pieces[0].tolist() == [bos, *tokenizer("ab", add_special_tokens=False).input_ids, eos]
    assert all(piece[0] == bos and len(piece) <= 16 for piece in pieces)
    assert [int(t) for piece in pieces[1:] for t in piece[1:]] == [*plain, eos]


@pytest.mark.parametrize("mixed", [False, True])
def test_every_token_is_labelled_with_its_documents_domain(domains, tokenizer, mixed):
    data = training_sequences(domains, tokenizer, n_sequences=60, length=32, mixed=mixed, seed=3)
    assert data.tokens.shape == data.domain.shape == (60, 32)
    assert (data.tokens[:, 0] == tokenizer.bos_token_id).all()
    for tokens, labels in zip(data.tokens, data.domain):
        for token, label in zip(tokens, labels):
            assert set(tokenizer.decode([token], skip_special_tokens=True)) <= set(LETTERS[label])
    n_domains = [len(set(row)) for row in data.domain]
    assert max(n_domains) > 1 if mixed else max(n_domains) == 1
    again = training_sequences(domains, tokenizer, n_sequences=60, length=32, mixed=mixed, seed=3)
    np.testing.assert_array_equal(data.tokens, again.tokens)
    other = training_sequences(domains, tokenizer, n_sequences=60, length=32, mixed=mixed, seed=4)
    assert (data.tokens != other.tokens).any()


@pytest.mark.parametrize("draws, most_domains", [(1, 1), (2, 2), (None, 3)])
def test_micro_batches_hold_as_many_domains_as_asked_at_the_same_shares(draws, most_domains):
    shares = (0.5, 0.3, 0.2)
    options = {"n_sequences": 8 * 1500, "length": 8, "shares": shares, "domains_per_group": draws, "group": 8}
    data = pack(pieces_of(), "abc", **options)
    groups = data.domain[:, 0].reshape(-1, 8)
    assert max(len(set(group)) for group in groups.tolist()) == most_domains
    # 1500 independent groups: a share's standard deviation is at most .013
    np.testing.assert_allclose(np.bincount(groups.ravel()) / groups.size, shares, atol=0.045)


def test_a_mixed_micro_batch_is_as_close_to_the_shares_as_whole_sequences_allow():
    data = pack(pieces_of(n=2), "ab", n_sequences=320, length=8, shares=(0.7, 0.3), group=16)
    first = (data.domain[:, 0] == 0).reshape(-1, 16).sum(1)
    assert set(first.tolist()) == {11, 12}  # .7 * 16 = 11.2


def test_a_stream_goes_through_all_pieces_before_it_repeats_one():
    pieces = [[np.full(8, i, np.int32) for i in range(10)]]
    data = pack(pieces, "a", n_sequences=20, length=8)
    assert sorted(data.tokens[:10, 0]) == sorted(data.tokens[10:, 0]) == list(range(10))


def test_validation_is_pure_and_from_validation_documents(domains, tokenizer):
    data = validation_sequences(domains, tokenizer, n_per_domain=3, length=32)
    assert data.domain[:, 0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    held_out = {tuple(p) for p in encode_documents(tokenizer, domains[0].validation, 32)}
    assert tuple(data.tokens[0][: len(next(iter(held_out)))]) in {p[: len(next(iter(held_out)))] for p in held_out}


def test_too_short_sequences_are_refused():
    with pytest.raises(ConfigError, match="length 4"):
        pack(pieces_of(), "abc", n_sequences=1, length=4)


def test_a_document_that_begins_with_bos_gets_no_second_one(tokenizer):
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    plain = tokenizer("ab", add_special_tokens=False).input_ids
    for text in ("ab", "<bos>ab", "<bos><bos>ab"):
        assert [piece.tolist() for piece in encode_documents(tokenizer, [text], length=16)] == [[bos, *plain, eos]]
