"""Does tuning the last router help, and does it show in sampled answers? The figures of docs/tuning-study.md.

    python benchmarks/tuning_study.py --out runs/tuning-study --docs docs/tuning-study.md

On the demo model, for each of three seeds: counterfactual routes and pass@K of the untuned model on held-out word
problems; the last MoE layer's router tuned on the solutions of other problems; then both again. Finished parts are read
back and an unfinished one goes on, so the command may be stopped and repeated; other settings need another ``--out``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

import moe_interp as mi
from moe_interp import stats
from moe_interp.experiments.pass_at_k.result import mean_over_problems
from moe_interp.experiments.router_tuning.routers import TunedRouter
from moe_interp.plots.figure import BLUE, GREEN, GREY, ORANGE, RED, panels, save_figure
from moe_interp.results import Result
from moe_interp.testbed.domains.arithmetic import arithmetic

LISTWISE: dict[str, Any] = {"objective": "listwise", "sampler": mi.GumbelTopK(1.0), "temperature": 0.1}
# what differs from the published values, which are tune_router's own; "repair" starts from a damaged router, as a
# control that shows whether the study can see an effect at all
WAYS: dict[str, dict[str, Any]] = {
    "epo": {},
    "repair": {**LISTWISE, "schedule": "linear", "lr": 0.02, "n_routes": 16, "select": None, "batch_size": 64},
    "listwise": {**LISTWISE, "schedule": "linear"},
}
SAMPLING: dict[str, Any] = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 48}
MARK = "<!-- the tables below are written by benchmarks/tuning_study.py -->"
MOST_STEPS = 3  # of a problem: easy enough to be solved in part
UNTUNED, DAMAGED = "untuned", "damaged"
COLOURS = (BLUE, ORANGE, RED, GREEN, "#CC79A7")
Sequences = list[dict[str, str]]
Values = NDArray[np.float64]
R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        ways: Of ``WAYS``.
        seeds: How many; a seed is that of the tuning text, of tuning, of routes and of sampling.
        problems: Held-out problems, the first of at most ``MOST_STEPS`` steps among the demo model's items.
        samples, ks: Completions a problem, and the K.
        tuned_on, measured_on: Problems whose solutions a router is tuned on, and is measured on during tuning.
        routes: Routes a token.
    """

    ways: tuple[str, ...] = tuple(WAYS)
    seeds: int = 3
    problems: int = 60
    samples: int = 32
    ks: tuple[int, ...] = (1, 4, 16)
    tuned_on: int = 600
    measured_on: int = 100
    routes: int = 32


