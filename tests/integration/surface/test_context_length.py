"""How long a sequence may be: one limit, the model's own, and the same refusal wherever tokens are given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import moe_interp as mi
from moe_interp.errors import DataError
from moe_interp.experiments.inputs.items import Item, tokenize_items
from moe_interp.experiments.inputs.sequences import read_sequences
from moe_interp.hooks.attach import MoEHooks, attach
from moe_interp.tokenization import context_length
from tests import tiny

CONTEXT = 64
LIMIT = f"at most the model's context of {CONTEXT}"
SAID = f"{CONTEXT + 1} tokens. Expected: {LIMIT}. Shorten what is longer, or leave it out."


@pytest.fixture(scope="module")
def moe() -> MoEHooks:
    bridge = tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe", tiny.tiny_tokenizer())
    return attach(bridge)


def bridge_of(config: Any) -> Any:
    return SimpleNamespace(original_model=SimpleNamespace(config=config))


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_the_limit_is_what_the_text_part_of_the_configuration_says(name: str) -> None:
    entry = tiny.CONFIGS[name]
    given = copy.deepcopy(entry["config"])
    config = getattr(transformers, entry["config_class"])(**given)
    stated = given.get("text_config", given).get("max_position_embeddings")
    assert context_length(bridge_of(config)) == stated
    # T5's positions are relative: it has no limit, and TransformerLens' default of 2,048 is none of its own
    assert (stated is None) == (name == "switch_transformers")


def test_a_model_with_learned_positions_fails_where_the_limit_is() -> None:
    config = transformers.GPT2Config(n_positions=6, n_embd=8, n_layer=1, n_head=1, vocab_size=9)
    model = transformers.GPT2Model(config).eval()
    limit = context_length(bridge_of(config))
    assert limit == 6
    with torch.no_grad():
        model(input_ids=torch.zeros(1, limit, dtype=torch.long))
        with pytest.raises(IndexError):
            model(input_ids=torch.zeros(1, limit + 1, dtype=torch.long))


def long_ids(n: int) -> torch.Tensor:
    return tiny.random_tokens(1, n)


def text(n: int) -> str:
    return " ".join(["w5"] * (n - 1))  # and BOS


def scored(moe: MoEHooks, tokens: Any) -> None:
    routes = torch.arange(moe.spec(1).top_k).expand(1, CONTEXT + 1, 1, -1)[
        :, : getattr(tokens, "shape", (1, CONTEXT))[1]
    ]
    mi.score_routes(moe, tokens, 1, routes, positions=[0])


ENTRANCES: dict[str, Callable[[MoEHooks, int], Any]] = {
    "score_routes, ids": lambda moe, n: scored(moe, long_ids(n)),
    "score_routes, text": lambda moe, n: scored(moe, text(n)),
    "sequences": lambda moe, n: read_sequences(moe.bridge, [{"id": "a", "tokens": [5] * n}]),
    "items": lambda moe, n: tokenize_items(moe.bridge, [Item(id="a", domain="d", prompt=text(n - 1), answer="w6")]),
    "verify, ids": lambda moe, n: moe.verify(long_ids(n), layers=[1]),
    "verify, text": lambda moe, n: moe.verify(text(n), layers=[1]),
    "an ablation's reference": lambda moe, n: mi.ablate_experts(moe, 1, [0], mode="mean", reference=long_ids(n)),
    "a sweep": lambda moe, n: mi.patching.router_logits(moe, long_ids(n), {}, lambda logits: logits.sum()),
}
RUN_AT_THE_LIMIT = {"score_routes, ids", "score_routes, text", "sequences", "items", "an ablation's reference"}


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_every_entrance_refuses_one_token_too_many_in_the_same_words(moe: MoEHooks, entrance: str) -> None:
    with pytest.raises(DataError) as refusal:
        ENTRANCES[entrance](moe, CONTEXT + 1)
    assert str(refusal.value).endswith(SAID), refusal.value
    if entrance in RUN_AT_THE_LIMIT:
        ENTRANCES[entrance](moe, CONTEXT)
