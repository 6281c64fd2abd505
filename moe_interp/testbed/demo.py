"""The bundled demo model: trained by the testbed's own preset, judged on held-out items, with its provenance."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import hypergeom
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from moe_interp.checks import check_name
from moe_interp.disk import read_bytes, read_json
from moe_interp.errors import DataError
from moe_interp.hooks.attach import attach
from moe_interp.results.files import replacing
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.domains.arithmetic import final_answer
from moe_interp.testbed.domains.domain import Domain, Item, read_items, write_items
from moe_interp.testbed.evaluate import evaluate
from moe_interp.testbed.generate import complete
from moe_interp.testbed.metrics import routing_metrics
from moe_interp.testbed.model import bridge_model, save_checkpoint
from moe_interp.testbed.presets import DEMO
from moe_interp.testbed.strategies.strategy import recorded
from moe_interp.testbed.training.train import TrainedRun, train
from moe_interp.traces.trace import RoutingTrace

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "demo"
CHECKSUMS = "checksums.json"
ANEW = "Install the package anew, or make them with moe_interp.testbed.demo.make_demo()."
_PACKAGES = ("torch", "transformers", "tokenizers", "accelerate")
_SAMPLED_PROBLEMS = 150
_LICENCES = {
    "model, tokenizer and generated items": "MIT, as the package",
    "code": "PSF-2.0: lines of Python's standard library, Copyright (c) Python Software Foundation",
}


@dataclass(frozen=True)
class DemoAssets:
    """Where the demo model is, its held-out items by domain, and how it was made.

    Attributes:
        model_path: A standard checkpoint folder (float16; load it as float32 on a CPU).
        items: domain -> items with short answers. Arithmetic items also carry ``question``, ``solution``,
            ``final_answer``, ``steps`` and ``size`` for free generation.
        provenance: Data, configuration, seed, losses, accuracies, samples, versions.
    """

    model_path: Path
    items: dict[str, tuple[Item, ...]]
    provenance: dict[str, Any]


def load_demo_assets(folder: Path = ASSETS) -> DemoAssets:
    """The files that the package ships; no network, no model loaded.

    Raises:
        DataError: They are not there, as in a checkout without them, or not as they were shipped.
    """
    expected = "the files that the package ships"
    if not (folder / CHECKSUMS).exists():
        raise DataError(f"no demo model in {folder}", expected, ANEW)
    sums = read_json(folder / CHECKSUMS, expected, ANEW)
    if not isinstance(sums, dict) or "provenance.json" not in sums:
        raise DataError(f"{folder / CHECKSUMS} without the files' checksums", expected, ANEW)
    for name, kept in sums.items():
        if hashlib.sha256(read_bytes(folder / name, expected, ANEW)).hexdigest() != kept:
            raise DataError(f"{folder / name}, which is not as it was shipped", expected, ANEW)
    items = {Path(name).stem: read_items(folder / name) for name in sorted(sums) if name.endswith(".jsonl")}
    return DemoAssets(folder / "model", items, read_json(folder / "provenance.json", expected, ANEW))


def make_demo(out: Path, assets: Path = ASSETS, config: TestbedConfig = DEMO, progress: bool = True) -> dict[str, Any]:
    """Train the demo model from nothing (or go on with the run in ``out``), judge it, and write the assets.

    Returns:
        The provenance, as written.
    """
    run = train(config, out=out, resume=True, progress=progress)
    return write_assets(run, assets)


def write_assets(run: TrainedRun, assets: Path = ASSETS, n_samples: int = 64) -> dict[str, Any]:
    """Write model (float16), tokenizer, items and provenance of a finished run; the numbers are those of the files."""
    (assets / "items").mkdir(parents=True, exist_ok=True)
    save_checkpoint(run.moe.bridge.original_model, run.tokenizer, assets / "model", torch.float16)
    for domain in run.domains:
        name = check_name(domain.name, "domain", is_file=True)
        write_items(domain.items, assets / "items" / f"{name}.jsonl")
    provenance = {
        "config": run.config.model_dump(mode="json"),
        "fingerprint": run.config.fingerprint(),
        "tokens_seen": run.history[-1]["tokens"],
        "training": {key: run.history[-1][key] for key in ("tokens_per_s", "loss", "unigram")},
        "domains": {d.name: _sizes(d) for d in run.domains},
        "licences": _LICENCES,
        "versions": {p: version(p) for p in ("torch", "transformers", "tokenizers")}
        | {"python": platform.python_version()},
        "bytes_of_weights": (assets / "model" / "model.safetensors").stat().st_size,
        "judged": judge(assets / "model", run, n_samples),
    }
    (assets / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
    write_checksums(assets)
    return provenance


def write_checksums(assets: Path = ASSETS) -> None:
    """SHA-256 of every file of the assets, which loading compares with."""
    files = sorted(path for path in assets.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    sums = {path.relative_to(assets).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    with replacing(assets / CHECKSUMS) as file:
        file.write((json.dumps(sums, indent=1) + "\n").encode())


def _sizes(domain: Domain) -> dict[str, Any]:
    counts = {"train": len(domain.train), "validation": len(domain.validation), "items": len(domain.items)}
    return counts | {"held_out": domain.split_by}


def judge(model_path: Path, run: TrainedRun, n_samples: int = 64) -> dict[str, Any]:
    """Validation losses against the unigram's, use of the experts, accuracies on held-out items, and samples.

    Use is that of the training mix: each domain's load weighted by its share.
    """
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path)
    items = {domain.name: domain.items for domain in run.domains}
    bridge = bridge_model(AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval(), tokenizer)
    with attach(bridge, expert_outputs=False) as moe:
        found = evaluate(
            lambda tokens, domain: recorded(moe, lambda: bridge(tokens)), run.validation, torch.device("cpu")
        )
    unigram = run.history[-1]["unigram"]
    shares = dict(zip(items, run.config.shares or (1.0,) * len(items)))
    result: dict[str, Any] = {
        "validation_loss": found.losses,
        "share_of_unigram_loss": {name: loss / unigram[name] for name, loss in found.losses.items()},
        "experts": expert_use(found.trace, shares),
        "routing": routing_metrics(found.trace).to_dict("list"),
    }
    for name in sorted({"facts", "puzzles"} & items.keys()):
        result[name] = short_answer_accuracy(model, tokenizer, items[name])
    if "arithmetic" in items:
        result["arithmetic"] = arithmetic_accuracy(model, tokenizer, items["arithmetic"], n_samples)
    return result


def expert_use(trace: RoutingTrace, shares: Mapping[str, float]) -> dict[str, list[float]]:
    """MaxVio, and the smallest load as a multiple of the mean, of each layer under the training mix's shares."""
    counts = trace.counts(trace.domain_codes, len(trace.domains)).astype(float)  # domain layer expert
    weights = np.array([shares[str(name)] for name in trace.domains]) / sum(shares.values())
    load = np.einsum("d,dle->le", weights, counts / counts.sum(-1, keepdims=True)) * trace.n_experts
    return {"max_violation": (load.max(-1) - 1).tolist(), "smallest_load": load.min(-1).tolist()}