class Study:
    """The parts of the study, each kept in a file.

    Args:
        out: Their folder.
        settings: What is run; a folder of other settings is refused.
    """

    def __init__(self, out: Path, settings: Settings) -> None:
        self.out, self.settings = out, settings
        out.mkdir(parents=True, exist_ok=True)
        plan = json.dumps(asdict(settings) | {"ways": repr(sorted(WAYS.items())), "sampling": SAMPLING})
        kept = out / "settings.json"
        if kept.exists() and kept.read_text(encoding="utf-8") != plan:
            sys.exit(f"{out} holds a study of other settings; choose another --out")
        kept.write_text(plan, encoding="utf-8")
        self.moe, items = mi.load_demo()
        graded = [item for item in items["arithmetic"] if item.fields["steps"] <= MOST_STEPS]
        self.items = graded[: settings.problems]
        self.seconds: dict[str, float] = json.loads(self._clock.read_text()) if self._clock.exists() else {}

    @property
    def _clock(self) -> Path:
        return self.out / "seconds.json"

    @property
    def parts(self) -> list[tuple[str, str, int]]:
        """``(kind, way, seed)`` of every part, in the order in which they run."""
        found: list[tuple[str, str, int]] = []
        for way in self.settings.ways:
            for seed in range(self.settings.seeds):
                start = [(kind, start_of(way), seed) for kind in ("routes", "answers")]
                found += [part for part in start if part not in found]
                found += [(kind, way, seed) for kind in ("router", "routes", "answers")]
        return found

    def run(self) -> None:
        for number, (kind, way, seed) in enumerate(self.parts, 1):
            is_there = self._path(kind, way, seed).exists()
            print(f"{number} of {len(self.parts)}: {kind}, {way}, seed {seed}{': there' * is_there}", flush=True)
            {"router": self.router, "routes": self.routes, "answers": self.answers}[kind](way, seed)

    def router(self, way: str, seed: int) -> mi.RouterTuningResult:
        """The last layer's router, tuned on the solutions of problems that are the seed's own."""

        def tune() -> mi.RouterTuningResult:
            train, held_out = self._tuning_text(seed)
            out = self.out / f"tuning-{way}-{seed}"
            with self._with_router(start_of(way), seed):
                return mi.tune_router(self.moe, train, held_out=held_out, seed=seed, out=out, resume=True, **WAYS[way])

        return self._kept("router", way, seed, mi.RouterTuningResult, tune)

    def routes(self, way: str, seed: int) -> mi.CounterfactualResult:
        """Counterfactual routes of the last layer, on the held-out problems' solutions."""

        def score() -> mi.CounterfactualResult:
            given = [_solved(item.id, item.fields["question"], item.fields["solution"]) for item in self.items]
            last, n = [self.moe.layers[-1]], self.settings.routes
            with self._with_router(way, seed):
                return mi.counterfactual_routes(self.moe, given, layers=last, n_routes=n, seed=seed)

        return self._kept("routes", way, seed, mi.CounterfactualResult, score)

    def answers(self, way: str, seed: int) -> mi.PassAtKResult:
        """pass@K on the held-out problems; the draws are the seed's, the same before and after tuning."""

        def sample() -> mi.PassAtKResult:
            given = [
                {"id": item.id, "prompt": item.fields["question"], "answer": item.fields["final_answer"]}
                for item in self.items
            ]
            n, ks, store = self.settings.samples, self.settings.ks, self.out / f"completions-{way}-{seed}.jsonl"
            with self._with_router(way, seed):
                return mi.evaluate_pass_at_k(self.moe, given, n, ks, seed=seed, store=store, **SAMPLING)

        return self._kept("answers", way, seed, mi.PassAtKResult, sample)

    def _path(self, kind: str, way: str, seed: int) -> Path:
        return self.out / f"{kind}-{way}-{seed}.nc"

    def _kept(self, kind: str, way: str, seed: int, of: type[R], make: Callable[[], R]) -> R:
        path = self._path(kind, way, seed)
        if path.exists():
            return of.load(path)
        start = time.perf_counter()
        made = make()
        made.save(path)
        self.seconds[path.stem] = time.perf_counter() - start
        self._clock.write_text(json.dumps(self.seconds), encoding="utf-8")
        return made

    @contextmanager
    def _with_router(self, way: str, seed: int) -> Iterator[None]:
        """Inside the ``with``, the model has the router that a way starts from, or has tuned."""
        router = self.router(way, seed) if way in WAYS else None
        weight = TunedRouter.of(self.moe, self.moe.layers[-1]).parameter
        whole = weight.detach().clone()
        try:
            if DAMAGED in (way, start_of(way)):
                order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
                with torch.no_grad():
                    weight.copy_(whole[order])
            if router is not None:
                router.apply(self.moe)
            yield
        finally:
            with torch.no_grad():
                weight.copy_(whole)

    def _tuning_text(self, seed: int) -> tuple[Sequences, Sequences]:
        """Solutions to tune on, no two seeds' alike, and to measure on.

        All are of the generator's validation split: computations that the demo model was not trained on, and that none
        of its items has. Computations that are measured on are not tuned on.
        """
        n, held = self.settings.tuned_on, self.settings.measured_on
        drawn = arithmetic(n_train=1, n_items=1, n_validation=held + 2 * self.settings.seeds * n)
        texts = [text.split("\n", 1) for text in drawn.validation]
        given = [_solved(f"validation-{i}", f"{question}\n", answer) for i, (question, answer) in enumerate(texts)]
        measured = {one["answer"] for one in given[:held]}
        others = [one for one in given[held:] if one["answer"] not in measured]
        return others[seed * n : (seed + 1) * n], given[:held]


def start_of(way: str) -> str:
    """What a way starts from."""
    return DAMAGED if way == "repair" else UNTUNED


def _solved(name: str, question: str, solution: str) -> dict[str, str]:
    """A worked problem, of which the solution's tokens count."""
    return {"id": name, "prompt": question, "answer": solution}


# -- before and after --------------------------------------------------------------------------------------------------
def held_out_text(study: Study) -> pd.DataFrame:
    """What each tuned router learned, on held-out text; intervals over sequences."""
    rows = []
    for way in study.settings.ways:
        for seed in range(study.settings.seeds):
            found = study.router(way, seed)
            row, end = found.held_out().iloc[0], found.curve().iloc[-1]
            rows.append(
                {
                    "way": way,
                    "seed": seed,
                    "steps": found.data.sizes["step"],
                    "cross-entropy before": f"{row['ce_before']:.4f}",
                    "change": _shown(row["ce_change"], row["ce_change_low"], row["ce_change_high"], 4),
                    "changed routes": f"{row['changed']:.3f}",
                    "preference": f"{row['preference']:.2f}",
                    "adoption": f"{row['adoption']:.2f}",
                    "relative change of W": f"{end['weight_change']:.3f}",
                }
            )
    return pd.DataFrame(rows)


