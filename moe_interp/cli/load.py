"""Loading what ``--model`` names: the bundled demo model, a folder, or a model of the Hugging Face hub."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from moe_interp.cli.options import DEMO, check_dtype, check_model
from moe_interp.errors import ConfigError
from moe_interp.hooks.attach import MoEHooks, attach
from moe_interp.testbed.demo import load_demo_assets


def load_bridge(model: str, device: str | None = None, dtype: str = "float32", **options: Any) -> TransformerBridge:
    """A bridge in eval mode; without a tokenizer where a folder holds none.

    Args:
        model: "demo", a folder with a transformers checkpoint, or a hub name. ``HF_HUB_OFFLINE=1`` is honoured: then
            only what is already in the cache is found.
        device: A torch device; TransformerLens' own choice by default.
        dtype: A name of ``options.DTYPES``.
        options: Handed on to ``TransformerBridge.boot_transformers``.

    Raises:
        ConfigError: an unknown number format or device, a folder that is not there, a name that is not on the hub or
            cannot be reached, or a model that TransformerLens does not bridge.
    """
    check_dtype(dtype)
    source = _source(model)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    has_text = not Path(source).is_dir() or _has_tokenizer(Path(source))
    if not has_text:
        options = {"tokenizer": _stand_in(), **options}
    try:
        bridge = TransformerBridge.boot_transformers(
            source, device=_device(device), dtype=getattr(torch, dtype), **options
        )
    except Exception as error:  # damaged weights raise errors of any class
        if "allocate" in str(error):  # out of memory
            raise
        raise _explained(model, error) from error
    if not has_text:
        bridge.tokenizer = None
    bridge.cfg.model_name = DEMO if model == DEMO else bridge.cfg.model_name
    bridge.eval()
    return bridge


def load_hooks(model: str, device: str | None = None, dtype: str = "float32") -> MoEHooks:
    """The same, attached.

    Raises:
        ConfigError: as for :func:`load_bridge`.
        AttachError: a model without MoE layers, or of an unknown family.
    """
    return attach(load_bridge(model, device, dtype))


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
        raise ConfigError(
            f"--device {device} ({str(error).splitlines()[0]})", "a device that this machine has", "Try --device cpu."
        ) from error
    return device


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
