"""``load_demo``: the bundled model, attached, with its held-out items."""

from __future__ import annotations

import torch
from transformer_lens.model_bridge import TransformerBridge

from moe_interp.hooks.attach import MoEHooks, attach
from moe_interp.testbed.demo import load_demo_assets
from moe_interp.testbed.domains.domain import Item


def load_demo() -> tuple[MoEHooks, dict[str, list[Item]]]:
    """The small model that the package ships, attached, and its held-out items by domain. Needs no network.

    It learned arithmetic with steps, the facts of a made-up world, puzzles and Python code; ``provenance.json`` beside
    its weights says from what, for how long and how well.

    Raises:
        DataError: the package was installed without its assets.
    """
    assets = load_demo_assets()
    bridge = TransformerBridge.boot_transformers(str(assets.model_path), device="cpu", dtype=torch.float32)
    bridge.cfg.model_name = "demo"
    return attach(bridge.eval()), {domain: list(items) for domain, items in assets.items.items()}
