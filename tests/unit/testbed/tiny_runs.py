"""A run of a few steps on two domains that anybody can tell apart."""

from __future__ import annotations

from moe_interp.testbed import TestbedConfig
from moe_interp.testbed.domains.domain import Domain
from moe_interp.testbed.model import ModelConfig

TINY = TestbedConfig(
    model=ModelConfig(n_layers=2, d_model=32, n_heads=2, n_experts=4, top_k=2, d_expert=16, max_length=64),
    vocab_size=280,
    domains=("letters", "numbers"),
    length=16,
    micro_batch=4,
    steps=8,
    warmup_steps=2,
    validation_sequences=3,
    lr=3e-3,
)


def letters_and_numbers(n: int) -> tuple[Domain, ...]:
    """Two domains of ``n * n`` texts each, a seventh of them held out."""
    pairs = [(i, j) for i in range(n) for j in range(n)]
    texts = {
        "letters": [f"abc {'xy' * i} {'z' * j} cba" for i, j in pairs],
        "numbers": [f"{i} + {j} = {i + j}" for i, j in pairs],
    }
    return tuple(
        Domain(name, tuple(t for k, t in enumerate(own) if k % 7), tuple(own[::7])) for name, own in texts.items()
    )
