"""Tiny random models of every family, drawn so that a mistake in routing shows in their logits.

At the initialisation of transformers, correction biases are zero, expert scales are one and some routers are all zero,
and removing the experts moves the logits by almost nothing: a test on such a model proves nothing. Here every parameter
and buffer of every router and expert is drawn anew (`redraw`), and the routers are scaled until their logits have a
standard deviation of `ROUTER_STD` (`scale_routers`). Nothing here imports moe_interp: the models, and the reference
values that tests compare with, come from transformers and torch alone.
"""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module

CONFIGS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "data/tiny_configs.json").read_text())
FAMILIES: list[str] = list(CONFIGS)
ENCODER_DECODERS = ("switch_transformers",)

ROUTER_STD = 1.6
EXPERT_GAIN = {"switch_transformers": 1.6}  # one expert a token, weighted by its probability
FIRST_TOKEN, LAST_TOKEN = 3, 90  # special tokens lie below, image tokens above

Label = int | tuple[str, int]


# --- models ---------------------------------------------------------------------------------------------------


def build_hf(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32, attn_implementation: str = "eager"
) -> transformers.PreTrainedModel:
    """A fresh copy of a family's transformers model, in eval mode; the same weights for the same name and seed."""
    model = copy.deepcopy(_template(name, seed))
    model.set_attn_implementation(attn_implementation)
    # unlike .to(dtype), these leave complex buffers alone
    casts = {torch.float64: model.double, torch.bfloat16: model.bfloat16, torch.float16: model.half}
    return casts[dtype]() if dtype in casts else model


def build_bridge(hf: transformers.PreTrainedModel, name: str, tokenizer: Any = None) -> TransformerBridge:
    """A bridge around a copy of ``hf``, which stays untouched."""
    model, architecture = copy.deepcopy(hf), CONFIGS[name]["tl_architecture"]
    with pytest.MonkeyPatch.context() as patch:
        # two adapters ask for torchvision, for their image processors; tests give text only
        patch.setattr(SUPPORTED_ARCHITECTURES[architecture], "required_libraries", [])
        return build_bridge_from_module(
            model, architecture, hf_config=model.config, tokenizer=tokenizer, model_name=f"tiny-{name}"
        )


@cache
def _template(name: str, seed: int) -> transformers.PreTrainedModel:
    entry = CONFIGS[name]
    config = getattr(transformers, entry["config_class"])(**copy.deepcopy(entry["config"]))
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, entry["model_class"])(config).eval()
    redraw(model, torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed), EXPERT_GAIN.get(name, 1.0))
    scale_routers(model, name)
    return model


def set_experts_implementation(model: nn.Module, implementation: str) -> None:
    """Choose how a model's (or a bridge's) batched experts run: "eager", "batched_mm" or "grouped_mm"."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, transformers.PreTrainedConfig):
            config._experts_implementation = implementation


@contextmanager
def experts_run_by(implementation: str, model: nn.Module) -> Iterator[None]:
    """:func:`set_experts_implementation` for a model that tests share; it is undone afterwards."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    before = [
        (config, config._experts_implementation)
        for config in configs
        if isinstance(config, transformers.PreTrainedConfig)
    ]
    set_experts_implementation(model, implementation)
    try:
        yield
    finally:
        for config, value in before:
            config._experts_implementation = value


