"""What a result calls the model it is about, and what tells one model from another of the same name."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from moe_interp.checks import check_name
from moe_interp.hooks.attach import MoEHooks


def model_name(moe: MoEHooks) -> str:
    """The model's name; of a folder its last part, since the path is the machine's own.

    Raises:
        DataError: a name that neither a file nor a terminal can show, such as one with a line break.
    """
    name = str(getattr(moe.bridge.cfg, "model_name", "") or type(moe.bridge.original_model).__name__)
    name = check_name(name, "the model's name, bridge.cfg.model_name,")
    return Path(name).name if Path(name).is_dir() else name


def weights_checksum(moe: MoEHooks) -> str:
    """SHA-256 over a model's parameters: names, shapes, number formats, and up to 64 evenly spaced values of each.

    So finished cells are not mixed with those of another checkpoint, format or tuned router of the same name. An edit
    that misses all of the values read is not seen.
    """
    digest = hashlib.sha256()
    for name, parameter in moe.bridge.original_model.named_parameters():
        flat = parameter.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // 64)][:64]
        read = "offloaded" if parameter.is_meta else values.to("cpu", torch.float64).tolist()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {read}".encode())
    return digest.hexdigest()
