"""The table of families: one row for every kind of MoE layer that TransformerLens bridges.

A layer is recognised by the class name of its container, the transformers module that holds router and experts. To add
a family, add a row; the columns are those of :class:`~moe_interp.arch.family.Family`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_interp.arch.expert_functions import (
    SwitchExperts,
    jetmoe_experts,
    jetmoe_sizes,
    llama4_experts,
    llama4_sizes,
    switch_sizes,
)
from moe_interp.arch.family import Family, RuleBuilder
from moe_interp.arch.modules import child, unwrap
from moe_interp.arch.router_outputs import (
    CappedTriple,
    DenseScores,
    OneHot,
    ScoresTriple,
    SortedPairs,
)
from moe_interp.arch.rules import (
    HashTable,
    RoutingRule,
    SigmoidTopK,
    SoftmaxTopK,
    SparseMixer,
    SwitchTop1,
    TopKSigmoid,
    TopKSoftmax,
)
from moe_interp.arch.spec import MoESpec
from moe_interp.types import Layer


def _softmax(*, normalize: bool | None = None, cast: str = "none", **options: Any) -> RuleBuilder:
    """Softmax over all, top-k; ``normalize=None`` follows the router's own ``norm_topk_prob``."""

    def build(router: Any, container: Any, n_experts: int, top_k: int, dtype: torch.dtype) -> RoutingRule:
        return SoftmaxTopK(
            n_experts=n_experts,
            top_k=top_k,
            normalize=router.norm_topk_prob if normalize is None else normalize,
            dtype=dtype if cast == "hidden" else None,
            **options,
        )

    return build


def _deepseek_v2(router: Any, container: Any, n_experts: int, top_k: int, dtype: torch.dtype) -> RoutingRule:
    grouped = router.topk_method == "group_limited_greedy"
    return SoftmaxTopK(
        n_experts=n_experts,
        top_k=top_k,
        n_groups=router.num_group if grouped else 1,
        top_groups=router.topk_group if grouped else 1,
        group_score="max" if grouped else None,
        excluded_score=0.0,
        scale=router.routed_scaling_factor,
        sorted_slots=False,
    )


def _ernie(router: Any, container: Any, n_experts: int, top_k: int, dtype: torch.dtype) -> RoutingRule:
    bias = unwrap(router.moe_statics).e_score_correction_bias.squeeze()
    return SoftmaxTopK(n_experts=n_experts, top_k=top_k, bias=bias, normalize=True, floor=router.norm_min, dtype=dtype)


def _gemma4(router: Any, container: Any, n_experts: int, top_k: int, dtype: torch.dtype) -> RoutingRule:
    return SoftmaxTopK(n_experts=n_experts, top_k=top_k, normalize=True, expert_scale=router.per_expert_scale)


def _deepseek_v3(router: Any, container: Any, n_experts: int, top_k: int, dtype: torch.dtype) -> RoutingRule:
    return SigmoidTopK(
        n_experts=n_experts,
        top_k=top_k,
        bias=router.e_score_correction_bias,
        n_groups=router.num_group,
        top_groups=router.topk_group,
        group_score="top2",
        normalize=router.norm_topk_prob,
        eps=1e-20,
        scale=router.routed_scaling_factor,
        sorted_slots=False,
    )


def _deepseek_v4(router: Any, container: Any, n_experts: int, top_k: int, dtype: torch.dtype) -> RoutingRule:
    common: dict[str, Any] = {
        "n_experts": n_experts,
        "top_k": top_k,
        "score": router.score_fn,
        "float32": False,
        "normalize": True,
        "eps": 1e-20,
        "scale": router.routed_scaling_factor,
        "sorted_slots": False,
    }
    if hasattr(router, "tid2eid"):
        return HashTable(table=router.tid2eid, **common)
    return SigmoidTopK(bias=router.e_score_correction_bias, **common)


def _lfm2(router: Any, container: Any, n_experts: int, top_k: int, dtype: torch.dtype) -> RoutingRule:
    return SigmoidTopK(
        n_experts=n_experts,
        top_k=top_k,
        bias=container.expert_bias if router.use_expert_bias else None,
        float32=False,
        normalize=router.norm_topk_prob,
        eps=1e-6,
        scale=router.routed_scaling_factor,
    )


def _minimax(router: Any, container: Any, n_experts: int, top_k: int, dtype: torch.dtype) -> RoutingRule:
    bias = container.e_score_correction_bias
    return SigmoidTopK(n_experts=n_experts, top_k=top_k, bias=bias, normalize=True, sorted_slots=False)


