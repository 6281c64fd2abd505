"""A random OLMoE of 3 layers and 8 experts, made in place: the examples need no download."""

from __future__ import annotations

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import OlmoeConfig, OlmoeForCausalLM


def tiny_bridge() -> TransformerBridge:
    """With your own model, this line is ``TransformerBridge.boot_transformers("allenai/OLMoE-1B-7B-0924")``."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # larger than usual, so that routers and experts matter in a random model
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = OlmoeForCausalLM(config).eval()
    return build_bridge_from_module(model, "OlmoeForCausalLM", hf_config=config, model_name="tiny-olmoe")


def random_tokens(batch: int, pos: int, seed: int = 0) -> torch.Tensor:
    """Token ids ``[batch, pos]`` without special tokens."""
    return torch.randint(3, 101, (batch, pos), generator=torch.Generator().manual_seed(seed))
