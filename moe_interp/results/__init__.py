"""Labelled results: save, load, to_dataframe, and the manifest that says where they come from."""

from moe_interp.results.base import Result, load_result
from moe_interp.results.files import replacing
from moe_interp.results.manifest import Manifest, checksum

__all__ = ["Manifest", "Result", "checksum", "load_result", "replacing"]
