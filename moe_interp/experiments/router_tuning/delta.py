"""What tuning changed, as a file, in a model in memory, and in a saved checkpoint."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from moe_interp.errors import ResultError
from moe_interp.experiments.identity.tensors import tensor_digest
from moe_interp.experiments.router_tuning.routers import named_tensors
from moe_interp.hooks.attach import MoEHooks, check_attached
from moe_interp.results.files import replacing

FORMAT = "moe_interp router delta 1"
HEADER = "moe_interp"


@dataclass(frozen=True, eq=False)
class RouterDelta:
    """Router weights before tuning, and what is added to them.

    The tuned weight is ``W + delta``, added in the number format of ``delta`` (float32, or float64 for a model of
    float64) and rounded to the model's own: the same bits wherever it is put together.

    Attributes:
        original: By parameter name, as in the model, in its number format.
        delta: By parameter name.
        fingerprint: Of all other parameters and buffers of the model: :func:`rest_of_model`.
        manifest: Where it comes from, plain JSON values.
    """

    original: Mapping[str, Tensor]
    delta: Mapping[str, Tensor]
    fingerprint: str
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def tuned(self, name: str) -> Tensor:
        """A tuned weight, in the model's number format."""
        return (self.original[name].to(self.delta[name]) + self.delta[name]).to(self.original[name].dtype)

    # -- in a model -------------------------------------------------------------------------------------------------
    def apply(self, moe: MoEHooks) -> None:
        """Put the tuned weights into the model.

        Raises:
            ResultError: another model, another number format, or a model that is tuned already; it stays as it is.
        """
        self._write(moe, {name: self.original[name] for name in self.delta}, {n: self.tuned(n) for n in self.delta})

    def revert(self, moe: MoEHooks) -> None:
        """Put the weights of before tuning back, bit for bit.

        Raises:
            ResultError: another model, or one that these weights are not in; it stays as it is.
        """
        self._write(moe, {n: self.tuned(n) for n in self.delta}, {name: self.original[name] for name in self.delta})

    @torch.no_grad()
    def _write(self, moe: MoEHooks, expected: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
        check_attached(moe)
        there = dict(named_tensors(moe))
        if lacking := [name for name in self.delta if name not in there]:
            raise _another(f"a model without the parameter {lacking[0]!r}")
        for name, value in expected.items():
            if not _is_same(there[name], value):
                state = "tuned already" if _is_same(there[name], new[name]) else "another one"
                raise _another(f"a model whose {name} ({there[name].dtype}) is {state}")
        if rest_of_model(moe, self.delta) != self.fingerprint:
            raise _another("a model of which other weights than the tuned routers' differ")
        for name, value in new.items():
            there[name].copy_(value)

    # -- in a file --------------------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> Path:
        """Write a safetensors file: ``delta.<parameter>`` and ``original.<parameter>``, manifest and fingerprint.

        Raises:
            ResultError: the file cannot be written.
        """
        target = Path(path)
        target = target if target.suffix else target.with_suffix(".safetensors")
        header = {"format": FORMAT, "fingerprint": self.fingerprint, "manifest": dict(self.manifest)}
        tensors = {f"delta.{name}": value.contiguous() for name, value in self.delta.items()}
        tensors |= {f"original.{name}": value.contiguous() for name, value in self.original.items()}
        header["checksum"] = _checksum(tensors)
        content = save(tensors, metadata={HEADER: json.dumps(header)})
        with replacing(target) as file:
            file.write(content)
        return target

    @classmethod
    def load(cls, path: str | Path) -> RouterDelta:
        """The delta that :meth:`save` wrote.

        Raises:
            ResultError: no such file, damaged, or another kind of file.
        """
        expected, remedy = "a delta that moe_interp wrote", "Restore it from a copy, or tune again."
        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {})[HEADER])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if header["format"] != FORMAT or header["checksum"] != _checksum(tensors):
                raise ValueError("another format, or tensors that were changed")
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            given = f"{str(path)!r} cannot be read as a router delta ({type(error).__name__}: {error})"
            raise ResultError(given, expected, remedy) from error
        parts = {
            kind: {n.removeprefix(kind): t for n, t in tensors.items() if n.startswith(kind)}
            for kind in ("delta.", "original.")
        }
        return cls(parts["original."], parts["delta."], header["fingerprint"], header["manifest"])

    # -- in a checkpoint --------------------------------------------------------------------------------------------
    def merge(self, checkpoint: str | Path, out: str | Path | None = None) -> Path:
        """Put the tuned weights into a saved transformers checkpoint; ``from_pretrained`` alone then loads it.

        A weight is found by its name, or by its values where the checkpoint names it otherwise, and only if it is the
        one that was tuned. It is written in the number format of the model that was tuned: load with that ``dtype``.

        Args:
            checkpoint: A folder with ``config.json`` and safetensors files.
            out: A new folder for the merged checkpoint; the checkpoint itself is changed by default.

        Returns:
            The folder of the merged checkpoint.

        Raises:
            ResultError: no checkpoint, one of another model, a folder that is there already, or one that cannot be
                written: no new folder is left then.
        """
        folder = Path(checkpoint)
        places = self._places(folder)
        if out is None:
            self._write_into(folder, places)
            return folder
        target = Path(out)
        if target.exists():
            raise ResultError(f"{str(target)!r} is there already", "a new folder", "Choose another, or remove it.")
        unfinished = target.with_name(f".{target.name}.part")  # a folder of the final name is a merged checkpoint
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(folder, unfinished)
            self._write_into(unfinished, places)
            unfinished.rename(target)
        except OSError as error:  # of copytree, a list of them
            raise ResultError(
                f"{str(target)!r} could not be written: {error.strerror or error}",
                "a folder with room for a checkpoint and permission to write",
                "Free space or choose another path.",
            ) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return target

    def _write_into(self, folder: Path, places: Mapping[str, tuple[str, str]]) -> None:
        """Put the tuned weights into the files of a checkpoint, one file after the other."""
        for name in sorted({file for file, _ in places.values()}):
            tensors, metadata = _read(folder / name)
            for parameter, (file, key) in places.items():
                if file == name:
                    tensors[key] = self.tuned(parameter).contiguous()
            with replacing(folder / name) as written:
                written.write(save(tensors, metadata=metadata))

    def _places(self, folder: Path) -> dict[str, tuple[str, str]]:
        """By parameter, the file and the name of the tensor in it that is this parameter before tuning."""
        files = sorted(folder.glob("*.safetensors"))
        if not files or not (folder / "config.json").is_file():
            raise ResultError(
                f"{str(folder)!r} without config.json or safetensors files",
                "a folder written by save_pretrained",
                "Save the model with transformers first.",
            )
        found: dict[str, list[tuple[str, str]]] = {name: [] for name in self.delta}
        for path in files:
            tensors, _ = _read(path)
            for key, tensor in tensors.items():
                for name in found:
                    original = self.original[name]
                    if tensor.shape == original.shape and torch.equal(original.to(tensor.dtype), tensor):
                        found[name].append((path.name, key))
        for name, hits in found.items():
            found[name] = [hit for hit in hits if hit[1] == name] or hits
            if len(found[name]) != 1:
                raise _another(f"a checkpoint in {str(folder)!r} with {len(hits)} tensors like the untuned {name}")
        return {name: hits[0] for name, hits in found.items()}


def rest_of_model(moe: MoEHooks, without: Any) -> str:
    """A checksum of the values of all parameters and buffers but those of these names.

    Rotary frequencies are left out: passes of another length may set them anew.
    """
    return everything(moe, without)[0]


def everything(moe: MoEHooks, without: Any = ()) -> tuple[str, dict[str, str]]:
    """The checksum of :func:`rest_of_model`, and each tensor's own by name."""
    parts = {
        name: tensor_digest(tensor)
        for name, tensor in named_tensors(moe)
        if name not in without and not name.endswith("inv_freq") and not tensor.is_meta
    }
    return hashlib.sha256(json.dumps(sorted(parts.items())).encode()).hexdigest(), parts


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other.to(one.device))


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(json.dumps(sorted((n, tensor_digest(t)) for n, t in tensors.items())).encode()).hexdigest()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ResultError(f"{str(path)!r} cannot be read ({error})", "a safetensors file", "Save it again.") from error


def _another(given: str) -> ResultError:
    return ResultError(
        given,
        "the very model that was tuned, in the same number format and state",
        "Load that model, or tune this one.",
    )
