"""Families whose layers differ in form: for what does not depend on the routing rule, these stand for all."""

from __future__ import annotations

# plain, biased experts, shared and dense, latent width, weight on the input, own block, norms after, soft-capped router
STRUCTURES = (
    "mixtral",
    "gpt_oss",
    "deepseek_v2",
    "nemotron_h",
    "llama4",
    "jetmoe",
    "flex_olmo",
    "gemma4_text",
    "laguna",
    "granite_moe_hybrid",
    "lfm2_moe",
)
