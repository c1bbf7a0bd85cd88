"""The figures of performance.py by machine: performance.json, performance.md's tables, the plot.

What is measured anew takes the place of the same machine's figures only; the tables show all
machines side by side. A column has figures of one machine and of one set of versions. This module
measures nothing.
"""

from __future__ import annotations

import json
import re
from statistics import quantiles
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from measure import ratio

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from measure import Times

__all__ = ["ENGINE", "OURS", "PLAIN", "SGD", "figures", "known", "record", "tables"]

OURS = "asgd_fast"
ENGINE = "asgd_fast, the engine alone"
PLAIN = "plain loop"
SGD = "torch.optim.SGD(fused=True)"


class Section(NamedTuple):
    """How the figures of a section of performance.py are shown."""

    unit: str
    nanoseconds: float  # of the unit
    reference: str | None = None  # the contender to which the others' times are ratios
    is_grid: bool = False  # a row for each case rather than for each contender


SECTIONS = {
    "large": Section("ms", 1e6, OURS),
    "dtypes": Section("ms", 1e6, OURS),
    "averages": Section("ms", 1e6, OURS),
    "backward": Section("us", 1e3, SGD),
    "hot": Section("us", 1e3, OURS),
    "arrays": Section("us", 1e3),
    "classifier": Section("us a sample", 1e3, is_grid=True),
    "scaling": Section("ns an element", 1, is_grid=True),
    "threads": Section("us", 1e3, is_grid=True),
}

# These facts of a machine may change; a machine with other values of the rest is another machine.
VERSIONS = ("compiler", "python", "torch", "plain loops")

# The fact by which processors of the same name are told apart, and its value where nobody knows it.
FAMILY = "family/model/stepping"
UNKNOWN = "unknown"

# Of a case: the quartiles of the nanoseconds of each contender, the median in the middle, and how
# many times as long as the reference it takes, the median of the rounds.
Case: TypeAlias = "dict[str, dict[str, Any]]"


def figures(section: str, cases: dict[str, Times]) -> dict[str, Case]:
    """Return what is kept of the times of a section."""
    reference = SECTIONS[section].reference
    result: dict[str, Case] = {}
    for case, times in cases.items():
        result[case] = {}
        for name, rounds in times.items():
            own: dict[str, Any] = {"ns": [round(x, 3) for x in quantiles(rounds)]}
            if reference is not None:
                own["ratio"] = round(ratio(times, name, reference), 3)
            result[case][name] = own
    return result


def known(folder: Path, machine: dict[str, Any], sections: Iterable[str]) -> dict[str, Any]:
    """Return the figures in performance.json, where those of a machine may be put beside them.

    Parameters
    ----------
    folder : Path
    machine : dict
        The facts of the machine.
    sections : iterable of str
        What is measured on it.

    Returns
    -------
    dict
        The facts and sections of each machine.

    Raises
    ------
    ValueError
        The file is malformed, or the column of this machine's name is of another machine, or it
        would keep figures of other versions than it says.
    """
    path = folder / "performance.json"
    if not path.exists():
        return {}
    try:
        machines: dict[str, Any] = json.loads(path.read_text())
        for table in ("machines", "shares", *SECTIONS):
            list(tables(table, machines))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise ValueError(f"{path} is malformed: {e!r}") from e
    name = _name(machine)
    if name not in machines:
        return machines
    recorded = machines[name]["machine"]
    differences = {
        fact: f"{fact} is {recorded.get(fact, UNKNOWN)} there and {value} here"
        for fact, value in machine.items()
        if recorded.get(fact, UNKNOWN) != value
    }
    lasting = [text for fact, text in differences.items() if fact not in VERSIONS]
    if lasting:
        raise ValueError(
            f"{path} has {name!r} of another machine, or otherwise measured: {'; '.join(lasting)}; "
            "save into another folder"
        )
    kept = machines[name]["sections"].keys() - set(sections)
    if differences and kept:
        raise ValueError(
            f"{path} has {name!r} of other versions: {'; '.join(differences.values())}; measure "
            f"{', '.join(sorted(kept))} as well, since a column has one set of versions"
        )
    return machines


def _name(machine: dict[str, Any]) -> str:
    """Return the name of a machine's column: many virtual machines have a processor "AMD EPYC"."""
    return f"{machine['processor']} {machine[FAMILY]}, {machine['simd']}"


