"""Small transformers MoE models, and a tokenizer trained on the mix; both save as a standard checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from moe_interp.checks import check_whole
from moe_interp.errors import ConfigError
from moe_interp.testbed.domains.domain import Domain, check_domains

SPECIAL = ("<pad>", "<bos>", "<eos>")


def whole_fields(model: type[BaseModel], fields: Any) -> Any:
    """The fields of a configuration with whole numbers of any library as Python's.

    Raises:
        ConfigError: a bool, a float or anything else where a whole number belongs.
    """
    if not isinstance(fields, Mapping):
        return fields
    kinds = {name: model.model_fields[name].annotation for name in fields if name in model.model_fields}
    whole = {name for name, kind in kinds.items() if kind is int or (kind == int | None and fields[name] is not None)}
    return {name: check_whole(value, name) if name in whole else value for name, value in fields.items()}


class ModelConfig(BaseModel):
    """Sizes of a testbed model. ``d_expert`` is the width of one expert; all layers are MoE layers.

    ``family`` "deepseek_v3" has the correction bias that loss-free balancing writes to.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Literal["olmoe", "qwen3_moe", "deepseek_v3"] = "olmoe"
    n_layers: int = 4
    d_model: int = 128
    n_heads: int = 4
    n_experts: int = 16
    top_k: int = 2
    d_expert: int = 96
    n_shared_experts: int = 0
    norm_topk_prob: bool = True
    max_length: int = 512

    @model_validator(mode="before")
    @classmethod
    def _check_whole(cls, fields: Any) -> Any:
        return whole_fields(cls, fields)

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        sizes = self.n_layers, self.d_model, self.n_heads, self.n_experts, self.top_k, self.d_expert
        if min(sizes) < 1 or self.top_k > self.n_experts or self.d_model % (2 * self.n_heads):
            raise ConfigError(
                f"top_k={self.top_k} of {self.n_experts} experts, d_model={self.d_model}, n_heads={self.n_heads}",
                "positive sizes, top_k <= n_experts, and d_model a multiple of 2 n_heads",
                "Change the sizes.",
            )
        if self.n_shared_experts and self.family != "deepseek_v3":
            raise ConfigError(
                f"{self.n_shared_experts} shared experts on {self.family}", "shared experts on deepseek_v3", "Use 0."
            )
        return self


def train_tokenizer(
    domains: Sequence[Domain], vocab_size: int = 768, characters_per_domain: int = 400_000
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with single digits, trained on the same amount of each domain's training text.

    It adds no special tokens by itself (TransformerLens' ``to_tokens`` prepends ``<bos>``).

    Raises:
        DataError: Empty or overlapping domains.
        ConfigError: A vocabulary too small for the 256 bytes and the special tokens.
    """
    check_domains(domains)
    if vocab_size < 256 + len(SPECIAL):
        raise ConfigError(f"vocab_size={vocab_size}", f"at least {256 + len(SPECIAL)}", "Raise it.")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def sample() -> Iterator[str]:
        for domain in domains:
            left = characters_per_domain
            for text in domain.train:
                if left <= 0:
                    break
                part = text[: min(left, 20_000)]  # no single long document may decide the vocabulary
                yield part
                left -= len(part)

    backend.train_from_iterator(sample(), trainer)
    return _wrapped(backend)


def transformers_config(config: ModelConfig, vocab_size: int) -> PreTrainedConfig:
    """The family's own transformers configuration of these sizes."""
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads,
        "max_position_embeddings": config.max_length,
        "num_experts_per_tok": config.top_k,
        "norm_topk_prob": config.norm_topk_prob,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    head = config.d_model // config.n_heads
    if config.family == "olmoe":
        return OlmoeConfig(**common, intermediate_size=config.d_expert, num_experts=config.n_experts)
    if config.family == "qwen3_moe":
        common |= {"head_dim": head, "num_experts": config.n_experts, "moe_intermediate_size": config.d_expert}
        return Qwen3MoeConfig(**common, intermediate_size=config.d_expert * config.top_k)
    return DeepseekV3Config(
        **common,
        intermediate_size=config.d_expert * config.top_k,
        moe_intermediate_size=config.d_expert,
        n_routed_experts=config.n_experts,
        n_shared_experts=config.n_shared_experts,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        routed_scaling_factor=1.0,
        q_lora_rank=None,
        kv_lora_rank=config.d_model // 2,
        qk_nope_head_dim=head // 2,
        qk_rope_head_dim=head // 2,
        v_head_dim=head,
    )


def build_model(config: ModelConfig, vocab_size: int, seed: int = 0) -> PreTrainedModel:
    """A fresh model in float32; the seed alone fixes its weights (the global random state is left as it was)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(transformers_config(config, vocab_size))


def bridge_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> TransformerBridge:
    """A TransformerBridge around the model, which it changes in place; its parameters stay the same objects."""
    kind, tokenizer = type(model).__name__, _with_bos(tokenizer)
    return build_bridge_from_module(model, kind, hf_config=model.config, tokenizer=tokenizer, model_name="testbed")


def _with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy that prepends ``<bos>``: TransformerLens would load a tokenizer that does not anew, by a name it lacks."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    return _wrapped(backend, name_or_path="testbed", add_bos_token=True)


def _wrapped(backend: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special, **options)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers (not copies) under transformers' own names, also of a model inside a bridge."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name.replace("._original_component", ""): tensor.detach() for name, tensor in named.items()}


def save_checkpoint(model: nn.Module, tokenizer: PreTrainedTokenizerFast, path: Path, dtype: torch.dtype) -> None:
    """A standard folder, which ``from_pretrained`` and ``TransformerBridge.boot_transformers`` load offline.

    Args:
        model: A transformers model, or the ``original_model`` of its bridge.
    """
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(model.config)).to(dtype)
    tensors = model_tensors(model)
    with torch.no_grad():
        for name, tensor in plain.state_dict().items():
            tensor.copy_(tensors[name])
    plain.config.dtype = dtype
    plain.save_pretrained(path)
    tokenizer.save_pretrained(path)
