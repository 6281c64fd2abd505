"""The configurations that the command line and the shipped demo model use."""

from __future__ import annotations

from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.model import ModelConfig

# Under a minute on two cores: shows that everything runs; the model learns little more than the domains' look.
SMOKE = TestbedConfig(
    model=ModelConfig(n_layers=2, d_model=64, n_experts=8, d_expert=48, max_length=128),
    domains=("arithmetic", "facts", "puzzles", "lookups"),
    data_scale=0.02,
    length=128,
    steps=120,
    warmup_steps=20,
    validate_every=60,
    checkpoint_every=60,
    validation_sequences=8,
)

# The bundled model: 2.8M parameters, 12.3M tokens, 20 to 40 minutes on two cores.
DEMO = TestbedConfig(
    model=ModelConfig(n_layers=4, d_model=128, n_heads=4, n_experts=16, top_k=2, d_expert=96, max_length=512),
    domains=("arithmetic", "facts", "puzzles", "code"),
    shares=(0.40, 0.22, 0.18, 0.20),
    strategy="micro_batch",
    balance=0.01,
    micro_batch=16,
    steps=3000,
    optimizer="muon",
    lr=4e-3,
    muon_lr=0.02,
    schedule="linear",
    decay_from=0.6,
    validate_every=250,
    checkpoint_every=250,
    validation_sequences=32,
)

# About 50M active parameters of 0.5B, for one GPU of 80 GB with mixed precision.
PAPER = TestbedConfig(
    model=ModelConfig(
        family="qwen3_moe", n_layers=12, d_model=512, n_heads=8, n_experts=64, top_k=4, d_expert=384, max_length=1024
    ),
    domains=("arithmetic", "facts", "puzzles", "lookups", "code"),
    vocab_size=4096,
    data_scale=5.0,
    length=1024,
    micro_batch=32,
    micro_batches=4,
    steps=20_000,
    warmup_steps=1000,
    optimizer="adamw",
    lr=6e-4,
    validate_every=1000,
    checkpoint_every=1000,
)

PRESETS = {"smoke": SMOKE, "demo": DEMO, "paper": PAPER}
