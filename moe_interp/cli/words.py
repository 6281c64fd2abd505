"""The library's messages in the words of the command line: options where Python has arguments."""

from __future__ import annotations

import re

# argument of Python -> the option that sets it
OPTIONS = {
    "memory_budget": "--memory",
    "n_routes": "--routes",
    "random_draws": "--random-draws",
    "n_samples": "--samples",
    "max_new_tokens": "--max-new-tokens",
    "batch_size": "--batch-size",
    "top_p": "--top-p",
    "is_correct": "--checker",
    "prompt_field": "--prompt-field",
    "answer_field": "--answer-field",
    "domain_field": "--domain-field",
    "mixed_precision": "--mixed-precision",
    **{
        name: f"--{name}"
        for name in (
            *("layers", "experts", "mode", "method", "seed", "sampler", "tau", "pool", "controls", "domains"),
            *("dtype", "device", "compile", "tokens", "resume", "out", "steps", "strategies", "seeds"),
        )
    },
}
# fields of the testbed's configuration by which its messages name what was given; --set takes them
FIELDS = {
    **{name: name for name in ("length", "micro_batches", "shares")},
    **{name: f"model.{name}" for name in ("vocab_size", "top_k", "max_length", "d_model", "n_heads", "n_experts")},
}
# what holds in Python alone, as a pattern, and what holds on the command line
PHRASES = (
    (r'Use "(auto|naive)"', r"Use --method \1"),
    (r'Use "no"', "Use --mixed-precision no"),
    (r"Use UniformSubsets\(\) or GumbelTopK\(\)", "Use --sampler uniform or --sampler gumbel"),
    (r"for uniform sets use UniformSubsets\(\)", "for uniform sets use --sampler uniform"),
    (r"Correct (layers|experts)\b", r"Correct --\1"),
    (r"(?: in the route of position \d+)? at experts\b(?:, position \d+)?", " in --experts"),
    (r", or -1 for an empty slot", ""),
    (r"; scale the expert's weight if it should count twice", ""),
    (r"(;|\.) [Tt]he model was left as it was\b", ""),
    (r", text_field\)", ")"),
    (r", \.\.\.\)", ")"),
    (r", or leave out store=", ""),
    (r"Choose one of moe\.layers|Leave `layers` out to attach to all of them", "Leave --layers out for all of them"),
    (r"Leave layers out", "Leave --layers out"),
    (r"[Ss]ee moe_interp\.support_table\(\)", "See `moe-interp support`"),
    (r", or set bridge\.tokenizer\.chat_template", ", or use a model whose tokenizer has one"),
    (r"Pass bridge\.to_tokens\(text\), or leave tokens out", "Give --text, or leave both out"),
    (r"a family of moe_interp\.support_table\(\)", "a family of `moe-interp support`"),
    (r"Use run_with_hooks with the interventions; this", "This"),
    (r"Run isolate_experts on (more|single) experts(?: for this)?", r"Isolate \1 --experts"),
    (r"Run isolate_experts\(mass=\('one', 'natural'\)\)", "Use --mode force"),
    (r"Raise the number of routes", "Raise --routes"),
    (r"\bchange out\b", "change --out"),
    (r"Change the (configuration|sizes)", "Change it with --set"),
    (r"Name the text column with `column=`", "Name the text column as name=hub:dataset:column"),
)
QUOTES = "'\""
# not in a path, a quotation, a call, or a longer name: those are the user's
_WITH_VALUE = re.compile(r"(?<![\w./'\"=(-])([a-z_]+)=('[^']*'|\"[^\"]*\"|\[[^\]]*\]|[\w.+-]+)")
_BY_NAME = re.compile(r"(?<![\w./'\"=-])(" + "|".join(name for name in OPTIONS if "_" in name) + r")\b")


def in_options(text: str) -> str:
    """A message of the library, with the options of the command line in the place of Python's arguments.

    ``memory_budget=5`` becomes ``--memory 5``, ``controls=True`` becomes ``--controls``; an argument that is named
    without a value becomes its option where it cannot be an ordinary word.
    """
    for pattern, said in PHRASES:
        text = re.sub(pattern, said, text)
    return _BY_NAME.sub(lambda found: OPTIONS[found[1]], _WITH_VALUE.sub(_option, text))


def _option(found: re.Match[str]) -> str:
    name, value = found[1], found[2]
    if name in FIELDS:
        return f"--set {FIELDS[name]}={value}"
    if name not in OPTIONS:
        return found[0]
    if value in ("True", "False"):
        return OPTIONS[name] if value == "True" else OPTIONS[name].replace("--", "--no-", 1)
    return f"{OPTIONS[name]} {value.strip(QUOTES)}"
