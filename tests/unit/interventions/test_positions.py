"""Which tokens are meant, in hand-made passes: padding, positions, steps of generate, samples of a prompt."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_interp.errors import ConfigError, HookError
from moe_interp.hooks.passes import PassContext
from moe_interp.interventions.positions import TokenSelection, merge_slots, merge_weights, pack_routes

LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])  # rows of 3 and 5 tokens
RIGHT = LEFT.flip(-1)
PROMPT = 5


def running(n_past: int = 0, **span: Any) -> Any:
    """Hooks in a pass that finds so many columns in its cache."""
    now = PassContext(n_past, **span)
    return SimpleNamespace(pass_context=lambda layer: now)


def touched(
    positions: Any, mask: Tensor | None = None, n_past: int = 0, pos: int = PROMPT, batch: int = 2, **span: Any
) -> list[str]:
    """A row's tokens as a string, "x" where touched."""
    tokens = TokenSelection(running(n_past, **span), 1, positions, mask).tokens(torch.zeros(batch, pos, 1))
    assert tokens.dtype == torch.bool
    return ["".join("x" if t else "." for t in row) for row in tokens.tolist()]


@pytest.mark.parametrize(
    ("positions", "plain", "left", "right"),
    [
        (None, ["xxxxx", "xxxxx"], ["..xxx", "xxxxx"], ["xxx..", "xxxxx"]),
        ("all", ["xxxxx", "xxxxx"], ["..xxx", "xxxxx"], ["xxx..", "xxxxx"]),
        ("new", [".....", "....."], [".....", "....."], [".....", "....."]),
        ([0, 2], ["x.x..", "x.x.."], ["..x.x", "x.x.."], ["x.x..", "x.x.."]),
        ([-1], ["....x", "....x"], ["....x", "....x"], ["..x..", "....x"]),
        ([-1, 0], ["x...x", "x...x"], ["..x.x", "x...x"], ["x.x..", "x...x"]),
        ([4], ["....x", "....x"], [".....", "....x"], [".....", "....x"]),
        ([-4], [".x...", ".x..."], [".....", ".x..."], [".....", ".x..."]),
        ([7, -9], [".....", "....."], [".....", "....."], [".....", "....."]),
        ([], [".....", "....."], [".....", "....."], [".....", "....."]),
    ],
)
def test_positions_of_a_prompt(positions: Any, plain: list[str], left: list[str], right: list[str]) -> None:
    assert touched(positions) == plain
    assert touched(positions, LEFT) == left
    assert touched(positions, RIGHT) == right


@pytest.mark.parametrize(
    ("positions", "first", "second", "masked"),
    [
        (None, ".", ".", [".", "."]),
        ("all", "x", "x", ["x", "x"]),
        ("new", "x", "x", ["x", "x"]),
        ([0, 4], ".", ".", ["x", "."]),  # with the mask, row 0's position 4 is the second new token
        ([5], "x", ".", [".", "."]),
        ([6], ".", "x", [".", "x"]),
        ([-1, -2], ".", ".", [".", "."]),
    ],
)
def test_positions_in_later_steps_of_generate(positions: Any, first: str, second: str, masked: list[str]) -> None:
    """Whether the first and the second new token are touched, in steps of one token and in one step of two."""
    for step in ({"n_past": 5, "pos": 1}, {"n_past": 6, "pos": 1}, {"n_past": 5, "pos": 2}):
        expected = "".join(
            each for column, each in ((5, first), (6, second)) if 0 <= column - step["n_past"] < step["pos"]
        )
        assert touched(positions, **step, prompt=5) == [expected, expected]
    assert touched(positions, LEFT, n_past=6, pos=1) == masked
    assert touched(positions, RIGHT, n_past=6, pos=1) == masked


def test_a_mask_tells_the_prompt_from_what_follows_also_without_a_cache() -> None:
    for mask, padded in ((LEFT, "..xxx"), (RIGHT, "xxx..")):
        assert touched(None, mask, pos=7) == [padded + "..", "xxxxx.."]
        assert touched("new", mask, pos=7) == [".....xx", ".....xx"]
        assert touched("all", mask, pos=7) == [padded + "xx", "xxxxxxx"]
        assert touched([3], mask, pos=7) == [".....x.", "...x..."]
        assert touched([-1], mask, pos=7) == [row + ".." for row in touched([-1], mask)]


def test_a_mask_with_a_gap_counts_real_tokens() -> None:
    mask = torch.tensor([[1, 0, 1, 1]])
    assert touched([1], mask, pos=4, batch=1) == ["..x."]
    assert touched([-1], mask, pos=4, batch=1) == ["...x"]
    assert touched(None, mask, pos=4, batch=1) == ["x.xx"]


