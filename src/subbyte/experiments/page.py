"""A paper's page: for every claim the rule, the runs, the verdict and the command."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from subbyte.experiments.figures import FIGURES
from subbyte.experiments.judge import Judged, Lines, figure, judge, verdict
from subbyte.experiments.plots import save_curve
from subbyte.experiments.settings import Comparison, Experiment

TITLES = {
    "lowres": "LowRes: the paper's claims",
    "sgm": "SGM: the papers' claims",
    "cora": "CoRa: the paper's claims",
    "open": "Open questions",
}
_HEAD = """# {title}

A section per claim: the rule that judges it, the runs, the verdict. A cell is the median over the
seeds, with the range in brackets where the seeds differ. The scores are of files, read back; bytes
are of the whole file. `subbyte experiment page {paper}` makes this page from the files and lines in
`experiments/{paper}/`.

{table}
"""


def page_of(paper: str, experiments: Mapping[Experiment, Lines]) -> str:
    """The whole page, as Markdown; its experiments by `place`, then by name."""
    ordered = sorted(experiments.items(), key=lambda item: (item[0].place, item[0].name))
    rows = [[f"[{e.title}](#{_anchor(e.title)})", _word(e, own)] for e, own in ordered]
    head = _HEAD.format(
        title=TITLES.get(paper, paper), paper=paper, table=grid(["claim", "verdict"], rows)
    )
    return head + "".join(f"\n{section(e, own)}\n" for e, own in ordered)


def _anchor(title: str) -> str:
    """As a Markdown viewer makes it of a heading."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -")
    return kept.replace(" ", "-")


def _word(experiment: Experiment, own: Lines) -> str:
    word = verdict(judge(experiment, own))
    return word if own else f"{word}: not run"


def section(experiment: Experiment, own: Lines) -> str:
    """One claim, as Markdown."""
    judged = judge(experiment, own)
    parts = [
        f"## {experiment.title}",
        f"Claim: {experiment.claim} ({experiment.source})",
        "Rule: " + "; and ".join(rule_in_words(c) for c in experiment.judge) + ".",
        f"**Verdict: {_word(experiment, own)}.**",
        *([runs(experiment, own), comparisons(judged), machines(own.values())] if own else []),
        *([f"![{experiment.title}]({picture_of(experiment)})"] if drawn(experiment, own) else []),
        *([experiment.not_run] if experiment.not_run else []),
        f"Command: `subbyte experiment run {experiment.runs_of} --resume`",
    ]
    return "\n\n".join(parts)


def rule_in_words(rule: Comparison) -> str:
    subject = f"{FIGURES[rule.figure].title} of {rule.of}"
    if rule.minus is not None:
        subject += f" less that of {rule.minus}"
    if rule.over is not None:
        subject += f" over that of {rule.over}"
    side = "at least" if rule.at_least is not None else "at most"
    by = "median" if rule.by == "median" else "95 % interval of the mean"
    seeds = f"{rule.seeds} seeds or more" if rule.seeds > 1 else "1 seed or more"
    return f"{subject} ({by}, {seeds}) is {side} {rule.bound:g}"


def runs(experiment: Experiment, own: Lines) -> str:
    """A row per variation that has lines: seeds, each figure's median and range, hours.

    Of another experiment's runs only those that are judged.
    """
    named = {v for rule in experiment.judge for v in rule.variations}
    rows = []
    for variation in experiment.variations:
        if experiment.runs_of != experiment.name and variation not in named:
            continue
        lines = {seed: line for (v, seed), line in sorted(own.items()) if v == variation}
        if lines:
            cells = [spread((figure(x, n) for x in lines.values()), FIGURES[n].form)
                     for n in experiment.shown]  # fmt: skip
            hours = spread((x["hours"] for x in lines.values()), ".2f")
            rows.append([variation, ", ".join(map(str, lines)), *cells, hours])
    titles = [FIGURES[name].title for name in experiment.shown]
    return grid(["variation", "seeds", *titles, "hours per run"], rows)


def comparisons(judged: Sequence[Judged]) -> str:
    """A row per comparison: the values by seed and what follows."""
    rows = []
    for each in judged:
        rule, form = each.comparison, FIGURES[each.comparison.figure].form
        form = ".2f" if rule.over is not None else form
        against = "".join(f" {word} {v}" for word, v in (("less", rule.minus), ("over", rule.over))
                          if v is not None)  # fmt: skip
        values = ", ".join(f"{value:{form}}" for value in each.values.values())
        rows.append([f"{FIGURES[rule.figure].title}: {rule.of}{against}", values or "none",
                     _held(each, form), _reason(each)])  # fmt: skip
    return grid(["compared", "each seed", "median or interval", "verdict"], rows)


def _held(each: Judged, form: str) -> str:
    if each.low is None or each.high is None:
        return ""
    same = each.low == each.high
    return f"{each.low:{form}}" if same else f"{each.low:{form}} to {each.high:{form}}"


def _reason(each: Judged) -> str:
    if len(each.values) < each.comparison.seeds:
        return f"{each.verdict}: {len(each.values)} of {each.comparison.seeds} seeds"
    return each.verdict


def machines(lines: Iterable[Mapping[str, object]]) -> str:
    """Where the runs were made, and by which code."""
    where, commits = set(), set()
    for line in lines:
        machine = line["machine"]
        assert isinstance(machine, dict)
        details = line["details"]
        assert isinstance(details, dict)
        used = f", {details['precision']}" if "precision" in details else ""
        where.add(f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}{used}")
        commits.add(str(line["revision"] or "")[:7])
    commits.discard("")
    code = f" Code: {', '.join(f'`{c}`' for c in sorted(commits))}." if commits else ""
    return f"Machine: {'; '.join(sorted(where))}.{code}"


def spread(values: Iterable[float | None], form: str) -> str:
    """Median and range: 91.70 (0.14); the value alone if all are equal; "" if there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    middle = f"{statistics.median(known):{form}}"
    wide = max(known) - min(known)
    return f"{middle} ({wide:{form}})" if wide > 0 else middle


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


# ---------------------------------------------------------------- pictures


def picture_of(experiment: Experiment) -> str:
    return experiment.name.replace("/", "-") + ".png"


def drawn(experiment: Experiment, own: Lines) -> bool:
    """Whether there is anything to draw."""
    return any(experiment.curve in line["curves"] for line in own.values())


def pictures_of(experiments: Mapping[Experiment, Lines]) -> dict[str, Callable[[Path], None]]:
    """File names to what draws them."""
    return {
        picture_of(e): lambda path, e=e, own=own: save_curve(e, own, path)  # type: ignore[misc]
        for e, own in experiments.items()
        if drawn(e, own)
    }
