"""What was measured, as Markdown: always every row, with "not measured" where there is nothing."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version

import psutil
import torch
from gpu_shapes import Sizes

NOT_MEASURED = "not measured"


def model_rows(sizes: Sizes) -> dict[str, str]:
    """The rows of the models' table: key -> what it says."""
    budget = f"{sizes.budget / 2**30:g} GiB"
    few, many = sizes.copies
    return {
        "forward": f"plain bridge forward, {sizes.batch} x {sizes.pos}",
        "unhooked": "attached, unhooked",
        "read": "router hooks that only read, all layers",
        "cached": "`expert_out` of one layer cached",
        "every": "`expert_out` hooked at all layers",
        "waits": "host waits of a forward pass, plain and reading",
        "naive": f"naive, routes a second (batches of {few} or {many})",
        "last": f"branches, last layer ({budget} or half of what is free)",
        "middle": "middle layer",
        "early": "an early layer",
        "default": "middle layer, default budget",
        "shares": "share of the GEMM limit, last / middle / early",
        "share_default": "share at the default budget, middle",
        "compact": "middle layer, default budget, in compact rows",
        "grid": "the same as a grid",
        "grid_compiled": "as a grid, compiled",
        "isolation": f"isolation, one middle layer, {sizes.items} items x {sizes.item_tokens} tokens, forced items a s",
        "isolation_ratio": f"over one `run_with_hooks` of the {sizes.items} items together",
        "memory": "peak memory of the device (weights alone)",
    }


def run_rows(sizes: Sizes) -> dict[str, str]:
    """The rows of the table of what is measured once."""
    whole = f"{sizes.sequences} sequences x {sizes.sequence_tokens} tokens, {sizes.routes} routes, all layers"
    return {
        "exact_branches": f"branches against naive, float32, {sizes.exact_layers} layers (at most 2e-5)",
        "exact_hooks": "hooks of routers passing through, change of a logit (at most as two plain passes differ)",
        "gemm": f"matrix product, {sizes.gemm} cubed",
        "experiment": f"`counterfactual_routes`, OLMoE's shape, {whole}, controls",
        "paper": "a `paper` step of the testbed, `micro_batch`",
        "paper_compiled": "the same compiled, as a run of the preset's length is",
    }


def machine(device: torch.device) -> str:
    """Date, card, driver and versions."""
    if device.type == "cuda":
        card = f"{torch.cuda.get_device_name(device)}, driver {_driver()}, CUDA {torch.version.cuda}"
    else:
        card = f"no GPU ({platform.machine()}, {psutil.cpu_count()} processors, {torch.get_num_threads()} threads)"
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "transformer-lens"))
    return f"{date.today():%d %B %Y}; {card}; {libraries}"


def markdown(rows: Mapping[str, str], columns: Mapping[str, Mapping[str, str]], corner: str = "") -> str:
    """One line a row, one column a model."""
    lines = [_line([corner, *columns]), "|".join(["", *["---"] * (len(columns) + 1), ""])]
    lines += [
        _line([label, *(cells.get(key, NOT_MEASURED) for cells in columns.values())]) for key, label in rows.items()
    ]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return "unknown"
    return said.split("\n")[0].strip() or "unknown"
