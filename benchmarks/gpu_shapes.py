"""The models that benchmarks/gpu.py builds, and the sizes that it measures at. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A model of transformers, with random weights.

    Attributes:
        name: What it is called.
        architecture: Its class in transformers; the configuration's class is named after it.
        billions: Of parameters, at the published sizes.
        published: The configuration's values at the published sizes.
        tiny: The values that make it tiny, in the place of the published ones.
    """

    name: str
    architecture: str
    billions: float
    published: dict[str, Any]
    tiny: dict[str, Any]

    @property
    def config_class(self) -> str:
        return self.architecture.replace("ForCausalLM", "Config")


@dataclass(frozen=True)
class Sizes:
    """How much is measured at once.

    Attributes:
        batch, pos: Sequences and tokens of the plain forward pass; branches are of one sequence of ``pos`` tokens.
        routes: Routes a token.
        copies: Sequences a naive pass, of which the better counts.
        items, item_tokens, answer: Items of isolation, their tokens, and how many of these are the answer.
        sequences, sequence_tokens: Of the whole experiment.
        exact_layers, exact_tokens, exact_routes: Of the float32 model whose branches are compared with full passes.
        gemm: Rows and columns of the matrices whose product is timed.
        budget: Bytes of the large budget, at most.
        rounds: How often the forward passes are timed, where the time holds it.
    """

    batch: int = 4
    pos: int = 512
    routes: int = 32
    copies: tuple[int, ...] = (8, 32)
    items: int = 8
    item_tokens: int = 256
    answer: int = 4
    sequences: int = 8
    sequence_tokens: int = 256
    exact_layers: int = 4
    exact_tokens: int = 64
    exact_routes: int = 4
    gemm: int = 8192
    budget: int = 2**34
    rounds: int = 6


REAL_SIZES = Sizes()
TINY_SIZES = Sizes(
    batch=2,
    pos=32,
    routes=8,
    copies=(2, 4),
    items=3,
    item_tokens=16,
    sequences=2,
    sequence_tokens=16,
    exact_layers=3,
    exact_tokens=12,
    gemm=256,
    budget=2**28,
    rounds=2,
)

_TINY = {"vocab_size": 503, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128}
_YARN_GPT_OSS = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_YARN_DEEPSEEK = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
}

SHAPES = {
    # config.json of allenai/OLMoE-1B-7B-0924
    "olmoe": Shape(
        name="OLMoE-1B-7B",
        architecture="OlmoeForCausalLM",
        billions=6.9,
        published={
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        tiny=_TINY
        | {"intermediate_size": 32, "num_hidden_layers": 4, "num_key_value_heads": 4, "num_experts": 8}
        | {"num_experts_per_tok": 2},
    ),
    # config.json of Qwen/Qwen3-30B-A3B
    "qwen3_30b": Shape(
        name="Qwen3-30B-A3B",
        architecture="Qwen3MoeForCausalLM",
        billions=30.5,
        published={
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        tiny=_TINY
        | {"intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 4}
        | {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2},
    ),
    # config.json of openai/gpt-oss-20b; bfloat16, where the published weights of the experts have four bits
    "gpt_oss_20b": Shape(
        name="GPT-OSS-20B",
        architecture="GptOssForCausalLM",
        billions=20.9,
        published={
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"] * 12,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _YARN_GPT_OSS,
        },
        tiny=_TINY
        | {"intermediate_size": 32, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 16}
        | {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 8}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    # config.json of deepseek-ai/DeepSeek-V2-Lite
    "dsv2_lite": Shape(
        name="DeepSeek-V2-Lite",
        architecture="DeepseekV2ForCausalLM",
        billions=15.7,
        published={
            "vocab_size": 102400,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "max_position_embeddings": 163840,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _YARN_DEEPSEEK,
        },
        tiny=_TINY
        | {"intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 4}
        | {"num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2}
        | {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
    ),
}


def shapes_of(names: str) -> list[str]:
    """The models that a list such as ``olmoe,qwen3_30b`` names; ``tiny`` alone names all.

    Raises:
        ValueError: a name that there is not, one twice, or none.
    """
    asked = [name.strip() for name in names.split(",") if name.strip()]
    if asked == ["tiny"]:
        return list(SHAPES)
    unknown = [name for name in asked if name not in SHAPES]
    if unknown:
        raise ValueError(f"unknown model {', '.join(unknown)}: choose among {', '.join(SHAPES)}, or tiny alone")
    if not asked or len(set(asked)) < len(asked):
        raise ValueError(f"{names!r}: name at least one model, each once")
    return asked