def regret(study: Study) -> pd.DataFrame:
    """Regret of the last layer before and after, token by token; intervals and p over sequences."""
    rows = []
    for way in study.settings.ways:
        pairs = [[_by_sequence(study.routes(which, seed)) for which in (start_of(way), way)] for seed in _seeds(study)]
        for seed, (before, after) in enumerate(pairs):
            rows.append({"way": way, "seed": str(seed), **_regret_row(before[0], after[0], before[1])})
        before, after = (np.mean([pair[i][0] for pair in pairs], axis=0) for i in (0, 1))
        rows.append({"way": way, "seed": "mean", **_regret_row(before, after, pairs[0][0][1])})
    return pd.DataFrame(rows)


def _by_sequence(found: mi.CounterfactualResult) -> tuple[Values, Values]:
    """``[sequence]`` sum of regret over tokens, and number of tokens."""
    table = found.token_table().groupby("sequence")["regret"]
    return table.sum().to_numpy(), table.count().to_numpy().astype(np.float64)


def _regret_row(before: Values, after: Values, n: Values) -> dict[str, Any]:
    row: dict[str, Any] = {"n": len(n)}
    for name, sums in (("before", before), ("after", after), ("change", after - before)):
        found = stats.cluster_interval([sums, n], lambda total, count: total / count)
        row |= {name: float(found.estimate), f"{name}_low": float(found.low), f"{name}_high": float(found.high)}
    return row | {"p": float(stats.paired_permutation(after - before).p_value)}


def answers(study: Study) -> pd.DataFrame:
    """pass@K before and after, problem by problem; intervals and p over problems."""
    rows = []
    for way in study.settings.ways:
        for k in study.settings.ks:
            before, after = (
                np.array([study.answers(which, seed).data["pass_at_k"].sel(k=k).values for seed in _seeds(study)])
                for which in (start_of(way), way)
            )
            for seed in _seeds(study):
                rows.append({"way": way, "k": k, "seed": str(seed), **_answer_row(before[seed], after[seed])})
            mean = _answer_row(before.mean(0), after.mean(0))
            rows.append({"way": way, "k": k, "seed": "mean", **mean})
    table = pd.DataFrame(rows)
    is_mean = table["seed"] == "mean"
    table.loc[is_mean, "p_holm"] = stats.adjust_p(table.loc[is_mean, "p"].to_numpy(), method="holm")
    return table


def _answer_row(before: Values, after: Values) -> dict[str, Any]:
    row: dict[str, Any] = {"n": len(before)}
    for name, values, low in (("before", before, 0.0), ("after", after, 0.0), ("change", after - before, -1.0)):
        found = mean_over_problems(values, low=low)
        row |= {name: found["mean"], f"{name}_low": found["ci_low"], f"{name}_high": found["ci_high"]}
    return row | {"p": float(stats.paired_permutation(after - before).p_value)}


def _seeds(study: Study) -> range:
    return range(study.settings.seeds)


# -- the page ----------------------------------------------------------------------------------------------------------
def figure(study: Study, lost: pd.DataFrame, path: Path) -> None:
    """Regret before and after, and pass@K against K, means of the seeds."""
    ways = list(dict.fromkeys(which for way in study.settings.ways for which in (start_of(way), way)))
    drawn, (left, right) = panels(["Regret at the tuned layer", "pass@K on held-out problems"], 3.4, share=False)
    for place, way in enumerate(ways):
        side, of = ("after", way) if way in WAYS else ("before", next(w for w in WAYS if start_of(w) == way))
        rows = lost[lost["way"] == of]
        row = rows[rows["seed"] == "mean"].iloc[0]
        error = [[row[side] - row[f"{side}_low"]], [row[f"{side}_high"] - row[side]]]
        left.errorbar([place], [row[side]], yerr=error, fmt="o", color=COLOURS[place], capsize=4, markersize=7)
        one = rows[rows["seed"] != "mean"][side]
        left.plot(place + np.linspace(0.15, 0.25, len(one)), one, "o", color=GREY, markersize=3)
    left.set_xticks(range(len(ways)), ways)
    left.set_xlim(-0.5, len(ways) - 0.5)
    left.set_yscale("log")  # a damaged router's is many times larger
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(NullFormatter() if len(ways) > 2 else "{x:g}")
    left.set_ylabel("nats (small: each seed)", fontsize=11)
    ks = [2**power for power in range(study.settings.samples.bit_length()) if 2**power <= study.settings.samples]
    for place, way in enumerate(ways):
        runs = [study.answers(way, seed).data for seed in _seeds(study)]
        values = np.mean([stats.pass_at_k(run["n"].values[:, None], run["c"].values[:, None], ks) for run in runs], 0)
        found = [mean_over_problems(column) for column in values.T]
        mean, low, high = ([row[name] for row in found] for name in ("mean", "ci_low", "ci_high"))
        right.plot(ks, mean, "o-", color=COLOURS[place], markersize=4, label=way)
        right.fill_between(ks, low, high, color=COLOURS[place], alpha=0.12, linewidth=0)
    right.set_xscale("log", base=2)
    right.set_xticks(ks, [str(k) for k in ks])
    right.minorticks_off()
    right.set_ylim(0, 1)
    right.set_xlabel("K, completions that are allowed", fontsize=11)
    right.legend(fontsize=11, frameon=False, loc="lower right")
    for axis in (left, right):
        axis.title.set_fontsize(12)
        axis.tick_params(which="both", labelsize=11)
    save_figure(drawn, path)