def tiny_tokenizer(
    bos: bool = True, pad: bool = True, side: str = "left", chat_template: str | None = None
) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of 101 words ("w3 w4") with the special tokens of the tiny models, made in place.

    Args:
        bos: It has BOS and prepends it; without, it has none.
        pad: It has a padding token.
        side: The side it pads on.
        chat_template: Its chat template, if any.
    """
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, 101)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "unk_token": "<eos>"}
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
        special["bos_token"] = "<bos>"
    if pad:
        special["pad_token"] = "<pad>"
    # TransformerLens reloads a tokenizer by name unless it says that it adds BOS
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, name_or_path="tiny", add_bos_token=bos, padding_side=side, **special
    )
    tokenizer.chat_template = chat_template
    return tokenizer


# --- inputs ---------------------------------------------------------------------------------------------------


def random_tokens(batch: int = 2, pos: int = 10, seed: int = 0) -> Tensor:
    """Token ids ``[batch, pos]`` without special tokens."""
    return torch.randint(FIRST_TOKEN, LAST_TOKEN, (batch, pos), generator=torch.Generator().manual_seed(seed))


def model_inputs(name: str, tokens: Tensor) -> dict[str, Tensor]:
    """What a forward pass of this family needs beside its tokens."""
    return {"decoder_input_ids": tokens.flip(-1)} if name in ENCODER_DECODERS else {}


@torch.no_grad()
def native_logits(hf: nn.Module, name: str, tokens: Tensor, **kwargs: Any) -> Tensor:
    """The logits ``[batch, pos, vocab]`` of the transformers model."""
    return hf(input_ids=tokens, use_cache=False, **model_inputs(name, tokens), **kwargs).logits


# --- where the routers and the experts of a transformers model are --------------------------------------------


@dataclass(frozen=True)
class NativeMoE:
    """One MoE layer of an untouched transformers model.

    ``block`` holds the router and the experts (gemma4: the decoder layer). ``linear`` is the module whose ``weight``
    ``[expert, d_model]`` makes the logits. ``experts`` is what to silence so that no expert contributes.
    """

    label: Label
    block: nn.Module
    router: nn.Module
    linear: nn.Module
    experts: nn.Module

    @property
    def weight(self) -> nn.Parameter:
        return self.linear.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.linear, "bias", None)


def native_layers(hf: nn.Module) -> dict[Label, NativeMoE]:
    """The MoE layers by label: the layer's index, or ("encoder", index) / ("decoder", index)."""
    layers = [_native_layer(name, block) for name, block in hf.named_modules() if _router_of(block) is not None]
    return {layer.label: layer for layer in layers}


def _router_of(block: nn.Module) -> nn.Module | None:
    """The router among a block's children; JetMoE's attention has one too, which is not meant."""
    for name in ("gate", "router"):
        child = getattr(block, name, None)
        if isinstance(child, nn.Module) and type(child).__name__.endswith(("Router", "Gating")):
            return None if type(block).__name__ == "JetMoeMoA" else child
    return None


def _native_layer(name: str, block: nn.Module) -> NativeMoE:
    router = _router_of(block)
    assert router is not None
    linear = next(m for m in router.modules() if getattr(m, "weight", None) is not None and m.weight.ndim == 2)
    index = next(int(part) for part in name.split(".") if part.isdigit())
    stack = name.split(".")[0]
    label: Label = (stack, index) if stack in ("encoder", "decoder") else index
    experts = block.output_linear if hasattr(block, "output_linear") else block.experts
    return NativeMoE(label, block, router, linear, experts)  # type: ignore[arg-type]


def routing_state(layer: NativeMoE) -> dict[str, Tensor]:
    """Every parameter and buffer of a layer's router and routed experts, and the block's own (correction biases)."""
    own = [*layer.block.named_parameters(recurse=False), *layer.block.named_buffers(recurse=False)]
    state = {name: tensor for name, tensor in own if name.endswith("bias")}
    for part, module in layer.block.named_children():
        if part in ("gate", "router", "experts", "input_linear", "output_linear"):
            tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            state |= {f"{part}.{name}": tensor for name, tensor in tensors.items()}
    return state


# --- drawing weights with which a mistake shows ---------------------------------------------------------------


@torch.no_grad()
def redraw(model: transformers.PreTrainedModel, generator: torch.Generator, expert_gain: float) -> None:
    """Draw every matrix and everything in routers and experts anew, zeros and ones included; jog all other vectors."""
    embedding, unembedding = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    routing = {id(t) for layer in native_layers(model).values() for t in routing_state(layer).values()}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("tid2eid"):
            tensor.copy_(torch.rand(len(tensor), 8, generator=generator).argsort(-1)[:, : tensor.shape[1]])
            continue
        if not tensor.is_floating_point() or (not isinstance(tensor, nn.Parameter) and id(tensor) not in routing):
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor is embedding and (tensor is not unembedding or model.config.is_encoder_decoder):
            tensor.copy_(noise)
        elif id(tensor) in routing and "bias" in name:
            tensor.copy_(0.2 * noise)
        elif tensor.ndim == 1 or "A_log" in name:
            tensor.add_((0.3 if id(tensor) in routing else 0.1) * noise)
        else:
            gain = expert_gain if id(tensor) in routing else 1.0
            tensor.copy_(gain * noise * tensor.shape[-1] ** -0.5)


