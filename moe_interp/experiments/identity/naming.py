"""What a result calls the model it is about."""

from __future__ import annotations

from pathlib import Path

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
