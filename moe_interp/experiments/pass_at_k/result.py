"""pass@K of problems: by problem, over problems with intervals, by domain, and against another run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike

from moe_interp.checks import check_whole
from moe_interp.errors import ConfigError, DataError, ResultError, warn
from moe_interp.results import Result, checksum
from moe_interp.stats import FEWEST_UNITS, adjust_p, bootstrap_interval, paired_permutation, pass_at_k, verdict
from moe_interp.stats.checks import FloatArray

POOLED = "all problems"
NO_SPREAD = 1e-12  # equal estimates may differ by rounding
SAMPLED_BY = ("temperature", "top_p", "max_new_tokens", "stop", "is_correct")


class OtherSamplingWarning(UserWarning):
    """Two runs that are compared drew or checked their completions in different ways."""


class PassAtKResult(Result, kind="pass_at_k"):
    """Completions that are right, by problem.

    ``data``: n[problem] completions, c[problem] right ones, n_errors[problem] whose check raised (not right), the
    estimate pass_at_k[problem, k]; and of a sampled run correct[problem, sample] (1, 0, or -1 where the check raised),
    n_tokens[problem, sample], is_cut[problem, sample] (ended by its length); ``domain(problem)``,
    ``content(problem)``, a checksum of prompt and answer.
    """

    main = "pass_at_k"

    @staticmethod
    def check(data: xr.Dataset) -> None:
        if missing := {"n", "c", "pass_at_k"} - {str(name) for name in data.data_vars}:
            raise ResultError(f"a dataset without {min(missing)}", "n, c and pass_at_k by problem", "Make it anew.")

    @classmethod
    def from_counts(
        cls,
        n: ArrayLike,
        c: ArrayLike,
        ks: Sequence[int] = (1, 8, 64),
        problems: Sequence[str] | None = None,
        domains: Sequence[str] | None = None,
    ) -> PassAtKResult:
        """A result of counts that were made elsewhere.

        Args:
            n, c: Completions of each problem, and how many of them are right; they broadcast.
            ks: The K, each at most the smallest n.
            problems, domains: Ids and domains; numbers, and one domain, by default.

        Raises:
            DataError: counts that are none, c > n, a K above an n, or names that are not of their number.
            ConfigError: no K, or one that is not a whole number of at least 1.
        """
        chosen = tuple(sorted(checked_ks(ks)))
        try:
            total, right = np.broadcast_arrays(np.atleast_1d(n), np.atleast_1d(c))
        except ValueError:
            given = f"n of shape {np.shape(n)} and c of shape {np.shape(c)}"
            raise DataError(given, "one of each a problem", "Give them the same length.") from None
        names = [str(i) for i in range(len(total))] if problems is None else list(map(str, problems))
        labels = ["all"] * len(total) if domains is None else list(map(str, domains))
        if (
            total.ndim != 1
            or not len(total)
            or len(names) != len(total)
            or len(labels) != len(total)
            or len(set(names)) < len(names)
        ):
            given = f"counts of shape {total.shape}, {len(names)} problems and {len(labels)} domains"
            raise DataError(
                given, "at least one problem, with one count, one id of its own and one domain each", "Correct them."
            )
        values = pass_at_k(total[:, None], right[:, None], np.array(chosen))
        data = xr.Dataset(
            {
                "pass_at_k": (("problem", "k"), values),
                "n": ("problem", total.astype(np.int64)),
                "c": ("problem", right.astype(np.int64)),
            },
            coords={"problem": names, "k": list(chosen), "domain": ("problem", labels), "content": ("problem", names)},
        )
        return cls(data, config={"ks": list(chosen)}, data_checksum=checksum(names))

    @property
    def ks(self) -> tuple[int, ...]:
        return tuple(int(k) for k in self.data["k"].values)

    def by_problem(self) -> pd.DataFrame:
        """A row a problem: domain, n, c, n_errors, and pass@K in a column for each K."""
        data = self.data
        columns: dict[str, Any] = {name: data[name].values for name in ("problem", "domain", "n", "c")}
        if "n_errors" in data:
            columns["n_errors"] = data["n_errors"].values
        columns |= {f"pass@{k}": data["pass_at_k"].sel(k=k).values for k in self.ks}
        return pd.DataFrame(columns)

    def curve(self, ks: Iterable[int] | None = None, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """Mean pass@K over problems for every K, with its bootstrap interval (columns k, n, mean, ci_low, ci_high).

        Args:
            ks: Any K of at most n; those of the run by default.
            level: Of the intervals.
            seed: Of the bootstrap, which resamples problems.

        Raises:
            DataError: a K above a problem's n.

        The interval is for another draw of such problems, and holds the noise of n samples too. Intervals at several K
        are of the same problems, and move together.
        """
        chosen = self.ks if ks is None else checked_ks(ks)
        return pd.DataFrame(
            [{"k": k, **mean_over_problems(v, level, seed)} for k, v in zip(chosen, self._values(chosen).T)]
        )

    def by_domain(self, ks: Iterable[int] | None = None, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """:meth:`curve` of each domain (columns domain, k, n, mean, ci_low, ci_high)."""
        chosen = self.ks if ks is None else checked_ks(ks)
        values, labels = self._values(chosen), self.data["domain"].values.astype(str)
        rows = [
            {"domain": name, "k": k, **mean_over_problems(values[labels == name, i], level, seed)}
            for name in sorted(set(labels.tolist()))
            for i, k in enumerate(chosen)
        ]
        return pd.DataFrame(rows)

    def compare(
        self, other: PassAtKResult, ks: Iterable[int] | None = None, level: float = 0.95, seed: int = 0
    ) -> pd.DataFrame:
        """Paired difference to another run on the same problems, by domain and over all; positive: this one is better.

        d_i = pass@K of this run - pass@K of the other, problem by problem; mean d with its bootstrap interval over
        problems, p of a sign-flip permutation test, and p_holm, adjusted over all rows of the table. A verdict needs
        both interval and p_holm. The row over all domains is named "all problems".

        Args:
            other: Of the same problems; n may differ.
            ks: Those of both runs by default.

        Raises:
            DataError: other problems, or a K above an n.

        Warns:
            OtherSamplingWarning: temperature, nucleus, length or checker differ, so that a difference may be theirs.
        """
        order = self._order(other)
        self._warn_of_sampling(other)
        chosen = tuple(k for k in self.ks if k in other.ks) if ks is None else checked_ks(ks)
        if not chosen:
            given = f"K of {self.ks} and of {other.ks}"
            raise DataError(given, "a K of both runs", "Name one that both have enough completions for (ks).")
        difference = self._values(chosen) - other._values(chosen)[order]
        labels = self.data["domain"].values.astype(str)
        names = sorted(set(labels.tolist()))
        rows: list[dict[str, Any]] = []
        for name in [*(names if len(names) > 1 else []), POOLED]:
            for i, k in enumerate(chosen):
                values = difference[:, i] if name == POOLED else difference[labels == name, i]
                p = float(paired_permutation(values, seed=seed).p_value)
                rows.append({"domain": name, "k": k, **mean_over_problems(values, level, seed, low=-1.0), "p": p})
        for row, p in zip(rows, adjust_p([row["p"] for row in rows], method="holm").tolist()):
            row["p_holm"] = p
            row["verdict"] = verdict(
                row["ci_low"],
                row["ci_high"],
                n=row["n"],
                words=("better", "worse"),
                units="problems",
                p=p,
                alpha=1 - level,
            )
        table = pd.DataFrame(rows)
        table.attrs = {"pooled": POOLED, "level": level}
        return table

    def headlines(self) -> list[str]:
        """What was done, pass@K over all problems and by domain, and what to know of the completions, a line each."""
        data, config = self.data, self.manifest.config
        count, n = data.sizes["problem"], data["n"].values
        samples = f"{n.min()}" if n.min() == n.max() else f"{n.min()} to {n.max()}"
        how = ""
        if "temperature" in config:
            greedy = not config["temperature"]
            how = ", greedy" if greedy else f", temperature {config['temperature']:g}, top-p {config['top_p']:g}"
        lines = [
            f"pass@K of {data.attrs.get('model', 'a model')} on {count} problem{'s' * (count != 1)} "
            f"({samples} completions each{how}; 95% bootstrap intervals over problems):"
        ]
        lines.append("; ".join(f"pass@{row['k']} {_shown(row)}" for row in self.curve().to_dict("records")))
        table = self.by_domain()
        domains = list(dict.fromkeys(table["domain"]))
        if len(domains) > 1:
            for name in domains:
                rows = table[table["domain"] == name].to_dict("records")
                shown = "; ".join(f"pass@{row['k']} {_shown(row)}" for row in rows)
                lines.append(f"{name} ({rows[0]['n']}): {shown}")
        never = int((data["c"].values == 0).sum())
        if never:
            lines.append(f"{never} of {count} problems have no right completion.")
        if "is_cut" in data and (cut := float(data["is_cut"].values.mean())) > 0:
            lines.append(f"{cut:.1%} of completions ended by their length, before an end of their own.")
        if "n_errors" in data and (raised := int(data["n_errors"].values.sum())):
            on = int((data["n_errors"].values > 0).sum())
            lines.append(f"The checker raised on {raised} completions of {on} problems; they count as not right.")
        return lines

    def summary(self) -> str:
        """In words: pass@K with intervals, by domain, and what to know of the completions."""
        return "\n  ".join(self.headlines())

    def _values(self, ks: Sequence[int]) -> FloatArray:
        """``[problem, k]``."""
        n, c = self.data["n"].values, self.data["c"].values
        return np.asarray(pass_at_k(n[:, None], c[:, None], np.array(ks)))

    def _order(self, other: PassAtKResult) -> list[int]:
        """Where each of this run's problems stands in the other.

        Raises:
            DataError: not the same problems.
        """
        if not isinstance(other, PassAtKResult):
            raise ConfigError(f"other of type {type(other).__name__}", "a PassAtKResult", "Pass a result of pass@K.")
        mine, theirs = (
            list(zip(*(r.data[x].values.astype(str).tolist() for x in ("problem", "content")))) for r in (self, other)
        )
        place = {name: number for number, name in enumerate(theirs)}
        missing = [name for name in mine if name not in place] or [name for name in theirs if name not in set(mine)]
        if missing:
            known = missing[0][0] in {name for name, _ in mine} & {name for name, _ in theirs}
            what = "whose prompt or answer differs between the runs" if known else "which only one of the runs has"
            raise DataError(
                f"problem {missing[0][0]!r}, {what}", "the same problems in both", "Compare runs of the same."
            )
        return [place[name] for name in mine]

    def _warn_of_sampling(self, other: PassAtKResult) -> None:
        here, there = self.manifest.config, other.manifest.config
        differs = [n for n in SAMPLED_BY if n in here and n in there and here[n] != there[n]]
        if differs:
            named = ", ".join(f"{name} ({here[name]} here, {there[name]} there)" for name in differs)
            warn(f"the runs differ in {named}: a difference between them may be theirs", OtherSamplingWarning)


def checked_ks(ks: int | Iterable[int]) -> tuple[int, ...]:
    """Each K once, in the order given.

    Raises:
        ConfigError: none, or one that is not a whole number of at least 1.
    """
    try:
        given = [ks] if isinstance(ks, int | np.integer) else list(ks)
    except TypeError:
        raise ConfigError(f"ks={ks!r}", "whole numbers", "Pass such as (1, 8, 64).") from None
    if not given:
        raise ConfigError("ks without a number", "at least one K", "Pass such as (1, 8, 64).")
    return tuple(dict.fromkeys(check_whole(k, "k", 1) for k in given))


def mean_over_problems(values: FloatArray, level: float = 0.95, seed: int = 0, low: float = 0.0) -> dict[str, Any]:
    """Number of problems, mean and interval (n, mean, ci_low, ci_high) of values between ``low`` and 1.

    The interval is a bootstrap over problems. Where all values are the same v, resampling shows no spread. Then it is
    v - q (v - low) to v + q (1 - v), q = 1 - ((1 - level) / 2)^(1/n): n problems are all at v with probability
    (1 - level) / 2 at least only where no more than a share q of all such problems is elsewhere (derived).

    Args:
        values: ``[problem]``, such as pass@K, or (with ``low=-1``) its difference between two runs.
    """
    n, mean = len(values), float(values.mean())
    if n < 2:
        return {"n": n, "mean": mean, "ci_low": np.nan, "ci_high": np.nan}
    if np.ptp(values) < NO_SPREAD:
        elsewhere = 1 - ((1 - level) / 2) ** (1 / n)
        low, high = mean - elsewhere * (mean - low), mean + elsewhere * (1 - mean)
        return {"n": n, "mean": mean, "ci_low": low, "ci_high": high}
    # values between bounds, many of them at one: a t-interval is far wider than need be (see docs/pass-at-k.md)
    method = "bca" if n >= FEWEST_UNITS else "percentile"
    found = bootstrap_interval(values, method=method, level=level, seed=seed)
    return {"n": n, "mean": mean, "ci_low": max(float(found.low), low), "ci_high": min(float(found.high), 1.0)}


def _shown(row: dict[Any, Any]) -> str:
    interval = "no interval" if np.isnan(row["ci_low"]) else f"{row['ci_low']:.3f}, {row['ci_high']:.3f}"
    return f"{row['mean']:.3f} [{interval}]"
