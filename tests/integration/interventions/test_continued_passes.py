"""Passes that continue a cache: the prompt in pieces, a shared prefix, every kind of generate, and decoding by hand."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from moe_interp.errors import ConfigError, RouteError
from moe_interp.hooks.attach import attached
from moe_interp.interventions import force_experts, random_routing, replay_routes, set_routes
from moe_interp.interventions.router import BiasLimitWarning
from moe_interp.types import Hooks
from tests import tiny
from tests.integration.hooks.support import Opened, opened
from tests.integration.interventions.support import see
from tests.integration.interventions.test_tokens import INTERVENTIONS

LENGTH = 10
TOKENS = tiny.random_tokens(2, LENGTH, seed=4)
MASK = torch.ones(2, LENGTH, dtype=torch.int64)
MASK[0, :2] = 0
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@torch.no_grad()
def in_pieces(
    model: Opened, hooks: Hooks, cuts: list[int], mask: Tensor | None = None, tokens: Tensor = TOKENS
) -> Tensor:
    """Logits of the tokens, run in pieces of these widths, each on the cache of those before."""
    cache, found, start = None, [], 0
    is_two = model.name in tiny.ENCODER_DECODERS
    name = "decoder_input_ids" if is_two else "input_ids"
    with model.precision(), model.bridge.hooks(fwd_hooks=hooks):
        fixed = {"encoder_outputs": model.bridge.original_model.get_encoder()(TOKENS)} if is_two else {}
        for width in cuts:
            options: dict[str, Any] = {name: tokens[:, start : start + width], "past_key_values": cache}
            if mask is not None:
                options["attention_mask"] = mask[:, : start + width]
            out = model.bridge.original_model(**fixed, **options, use_cache=True)
            cache, start = out.past_key_values, start + width
            found.append(out.logits)
    return torch.cat(found, dim=1)


def by_position(model: Opened, **where: Any) -> Hooks:
    routes = torch.stack([torch.arange(LENGTH) % 8, (torch.arange(LENGTH) + 3) % 8], dim=-1)
    return set_routes(model.moe, model.last, routes, torch.rand(LENGTH, 2, generator=torch.Generator().manual_seed(1)))


EVERYWHERE: dict[str, Callable[[Opened], Hooks]] = {
    "forced": lambda m: force_experts(m.moe, m.last, 3, mass="natural"),
    "random": lambda m: random_routing(m.moe, seed=2),
    "by position": by_position,
}


def test_a_prompt_in_pieces_is_the_prompt_at_once(family: str) -> None:
    model = opened(family, torch.float64)
    plain = in_pieces(model, [], [LENGTH])
    for (kind, build), widths in zip(EVERYWHERE.items(), ([3, 3, 3, 1], [6, 4], [8, 1, 1])):
        whole = in_pieces(model, build(model), [LENGTH])
        assert (whole - plain).abs().max() > 0.01, kind
        if family == "jamba":  # that of transformers forgets its state where several tokens continue one
            widths = [7, 1, 1, 1]
        pieces = in_pieces(model, build(model), widths)
        torch.testing.assert_close(pieces, whole, atol=1e-9, rtol=0, msg=lambda text, kind=kind: f"{kind}: {text}")


@pytest.mark.parametrize("name", ["olmoe", "llama4"])
def test_every_intervention_is_the_same_in_pieces(name: str) -> None:
    model = opened(name, torch.float64)
    for kind, intervene in INTERVENTIONS.items():
        for where in ({}, {"positions": [1, 6, -1], "attention_mask": MASK}):
            mask = where.get("attention_mask")
            real = MASK.bool() if mask is not None else MASK >= 0
            whole = in_pieces(model, intervene(model, **where), [LENGTH], mask)
            assert (whole - in_pieces(model, [], [LENGTH], mask))[real].abs().max() > 0.001
            pieces = in_pieces(model, intervene(model, **where), [3, 3, 4], mask)
            torch.testing.assert_close(pieces[real], whole[real], atol=1e-9, rtol=0, msg=f"{kind} {where}")


# --- which tokens are touched ---------------------------------------------------------------------------------


class Touched:
    """Forces three experts, and records the columns of each row that have three: "x", "." or, not run, " "."""

    def __init__(self, model: Opened, positions: Any = None, mask: Tensor | None = None, layer: Any = None) -> None:
        self.moe, self.layer = model.moe, model.last if layer is None else layer
        record = (self.moe.hook_name("expert_indices", self.layer), self.record)
        force = force_experts(self.moe, self.layer, [1, 2, 7], positions=positions, attention_mask=mask)
        self.hooks = [*force, record]
        self.rows: dict[int, dict[int, str]] = {}

    def record(self, value: Tensor, hook: Any) -> None:
        start = self.moe.pass_context(self.layer).n_past
        for row, line in enumerate(((value >= 0).sum(-1) == 3).tolist()):
            self.rows.setdefault(row, {}).update({start + at: "x" if hit else "." for at, hit in enumerate(line)})

    def by(self, run: Callable[[], Any]) -> list[str]:
        """A line a row, once the hooks are on and this has run."""
        self.rows.clear()
        with torch.no_grad(), self.moe.bridge.hooks(fwd_hooks=self.hooks):
            run()
        return ["".join(row.get(at, " ") for at in range(max(row) + 1)) for row in self.rows.values()]


CHUNKED = {"prefill_chunk_size": 3}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": CHUNKED,
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 2},
    "samples": {"num_return_sequences": 3, "do_sample": True},
    "chunks of a static cache": {"cache_implementation": "static", **CHUNKED},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_generate_of_transformers_in_every_way(way: str) -> None:
    model, options = opened("olmoe"), GREEDY | {"max_new_tokens": 4} | WAYS[way]
    generate = model.bridge.original_model.generate
    for positions, expected in (
        (None, "xxxxxxxxxx..."), ("new", "..........xxx"), ("all", "x" * 13), ([0, 8, 11], "x.......x..x."),
    ):  # fmt: skip
        rows = Touched(model, positions).by(lambda: generate(TOKENS, **options))
        assert set(rows) == {expected}, positions
    rows = Touched(model, [0, -1]).by(lambda: generate(TOKENS, attention_mask=MASK, **options))
    assert set(rows[: len(rows) // 2]) == {"..x......x..."}
    assert set(rows[len(rows) // 2 :]) == {"x........x..."}
    given = Touched(model, [0, -1, 9], MASK).by(lambda: generate(TOKENS, attention_mask=MASK, **options))
    assert set(given[: len(given) // 2]) == {"..x......x.x."}


def test_generate_on_a_cache_that_holds_a_shared_prefix() -> None:
    model = opened("olmoe")
    core = model.bridge.original_model
    with torch.no_grad():
        prefix = core(TOKENS[:, :6], use_cache=True).past_key_values
    options = GREEDY | {"max_new_tokens": 3}
    for positions, expected in (
        (None, "xxxx.."), ("new", "....xx"), ([2, 7, 10], ".x..x."), ([-1, -4], "x..x.."), ("all", "xxxxxx"),
    ):  # fmt: skip
        for more in ({}, CHUNKED):
            ways: list[Callable[[], Any]] = [
                lambda more=more: core.generate(TOKENS, past_key_values=copy.deepcopy(prefix), **options, **more),
                lambda more=more: core.generate(
                    TOKENS, attention_mask=MASK | 1, past_key_values=copy.deepcopy(prefix), **options, **more
                ),
            ]
            if not more:  # the new tokens alone, with the mask of all
                ways.append(
                    lambda: core.generate(
                        TOKENS[:, 6:], attention_mask=MASK | 1, past_key_values=copy.deepcopy(prefix), **options
                    )
                )
            for way in ways:
                assert Touched(model, positions).by(way) == [" " * 6 + expected] * 2, (positions, more)
    for mask in (MASK, MASK[:, 6:]):  # of the whole prompt, or of what is not cached
        run = lambda: core.generate(TOKENS, attention_mask=MASK, past_key_values=copy.deepcopy(prefix), **options)  # noqa: E731
        assert Touched(model, [5, -1], mask).by(run) == [" " * 6 + ".x.x..", " " * 6 + "...x.."]


def test_assisted_decoding_tells_candidates_from_the_prompt() -> None:
    model = opened("olmoe")
    tokens = TOKENS[:1, :4].repeat(1, 3)  # repeats, for the look-up to find
    for positions, prompt, new in ((None, "x" * 12, "."), ("new", "." * 12, "x")):
        run = lambda: model.bridge.original_model.generate(  # noqa: E731
            tokens, prompt_lookup_num_tokens=3, max_new_tokens=6, **GREEDY
        )
        (row,) = Touched(model, positions).by(run)
        assert row[:12] == prompt
        assert set(row[12:]) == {new}


def test_several_generations_one_after_the_other_and_plain_passes_between_the_pieces_of_a_stream() -> None:
    model = opened("olmoe")
    bridge = model.bridge
    options = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens", "max_new_tokens": 3}
    touched = Touched(model)
    for width in (10, 4, 7):
        assert touched.by(lambda w=width: bridge.generate(TOKENS[:, :w], **options)) == ["x" * width + ".."] * 2
        uncached = touched.by(lambda w=width: bridge.generate(TOKENS[:, :w], use_past_kv_cache=False, **options))
        assert uncached == ["x" * width + ".."] * 2
    between: list[list[str]] = []

    def stream() -> None:
        for _ in bridge.generate_stream(TOKENS[:, :4], max_tokens_per_yield=1, **options):
            inner = Touched(model)
            between.append(inner.by(lambda: bridge(TOKENS[:, :3])))

    assert Touched(model, "new").by(stream) == ["....xx"] * 2
    assert between == [["xxx"] * 2] * 3  # of a pass of its own, all tokens belong to a prompt
    assert Touched(model, "new").by(lambda: list(bridge.generate_stream(TOKENS[:, :4], **options))) == ["....xx"] * 2


def test_encoder_and_decoder_of_a_generation_have_their_own_columns() -> None:
    model = opened("switch_transformers")
    core, tokens = model.bridge.original_model, TOKENS[:, :5]
    for run in (
        lambda: core.generate(tokens, max_new_tokens=4, **GREEDY),
        lambda: core.generate(tokens, max_new_tokens=4, use_cache=False, **GREEDY),
        lambda: core.generate(tokens, max_new_tokens=4, num_beams=2, **GREEDY),
        lambda: model.bridge.generate(tokens, max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False),
    ):
        for layer, positions, expected in (
            (("encoder", 1), None, "xxxxx"), (("encoder", 1), [-1], "....x"), (("encoder", 1), "new", "....."),
            (("decoder", 1), None, "x..."), (("decoder", 1), "new", ".xxx"), (("decoder", 1), [0, 2], "x.x."),
        ):  # fmt: skip
            assert set(Touched(model, positions, layer=layer).by(run)) == {expected}, (layer, positions)
    prompt = torch.tensor([[0, 5, 6], [0, 7, 8]])
    run = lambda: core.generate(tokens, decoder_input_ids=prompt, max_new_tokens=3, **GREEDY)  # noqa: E731
    assert Touched(model).by(run) == ["xxx.."] * 2


# --- by hand --------------------------------------------------------------------------------------------------


def test_a_static_cache_and_the_base_model_by_hand() -> None:
    model = opened("olmoe")
    core = model.bridge.original_model
    for make in (lambda: StaticCache(config=core.config, max_cache_len=16), lambda: DynamicCache(config=core.config)):
        for run_model in (core, core.model):
            cache = make()

            def run(run_model: Any = run_model, cache: Any = cache) -> None:
                for piece in TOKENS.split([6, 3, 1], dim=1):
                    run_model(piece, past_key_values=cache)

            assert Touched(model, [0, 7, 9]).by(run) == ["x......x.x"] * 2


def test_decoding_by_hand_is_told_by_the_mask_of_the_prompt() -> None:
    model = opened("olmoe")
    run = lambda: in_pieces(model, [], [6, 1, 1, 1, 1])  # noqa: E731
    padded = lambda: in_pieces(model, [], [6, 1, 1, 1, 1], MASK)  # noqa: E731
    prompt = MASK[:, :6]
    assert Touched(model).by(run) == Touched(model, "all").by(run) == ["x" * 10] * 2  # all of it is a prompt
    assert Touched(model, None, prompt | 1).by(run) == ["xxxxxx...."] * 2
    assert Touched(model, "new", prompt | 1).by(run) == ["......xxxx"] * 2
    assert Touched(model, "new", prompt).by(padded) == ["......xxxx"] * 2
    assert Touched(model, [0, -1, 7], prompt).by(padded) == ["..x..x...x", "x....x.x.."]
    with pytest.warns(
        UserWarning, match="positions='new' touches nothing at layer .* outside generate.*attention_mask"
    ):
        assert Touched(model, "new").by(run) == ["." * 10] * 2
    with pytest.raises(ConfigError, match=r"positions=\[-1\] in a prompt that is run in several passes.*whole prompt"):
        Touched(model, [-1]).by(run)


def test_masks_of_a_piece_of_the_whole_and_of_what_came_before() -> None:
    model = opened("olmoe")
    core = model.bridge.original_model
    with torch.no_grad():
        prefix = core(TOKENS[:, :6], attention_mask=MASK[:, :6], use_cache=True).past_key_values
    piece = MASK[:, 6:].clone()
    piece[1, -1] = 0  # padding on the right
    own = torch.cat([MASK[:, :6], piece], dim=1)

    def touched(positions: Any, mask: Any, given: Any = own) -> list[str]:
        run = lambda: core(TOKENS[:, 6:], attention_mask=given, past_key_values=copy.deepcopy(prefix))  # noqa: E731
        return [row[6:] for row in Touched(model, positions, mask).by(run)]

    for mask in (None, own, piece):
        assert touched(None, mask) == ["xxxx", "xxx."]
        assert touched([4, 6, -1], mask) == ["x.xx", "x.x."]
    assert touched("new", MASK[:, :6]) == ["xxxx", "xxxx"]
    wide = force_experts(model.moe, 1, 3, attention_mask=torch.ones(2, 12))
    with pytest.raises(ConfigError, match=r"mask of 2 x 12 for a pass of 2 x 10 tokens.*with use_cache=True"):
        model.bridge.run_with_hooks(TOKENS, fwd_hooks=wide)


def test_routes_by_position_are_absolute_or_those_of_the_pass_that_runs() -> None:
    model = opened("olmoe")
    routes = (torch.arange(LENGTH) % 8).unsqueeze(-1)
    seen: list[Tensor] = []
    record = (model.moe.hook_name("expert_indices", 1), lambda value, hook: seen.append(value.clone()))
    in_pieces(model, [*set_routes(model.moe, 1, routes), record], [6, 4])
    assert torch.equal(torch.cat(seen, dim=1)[0, :, :1], routes)
    core = model.bridge.original_model
    with torch.no_grad():
        cache = core(TOKENS[:, :5], use_cache=True).past_key_values
        with model.bridge.hooks(fwd_hooks=[*set_routes(model.moe, 1, routes[:5]), record]):
            core(TOKENS[:, 5:], past_key_values=cache)
    assert torch.equal(seen[-1][0, :, :1], routes[:5])
    with pytest.raises(
        RouteError, match=r"for a pass of 2 x 5 tokens after 5 in the cache.*each position of the prompt"
    ):
        in_pieces(model, set_routes(model.moe, 1, routes[:5]), [5, 5])
    with pytest.raises(RouteError, match=r"for a pass of 2 x 10 tokens"):
        model.bridge.run_with_hooks(TOKENS, fwd_hooks=set_routes(model.moe, 1, routes[:6]))
    cache = see(model, [], 1, tokens=TOKENS)[1]
    replayed = replay_routes(model.moe, {model.moe.hook_name(n, 1): v for n, v in cache.items()}, [1])
    plain = in_pieces(model, [], [LENGTH])
    torch.testing.assert_close(in_pieces(model, replayed, [6, 4]), plain, atol=1e-5, rtol=0)


def test_a_copy_of_an_attached_model_generates_on_its_own() -> None:
    model = opened("olmoe")
    twin = copy.deepcopy(model.bridge)
    moe = attached(twin)
    assert moe is not None
    calls: list[int] = []
    with twin.hooks(fwd_hooks=[(moe.hook_name("router_logits", 1), lambda value, hook: calls.append(value.shape[1]))]):
        twin.original_model.generate(TOKENS, max_new_tokens=2, **GREEDY)
    assert calls == [10, 1]
    assert moe.pass_context(1).prompt == 10
    assert model.bridge.original_model.generate is not twin.original_model.generate
    with warnings.catch_warnings():
        warnings.simplefilter("error", BiasLimitWarning)
        moe.detach()
    assert "generate" not in vars(twin.original_model) | vars(twin)
