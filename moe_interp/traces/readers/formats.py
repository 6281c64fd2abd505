"""From a format's name to its reader."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_interp.errors import ConfigError, DataError, ResultError
from moe_interp.traces.files import WRITERS, read_trace_file
from moe_interp.traces.readers.columns import Layers, experts_of, labelled
from moe_interp.traces.readers.esft import read_esft
from moe_interp.traces.readers.megatron import read_megatron
from moe_interp.traces.readers.router_logits import read_router_logits
from moe_interp.traces.readers.sglang import read_sglang
from moe_interp.traces.readers.vllm import read_vllm

READERS: dict[str, Callable[..., dict[str, Any]]] = {
    "esft": read_esft,
    "vllm": read_vllm,
    "sglang": read_sglang,
    "megatron": read_megatron,
    "transformers": read_router_logits,
}
OF_TRACES = ("token_ids", "predicted_ids", "domain")


def read_arguments(
    path: str | Path, format: str | None, n_experts: int | None, layers: Layers, options: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of ``RoutingTrace.from_arrays`` that a file or folder holds.

    Raises:
        ConfigError: an option that the format does not have.
        ResultError, DataError: as the reader of the format.
    """
    if format not in READERS:
        return _of_our_file(path, format, n_experts, layers, options)
    reader = READERS[format]
    known = set(inspect.signature(reader).parameters) - {"path", "n_experts", "layers"}
    own = {name: value for name, value in options.items() if name in known}
    rest = {name: value for name, value in options.items() if name not in known}
    _refuse_unknown(rest, set(OF_TRACES), known | set(OF_TRACES), format)
    return reader(path, n_experts, layers, **own) | rest


def _of_our_file(
    path: str | Path, format: str | None, n_experts: int | None, layers: Layers, options: dict[str, Any]
) -> dict[str, Any]:
    """A file that ``save`` wrote, which says its layers and experts: those given must be among it."""
    known = {"moe", *OF_TRACES}
    _refuse_unknown(options, known, known, format or Path(path).suffix.removeprefix("."))
    if format is not None and format not in WRITERS:
        raise ResultError(
            f"Trace format {format!r} for {str(path)!r}",
            f"one of {', '.join((*WRITERS, *READERS))}",
            "Choose the tool that wrote the file.",
        )
    arguments, moe = read_trace_file(path, format), options.pop("moe", None)
    if n_experts is not None or moe is not None:
        count = experts_of(n_experts, moe)
        if count != arguments["n_experts"]:
            raise DataError(f"{path} of {arguments['n_experts']} experts", f"{count}", "Leave n_experts out.")
    if layers is not None or moe is not None:
        arguments["layers"], columns = labelled(arguments["layers"], layers, moe)
        for name in ("expert_indices", "expert_weights", "expert_norms", "router_logits", "router_inputs"):
            if arguments.get(name) is not None:
                arguments[name] = arguments[name][:, columns]
    return arguments | options


def _refuse_unknown(given: dict[str, Any], known: set[str], all_known: set[str], format: str) -> None:
    if unknown := sorted(set(given) - known):
        raise ConfigError(
            f"option {unknown[0]!r} for format {format!r}", f"one of {', '.join(sorted(all_known))}", "Leave it out."
        )
