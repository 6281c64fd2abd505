"""What tells one model, and one state of it, from another: all that changes a number that it computes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from transformer_lens.hook_points import HookPoint

from moe_interp.errors import ConfigError
from moe_interp.experiments.identity.functions import Fingerprint, UnknownContentError
from moe_interp.experiments.identity.tensors import tensor_digest
from moe_interp.hooks.attach import MoEHooks

# entries of a config that change no number, or that stand elsewhere in the identity
PASSED_OVER = {
    "_name_or_path", "name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "id2label",
    "label2id", "use_cache", "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward",
    "problem_type", "is_encoder_decoder", "model_type",
}  # fmt: skip
# attributes of modules that change no number, or are set anew by every pass
PASSING = {"max_seq_len_cached", "name_or_path", "hf_device_map"}
ADAPTERS = ("_active_adapter", "_disable_adapters", "_disable_adapter")
LIBRARIES = ("moe_interp", "transformer_lens", "transformers", "accelerate", "torch")
PLAIN = (bool, int, float, str, type(None))


def model_identity(moe: MoEHooks) -> dict[str, Any]:
    """The state of a model as entries of a plan (:mod:`moe_interp.results.plans`), each named ``model.<what>``.

    It holds: every value of every parameter and buffer (also of offloaded ones), number formats, classes of modules,
    their plain attributes (k, renormalisation, scaling, groups, jitter, adapters), the configuration, train or eval,
    the implementations of attention and experts, autocast, hooks of any kind and replaced methods with what they
    hold on to, and the versions of moe_interp and transformers.

    The device is not part of it: devices differ by rounding. Attention and experts implementations are, although most
    differ by rounding too: some leave out caps or sinks, and at 16 bits rounding changes routes.

    Raises:
        ConfigError: a parameter whose values cannot be reached, or a hook that holds something of unknown content.
    """
    model: nn.Module = moe.bridge.original_model
    config = getattr(model, "config", None)
    tensors = [*model.named_parameters(), *_tensor_attributes(model)]
    formats = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    found: dict[str, Any] = {
        "number format": " and ".join(formats),
        "weights": {"checksum": _sums(model, tensors)},
        "buffers": {"checksum": _sums(model, _buffers(model))},
        "modules": {"checksum": _sha([f"{name} {type(m).__name__}" for name, m in _own(model)])},
        "mode": _mode(model),
        "attention implementation": getattr(config, "_attn_implementation", None),
        "experts implementation": getattr(config, "_experts_implementation", None),
        "autocast": _autocast(),
        "hooks": _hooks(moe),
    }
    found |= _attributes(model)
    found |= {f"config.{name}": value for name, value in sorted(_config(config).items())}
    libraries = {name: version(name.replace("_", "-")) for name in ("moe_interp", "transformers")}
    return {f"model.{name}": value for name, value in found.items()} | libraries


def weights_of(identity: Mapping[str, Any]) -> str:
    """One checksum of the weights and buffers in an identity."""
    return _sha([identity["model.weights"], identity["model.buffers"]])


def value_identity(value: Any, option: str) -> dict[str, str]:
    """An object given as an option, as an entry of a plan: what it is called, and a checksum of what it holds.

    Raises:
        ConfigError: it holds something of unknown content.
    """
    try:
        checksum = Fingerprint({}).of(value)
    except UnknownContentError as error:
        raise ConfigError(
            f"{option}, a {type(value).__name__} that holds {error}, whose content cannot be read",
            "an object that holds numbers, text, tensors and objects of these",
            "Keep it simpler, or leave out store=.",
        ) from None
    named = repr(value)
    return {"name": type(value).__qualname__ if " at 0x" in named else named, "checksum": checksum}


def _sums(model: nn.Module, tensors: Any) -> str:
    parts = []
    for path, tensor in tensors:
        real = tensor if not tensor.is_meta else _offloaded(model, path)
        if real is None or real.is_meta:
            raise ConfigError(
                f"parameter {path!r}, which is on the meta device",
                "weights that can be read, or hooks of accelerate that know where they are",
                "Load the weights, or leave out store=.",
            )
        parts.append(f"{path} {tensor_digest(real)}")
        if type(tensor) not in (nn.Parameter, Tensor, nn.Buffer):
            # quantised parameters keep scales beside their data
            parts += [f"{path} {d}" for d in sorted(_held(vars(tensor)))]
    return _sha(sorted(parts))


def _held(value: Any, depth: int = 3) -> Iterator[str]:
    """Digests of the tensors that a value holds."""
    if isinstance(value, Tensor):
        yield tensor_digest(value)
    elif depth:
        entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        for entry in [*entries, getattr(value, "__dict__", None)]:
            yield from _held(entry, depth - 1)


def _offloaded(model: nn.Module, path: str) -> Tensor | None:
    """The values of a tensor on the meta device, from accelerate's hook on its module or on one around it."""
    parts = path.split(".")
    for n in reversed(range(len(parts))):
        hook = getattr(model.get_submodule(".".join(parts[:n])), "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            weights, name = getattr(one, "weights_map", None), ".".join(parts[n:])
            if weights is not None and name in weights:
                return weights[name]
    return None


def _own(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules without those that TransformerLens and this package put around and between them."""
    for name, module in model.named_modules():
        if type(module).__module__.split(".")[0] not in ("transformer_lens", "moe_interp"):
            yield name.replace("_original_component.", "").replace("original_component.", ""), module


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers, without the frequencies that a pass sets anew by its length where the first ones are kept beside."""
    for name, buffer in model.named_buffers():
        owner = model.get_submodule(name.rpartition(".")[0])
        changes = name.endswith("inv_freq") and getattr(owner, "rope_type", "default") in ("dynamic", "longrope")
        if not changes or "original" in name or not hasattr(owner, "original_inv_freq"):
            yield name, buffer


def _tensor_attributes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that are attributes of modules without being registered."""
    for path, module in _own(model):
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not name.startswith("_"):
                yield f"{path}.{name}", value


def _mode(model: nn.Module) -> str:
    training = [name for name, module in _own(model) if module.training]
    n = sum(1 for _ in _own(model))
    return "eval" if not training else "train" if len(training) == n else f"eval but for {len(training)} modules"


def _autocast() -> str:
    enabled = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    return ", ".join(f"{device} {torch.get_autocast_dtype(device)}" for device in enabled) or "off"


def _attributes(model: nn.Module) -> dict[str, Any]:
    """``Class.attribute`` -> its value, or a checksum where layers differ."""
    by_name: dict[str, list[Any]] = {}
    for path, module in _own(model):
        for name, value in vars(module).items():
            is_method = callable(value) and hasattr(type(module), name)  # see _replaced
            known = not name.startswith("_") and name not in {"training", *PASSING} and not is_method
            if (known or name in ADAPTERS) and (plain := _plain(value)) is not None:
                by_name.setdefault(f"{type(module).__name__}.{name}", []).append([path, plain[0]])
    return {
        name: values[0][1] if all(v == values[0][1] for _, v in values) else {"checksum": _sha(values)}
        for name, values in sorted(by_name.items())
    }


def _plain(value: Any) -> tuple[Any] | None:
    """A value as JSON, in a tuple; None for what is no setting."""
    if isinstance(value, float):
        return (repr(value),)
    if isinstance(value, PLAIN):
        return (value,)
    if isinstance(value, torch.dtype):
        return (str(value),)
    if isinstance(value, FunctionType | type) or type(value).__name__ == "builtin_function_or_method":
        return (f"{value.__module__}.{value.__qualname__}",)
    if isinstance(value, Mapping):
        entries = {str(key): _plain(entry) for key, entry in value.items()}
        return None if None in entries.values() else ({key: e[0] for key, e in entries.items() if e},)
    if isinstance(value, set | frozenset):
        value = sorted(value, key=repr)
    if isinstance(value, list | tuple):
        items = [_plain(entry) for entry in value]
        return None if None in items else ([item[0] for item in items if item],)
    return None


def _config(config: Any) -> dict[str, Any]:
    """Entries of a model's configuration, those of configurations within it under ``name.entry``."""
    flat: dict[str, Any] = {}

    def add(entries: Mapping[str, Any], prefix: str) -> None:
        for name, value in entries.items():
            if name in PASSED_OVER or name.startswith(("_attn", "_experts")):
                continue
            if isinstance(value, Mapping) and value:
                add({str(key): entry for key, entry in value.items()}, f"{prefix}{name}.")
            else:
                # infinity as text: JSON has no such number
                flat[f"{prefix}{name}"] = json.loads(json.dumps(value, default=str), parse_constant=str)

    add(config.to_dict() if hasattr(config, "to_dict") else {}, "")
    return flat


def _hooks(moe: MoEHooks) -> dict[str, Any]:
    """Where hooks and replaced methods are, and a checksum of what they do; the libraries' own do not count."""
    names = {id(module): name for name, module in moe.bridge.named_modules()}
    names |= {id(module): name for name, module in moe.bridge.original_model.named_modules() if id(module) not in names}
    names |= {
        id(moe): "moe",
        id(moe.bridge): "bridge",
        id(moe.bridge.tokenizer): "tokenizer",
        id(moe.bridge.cfg): "cfg",
    }
    fingerprint = Fingerprint(names)
    at, done = [], []
    for place, kind, function in _installed(moe):
        try:
            done.append(f"{place} {kind} {fingerprint.of(function)}")
        except UnknownContentError as error:
            raise ConfigError(
                f"a {kind} at {place} that holds {error}, whose content cannot be read",
                "hooks that hold numbers, text, tensors and objects of these",
                "Remove the hook, or leave out store=: finished cells could not be told from those of another hook.",
            ) from None
        at.append(place)
    return {"at": list(dict.fromkeys(at)), "checksum": _sha(done)}


def _installed(moe: MoEHooks) -> Iterator[tuple[str, str, Any]]:
    """``(place, kind, function)`` of every hook and replaced method that is not the libraries' own."""
    seen: set[int] = set()
    for root in (moe.bridge, moe.bridge.original_model):
        for name, module in root.named_modules():
            if id(module) in seen:
                continue
            seen.add(id(module))
            place = getattr(module, "name", None) or name if isinstance(module, HookPoint) else name
            users = {}
            if isinstance(module, HookPoint):
                users = {h.hook.id: h.user_hook for h in module.fwd_hooks if getattr(h, "user_hook", None)}
            for kind, hooks in (("hook", module._forward_hooks), ("pre-hook", module._forward_pre_hooks)):
                for number, function in hooks.items():
                    function = users.get(number, function)
                    if not _is_structure(function):
                        yield place or "the model", kind, function
            for name, method in _replaced(module):
                yield place or "the model", f"replaced {name}", method
    for kind, hooks in (
        ("hook", global_hooks._global_forward_hooks),
        ("pre-hook", global_hooks._global_forward_pre_hooks),
    ):
        yield from (("all modules", kind, function) for function in hooks.values())


def _is_structure(function: Any) -> bool:
    """Whether a library put it there for its own work: this package's interventions are the user's hooks."""
    while hasattr(function, "func") or hasattr(function, "__func__"):
        function = getattr(function, "func", None) or function.__func__
    module = str(getattr(function, "__module__", None) or type(function).__module__)
    return module.split(".")[0] in LIBRARIES and not module.startswith("moe_interp.interventions")


def _replaced(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Methods of a module that are other than those its class was written with, and not a library's."""
    kind = type(module)
    for name, value in vars(module).items():
        if callable(getattr(kind, name, None)) and callable(value) and not _is_structure(value):
            yield name, value
    for name, value in vars(kind).items():
        if isinstance(value, FunctionType) and value.__module__ != kind.__module__ and not _is_structure(value):
            yield name, value


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
