"""The table that ``moe.verify()`` returns."""

from __future__ import annotations

import pandas as pd

COLUMNS = ["check", "layer", "hook", "figure", "relation", "bound", "passed", "note"]


class Verification(pd.DataFrame):
    """One row a check, layer and hook: ``check, layer, hook, figure, relation, bound, passed, note``.

    ``passed`` says whether ``figure relation bound`` holds. A check that has no meaning on a layer passes with the
    figure NaN, and its note says "excepted" and why. Printed, it is summed up over the layers, and its last line says
    which ways of the engine serve the model on its device (``attrs["policy"]``).
    """

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return bool(self["passed"].all())

    def summary(self) -> pd.DataFrame:
        """One row a check and hook: the worst layer's figure, and how many layers passed."""
        rows = []
        for (check, hook), group in self.groupby(["check", "hook"], sort=False):
            failed = group[~group["passed"]]
            shown = failed if len(failed) else group
            by_figure = shown["figure"].astype(float)
            at_least = str(shown["relation"].iloc[0]).startswith(">")
            worst = shown.iloc[0]
            if by_figure.notna().any():
                worst = shown.iloc[int(by_figure.argmin() if at_least else by_figure.argmax())]
            rows.append(
                {
                    "check": check,
                    "hook": hook,
                    "layers": f"{int(group['passed'].sum())}/{len(group)}",
                    "worst": worst["figure"],
                    "relation": worst["relation"],
                    "bound": worst["bound"],
                    "passed": not len(failed),
                    "note": worst["note"] or next((note for note in group["note"] if note), ""),
                }
            )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        table = self.summary()
        table["worst"] = [f"{x:.2g}" for x in table["worst"]]
        table["bound"] = [f"{x:.2g}" for x in table["bound"]]
        table["passed"] = ["yes" if x else "NO" for x in table["passed"]]
        left = {name: "{:<" + str(max(map(len, [*table[name], name]))) + "}" for name in ("check", "hook", "note")}
        text = table.to_string(index=False, formatters={name: f.format for name, f in left.items()})
        verdict = f"{int(self['passed'].sum())} of {len(self)} checks passed"
        return "\n".join(filter(None, [text, verdict, self.attrs.get("policy")]))
