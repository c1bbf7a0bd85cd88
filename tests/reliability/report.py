"""The figures of a campaign, as a table of docs/reliability.md."""

from __future__ import annotations

import datetime
import platform
import subprocess
from dataclasses import dataclass

from reliability.common import ROOT

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- figures: written by make reliability -->", "<!-- end of figures -->"


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


def table(outcomes, source, seed, scale, minutes):
    """Return the figures in Markdown."""
    today = datetime.datetime.now(datetime.timezone.utc).date()
    python = f"{platform.python_implementation()} {platform.python_version()}"
    where, how = f"{python} on {platform.machine()}", f"seed {seed}, scale {scale:g}"
    lines = [
        f"{today}, commit {source}, {where}, {how}, {minutes:.0f} minutes:",
        "",
        "| part | runs | planted faults found | result | minutes |",
        "| --- | --- | --- | --- | --- |",
    ]
    for x in outcomes:
        runs = "; ".join(f"{n:,} {name}" for name, n in x.counts.items()) or "none"
        found = f"{sum(x.controls.values())} of {len(x.controls)}"
        verdict = "nothing found" if x.is_green else "**red**"
        lines.append(f"| `{x.name}` | {runs} | {found} | {verdict} | {x.seconds / 60:.1f} |")
    return "\n".join(lines)


def save(text):
    """Put the figures into the page, between its two marks."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def _git(*arguments):
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