def record(folder: Path, machine: dict[str, Any], commit: str, measured: dict[str, Any]) -> None:
    """Write the figures of a machine into performance.json and performance.md, and draw them.

    Parameters
    ----------
    folder : Path
    machine : dict
        As of `known`, which must not refuse it.
    commit : str
        That was measured.
    measured : dict
        Of sections, what `figures` returned.
    """
    path = folder / "performance.json"
    machines = known(folder, machine, measured)
    name = _name(machine)
    own = machines.setdefault(name, {"machine": machine, "sections": {}})
    own["machine"] = machine  # with newer versions, if all sections are measured with them
    for section, cases in measured.items():
        own["sections"][section] = {"commit": commit, "cases": cases}
    path.write_text(json.dumps(machines, indent=1) + "\n")
    page = folder / "performance.md"
    if page.exists():
        page.write_text(filled(page.read_text(), machines))
    newest = {section: found["cases"] for section, found in own["sections"].items()}
    if {"large", "scaling", "backward"} <= newest.keys():
        plot(name, newest, folder / "performance.png")


def filled(page: str, machines: dict[str, Any]) -> str:
    """Return a page with the tables of all machines between its pairs of marks.

    A mark is a comment: ``<!-- NAME -->`` and ``<!-- end of NAME -->``, where NAME is a section,
    "machines" or "shares".
    """

    def table(match: re.Match[str]) -> str:
        lines = "\n".join(tables(match[1], machines))
        return f"<!-- {match[1]} -->\n\n{lines}\n\n<!-- end of {match[1]} -->"

    return re.sub(r"<!-- (\w+) -->.*?<!-- end of \1 -->", table, page, flags=re.DOTALL)