def test_one_row_of_the_mask_serves_all_samples_of_its_prompt() -> None:
    assert touched([0], LEFT, batch=6) == ["..x.."] * 3 + ["x...."] * 3
    assert touched([-1], RIGHT, batch=4) == ["..x.."] * 2 + ["....x"] * 2
    assert touched(None, LEFT[:1], batch=3) == ["..xxx"] * 3


def test_positions_and_masks_of_other_kinds() -> None:
    for positions in ((1, 2), range(1, 3), np.array([1, 2]), torch.tensor([1, 2])):
        assert touched(positions) == [".xx..", ".xx.."]
    assert touched(2) == touched(np.int64(2)) == ["..x..", "..x.."]
    for mask in (LEFT.numpy(), LEFT.float(), LEFT.bool(), LEFT.tolist()):
        assert touched([-3], mask) == ["..x..", "..x.."]


def test_a_token_has_the_same_index_and_keys_however_it_is_padded() -> None:
    left, right = (TokenSelection(running(), 1, None, mask) for mask in (LEFT, RIGHT))
    value = torch.zeros(2, PROMPT, 3)
    assert left.index(value)[0, 2:].tolist() == right.index(value)[0, :3].tolist() == [0, 1, 2]
    assert torch.equal(left.keys(value, 4, 9)[0, 2:], right.keys(value, 4, 9)[0, :3])
    for mask in (LEFT, RIGHT):
        assert TokenSelection(running(5), 1, "all", mask).index(value[:, :2]).tolist() == [[3, 4], [5, 6]]
    assert not torch.equal(left.keys(value, 4, 9)[0, 2:5], left.keys(value, 4, 9)[1, 0:3])


# --- errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["last", "listed", [0.5], [True, False], [[0, 1]], {1, 2}, ["a"]])
def test_positions_of_an_unknown_kind_are_refused(positions: Any) -> None:
    with pytest.raises(ConfigError, match=r'positions=.*Expected: a list of integers, None, "all" or "new".*Name'):
        touched(positions)


def test_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"attention mask of shape \(5,\). Expected: \[batch, pos\]. Pass the prompt's"
    ):
        touched(None, LEFT[0])
    with pytest.raises(ConfigError, match=r"mask of 2 x 5 for a pass of 3 x 5 tokens.*rows or a divisor.*batch's own"):
        touched(None, LEFT, batch=3)
    with pytest.raises(ConfigError, match=r"mask of 2 x 5 for a pass of 2 x 4 tokens.*mask of the prompt that runs"):
        touched(None, LEFT, pos=4)


def test_activations_without_a_batch_axis_are_refused() -> None:
    with pytest.raises(HookError, match=r"shape \(5, 2\), without its batch axis.*Run without remove_batch_dim"):
        TokenSelection(running(), 1).tokens(torch.zeros(5, 2))


# --- merging --------------------------------------------------------------------------------------------------


def test_merged_routes_are_packed_and_as_wide_as_the_widest() -> None:
    old = torch.tensor([[[4, 5], [6, 7], [3, -1]]])
    tokens = torch.tensor([[True, False, False]])
    wide = torch.tensor([[[0, 1, 2]]]).expand(1, 3, 3)
    assert merge_slots(tokens, wide, old).tolist() == [[[0, 1, 2], [6, 7, -1], [3, -1, -1]]]
    assert merge_slots(~tokens, wide[..., :1], old).tolist() == [[[4, 5], [0, -1], [0, -1]]]
    gap = torch.tensor([[[-1, 2]]]).expand(1, 3, 2)
    assert merge_slots(torch.ones_like(tokens), gap, old).tolist() == [[[2], [2], [2]]]
    nothing = torch.full((1, 3, 2), -1)
    assert merge_slots(torch.ones_like(tokens), nothing, old).tolist() == [[[-1], [-1], [-1]]]
    assert torch.equal(merge_slots(torch.zeros_like(tokens), wide, old), old)


def test_merged_weights_keep_the_width_of_the_routes_that_run() -> None:
    old = torch.tensor([[[0.1, 0.2, 0.3], [0.4, 0.5, 0.0]]])
    tokens = torch.tensor([[False, True]])
    new = torch.tensor([[[9.0], [8.0]]], dtype=torch.float64)
    merged = merge_weights(tokens, new, old)
    assert torch.equal(merged, torch.tensor([[[0.1, 0.2, 0.3], [8.0, 0.0, 0.0]]]))
    assert merged.dtype == old.dtype


def test_packed_weights_stay_with_their_experts() -> None:
    routes, weights = pack_routes(
        torch.tensor([[-1, 3, 1], [2, -1, 0]]), torch.tensor([[9.0, 0.3, 0.1], [0.2, 9.0, 0]])
    )
    assert routes.tolist() == [[3, 1, -1], [2, 0, -1]]
    assert weights is not None
    torch.testing.assert_close(weights, torch.tensor([[0.3, 0.1, 9.0], [0.2, 0.0, 9.0]]))
    assert pack_routes(torch.tensor([-1, 3]), None)[1] is None