def _afmoe(router: Any, container: Any, n_experts: int, top_k: int, dtype: torch.dtype) -> RoutingRule:
    return SigmoidTopK(
        n_experts=n_experts,
        top_k=top_k,
        bias=container.expert_bias,
        normalize=True,
        eps=1e-20,
        scale=router.route_scale,
    )


def _laguna(router: Any, container: Any, n_experts: int, top_k: int, dtype: torch.dtype) -> RoutingRule:
    return SigmoidTopK(
        n_experts=n_experts,
        top_k=top_k,
        softcap=router.router_logit_softcapping if router.router_logit_softcapping > 0 else None,
        bias=router.e_score_correction_bias,
        normalize=True,
        dtype=dtype,
        scale_after_cast=container.routed_scaling_factor,
    )


def _top_k_softmax(*, float32: bool) -> RuleBuilder:
    def build(router: Any, container: Any, n_experts: int, top_k: int, dtype: torch.dtype) -> RoutingRule:
        return TopKSoftmax(n_experts=n_experts, top_k=top_k, float32=float32, dtype=dtype if float32 else None)

    return build


def _phimoe(router: Any, container: Any, n_experts: int, top_k: int, dtype: torch.dtype) -> RoutingRule:
    return SparseMixer(n_experts=n_experts, top_k=top_k, jitter=router.router_jitter_noise)


def _llama4(router: Any, container: Any, n_experts: int, top_k: int, dtype: torch.dtype) -> RoutingRule:
    return TopKSigmoid(n_experts=n_experts, top_k=top_k, dtype=dtype)


def _switch(router: Any, container: Any, n_experts: int, top_k: int, dtype: torch.dtype) -> RoutingRule:
    return SwitchTop1(
        n_experts=n_experts, top_k=1, capacity=router.expert_capacity, router_dtype=router.dtype, dtype=dtype
    )


_SIGMOID_V3 = "sigmoid, correction bias for the choice, groups by their two best, top-k, normalise, scale"