def short_answer_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: Sequence[Item]
) -> dict[str, Any]:
    """Share of greedy first lines that equal the answer, overall and by each of the items' fields."""
    texts = complete(model, tokenizer, [item.prompt for item in items], max_new_tokens=8)
    right = [text[0].split("\n")[0].strip() == item.answer.strip() for text, item in zip(texts, items)]
    return {"accuracy": float(np.mean(right)), "n": len(items), "by": _by_field(items, right)}


def arithmetic_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: Sequence[Item], n_samples: int
) -> dict[str, Any]:
    """Greedy accuracy of the final answer, pass@K at temperature 1 (unbiased, from ``n_samples``), and samples."""
    questions = [str(item.fields["question"]) for item in items]
    greedy = [texts[0] for texts in complete(model, tokenizer, questions, max_new_tokens=80)]
    right = [_is_right(text, item) for text, item in zip(greedy, items)]
    some = items[:_SAMPLED_PROBLEMS]  # items go round the grades, so the first ones are as evenly graded as all
    sampled = complete(
        model, tokenizer, questions[: len(some)], n_samples=n_samples, max_new_tokens=80, temperature=1.0
    )
    correct = np.array([sum(_is_right(text, item) for text in texts) for texts, item in zip(sampled, some)])
    ks = [k for k in (1, 4, 16, 64) if k <= n_samples]
    return {
        "greedy": float(np.mean(right)),
        "n": len(items),
        "by": _by_field(items, right),
        "pass_at_k": {str(k): float(np.mean(hypergeom.sf(0, n_samples, correct, k))) for k in ks},
        "sampled_problems": len(some),
        "samples_per_problem": n_samples,
        "temperature": 1.0,
        "samples": [
            {"question": q, "completion": text, "right": ok} for q, text, ok in zip(questions[:16], greedy, right)
        ],
    }


def _is_right(text: str, item: Item) -> bool:
    return final_answer(text) == item.fields["final_answer"]


def _by_field(items: Sequence[Item], right: Sequence[bool]) -> dict[str, dict[str, float]]:
    graded = ("steps", "size", "kind", "n_people", "n_links", "asked_in_training")
    found: dict[str, dict[str, list[bool]]] = {}
    for item, ok in zip(items, right):
        for name in graded:
            if name in item.fields:
                found.setdefault(name, {}).setdefault(str(item.fields[name]), []).append(ok)
    return {name: {value: float(np.mean(oks)) for value, oks in values.items()} for name, values in found.items()}
