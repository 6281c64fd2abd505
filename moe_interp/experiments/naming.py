"""What a result calls the model it is about."""

from __future__ import annotations

from pathlib import Path

from moe_interp.hooks.attach import MoEHooks


def model_name(moe: MoEHooks) -> str:
    """The model's name; of a folder its last part, since the path is the machine's own."""
    name = str(getattr(moe.bridge.cfg, "model_name", "") or type(moe.bridge.original_model).__name__)
    return Path(name).name if Path(name).is_dir() else name