FAMILIES: tuple[Family, ...] = (
    Family(
        name="mixtral",
        containers=("MixtralSparseMoeBlock",),
        architectures=("MixtralForCausalLM",),
        rule_text="softmax, top-k, normalise",
        rule=_softmax(normalize=True),
    ),
    Family(
        name="olmoe",
        containers=("OlmoeSparseMoeBlock",),
        architectures=("OlmoeForCausalLM",),
        rule_text="softmax, top-k, normalise if norm_topk_prob",
        rule=_softmax(cast="hidden"),
    ),
    Family(
        name="flex_olmo",
        containers=("FlexOlmoSparseMoeBlock",),
        architectures=("FlexOlmoForCausalLM",),
        rule_text="softmax, top-k, normalise if norm_topk_prob",
        rule=_softmax(cast="hidden"),
        note="a norm follows the block: a common scale of routed_out has no effect on the model",
    ),
    Family(
        name="qwen2_moe",
        containers=("Qwen2MoeSparseMoeBlock",),
        architectures=("Qwen2MoeForCausalLM",),
        rule_text="softmax, top-k, normalise if norm_topk_prob",
        rule=_softmax(cast="hidden"),
        shared="shared_expert",
        shared_gate="shared_expert_gate",
        note="shared_out is after the shared expert's sigmoid gate",
    ),
    Family(
        name="qwen3_moe",
        containers=("Qwen3MoeSparseMoeBlock",),
        architectures=("Qwen3MoeForCausalLM",),
        rule_text="softmax, top-k, normalise if norm_topk_prob",
        rule=_softmax(cast="hidden"),
    ),
    Family(
        name="qwen3_next",
        containers=("Qwen3NextSparseMoeBlock",),
        architectures=("Qwen3NextForCausalLM",),
        rule_text="softmax, top-k, normalise if norm_topk_prob",
        rule=_softmax(cast="hidden"),
        shared="shared_expert",
        shared_gate="shared_expert_gate",
        note="shared_out is after the shared expert's sigmoid gate",
    ),
    Family(
        name="qwen3_5_moe",
        containers=("Qwen3_5MoeSparseMoeBlock",),
        architectures=("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
        rule_text="softmax, top-k, normalise",
        rule=_softmax(normalize=True, cast="hidden"),
        shared="shared_expert",
        shared_gate="shared_expert_gate",
        note="shared_out is after the shared expert's sigmoid gate",
    ),
    Family(
        name="qwen3_vl_moe",
        containers=("Qwen3VLMoeTextSparseMoeBlock",),
        architectures=("Qwen3VLMoeForConditionalGeneration",),
        rule_text="softmax, top-k, normalise",
        rule=_softmax(normalize=True, cast="hidden"),
    ),
    Family(
        name="gpt_oss",
        containers=("GptOssMLP", "Mxfp4GptOssMLP"),
        architectures=("GptOssForCausalLM",),
        rule_text="top-k of the (biased) logits, softmax over the chosen",
        rule=_top_k_softmax(float32=False),
        rule_type=TopKSoftmax,
        router="router",
        note="default compatibility mode changes this model even unattached: pass fold_value_biases=False",
    ),
    Family(
        name="granite_moe",
        containers=("GraniteMoeMoE",),
        architectures=("GraniteMoeForCausalLM",),
        rule_text="top-k of the logits, softmax over the chosen",
        rule=_top_k_softmax(float32=True),
        rule_type=TopKSoftmax,
        router="router",
        note="TransformerLens' own router hooks have logits and indices swapped here",
    ),
    Family(
        name="granite_moe_hybrid",
        containers=("GraniteMoeHybridMoE",),
        architectures=("GraniteMoeHybridForCausalLM",),
        rule_text="top-k of the logits, softmax over the chosen",
        rule=_top_k_softmax(float32=True),
        rule_type=TopKSoftmax,
        router="router",
        shared_on_layer="shared_mlp",
        note="TransformerLens' own router hooks have logits and indices swapped here",
    ),
    Family(
        name="jetmoe",
        containers=("JetMoeMoE",),
        architectures=("JetMoeForCausalLM", "JetMoEForCausalLM"),
        rule_text="top-k of the logits, softmax over the chosen",
        rule=_top_k_softmax(float32=True),
        rule_type=TopKSoftmax,
        layout=SortedPairs(),
        router="router",
        experts_at="",
        experts=jetmoe_experts,
        sizes=jetmoe_sizes,
        weights_in=("input_linear", "output_linear"),
        routes_at_router=True,
        output_bias="bias",
        note="the block adds a bias after routed_out; the attention's experts are not hooked",
    ),
    Family(
        name="deepseek_v2",
        containers=("DeepseekV2Moe",),
        architectures=("DeepseekV2ForCausalLM",),
        rule_text="softmax, groups by their best expert, top-k, scale",
        rule=_deepseek_v2,
        shared="shared_experts",
    ),
    Family(
        name="deepseek_v3",
        containers=("DeepseekV3MoE",),
        architectures=("DeepseekV3ForCausalLM",),
        rule_text=_SIGMOID_V3,
        rule=_deepseek_v3,
        rule_type=SigmoidTopK,
        shared="shared_experts",
    ),
    Family(
        name="deepseek_v4",
        containers=("DeepseekV4SparseMoeBlock",),
        architectures=("DeepseekV4ForCausalLM",),
        rule_text="own score function, correction bias for the choice, top-k, normalise, scale",
        rule=_deepseek_v4,
        rule_type=SigmoidTopK,
        shared="shared_experts",
        note="hash layers choose experts by token id: edited logits change weights there, never the choice",
    ),
    Family(
        name="glm4_moe",
        containers=("Glm4MoeMoE",),
        architectures=("Glm4MoeForCausalLM",),
        rule_text=_SIGMOID_V3,
        rule=_deepseek_v3,
        rule_type=SigmoidTopK,
        shared="shared_experts",
    ),
    Family(
        name="glm4_moe_lite",
        containers=("Glm4MoeLiteMoE",),
        architectures=("Glm4MoeLiteForCausalLM",),
        rule_text=_SIGMOID_V3,
        rule=_deepseek_v3,
        rule_type=SigmoidTopK,
        shared="shared_experts",
    ),
    Family(
        name="glm_moe_dsa",
        containers=("GlmMoeDsaMoE",),
        architectures=("GlmMoeDsaForCausalLM",),
        rule_text=_SIGMOID_V3,
        rule=_deepseek_v3,
        rule_type=SigmoidTopK,
        shared="shared_experts",
    ),
    Family(
        name="nemotron_h",
        containers=("NemotronHMoE",),
        architectures=("NemotronHForCausalLM",),
        rule_text=_SIGMOID_V3,
        rule=_deepseek_v3,
        rule_type=SigmoidTopK,
        shared="shared_experts",
        experts_read="fc1_latent_proj",
        latent="fc2_latent_proj",
        note="experts work in a latent width; expert_out is after the projection back to d_model",
    ),
    Family(
        name="ernie4_5_moe",
        containers=("Ernie4_5_MoeSparseMoeBlock",),
        architectures=("Ernie4_5_MoeForCausalLM",),
        rule_text="softmax, correction bias for the choice, top-k, clamped normalisation",
        rule=_ernie,
        shared="shared_experts",
    ),
    Family(
        name="lfm2_moe",
        containers=("Lfm2MoeSparseMoeBlock",),
        architectures=("Lfm2MoeForCausalLM",),
        rule_text="sigmoid, bias for the choice, top-k, normalise, scale",
        rule=_lfm2,
        rule_type=SigmoidTopK,
    ),
    Family(
        name="minimax_m2",
        containers=("MiniMaxM2SparseMoeBlock",),
        architectures=("MiniMaxM2ForCausalLM",),
        rule_text="sigmoid, correction bias for the choice, top-k, normalise",
        rule=_minimax,
        rule_type=SigmoidTopK,
    ),
    Family(
        name="afmoe",
        containers=("AfmoeSparseMoeBlock",),
        architectures=("AfmoeForCausalLM",),
        rule_text="sigmoid, bias for the choice, top-k, normalise, scale",
        rule=_afmoe,
        rule_type=SigmoidTopK,
        router="router",
        shared="shared_experts",
    ),
    Family(
        name="laguna",
        containers=("LagunaSparseMoeBlock",),
        architectures=("LagunaForCausalLM",),
        rule_text="tanh soft-cap, sigmoid, correction bias for the choice, top-k, normalise, scale",
        rule=_laguna,
        rule_type=SigmoidTopK,
        layout=CappedTriple(),
        shared="shared_experts",
        block_scale="routed_scaling_factor",
        note="router_logits are before the soft-cap, expert_weights after the block's scale",
    ),
    Family(
        name="phimoe",
        containers=("PhimoeSparseMoeBlock",),
        architectures=("PhiMoEForCausalLM",),
        rule_text="sparse mixer: two masked maxima, weights need not sum to 1",
        rule=_phimoe,
        rule_type=SparseMixer,
        router="router",
        note="at evaluation the gradient at router_logits is zero for most tokens; "
        "in training the native choice is random and only an edit re-routes by the evaluation rule",
    ),
    Family(
        name="llama4",
        containers=("Llama4TextMoe",),
        architectures=("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
        rule_text="top-k of the logits, sigmoid of each; scales the expert's input",
        rule=_llama4,
        rule_type=TopKSigmoid,
        layout=DenseScores(),
        router="router",
        shared="shared_expert",
        experts=llama4_experts,
        sizes=llama4_sizes,
        routes_at_router=True,
        weight_on_input=True,
        note="expert_out is E(weight * x), already weighted: routed_out is its plain sum",
    ),
    Family(
        name="switch_transformers",
        containers=("SwitchTransformersSparseMLP",),
        architectures=("SwitchTransformersForConditionalGeneration",),
        rule_text="softmax, top-1, capacity along the sequence",
        rule=_switch,
        rule_type=SwitchTop1,
        layout=OneHot(),
        router="router",
        experts=SwitchExperts,
        sizes=switch_sizes,
        routes_at_router=True,
        note="a token over capacity uses no expert; padding consumes capacity; written indices bypass it",
    ),
    Family(
        name="gemma4",
        containers=("Gemma4TextDecoderLayer",),
        architectures=("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"),
        rule_text="softmax (of a normed input), top-k, normalise, per-expert scale",
        rule=_gemma4,
        layout=ScoresTriple(),
        router="router",
        experts_read="pre_feedforward_layernorm_2",
        normed_after=True,
        note="routed_out is normed after, beside a dense MLP: a common scale of it has no effect",
    ),
    Family(
        name="jamba",
        containers=("JambaSparseMoeBlock",),
        architectures=("JambaForCausalLM",),
        rule_text="softmax, top-k, not normalised",
        rule=_softmax(normalize=False, cast="hidden"),
        router="router",
        note="TransformerLens' own router hook is handed a tuple here",
    ),
)

_BY_CONTAINER = {name: family for family in FAMILIES for name in family.containers}


def find_container(hf_layer: nn.Module) -> tuple[Family, nn.Module] | None:
    """The MoE container inside a transformers layer, with its family; None for a dense layer."""
    for module in hf_layer.modules():
        family = _BY_CONTAINER.get(type(module).__name__)
        if family is not None and child(module, family.router) is not None:
            return family, module
    return None


def build_spec(
    family: Family, container: nn.Module, hf_layer: nn.Module, layer: Layer, above: tuple[nn.Module, ...] = ()
) -> MoESpec:
    """One layer's spec.

    Raises:
        AttachError: the router is a stranger, so that the number of experts, k or the rule cannot be read.
    """
    spec = MoESpec(family=family, layer=layer, container=container, hf_layer=hf_layer, above=above)
    _ = spec.rule  # refuse now what could not be routed later
    return spec