def _shown(value: float, low: float, high: float, digits: int) -> str:
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _p(value: float) -> str:
    return "< .001" if value < 0.001 else f"{value:.3f}"


def _paired(table: pd.DataFrame, keys: list[str], digits: int) -> pd.DataFrame:
    """A table of before, after and change, each with its interval, in the page's form."""
    rows = []
    for row in table.to_dict("records"):
        line: dict[str, Any] = {key: row[key] for key in keys}
        for side in ("before", "after"):
            line[side] = f"{row[side]:.{digits}f} [{row[f'{side}_low']:.{digits}f}, {row[f'{side}_high']:.{digits}f}]"
        line["change"] = _shown(row["change"], row["change_low"], row["change_high"], digits)
        line["p"] = _p(row["p"])
        if "p_holm" in row:
            line["p (Holm)"] = "" if np.isnan(row["p_holm"]) else _p(row["p_holm"])
        rows.append(line)
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    lines = ["| " + " | ".join(table.columns) + " |", "|---" * table.shape[1] + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False))])


def page(study: Study, text: pd.DataFrame, lost: pd.DataFrame, found: pd.DataFrame) -> str:
    """The tables, and what they are of."""
    s = study.settings
    spread = found[found["seed"] != "mean"].groupby(["way", "k"], sort=False)["change"]
    between = pd.DataFrame(
        {"mean change": spread.mean().map("{:+.4f}".format), "sd": spread.std().map("{:.4f}".format)}
    )
    return "\n\n".join(
        [
            f"{s.seeds} seeds; {s.problems} held-out problems, {s.samples} completions of each (temperature .6, top-p "
            f".95, at most {SAMPLING['max_new_tokens']} tokens); {s.tuned_on} solutions to tune on, {s.measured_on} to "
            f"measure on; {s.routes} routes a token. Run time {sum(study.seconds.values()) / 60:.0f} minutes.",
            "### Held-out text\n\n" + markdown(text),
            "### Regret at the tuned layer, nats\n\n" + markdown(_paired(lost, ["way", "seed"], 4)),
            "### pass@K\n\n" + markdown(_paired(found, ["way", "k", "seed"], 3)),
            "### Between seeds: change of pass@K\n\n" + markdown(between.reset_index()),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path, help="page whose tables, and figure beside it, are written anew")
    parser.add_argument("--ways", default=",".join(WAYS))
    for name in ("seeds", "problems", "samples", "tuned_on", "measured_on", "routes"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Settings, name))
    given = vars(parser.parse_args())
    out, docs = given.pop("out"), given.pop("docs")
    ways = tuple(given.pop("ways").split(","))
    torch.set_num_threads(1)
    study = Study(out, Settings(ways=ways, **given))
    study.run()
    text, lost, found = held_out_text(study), regret(study), answers(study)
    tables = {"held_out_text": text, "regret": lost, "pass_at_k": found}
    record = {name: table.to_dict("records") for name, table in tables.items()} | {"seconds": study.seconds}
    (out / "study.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    figure(study, lost, out / "tuning-study.svg" if docs is None else docs.with_suffix(".svg"))
    written = page(study, text, lost, found)
    print(written)
    if docs is not None:
        head = docs.read_text(encoding="utf-8").split(MARK)[0] if docs.exists() else "# Tuning study\n\n"
        docs.write_text(f"{head}{MARK}\n\n{written}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
