"""The chapter of the geometry of routing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import pandas as pd

from moe_interp.plots import geometry
from moe_interp.report.html import html_table, with_intervals
from moe_interp.report.page import Chapter, Section, render_page, section
from moe_interp.results.tables import GeometryTables

_FINDINGS = (
    'What "The Myth of Expert Specialization in MoEs" reports, and what this run says of it. A verdict rests on an '
    "interval over sequences; which interval, and what counts as near, is in the documentation of the findings."
)


def geometry_chapter(result: GeometryTables, title: str = "The geometry of routing") -> Chapter:
    """Findings, figures and tables. Every number comes from a table of the result."""
    sections = [
        section(
            "similarity",
            "Do similar states route alike?",
            "A point is a pair of tokens of different sequences. Correlation: over pairs, of tokens and of sequences "
            "(cosine of expert counts against cosine of mean router inputs). p: sequences permuted whole (Mantel).",
            partial(geometry.similarity_scatter, result),
            lambda: with_intervals(_named(result.similarity(), "correlation")),
        ),
        section(
            "explained",
            "How much of that is geometry?",
            "The share of route similarity that a linear map of the states reproduces, cov(s, g) / var(s): the "
            "router's own weights (1 by construction where nothing else decides, so no finding), random routers on "
            "the same states, and random routers on whitened states. Of random: what random routers explain of one "
            "another.",
            tabulate=lambda: with_intervals(_named(result.explained(), "explained")),
        ),
        section(
            "bound",
            "The linear bound",
            "The distance of two tokens' logits is at most the largest singular value of the router on the states' "
            "subspace times the distance of their states. Tightness: the share of the bound that a pair uses, the "
            "median with 5% and 95% of pairs; converse: the same for the bound below; seen: the share of a difference "
            "that can move a logit at all.",
            partial(geometry.bound_scatter, result),
            lambda: _bound(result),
        ),
        section(
            "shared-direction",
            "Is the shared direction suppressed?",
            "Length of the centred logits for an input of length 1: along the mean of all inputs, along random "
            "directions, along the first principal axis, and of what is not shared. Ratio: of shared to random, over "
            "all tokens.",
            partial(geometry.shared_direction, result),
            lambda: _gains(result),
        ),
        section(
            "depth-overlap",
            "Who shares experts, by depth?",
            f"Overlap of the experts of two inputs ({result.data.attrs.get('depth_pairs', 'pairs of sequences')}) and, "
            "where measured, of one token in two contexts, of prompt and generation, and of two models.",
            partial(geometry.depth_overlap, result),
            lambda: with_intervals(result.depth()),
        ),
        section(
            "layer-agreement",
            "Do layers agree?",
            "Experts of two layers have no correspondence; compared is which sequences share experts.",
            partial(geometry.layer_agreement, result),
        ),
        section(
            "layer-overlap",
            "Do two layers use one set of experts?",
            "Overlap of the experts that a sequence uses at two layers (and, with a second model, at a layer of each), "
            "after experts are matched, as the title says. By usage: found on one half of the sequences, measured on "
            "the other. 1 on the diagonal of one model by construction.",
            partial(geometry.layer_overlap, result),
        ),
    ]
    for name, heading, tabulate in (
        ("contexts", "The same token in two contexts", result.contexts),
        ("phases", "Prompt and generation", result.phases),
        ("answers", "Two models", result.answers),
    ):
        if _MARKS[name] in result.data:
            sections.append(section(name, heading, "", tabulate=partial(_intervals_of, tabulate)))
    return Chapter(
        title,
        result.summary(),
        (Section("The five findings", _FINDINGS, table=html_table(_findings(result))), *sections),
        headlines=tuple(result.headlines()),
        manifest=getattr(result, "manifest", None),
    )


_MARKS = {"contexts": "same_token", "phases": "phase_same", "answers": "answer_same"}


def geometry_page(result: GeometryTables, *, extra: Mapping[str, str] | None = None) -> str:
    """A page of this chapter alone; ``extra`` as in :func:`moe_interp.report.render_page`."""
    return render_page([geometry_chapter(result)], model=result.data.attrs.get("model", ""), extra=extra)


def _bound(result: GeometryTables) -> pd.DataFrame:
    """The table of the bound; its brackets hold 5% and 95% of the pairs, and are no intervals."""
    names = {"bound_upper": "upper", "bound_lower": "lower", "converse_violations": "converse broken"}
    names |= {"violations": "broken"} | {f"converse_tightness{s}": f"converse{s}" for s in ("", "_low", "_high")}
    table = result.bound().drop(columns=["even_gain", "bound_rank"]).rename(columns=names)
    return with_intervals(table).rename(columns=lambda name: str(name).replace("[95%]", "[5%, 95%]"))


def _gains(result: GeometryTables) -> pd.DataFrame:
    """The gains; the bracket at random directions holds 95% of them."""
    names = {"shared_gain": "shared", "random_gain": "random", "centred_gain": "not shared"}
    names["first_component"] = "first axis"
    table = result.shared_direction().drop(columns=["centred_rms", "mean_norm"]).rename(columns=names)
    return with_intervals(table)


def _named(table: pd.DataFrame, name: str) -> pd.DataFrame:
    return table.rename(columns={"low": f"{name}_low", "high": f"{name}_high"})


def _intervals_of(tabulate: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    return with_intervals(tabulate())


def _findings(result: GeometryTables) -> pd.DataFrame:
    return with_intervals(result.findings().rename(columns={"low": "estimate_low", "high": "estimate_high"}))
