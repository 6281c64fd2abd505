"""What tells a model and its state from another: every change of a number does, and nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
import transformers
from tokenizers import normalizers
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformer_lens.model_bridge import TransformerBridge
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

import moe_interp as mi
from moe_interp.errors import ConfigError, ResultError
from moe_interp.experiments.identity.model import model_identity
from tests import tiny

SCALE = 1.0


def attached(name: str = "olmoe", **options: Any) -> mi.MoEHooks:
    return mi.attach(tiny.build_bridge(tiny.build_hf(name, **options), name, tiny.tiny_tokenizer()))


def items(n: int = 4) -> list[dict[str, Any]]:
    return [
        {
            "id": str(i),
            "domain": f"d{i % 2}",
            "prompt": tiny.random_tokens(1, 6, seed=i)[0].tolist(),
            "answer": tiny.random_tokens(1, 3, seed=99 + i)[0].tolist(),
        }
        for i in range(n)
    ]


def sequences(n: int = 3) -> list[list[int]]:
    return [tiny.random_tokens(1, 8, seed=i)[0].tolist() for i in range(n)]


def changed(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def largest_expert_weight(model: nn.Module) -> torch.Tensor:
    return max((p for name, p in model.named_parameters() if "expert" in name), key=lambda p: p.numel())


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_the_identity_of_every_family_is_stable_and_notices_one_value(name: str) -> None:
    moe = attached(name)
    model = moe.bridge.original_model
    before = model_identity(moe)
    if name not in tiny.ENCODER_DECODERS:
        with torch.no_grad():
            moe.bridge(tiny.random_tokens(1, 6))
    moe.detach()
    moe = mi.attach(moe.bridge, expert_outputs=False)
    assert changed(model_identity(moe), before) == []
    with torch.no_grad():
        weight = largest_expert_weight(model).view(-1)
        kept = weight[weight.numel() // 2].clone()
        weight[weight.numel() // 2] += 0.01
        assert changed(model_identity(moe), before) == ["model.weights"]
        weight[weight.numel() // 2] = kept
        for buffer_name, buffer in model.named_buffers():
            if "bias" in buffer_name:
                buffer.view(-1)[-1] += 0.01
                assert changed(model_identity(moe), before) == ["model.buffers"], buffer_name
                buffer.view(-1)[-1] -= 0.01


def _double(tensor: torch.Tensor, hook: Any = None) -> torch.Tensor:
    return tensor * 2


def _scaled(tensor: torch.Tensor, hook: Any = None) -> torch.Tensor:
    return tensor * SCALE


class _Steering:
    def __init__(self, vector: torch.Tensor) -> None:
        self.vector = vector

    def add(self, tensor: torch.Tensor, hook: Any = None) -> torch.Tensor:
        return tensor + self.vector

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + self.vector


def _router(moe: mi.MoEHooks) -> Any:
    return next(m for m in moe.bridge.original_model.modules() if isinstance(m, OlmoeTopKRouter))


def _set(owner: Any, name: str, value: Any) -> None:
    setattr(owner, name, value)


def _replace_forward(moe: mi.MoEHooks) -> None:
    norm = moe.bridge.original_model.model.norm
    norm.forward = lambda x, _inner=norm.forward: 2 * _inner(x)


STREAM = "blocks.1.hook_out"


def _hook_name(moe: mi.MoEHooks) -> str:
    return moe.hook_name("router_logits", 1)


CHANGES: dict[str, tuple[Callable[[mi.MoEHooks], Any], str]] = {
    "a permanent hook": (lambda moe: moe.bridge.add_perma_hook(_hook_name(moe), _double), "model.hooks"),
    "a hook for now": (lambda moe: moe.bridge.add_hook(_hook_name(moe), _double), "model.hooks"),
    "our intervention": (
        lambda moe: [moe.bridge.add_perma_hook(*hook) for hook in mi.ablate_experts(moe, 1, [0])],
        "model.hooks",
    ),
    "a torch hook": (
        lambda moe: moe.bridge.original_model.model.norm.register_forward_hook(_Steering(torch.ones(32))),
        "model.hooks",
    ),
    "a torch pre-hook": (
        lambda moe: _router(moe).register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:])),
        "model.hooks",
    ),
    "another forward": (_replace_forward, "model.hooks"),
    "train": (lambda moe: moe.bridge.train(), "model.mode"),
    "one module in train": (lambda moe: _router(moe).train(), "model.mode"),
    "k of a router": (lambda moe: _set(_router(moe), "top_k", 1), "model.OlmoeTopKRouter.top_k"),
    "renormalised weights": (
        lambda moe: _set(_router(moe), "norm_topk_prob", not _router(moe).norm_topk_prob),
        "model.OlmoeTopKRouter.norm_topk_prob",
    ),
    "the configuration": (
        lambda moe: _set(moe.bridge.original_model.config, "clip_qkv", 8.0),
        "model.config.clip_qkv",
    ),
    "attention": (
        lambda moe: moe.bridge.original_model.set_attn_implementation("sdpa"),
        "model.attention implementation",
    ),
    "experts": (
        lambda moe: tiny.set_experts_implementation(moe.bridge.original_model, "eager"),
        "model.experts implementation",
    ),
    "number format": (lambda moe: moe.bridge.original_model.to(torch.bfloat16), "model.number format"),
    "a tensor that is no parameter": (
        lambda moe: _set(_router(moe), "offset", torch.ones(3)),
        "model.weights",
    ),
    "another class": (
        lambda moe: _set(_router(moe), "__class__", type("Other", (OlmoeTopKRouter,), {})),
        "model.modules",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_or_its_state_is_named(change: str) -> None:
    moe = attached()
    before = model_identity(moe)
    apply, entry = CHANGES[change]
    apply(moe)
    assert entry in changed(before, model_identity(moe))
    moe.bridge.reset_hooks(including_permanent=True)


def test_a_change_of_every_module_and_of_the_surroundings_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = attached()
    before = model_identity(moe)
    handle = register_module_forward_hook(lambda module, args, output: None)
    assert changed(before, model_identity(moe)) == ["model.hooks"]
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert changed(before, model_identity(moe)) == ["model.autocast"]

    def forward(self: Any, hidden_states: torch.Tensor) -> Any:
        raise NotImplementedError

    monkeypatch.setattr(OlmoeTopKRouter, "forward", forward)
    assert "model.hooks" in changed(before, model_identity(mi.attach(attached_bridge())))
    monkeypatch.undo()
    assert changed(before, model_identity(moe)) == []


def attached_bridge() -> Any:
    return tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe", tiny.tiny_tokenizer())


def _hooked(moe: mi.MoEHooks, function: Any) -> dict[str, Any]:
    moe.bridge.reset_hooks(including_permanent=True)
    moe.bridge.add_perma_hook(moe.hook_name("expert_weights", 1), function)
    return model_identity(moe)["model.hooks"]


def _by_closure(vector: torch.Tensor) -> Any:
    return lambda tensor, hook: tensor + vector


def test_hooks_count_by_what_they_do_and_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = attached()
    one, two = torch.zeros(2), torch.tensor([0.0, 1e-6])
    hold: list[Callable[[torch.Tensor], Any]] = [
        _by_closure,
        lambda vector: functools.partial(lambda tensor, hook, by: tensor + by, by=vector),
        lambda vector: _Steering(vector).add,
        lambda vector: lambda tensor, hook, by={"a": [vector]}: tensor + by["a"][0],
    ]
    for make in hold:
        assert _hooked(moe, make(one)) == _hooked(moe, make(one.clone()))
        assert _hooked(moe, make(one)) != _hooked(moe, make(two))
    scaled = _hooked(moe, _scaled)
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    assert _hooked(moe, _scaled) != scaled
    assert _hooked(moe, lambda tensor, hook: tensor * 2) != _hooked(moe, lambda tensor, hook: tensor * 3)
    assert _hooked(moe, _double)["at"] == ["blocks.1.hook_expert_weights"]


def test_hooks_of_unknown_content_are_refused_by_name(tmp_path: Path) -> None:
    moe = attached()

    def numbers() -> Iterator[float]:
        yield 1.0

    stream = numbers()
    moe.bridge.add_perma_hook(moe.hook_name("router_logits", 1), lambda tensor, hook: tensor * next(stream))
    with pytest.raises(ConfigError, match=r"a hook at blocks\.1\.hook_router_logits that holds a .*generator.*store="):
        model_identity(moe)
    moe.bridge.reset_hooks(including_permanent=True)


def test_an_offloaded_model_is_the_one_in_memory(tmp_path: Path) -> None:
    tiny.build_hf("olmoe").save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)

    def loaded(**options: Any) -> Any:
        load = transformers.AutoModelForCausalLM.from_pretrained
        return load(tmp_path, dtype=torch.float32, attn_implementation="eager", **options)

    def hooks_on(model: Any) -> mi.MoEHooks:
        return mi.attach(TransformerBridge.boot_transformers(str(tmp_path), hf_model=model))

    expected = model_identity(hooks_on(loaded()))
    placed = {f"model.layers.{layer}": "disk" if layer else "cpu" for layer in range(3)}
    placed |= dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    on_disk = loaded(device_map=placed, offload_folder=str(tmp_path / "offloaded"))
    waiting = accelerate.cpu_offload(loaded(), execution_device=torch.device("cpu"))
    for model in (on_disk, waiting):
        assert any(parameter.is_meta for parameter in model.parameters())
        moe = hooks_on(model)
        assert changed(model_identity(moe), expected) == []
    weights = waiting.model.layers[1].mlp.gate._hf_hook.weights_map
    with torch.no_grad():
        weights["weight"][0, 0] += 0.01
    assert changed(model_identity(moe), expected) == ["model.weights"]
    with pytest.raises(ConfigError, match=r"parameter '.*', which is on the meta device.*leave out store="):
        model_identity(hooks_on(loaded().to("meta")))


@pytest.mark.parametrize("name", ["deepseek_v3", "minimax_m2", "glm4_moe"])
def test_cells_of_another_models_buffers_are_refused(name: str, tmp_path: Path) -> None:
    """Correction biases are buffers, which training moves from checkpoint to checkpoint."""
    moe = attached(name)
    few: dict[str, Any] = {"experts": [0], "random_draws": 1, "progress": False, "store": tmp_path / "isolation"}
    routes: dict[str, Any] = {"n_routes": 2, "controls": False, "progress": False, "store": tmp_path / "routes"}
    layer = moe.layers[0]
    first = mi.isolate_experts(moe, items(), layers=[layer], **few)
    mi.counterfactual_routes(moe, sequences(), layers=[layer], **routes)
    biases = [b for n, b in moe.bridge.original_model.named_buffers() if "bias" in n]
    assert biases
    kept = [bias.clone() for bias in biases]
    with torch.no_grad():
        for bias in biases:
            bias.copy_(bias.flip(0) * 3)
    for again in (
        lambda: mi.isolate_experts(moe, items(), layers=[layer], **few),
        lambda: mi.counterfactual_routes(moe, sequences(), layers=[layer], **routes),
    ):
        with pytest.raises(ResultError, match=r"cells of another run \(the model's buffers: other content\)"):
            again()
    with torch.no_grad():
        for bias, values in zip(biases, kept):
            bias.copy_(values)
    resumed = mi.isolate_experts(moe, items(), layers=[layer], **few)
    np.testing.assert_array_equal(resumed.data["delta"], first.data["delta"])


def test_other_options_and_items_are_refused_by_name(tmp_path: Path) -> None:
    moe = attached()
    few: dict[str, Any] = {"layers": [0], "experts": [0], "random_draws": 1, "progress": False}
    routes: dict[str, Any] = {"layers": [0], "n_routes": 2, "controls": False, "progress": False}
    mi.isolate_experts(moe, items(), store=tmp_path / "i", **few)
    mi.counterfactual_routes(moe, sequences(), store=tmp_path / "c", **routes)
    other = [{**item, "answer": [5, *item["answer"]]} for item in items()]
    for change, said in (
        ({"items": other}, "items: other content"),
        ({"items": items(3)}, "items: 4 there, 3 here"),
        ({"layers": [1]}, r"layers=\[0\] there, \[1\] here"),
        ({"experts": [(0, 1)]}, r"experts=\['0'\] there, \['0\+1'\] here"),
        ({"mode": "ablate"}, "mode='force' there, 'ablate' here"),
        ({"mass": ("one",)}, r"mass=\['one', 'natural'\] there, \['one'\] here"),
        ({"baselines": ("natural",)}, "baselines="),
        ({"random_draws": 2}, "random_draws=1 there, 2 here"),
        ({"seed": 1}, "seed=0 there, 1 here"),
        ({"method": "naive"}, "method='prefix' there, 'naive' here"),
    ):
        options = {"items": items(), **few, **change}
        with pytest.raises(ResultError, match=rf"cells of another run \({said}"):
            mi.isolate_experts(moe, options.pop("items"), store=tmp_path / "i", **options)
    for change, said in (
        ({"sequences": sequences(2)}, "sequences: 3 there, 2 here"),
        ({"sequences": [[7, *s] for s in sequences()]}, "sequences: other content"),
        ({"n_routes": 3}, "n_routes=2 there, 3 here"),
        ({"controls": True}, "controls=False there, True here"),
        ({"sampler": mi.GumbelTopK(tau=0.5)}, r"sampler: .*GumbelTopK\(tau=1\.0.* there, .*tau=0\.5.* here"),
        ({"seed": 1}, "seed=0 there, 1 here"),
        ({"method": "naive"}, "method='auto' there, 'naive' here"),
    ):
        options = {"sequences": sequences(), **routes, **change}
        with pytest.raises(ResultError, match=rf"cells of another run \({said}"):
            mi.counterfactual_routes(moe, options.pop("sequences"), store=tmp_path / "c", **options)
    # the seed is the random baseline's alone
    bare = {**few, "baselines": ("natural",)}
    mi.isolate_experts(moe, items(), store=tmp_path / "b", **bare)
    mi.isolate_experts(moe, items(), store=tmp_path / "b", **{**bare, "seed": 5})


def test_texts_that_become_other_tokens_are_refused(tmp_path: Path) -> None:
    texts = [{"id": "a", "domain": "d", "prompt": "w5 w6", "answer": "w7"}]
    few: dict[str, Any] = {"layers": [0], "experts": [0], "random_draws": 1, "progress": False, "store": tmp_path}
    mi.isolate_experts(attached(), texts, **few)
    other = tiny.tiny_tokenizer()
    other.backend_tokenizer.normalizer = normalizers.Replace("w5", "w8")
    moe = mi.attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe", other))
    with pytest.raises(ResultError, match=r"cells of another run \(tokens: other content"):
        mi.isolate_experts(moe, texts, **few)
