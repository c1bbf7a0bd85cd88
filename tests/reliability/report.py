"""The figures of a campaign, as a table of docs/reliability.md."""

from __future__ import annotations

import datetime
import subprocess
from dataclasses import dataclass

from reliability.common import ROOT

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- figures: written by make reliability -->", "<!-- end of figures -->"
HEAD = (
    "| part | runs | planted faults found | result | minutes | day, commit | seed, scale |",
    "| --- | --- | --- | --- | --- | --- | --- |",
)


@dataclass
class Outcome:
    """What became of a part: its counts, and which of its planted faults were found."""

    name: str
    passed: bool
    counts: dict[str, int]
    controls: dict[str, bool]
    seconds: float

    @property
    def is_green(self):
        return self.passed and all(self.controls.values()) and not missing(self.counts)


def missing(counts):
    """Return what a part has not done at all: one that accepts no call has tried nothing."""
    return [name for name, n in counts.items() if not n] if counts else ["its runs"]


def source():
    """Return which sources are there at the moment: the commit, and whether they differ from it."""
    commit = _git("rev-parse", "--short", "HEAD")
    return commit + " with changes" * bool(_git("status", "--porcelain", "--untracked-files=no"))


def rows(outcomes, source, seed, scale):
    """Return the figures in Markdown: the row of a table for each part, by its name."""
    today = datetime.datetime.now(datetime.timezone.utc).date()
    result = {}
    for x in outcomes:
        runs = "; ".join(f"{n:,} {name}" for name, n in x.counts.items()) or "none"
        found = f"{sum(x.controls.values())} of {len(x.controls)}"
        verdict = "nothing found" if x.is_green else "**red**"
        minutes = f"{x.seconds / 60:.1f}"
        by = f"{today}, {source}", f"{seed}, {scale:g}"
        result[x.name] = f"| {' | '.join([f'`{x.name}`', runs, found, verdict, minutes, *by])} |"
    return result


def save(new):
    """Put rows into the page's table, between its two marks, in the place of the same parts'."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    old, _, after = rest.partition(END)
    found = {x.split("`")[1]: x for x in old.splitlines() if x.startswith("| `")}
    lines = [*HEAD, *(found | new).values()]
    PAGE.write_text("\n".join([f"{before}{BEGIN}", "", *lines, "", f"{END}{after}"]))


def _git(*arguments):
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
