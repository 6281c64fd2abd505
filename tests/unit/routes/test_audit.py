"""What a screen missed, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from moe_interp.errors import DataError
from moe_interp.routes import ScreenAudit


def planted(sequence, advantage, kept):
    return ScreenAudit(np.array(sequence), np.array(advantage, dtype=float), np.array(kept, dtype=float))


def test_recall_and_gain_by_hand():
    # the second token's best was missed, the third has nothing to gain, the fourth lost everything
    audit = planted([0, 0, 1, 1], [2.0, 1.0, -0.5, 1.0], [2.0, 0.5, -0.5, -0.2])
    assert audit.n_tokens == 4
    assert audit.recall == 0.5
    assert audit.gain_kept == 2.5 / 4.0
    assert "0.50" in audit.summary()
    assert "4 tokens" in audit.summary()


def test_intervals_resample_sequences():
    # each sequence of two tokens is wholly found or wholly missed: half of 40 sequences
    found = np.repeat([1.0, 0.0], 40)
    audit = planted(np.repeat(np.arange(40), 2), np.ones(80), found)
    low, high = audit.intervals()["recall"]
    # the sd of a mean of 40 coin tosses is .079; tokens taken as independent would give .056
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(40), rel=0.15)
    assert audit.intervals()["gain_kept"] == (low, high)
    assert all(np.isnan(bound) for bound in planted([3, 3], [1, 1], [1, 1]).intervals()["recall"])


def test_a_gain_of_few_tokens_has_an_interval():
    # two sequences have a gain, of which one keeps half: too few to say more than what a share can be
    advantage = np.where(np.arange(40) < 2, 1.0, -1.0)
    audit = planted(np.arange(40), advantage, np.where(np.arange(40) == 1, 0.5, advantage))
    assert audit.intervals()["gain_kept"] == (0.0, 1.0)
    assert "the share 0.75 [0.00, 1.00]" in audit.summary()


def test_no_audit_cannot_be_merged():
    with pytest.raises(DataError, match=r"no audit\. Expected: at least one"):
        ScreenAudit.merge([])


def test_merging_batches_equals_the_whole():
    whole = planted([0, 1, 2, 3], [1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 3.0, 2.0])
    parts = [planted([0, 1], [1.0, 2.0], [1.0, 0.0]), planted([0, 1], [3.0, 4.0], [3.0, 2.0])]
    merged = ScreenAudit.merge(parts)
    assert (merged.recall, merged.gain_kept) == (whole.recall, whole.gain_kept)
    assert merged.intervals() == whole.intervals()


def test_no_token_is_better_than_its_standard_route():
    audit = planted([0, 1], [-1.0, 0.0], [-2.0, 0.0])
    assert np.isnan(audit.gain_kept)
    assert audit.recall == 0.5
