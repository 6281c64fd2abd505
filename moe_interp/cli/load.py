"""Loading what ``--model`` names: the bundled demo model, a folder, or a model of the Hugging Face hub."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.devices import get_device
from transformers import PretrainedConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from moe_interp.arch.grouped_products import has_grouped_product
from moe_interp.arch.offload import device_of
from moe_interp.cli.options import AUTO, DEMO, DTYPES, check_dtype, check_model
from moe_interp.engine.memory import is_out_of_memory
from moe_interp.errors import ConfigError, first_sentence
from moe_interp.hooks.attach import MoEHooks, attach
from moe_interp.testbed.demo import load_demo_assets


def load_bridge(
    model: str, device: str | None = None, dtype: str = "float32", device_map: Any = None, **options: Any
) -> TransformerBridge:
    """A bridge in eval mode; without a tokenizer where a folder holds none.

    Args:
        model: "demo", a folder with a transformers checkpoint, or a hub name. ``HF_HUB_OFFLINE=1`` is honoured: then
            only what is already in the cache is found.
        device: A torch device; TransformerLens' own choice by default.
        dtype: A name of ``options.DTYPES``, or "auto": the checkpoint's own on a GPU, float32 on a CPU.
        device_map: How accelerate spreads the model over devices ("auto", or a mapping); then without ``device``.
        options: Handed on to ``TransformerBridge.boot_transformers``.

    Raises:
        ConfigError: a number format or device that is unknown or not there, a quantised checkpoint, a folder that is
            not there, a name that is not on the hub or cannot be reached, weights for which there is no room, or a
            model that TransformerLens does not bridge.
    """
    check_dtype(dtype)
    source = _source(model)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    has_text = not Path(source).is_dir() or _has_tokenizer(Path(source))
    if not has_text:
        options = {"tokenizer": _stand_in(), **options}
    place = {"device": _device(device)} if device_map is None else {"device_map": device_map}
    config = _config(source)
    if unpacked := _unpacked(model, config):
        options = {"hf_config_overrides": unpacked, **options}
    chosen = _dtype(dtype, device or ("cpu" if _is_without_gpu() else "cuda"), config)
    if dtype != AUTO and device_map is None:
        _check_number_format(chosen, device or get_device())
    try:
        bridge = TransformerBridge.boot_transformers(source, **place, dtype=chosen, **options)
    except Exception as error:  # damaged weights raise errors of any class
        if is_out_of_memory(error):
            given = f"{model}, which does not fit into memory ({first_sentence(error)})"
            remedy = "Try --dtype bfloat16, --device-map auto, or a device with more memory."
            raise ConfigError(given, "room for its weights", remedy) from error
        raise _explained(model, error) from error
    _set_experts_implementation(bridge.original_model)
    if not has_text:
        bridge.tokenizer = None
    bridge.cfg.model_name = DEMO if model == DEMO else bridge.cfg.model_name
    bridge.eval()
    return bridge


def load_hooks(model: str, device: str | None = None, dtype: str = "float32", device_map: Any = None) -> MoEHooks:
    """The same, attached.

    Raises:
        ConfigError: as for :func:`load_bridge`.
        AttachError: a model without MoE layers, or of an unknown family.
    """
    return attach(load_bridge(model, device, dtype, device_map))


def checkpoint_folder(model: str) -> Path:
    """The folder that a loaded model's checkpoint is in; of a hub model the one in the local cache."""
    source = _source(model)
    return Path(source) if Path(source).is_dir() else Path(snapshot_download(source, local_files_only=True))


def _source(model: str) -> str:
    if model == DEMO:
        return str(load_demo_assets().model_path)
    check_model(model)
    path = Path(model).expanduser()
    return str(path) if path.is_dir() else model


def _has_tokenizer(folder: Path) -> bool:
    names = [file.name.lower() for file in folder.iterdir()]
    return any(re.search(r"token|vocab|merges|tekken|\.model$", name) for name in names)