def tables(name: str, machines: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the table of a section, or of what stands above all sections."""
    if name == "machines":
        yield from _machines(machines)
        return
    if name == "shares":
        yield from _shares(machines)
        return
    section = SECTIONS[name]
    cases = {
        machine: own["sections"][name]["cases"]
        for machine, own in machines.items()
        if name in own["sections"]
    }
    if section.is_grid:
        yield from _grid(section, cases)
        return
    columns = [section.unit, *([f"times {section.reference}"] if section.reference else [])]
    yield from _head(["", "", *(f"{machine}: {x}" for machine in cases for x in columns)])
    for case, contenders in _all_of(cases).items():
        for i, contender in enumerate(contenders):
            cells = [case if i == 0 else "", contender]
            for own in cases.values():
                found = own.get(case, {}).get(contender)
                cells.append(_digits(_median(found) / section.nanoseconds) if found else "")
                if section.reference:
                    cells.append(f"{found['ratio']:.2f}" if found else "")
            yield _row(cells)


def _grid(section: Section, cases: dict[str, dict[str, Case]]) -> Iterator[str]:
    """Yield a table with a row for each case and a column for each contender on each machine."""
    columns = [
        (machine, contender)
        for machine, own in cases.items()
        for contender in next(iter(own.values()))
    ]
    yield from _head([section.unit, *(f"{machine}: {x}" for machine, x in columns)])
    for case in _all_of(cases):
        cells = [case]
        for machine, contender in columns:
            found = cases[machine].get(case, {}).get(contender)
            cells.append(_digits(_median(found) / section.nanoseconds) if found else "")
        yield _row(cells)


def _machines(machines: dict[str, Any]) -> Iterator[str]:
    """Yield a table of what is known of the machines and of their figures."""
    yield from _head(["", *machines])
    for fact in next(iter(machines.values()))["machine"]:
        yield _row([fact, *(str(own["machine"].get(fact, "")) for own in machines.values())])
    for section in SECTIONS:
        commits = [own["sections"].get(section, {}).get("commit", "") for own in machines.values()]
        if any(commits):
            yield _row([f"commit of {section}", *commits])


def _shares(machines: dict[str, Any]) -> Iterator[str]:
    """Yield a table of the shares of the plain loop's speed."""
    shares = {
        machine: {
            case: contenders
            for section in ("large", "dtypes", "averages")
            for case, contenders in own["sections"].get(section, {"cases": {}})["cases"].items()
        }
        for machine, own in machines.items()
    }
    yield from _head(["share of the plain loop's speed", *machines])
    for case in _all_of(shares):
        found = [own.get(case, {}) for own in shares.values()]
        yield _row([case, *(f"{x[PLAIN]['ratio']:.2f}" if PLAIN in x else "" for x in found)])
        if any(ENGINE in x for x in found):
            quotients = [
                f"{_median(x[PLAIN]) / _median(x[ENGINE]):.2f}" if ENGINE in x else ""
                for x in found
            ]
            yield _row([f"{case}, the engine alone", *quotients])


def _all_of(cases: dict[str, dict[str, Case]]) -> dict[str, list[str]]:
    """Return the contenders of the cases of all machines, in their order."""
    names: dict[str, list[str]] = {}
    for own in cases.values():
        for case, contenders in own.items():
            known = names.setdefault(case, [])
            known += [name for name in contenders if name not in known]
    return names


def _median(found: dict[str, Any]) -> float:
    middle: float = found["ns"][len(found["ns"]) // 2]
    return middle


def _head(cells: list[str]) -> list[str]:
    return [_row(cells), _row(["---" for _ in cells])]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _digits(value: float) -> str:
    """Return a number with about three digits."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def plot(machine: str, measured: dict[str, dict[str, Case]], path: Path) -> None:
    """Draw the times of a large tensor, those over sizes, and those after a backward pass."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplot_mosaic(
        [["phases", "sizes"], ["backward", "backward"]], figsize=(12, 8.5), layout="constrained"
    )
    figure.suptitle(f"One step on {machine}; whiskers: quartiles")

    def spread(found: dict[str, Any], scale: float) -> list[list[float]]:
        low, middle, high = found["ns"]
        return [[(middle - low) / scale], [(high - middle) / scale]]

    left, large = axes["phases"], measured["large"]
    phases = [case for case in large if case.startswith("100,000,000 ")]
    names = [OURS, PLAIN, SGD, "torch.compile of the update", "torch.optim.ASGD"]
    for k, name in enumerate(names):
        found = [(x, large[case][name]) for x, case in enumerate(phases) if name in large[case]]
        places = [x + 0.16 * (k - 2) for x, _ in found]
        bars = left.bar(places, [_median(own) / 1e6 for _, own in found], 0.15, label=name)
        left.bar_label(bars, fmt="%.0f", fontsize=8, padding=3)
        for place, (_, own) in zip(places, found, strict=True):
            left.errorbar(place, _median(own) / 1e6, spread(own, 1e6), color="black", linewidth=0.8)
    left.set_xticks(range(len(phases)), [case.split(", ", 1)[1] for case in phases], fontsize=8)
    left.set_ylabel("ms a step")
    left.set_title("One tensor of 100 million float32")
    left.set_ylim(top=1.35 * left.get_ylim()[1])
    left.legend(fontsize=8, ncols=2, loc="upper center")

    right, sizes = axes["sizes"], measured["scaling"]
    for name in next(iter(sizes.values())):
        style = ":" if name.startswith("plain") else "-"
        numbers = [int(n.replace(",", "")) for n in sizes]
        low, middle, high = zip(*(own[name]["ns"] for own in sizes.values()), strict=True)
        (line,) = right.plot(numbers, middle, style, marker=".", label=name)
        right.fill_between(numbers, low, high, alpha=0.15, color=line.get_color())
    right.set_xscale("log")
    right.set_ylim(bottom=0)
    right.set_xlabel("float32 elements")
    right.set_ylabel("ns an element")
    right.set_title("Averaging")
    right.legend(fontsize=8)

    below, cases = axes["backward"], measured["backward"]
    beside = [name for name in next(iter(cases.values())) if name != SGD]
    for k, name in enumerate(beside):
        ratios = [own[name]["ratio"] for own in cases.values()]
        places = [x + 0.16 * (k - 1.5) for x in range(len(cases))]
        bars = below.bar(places, [x - 1 for x in ratios], 0.15, bottom=1, label=name)
        below.bar_label(bars, [f"{x:.2f}" for x in ratios], fontsize=8)
    below.set_yscale("log")
    below.set_yticks([0.25, 0.5, 1, 2, 4, 8, 16], ["0.25", "0.5", "1", "2", "4", "8", "16"])
    below.minorticks_off()
    below.set_ylim(0.2, 32)
    below.axhline(1, color="gray", linewidth=0.8)
    below.set_xticks(range(len(cases)), list(cases))
    below.set_ylabel(f"times {SGD}")
    below.set_title("A step after a backward pass, 1 thread")
    below.legend(fontsize=8)
    figure.savefig(path, dpi=120)
