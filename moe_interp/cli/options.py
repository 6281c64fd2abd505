"""Options of one meaning in every command, and their checks, which need nothing heavy.

A command first checks everything here that can be checked without a model, and imports what it works with only then.
"""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from moe_interp.errors import ConfigError, DataError, ResultError

DEMO = "demo"
# What the library accepts, in words: the modules that say so load torch. A test compares them.
DTYPES = ("float32", "bfloat16", "float16", "float64")
AUTO = "auto"
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
MODES = ("force", "ablate")
METHODS = ("auto", "branch", "naive")
CHECKERS = ("number", "choice", "exact", "math")
SAMPLERS = ("gumbel", "uniform", "one-swap", "all")
FAMILIES = (
    *("mixtral", "olmoe", "flex_olmo", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe"),
    *("qwen3_vl_moe", "gpt_oss", "granite_moe", "granite_moe_hybrid", "jetmoe", "deepseek_v2"),
    *("deepseek_v3", "deepseek_v4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "nemotron_h"),
    *("ernie4_5_moe", "lfm2_moe", "minimax_m2", "afmoe", "laguna", "phimoe", "llama4"),
    *("switch_transformers", "gemma4", "jamba"),
)
STRATEGIES = (
    *("none", "micro_batch", "sequence", "global", "global_running", "z_loss", "block_loss", "loss_free"),
    *("sigmoid", "expert_choice", "hash", "random", "capacity", "reference"),
)
DOMAINS = ("arithmetic", "facts", "puzzles", "lookups", "code")
PRECISIONS = ("no", "bf16")
PRESETS = ("smoke", "demo", "paper")
DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla", "npu")


def completes(known: Collection[str]) -> Callable[[str], list[str]]:
    """What the shell offers for an option's value."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in known if name.startswith(incomplete)]

    return complete


Model = Annotated[str, typer.Option("--model", "-m", help="A hub name, a local folder, or 'demo'.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the result, the figures and the page.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; by default the best there is.")]
Dtype = Annotated[
    str,
    typer.Option(
        help=f"{', '.join(DTYPES)}, or auto: the checkpoint's own on a GPU, float32 on a CPU.",
        autocompletion=completes((AUTO, *DTYPES)),
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="Spread the model over several devices and, if need be, the CPU: auto, or another of accelerate's ways.",
        autocompletion=completes(DEVICE_MAPS),
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
First = Annotated[int | None, typer.Option(help="Use the first N of each domain, or of each file without domains.")]
PromptField = Annotated[str, typer.Option(help="The field of the files that holds the prompt.", metavar="NAME")]
AnswerField = Annotated[
    str, typer.Option(help="The field of the files that is scored after the prompt, e.g. trajectory.", metavar="NAME")
]
DomainField = Annotated[str, typer.Option(help="The field of the files that names the domain, if any.", metavar="NAME")]
Layers = Annotated[
    list[str] | None, typer.Option(help="MoE layers, e.g. 0,3,-1 or encoder.1; all by default.", metavar="LAYERS")
]
Memory = Annotated[
    float | None, typer.Option(help="Memory a pass may use, in GiB; by default what is free (on a CPU half of it).")
]
Resume = Annotated[bool, typer.Option(help="Go on with the finished cells in --out.")]


def nearest(given: str, known: Iterable[str]) -> str:
    """``Did you mean force?`` where a known name is near; else nothing."""
    from difflib import get_close_matches  # a tenth of the start, for mistakes alone

    names = {name.lower(): name for name in known}
    found = get_close_matches(given.lower(), list(names), n=1)
    return f"Did you mean {names[found[0]]}?" if found else ""


def check_one_of(option: str, value: str, known: Sequence[str], kind: str = "") -> None:
    """Refuse a word that is none of these.

    Raises:
        ConfigError: with the one that was probably meant.
    """
    if value not in known:
        expected = f"one of {', '.join(known)}"
        raise ConfigError(f"{option} {value}", expected, nearest(value, known) or f"Choose {kind or 'one'}.")


def check_number(option: str, value: int | None, least: int = 1, expected: str = "") -> None:
    """Refuse a whole number that is too small, or beyond 64 bits.

    Raises:
        ConfigError: it is.
    """
    if value is not None and not least <= value < 2**63:
        raise ConfigError(f"{option} {value}", expected or f"a whole number of at least {least}", "Choose another.")


def check_positive(option: str, value: float | None, unit: str = "") -> None:
    """Refuse what is not a finite number above 0.

    Raises:
        ConfigError: it is not.
    """
    if value is not None and not (math.isfinite(value) and value > 0):
        expected = f"a positive number{' of ' + unit if unit else ''}"
        raise ConfigError(f"{option} {value}", expected, "Leave it out for the default.")


def check_seed(seed: int) -> None:
    """Refuse a seed beyond 64 bits.

    Raises:
        ConfigError: it is.
    """
    check_number("--seed", seed, -(2**63), "a whole number of 64 bits")


def check_device(device: str | None) -> None:
    """Refuse what is no name of a device; whether this machine has it shows later.

    Raises:
        ConfigError: a kind that torch does not know, or a number that is none.
    """
    if device is None:
        return
    kind, colon, number = device.partition(":")
    if kind not in DEVICES or (colon and not number.isdecimal()):
        expected = "a device such as cpu, cuda, cuda:1 or mps"
        raise ConfigError(f"--device {device}", expected, nearest(kind, DEVICES) or "Leave it out for the best one.")


def check_dtype(dtype: str) -> None:
    """Refuse an unknown number format.

    Raises:
        ConfigError: it is.
    """
    check_one_of("--dtype", dtype, (*DTYPES, AUTO), "a number format")


def check_device_map(device_map: str | None, device: str | None) -> None:
    """Refuse an unknown way of spreading a model, and one beside a single device.

    Raises:
        ConfigError: it is.
    """
    if device_map is None:
        return
    check_one_of("--device-map", device_map, DEVICE_MAPS, "a way of spreading")
    if device is not None:
        raise ConfigError(f"both --device {device} and --device-map {device_map}", "at most one", "Leave one out.")


def check_common(model: str, device: str | None, dtype: str, seed: int, out: Path | None = None) -> None:
    """The checks of the options that every command with a model has.

    Raises:
        MoEInterpError: one of them cannot be meant.
    """
    check_seed(seed)
    check_dtype(dtype)
    check_device(device)
    check_model(model)
    if out is not None:
        check_out(out)


def memory_bytes(gib: float | None) -> int | None:
    """``--memory`` in bytes.

    Raises:
        ConfigError: not a positive number.
    """
    check_positive("--memory", gib, "GiB")
    if gib is None:
        return None
    if gib >= 2**33:  # 64 bits of bytes
        raise ConfigError(f"--memory {gib:g}", "a positive number of GiB, below 2**33", "Leave it out for the default.")
    return int(gib * 2**30)


def layer_names(layers: list[str] | None) -> list[str] | None:
    """``--layers`` such as "0, 3,-1", given once or repeatedly; None for all.

    Raises:
        ConfigError: not of this form.
    """
    if layers is None:
        return None
    named = [part.strip() for given in layers for part in given.split(",")]
    for name in named:
        if not re.fullmatch(r"((encoder|decoder)\.)?-?[0-9]{1,6}", name):
            expected = "layers such as 0,3,-1, or encoder.1 of an encoder-decoder"
            raise ConfigError(f"--layers {','.join(layers)}", expected, "Separate them by commas.")
    return named


def expert_sets(experts: str | None) -> list[int | tuple[int, ...]] | None:
    """``--experts`` such as "0,1,2+5"; None for all.

    Raises:
        ConfigError: not of this form.
    """
    if experts is None:
        return None
    sets = []
    for part in experts.split(","):
        if not re.fullmatch(r"\s*[0-9]{1,6}(\s*\+\s*[0-9]{1,6})*\s*", part):
            raise ConfigError(f"--experts {experts}", "ids such as 0,1,2+5", "Separate sets by commas.")
        sets.append(tuple(int(expert) for expert in part.split("+")))
    return [one[0] if len(one) == 1 else one for one in sets]


def token_ids(tokens: str | None) -> list[int] | None:
    """``--tokens`` such as "12,7,99"; None where there are none.

    Raises:
        ConfigError: not of this form.
    """
    if tokens is None:
        return None
    parts = [part.strip() for part in tokens.split(",")]
    if not all(part.isdecimal() and part.isascii() and len(part) < 10 for part in parts):
        raise ConfigError(f"--tokens {tokens!r}", "integers separated by commas", "Write them as 12,7,99.")
    return [int(part) for part in parts]


def names_of(option: str, text: str | None, example: str) -> list[str] | None:
    """Names separated by commas; None for all.

    Raises:
        ConfigError: no name, or an empty one.
    """
    if text is None:
        return None
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        raise ConfigError(f"{option} {text!r}", f"names such as {example}", "Separate them by commas.")
    return names


def inputs(option: str, files: list[str] | None, model: str, fields: str) -> list[str]:
    """The files to read, each of which is there; the bundled data of the bundled model where none is named.

    Raises:
        ConfigError: none is named.
        DataError: one is not a file, or cannot be read.
    """
    named = files or ([DEMO] if model == DEMO else [])
    if not named:
        raise ConfigError(f"no {option[2:]}", f"{option} FILE.jsonl ({fields})", f"Or use {option} {DEMO}.")
    for name in named:
        if name == DEMO:
            continue
        path, expected = Path(name).expanduser(), f"a file of JSON lines ({fields}), or '{DEMO}'"
        if not name or os.path.isdir(path) or not exists(path):
            raise DataError(f"{option} {name or repr(name)}, which is not a file", expected, "Check the path.")
        if not os.access(path, os.R_OK):
            raise DataError(f"{option} {name}, which may not be read", expected, "Check its permissions.")
    return named


def field_names(files: list[str], **names: str) -> dict[str, str]:
    """What the fields are called in the files, as arguments of the readers.

    Args:
        files: The inputs.
        names: The name of each, by ``prompt_field``, ``answer_field`` and the like.

    Raises:
        ConfigError: an empty name, or another than usual where no file is read.
    """
    for field, name in names.items():
        option = "--" + field.replace("_", "-")
        if not name.strip():
            raise ConfigError(f"{option} {name!r}", "the name of a field", "Leave it out for the usual one.")
        if name != field.removesuffix("_field") and all(file == DEMO for file in files):
            raise ConfigError(f"{option} {name} with the bundled data", "a field of your own files", "Leave it out.")
    return names


def check_out(out: Path) -> None:
    """Refuse, before anything runs, a folder that cannot be one or be written to.

    Raises:
        ResultError: it is a file, would lie in one, may not be written to, or has too long a name.
    """
    try:
        os.lstat(out)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ResultError(f"--out {str(out)[:60]}...", "a name that is not too long", "Shorten it.") from error
    expected, there = "a folder to write to", next((path for path in (out, *out.parents) if exists(path)), None)
    if there is not None and not os.path.isdir(there):
        raise ResultError(f"{str(there)!r} is a file", expected, "Choose another folder, or move the file away.")
    if there is not None and not os.access(there, os.W_OK | os.X_OK):
        raise ResultError(f"--out {out}: {str(there)!r} may not be written to", expected, "Choose another folder.")


def check_model(model: str) -> None:
    """Refuse a name that is neither a folder of a checkpoint nor can be of the hub.

    Raises:
        ConfigError: an empty name, a path that is not there, or a folder without a configuration.
    """
    if model == DEMO:
        return
    expected = "a folder with a transformers checkpoint, a hub name such as allenai/OLMoE-1B-7B-0924, or 'demo'"
    if not model.strip():
        raise ConfigError(f"--model {model!r}", expected, "Name a model.")
    looks_local = model.startswith((".", "/", "~")) or "\\" in model or model.count("/") > 1
    path = Path(model).expanduser()
    if os.path.isdir(path):
        if not os.path.isfile(path / "config.json"):
            raise ConfigError(
                f"the folder {model} without a config.json",
                "a folder written by save_pretrained",
                "Give the folder that holds config.json and the weights.",
            )
    elif looks_local or exists(path):
        raise ConfigError(f"the path {model}, which is not a folder that exists", expected, "Correct the path.")


def exists(path: str | Path) -> bool:
    """False also for what cannot be a path, such as a very long one."""
    return os.path.exists(path)