def _stand_in() -> PreTrainedTokenizerFast:
    """A tokenizer of nothing, to be taken off again: loading asks for one, and makes an empty one of some families."""
    special = dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), "<none>")
    backend = Tokenizer(WordLevel({"<none>": 0}, unk_token="<none>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path="none", add_bos_token=True, **special)


def _device(device: str | None) -> str | None:
    if device is None:
        return None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        given = f"--device {device} ({first_sentence(error)})"
        raise ConfigError(given, "a device that this machine has", "Try --device cpu.") from error
    return device


def _check_number_format(dtype: torch.dtype, device: str | None) -> None:
    """Refuse a number format that a device cannot multiply.

    Raises:
        ConfigError: the product fails.
    """
    try:
        some = torch.zeros(2, 2, dtype=dtype, device=device)
        torch.matmul(some, some)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:
        given = f"--dtype {str(dtype).removeprefix('torch.')} on --device {device} ({first_sentence(error)})"
        raise ConfigError(given, "a number format that the device has", "Try --dtype float32.") from error


def _is_without_gpu() -> bool:
    return get_device() == "cpu"


def _config(source: str) -> dict[str, Any]:
    """A checkpoint's configuration as it is written; empty where it cannot be read, which loading explains."""
    try:
        return dict(PretrainedConfig.get_config_dict(source)[0])
    except Exception:  # the network's, the hub's and the file's, all of which loading meets again
        return {}


def _dtype(name: str, device: str, config: dict[str, Any]) -> torch.dtype:
    if name != AUTO:
        return getattr(torch, name)  # type: ignore[no-any-return]
    text = config.get("text_config") or {}
    own = next((c[key] for c in (config, text) for key in ("dtype", "torch_dtype") if c.get(key)), "float32")
    own = str(own).removeprefix("torch.")
    return torch.float32 if device == "cpu" or own not in DTYPES else getattr(torch, own)


def _unpacked(model: str, config: dict[str, Any]) -> dict[str, Any]:
    """What a quantised checkpoint's configuration must say so that its weights are unpacked in loading.

    Packed weights cannot be read expert by expert.

    Raises:
        ConfigError: weights that transformers does not unpack.
    """
    quantised = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if not quantised:
        return {}
    if quantised.get("quant_method") == "mxfp4":
        return {"quantization_config": {**quantised, "dequantize": True}}
    raise ConfigError(
        f"{model}, a checkpoint quantised by {quantised.get('quant_method', 'an unknown method')}",
        f"weights in {', '.join(DTYPES)}",
        "Give a checkpoint that is not quantised, or dequantise it with transformers and save it.",
    )


def _set_experts_implementation(model: Any) -> None:
    """Run experts one after the other where torch has no grouped product in the model's number format.

    transformers chooses the grouped product, which then fails at the first pass.
    """
    served = has_grouped_product(next(model.parameters()).new_zeros(0, device=device_of(model)))
    if not served and getattr(model.config, "_experts_implementation", None) == "grouped_mm":
        model.set_experts_implementation("eager")


def _explained(model: str, error: Exception) -> ConfigError:
    """What went wrong in loading, found in the chain of causes."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if isinstance(error, ValueError) and "not supported" in first.lower():
        remedy = "See `moe-interp support` for the families."
        return ConfigError(f"{model}: {first}", "a model that TransformerLens bridges", remedy)
    if Path(model).expanduser().is_dir():
        remedy = "Load it with transformers alone to see what it lacks."
        return ConfigError(f"the folder {model}, which could not be loaded: {first}", "a complete checkpoint", remedy)
    if any(isinstance(e, GatedRepoError) for e in chain):
        remedy = "Ask for access on its page and log in with `hf auth login`."
        return ConfigError(f"the gated model {model}", "a model you have access to", remedy)
    if any(isinstance(e, RepositoryNotFoundError | HFValidationError) for e in chain):
        remedy = "Correct the name; `moe-interp models` lists some. Private models need `hf auth login`."
        return ConfigError(f"{model}, which is not on the hub", "the name of a hub model", remedy)
    if offline or any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        remedy = "Unset HF_HUB_OFFLINE to download it, or give a local folder."
        return ConfigError(
            f"{model}, which is not in the local cache (HF_HUB_OFFLINE is set)", "a cached model", remedy
        )
    if any("connect" in str(e).lower() or "connect" in type(e).__name__.lower() for e in chain):
        remedy = "Check the network, or give a local folder or 'demo'."
        return ConfigError(f"{model}, which could not be reached on the hub", "a network connection", remedy)
    remedy = "Load it with transformers alone to see what it lacks."
    return ConfigError(f"{model}, which could not be loaded: {first}", "a complete checkpoint", remedy)
