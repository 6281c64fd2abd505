"""The base of every result: a labelled dataset and a manifest, in one netCDF file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
import xarray as xr

import moe_interp
from moe_interp import RESULT_KINDS
from moe_interp.errors import ResultError
from moe_interp.results.content import content_checksum, read_netcdf, refuse_unstorable, write_netcdf
from moe_interp.results.files import replacing
from moe_interp.results.manifest import Manifest, describe, plain
from moe_interp.results.seals import read_sealed, sealed
from moe_interp.results.views import draw, write_report

CONTAINER = 2  # how dataset and manifest share a file; a class adds its own `version`
SLOT = "slot"  # the axis of a route's experts
MANIFEST, ATTRS = "moe_interp_manifest", "moe_interp_attrs"
RERUN = "Restore it from a copy, or run the experiment again."


class Result:
    """Labelled numbers of an experiment, kept per example, with their origin.

    A subclass names its kind, ``class IsolationResult(Result, kind="isolation")``, and adds what derives from
    ``data``; it raises ``version`` when the variables of ``data`` change their meaning.

    Args:
        data: Variables on named axes. ``data.attrs`` may hold any JSON value, a variable's ``attrs`` text and numbers.
        config: The options of the run.
        seeds: One seed, or seeds by name.
        data_checksum: :func:`moe_interp.results.checksum` of the items that went in.
        manifest: The manifest of a loaded file, instead of the three above.
    """

    kind: ClassVar[str] = "dataset"
    version: ClassVar[int] = 1
    main: ClassVar[str | None] = None  # the variable that `to_dataframe` is about; the first where None
    registry: ClassVar[dict[str, type[Result]]] = {}

    def __init_subclass__(cls, kind: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind is not None:
            cls.kind = kind
            Result.registry[kind] = cls

    def __init__(
        self,
        data: xr.Dataset,
        *,
        config: Mapping[str, Any] | None = None,
        seeds: Mapping[str, int] | int | None = None,
        data_checksum: str | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        self.check(data)
        self.data = data
        self._tables: dict[tuple[Any, ...], pd.DataFrame] = {}
        self.manifest = manifest or describe(self.kind, self.schema(), config, seeds, data_checksum)

    @staticmethod
    def check(data: xr.Dataset) -> None:
        """Refuse a dataset that is not one of this kind; a subclass says what it needs."""

    def cached(self, compute: Callable[..., pd.DataFrame], *args: Any) -> pd.DataFrame:
        """``compute(data, *args)``, computed once; a copy, so that nobody changes what the next caller gets."""
        key = (compute.__qualname__, *args)
        if key not in self._tables:
            self._tables[key] = compute(self.data, *args)
        return self._tables[key].copy()

    @classmethod
    def schema(cls) -> str:
        """Version of the file's layout and of this class' variables."""
        return f"{CONTAINER}.{cls.version}"

    def save(self, path: str | Path) -> Path:
        """Write dataset and manifest to one netCDF 4 file, and return its path.

        The file appears whole or not at all: after a full disk or Ctrl-C an earlier file of that name is unchanged. An
        existing folder gets the file ``<kind>.nc``. The manifest is the JSON attribute ``moe_interp_manifest``. The
        last line of the file is a checksum of its bytes, which readers of netCDF pass over.

        Raises:
            ResultError: The file cannot be written, its name has a suffix of another format, an attribute has no
                JSON form, or a text cannot be stored.
        """
        target = Path(path)
        if target.is_dir():
            target = target / f"{self.kind}.nc"
        if target.suffix not in ("", ".nc"):
            raise ResultError(
                f"{str(target)!r} with the suffix {target.suffix}",
                "a name that ends in .nc: a result is a netCDF file",
                f"Save it as {target.stem}.nc; to_dataframe().to_csv(path) writes a table.",
            )
        refuse_unstorable(self.data)
        manifest = Manifest(**{**self.manifest.__dict__, "content_checksum": content_checksum(self.data)})
        stored = self.data.copy(deep=False)
        stored.attrs = {MANIFEST: manifest.to_json(), ATTRS: json.dumps(self.data.attrs, default=plain)}
        content = sealed(write_netcdf(stored))
        with replacing(target) as file:
            file.write(content)
        return target

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """:func:`load_result`, refusing a result of another kind.

        Raises:
            ResultError: As :func:`load_result`; or the file holds another kind of result.
        """
        result = load_result(path)
        if not isinstance(result, cls):
            raise ResultError(
                f"{str(path)!r} holds a result of kind {result.kind!r}",
                f"kind {cls.kind!r}",
                "Load it with moe_interp.load_result, which returns the right class.",
            )
        return result

    def to_dataframe(self, *variables: str) -> pd.DataFrame:
        """One row per labelled value.

        Routes are text, the ids of their experts in order of rank; the variable ``route`` is the column ``experts``,
        beside the number of the route.

        Args:
            variables: Names of the variables wanted, broadcast against each other. Without any: the main variable, and
                every variable on some of its axes.

        Raises:
            ResultError: A name that is not a variable of ``data``.
        """
        known = [
            str(name) for name in self.data.variables if name not in self.data.coords or _is_own_axis(self.data, name)
        ]
        if unknown := [name for name in variables if name not in known]:
            raise ResultError(f"Variable {unknown[0]!r}", ", ".join(known), "Choose one of these.")
        routes = [name for name in known if _is_route(self.data, name)]
        if not variables:
            axes = set(self.data[self.main or known[0]].dims)
            axes_of = {name: set(self.data[name].dims) - ({SLOT} if name in routes else set()) for name in known}
            variables = tuple(name for name in known if axes_of[name] <= axes)
        data = self.data.drop_vars(routes)
        columns = {name: "experts" if _is_own_axis(self.data, name) else name for name in variables}
        for name in set(routes) & set(variables):
            data[columns[name]] = _as_text(self.data.variables[name])
        chosen = data[list(columns.values())]
        frame = chosen.to_dataframe() if chosen.dims else pd.DataFrame([{n: chosen[n].item() for n in chosen}])
        return frame.reset_index() if chosen.dims else frame

    def plot(self, name: str | None = None, **options: Any) -> Any:
        """A figure of the result, which a notebook shows as it is; ``moe_interp.plots.save_figure`` writes it.

        Args:
            name: Of the figure; the first of this kind's by default. ``moe_interp.plots.FIGURES[kind]`` lists them.
            options: Of the figure's function, such as ``baseline``.

        Returns:
            A matplotlib ``Figure``.

        Raises:
            ConfigError: No figure of that name, or none at all for this kind of result.
            DataError: The data cannot bear this figure.
        """
        return draw(self, self.kind, name, options)

    def report(self, path: str | Path) -> Path:
        """Write a page of the result, one HTML file that needs nothing else, and return its path.

        An existing folder gets the file ``index.html``.

        Raises:
            ResultError: The file cannot be written.
        """
        return write_report(self, self.kind, path)

    def summary(self) -> str:
        """What it is, on which axes, and from where, in a few lines of text."""
        axes = ", ".join(f"{size} {name}" for name, size in self.data.sizes.items())
        origin = f"moe_interp {self.manifest.moe_interp}, {self.manifest.created}"
        return f"{type(self).__name__} ({self.kind}): {axes}\nvariables: {', '.join(map(str, self.data))}\n{origin}"

    def __repr__(self) -> str:
        return self.summary()


Result.registry[Result.kind] = Result


def load_result(path: str | Path) -> Result:
    """The result that :meth:`Result.save` wrote, as the class of its kind. The data are read into memory.

    Args:
        path: The file, or a folder that holds one result file.

    Raises:
        ResultError: No such file; not a result; damaged; of a schema or a kind that this version does not know.
    """
    source = result_file(path)
    manifest, data = read_result_file(source)
    cls = result_class(manifest.kind, source)
    if manifest.schema != cls.schema():
        raise ResultError(
            f"{str(source)!r} was written by moe_interp {manifest.moe_interp} with schema {manifest.schema}",
            f"schema {cls.schema()} of kind {cls.kind!r}, which moe_interp {moe_interp.__version__} reads",
            f"Install moe_interp {manifest.moe_interp} to read it, or run the experiment again.",
        )
    if manifest.content_checksum != content_checksum(data):
        raise ResultError(
            f"{str(source)!r} does not hold the numbers, labels and attributes that were saved",
            f"content with checksum {str(manifest.content_checksum)[:12]}",
            RERUN,
        )
    return cls(data, manifest=manifest)


def result_file(path: str | Path) -> Path:
    """The result file at ``path``, or the only ``*.nc`` file of the folder ``path``."""
    source = Path(path)
    if source.is_dir():
        found = sorted(source.glob("*.nc"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise ResultError(f"{str(source)!r} is a folder with the result files: {names}", "one", "Name the file.")
        return found[0]
    if not source.exists():
        raise ResultError(f"{str(source)!r} does not exist", "a file written by a result's save()", "Check the path.")
    return source


def read_result_file(source: Path) -> tuple[Manifest, xr.Dataset]:
    """Manifest and data of a result file, whatever its kind and schema."""
    content = read_sealed(source, "a result", RERUN)
    try:
        data = read_netcdf(content)
        manifest = Manifest.from_json(data.attrs[MANIFEST])
        data.attrs = json.loads(data.attrs[ATTRS])
        if not isinstance(data.attrs, dict):
            raise TypeError(f"attributes that are a {type(data.attrs).__name__}")
        return manifest, data
    except Exception as error:  # HDF5 and what is built on it raise errors of any class
        raise ResultError(
            f"{str(source)!r} cannot be read as a result ({type(error).__name__}: {error})",
            "a netCDF file written by a result's save()",
            RERUN,
        ) from error


def result_class(kind: str, source: Path) -> type[Result]:
    """The class of a kind, importing the module that defines it."""
    if kind not in Result.registry and kind in RESULT_KINDS:
        import_module(RESULT_KINDS[kind])
    if kind not in Result.registry:
        raise ResultError(
            f"{str(source)!r} holds a result of kind {kind!r}",
            f"one of {', '.join(sorted({*Result.registry, *RESULT_KINDS}))}",
            "Import the module that defines this kind, or a version of moe_interp that has it.",
        )
    return Result.registry[kind]


def _is_own_axis(data: xr.Dataset, name: Any) -> bool:
    """Whether a variable of several axes is called as one of them, which makes it a coordinate."""
    return name in data.variables[name].dims and data.variables[name].ndim > 1


def _is_route(data: xr.Dataset, name: str) -> bool:
    return SLOT in data.variables[name].dims and data.variables[name].dtype.kind in "iu"


def _as_text(routes: xr.Variable) -> xr.Variable:
    """Expert ids along the slots, in order of rank, as text; empty for no route."""
    routes = routes.transpose(..., SLOT)
    known, which = np.unique(routes.values.reshape(-1, routes.shape[-1]), axis=0, return_inverse=True)
    texts = np.array([" ".join(str(e) for e in row if e >= 0) for row in known.tolist()], dtype=object)
    return xr.Variable(routes.dims[:-1], texts[which.reshape(-1)].reshape(routes.shape[:-1]))