@torch.no_grad()
def scale_routers(model: transformers.PreTrainedModel, name: str) -> None:
    """Scale each router's weight, layer by layer within one forward pass, until its logits' deviation is ROUTER_STD."""

    def scale(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        linear_in = args[0].reshape(-1, args[0].shape[-1])
        linear.weight.mul_(ROUTER_STD / (linear_in @ linear.weight.T).std())  # type: ignore[union-attr, operator]

    handles = [layer.linear.register_forward_pre_hook(scale) for layer in native_layers(model).values()]
    native_logits(model, name, random_tokens(4, 12, seed=1))
    for handle in handles:
        handle.remove()


# --- float64 --------------------------------------------------------------------------------------------------


class _Float64Casts(TorchFunctionMode):
    """Wherever a torch function is asked for float32, it is asked for float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        lifted = {name: _lift(value) for name, value in (kwargs or {}).items()}
        return func(*map(_lift, args), **lifted)


def _lift(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def float64_casts() -> Iterator[None]:
    """Lift every hard-coded float32 (``.float()``, ``softmax(dtype=...)``, factories, the default dtype) to float64.

    Routers, norms and rotary embeddings compute in float32 by name, whatever the model's dtype; within this context a
    float64 model computes in float64 throughout, so that rounding shrinks and a bug does not.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64Casts():
            yield
    finally:
        torch.set_default_dtype(default)


# --- an untouched model whose router gives chosen logits ------------------------------------------------------


@torch.no_grad()
def linear_input(layer: NativeMoE, hidden: Tensor) -> Tensor:
    """What the router's linear map reads ``[..., d_model]`` when the router reads ``hidden``; they differ in gemma4."""
    router: Any = layer.router
    if not hasattr(router, "proj"):
        return hidden
    return router.norm(hidden) * router.scale * router.scalar_root_size


@torch.no_grad()
def rank_one_router_update(hf: nn.Module, label: Label, hidden: Tensor, new_logits: Tensor) -> None:
    """Change a router's weight so that one token's raw logits become the new: W += (new - W h - b) h^T / |h|^2.

    ``hidden`` ``[d_model]`` is what the router reads, ``new_logits`` ``[expert]`` what its linear map shall give
    (laguna: before the soft-cap). Other tokens' logits change too. The linear algebra is done in float64.
    """
    layer = native_layers(hf)[label]
    weight, hidden = layer.weight.double(), linear_input(layer, hidden.reshape(1, -1))[0].double()
    old = weight @ hidden + (0.0 if layer.bias is None else layer.bias.double())
    update = torch.outer(new_logits.reshape(-1).double() - old, hidden) / (hidden @ hidden)
    layer.weight.copy_(weight + update)


@contextmanager
def recorded_inputs(hf: nn.Module) -> Iterator[dict[Label, Tensor]]:
    """Collects what each router's linear map reads, flat ``[token, d_model]``, in the forward pass run inside."""
    with _recorded({label: layer.linear for label, layer in native_layers(hf).items()}) as inputs:
        yield inputs


@contextmanager
def recorded_router_inputs(hf: nn.Module) -> Iterator[dict[Label, Tensor]]:
    """Collects what each router reads, flat ``[token, d_model]``; gemma4's linear map reads something else."""
    with _recorded({label: layer.router for label, layer in native_layers(hf).items()}) as inputs:
        yield inputs


@contextmanager
def _recorded(modules: dict[Label, nn.Module]) -> Iterator[dict[Label, Tensor]]:
    inputs: dict[Label, Tensor] = {}

    def recorder(label: Label) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[label] = args[0].detach().reshape(-1, args[0].shape[-1]).clone()

        return record

    handles = [module.register_forward_pre_hook(recorder(label)) for label, module in modules.items()]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def raw_logits(layer: NativeMoE, linear_in: Tensor) -> Tensor:
    """The router's logits ``[token, expert]`` before anything, recomputed from what its linear map read."""
    logits = linear_in @ layer.weight.detach().T
    return logits if layer.bias is None else logits + layer.bias.detach()
