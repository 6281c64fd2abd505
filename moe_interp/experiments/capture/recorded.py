"""What a capture to disk returns: where it is, and what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_interp.traces import RoutingTrace, read_parts
from moe_interp.traces.part_files import part_records, read_manifest


class RecordedRouting:
    """A recorded folder. Nothing of it is in memory until it is read.

    Args:
        path: A folder that ``capture_routing(out=...)`` wrote.

    Attributes:
        path: The folder.
        about: The model's name, layers, experts and top-k, and what is recorded.
        n_sequences, n_tokens, n_parts: What the finished parts hold.
        bytes: Size of the parts' files.
        sequence_ids: Of each sequence, in order.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.about: dict[str, Any] = read_manifest(self.path)["about"]
        records = part_records(self.path)
        self.n_parts, self.n_tokens = len(records), sum(record["tokens"] for record in records)
        self.bytes = sum(record.get("bytes", 0) for record in records)
        self.sequence_ids: list[str] = [name for record in records for name in record["sequences"]]

    @property
    def n_sequences(self) -> int:
        return len(self.sequence_ids)

    def parts(self) -> Iterator[RoutingTrace]:
        """See :func:`moe_interp.traces.read_parts`."""
        return read_parts(self.path)

    def read(self) -> RoutingTrace:
        """All parts as one trace in memory."""
        return RoutingTrace.read(self.path)

    def summary(self) -> str:
        """What was recorded, in words."""
        about = self.about
        stack = f" of the {about['stack']}" if about["stack"] else ""
        of_model = f"{about['model']}: {len(about['layers'])} MoE layers{stack}, {about['n_experts']} experts"
        lines = [
            f"{of_model}, top-{about['top_k']}.",
            f"{self.n_tokens} tokens in {self.n_sequences} sequences, {', '.join(about['recorded'])}.",
        ]
        if self.bytes:
            a_token = self.bytes / max(self.n_tokens, 1)
            size = f"{self.bytes / 2**20:.1f} MiB" if self.bytes >= 2**20 else f"{self.bytes / 2**10:.1f} KiB"
            parts = "1 part" if self.n_parts == 1 else f"{self.n_parts} parts"
            lines.append(f"{size} in {parts}, {a_token:.0f} bytes a token.")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"RecordedRouting({str(self.path)!r}, {self.n_tokens} tokens in {self.n_sequences} sequences)"
