"""The figures of gpu.py as the tables of a page: what was timed, and which targets were met.

This module knows names of cases and contenders; it measures nothing.
"""

from __future__ import annotations

import math
from typing import Any

__all__ = ["CAPTURABLE", "COMPILED", "COPY", "GRAPH", "OURS", "TORCH", "report"]

OURS, TORCH, COPY = "asgd_fast", "torch.optim.ASGD", "copy of as many bytes"
CAPTURABLE, GRAPH = "asgd_fast, capturable", "asgd_fast in a graph"
COMPILED = "torch.optim.ASGD, compiled"

# How many times as long as ours another one must take on the device, at least.
TARGETS = [
    ("1e8 float32, average", COPY, 0.92),
    ("1e8 float32, lazy", COPY, 0.92),
    ("1e8 float32, average", TORCH, 2.4),
    ("300 of 1e4 float32, average", TORCH, 20),
    ("1e8 float32, capturable", COMPILED, 1),
    ("300 of 1e4 float32, capturable", COMPILED, 2),
    *(
        (f"1e8 {dtypes}", COPY, 0.85)
        for dtypes in (
            "float16, average",
            "float16, lazy",
            "bfloat16, average",
            "bfloat16, lazy",
            "float32 with averages of float64, average",
            "float16 with averages of float32, average",
            "bfloat16 with averages of float32, average",
        )
    ),
]

# How many us the host may take; of a graph, for torch's replay alone.
HOST_TARGETS = [
    ("300 of 1e4 float32, average", OURS, 60),
    ("300 of 1e4 float32, capturable", GRAPH, 10),
]


def report(results: dict[str, Any]) -> str:
    """Return the page.

    Parameters
    ----------
    results : dict
        As gpu.py writes it to gpu.json.

    Returns
    -------
    str
        In Markdown.
    """
    lines = [f"- {name}: {value}" for name, value in results["machine"].items()]
    lines += [f"- left out: {name} ({reason})" for name, reason in results["left out"].items()]
    lines += [
        "",
        "| case | | device, ms | TB/s | of a copy's | times ours | host, us |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for label, case in results["cases"].items():
        times = case["times"]
        for i, (name, each) in enumerate(times.items()):
            ms = each["device"]
            figures = [
                f"{ms:.4f}",
                f"{case['moved'] / ms / 1e9:.2f}",
                f"{_ratio(times, COPY, name):.2f}",
                f"{_ratio(times, name, OURS):.2f}",
                f"{each['host']:.1f}",
            ]
            lines.append(_row("" if i else label, name, *figures))
    lines += ["", "| target | of what | asked for | seen | |", "| --- | --- | --- | --- | --- |"]
    times_of = {label: case["times"] for label, case in results["cases"].items()}
    for label, other, least in TARGETS:
        ratio = round(_ratio(times_of.get(label, {}), other, OURS), 2)
        what = "bandwidth of a copy" if other == COPY else f"speed of {other}"
        lines.append(_row(label, what, f">= {least}", f"{ratio:.2f}", _met(ratio, ratio >= least)))
    for label, name, most in HOST_TARGETS:
        us = times_of.get(label, {}).get(name, {"host": math.nan})["host"]
        what = f"us of the host, {name}"
        lines.append(_row(label, what, f"<= {most}", f"{us:.1f}", _met(us, us <= most)))
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _ratio(times: dict[str, dict[str, float]], over: str, under: str) -> float:
    """Return how many times as long one takes as another; nan if either was not timed."""
    if not {over, under} <= times.keys():
        return math.nan
    return times[over]["device"] / times[under]["device"]


def _met(value: float, is_met: bool) -> str:
    return "not measured" if math.isnan(value) else "met" if is_met else "missed"
