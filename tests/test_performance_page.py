"""The figures of docs/performance.md: whose they are, and that performance.json has the same."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "asv_benchmarks"

pytestmark = pytest.mark.skipif(
    not BENCHMARKS.is_dir(), reason="asv_benchmarks/ is in the repository only"
)

ZEN = {"processor": "Zen", "simd": "avx2", "cores": 2}
XEON = {"processor": "Xeon", "simd": "avx512", "cores": 2}


@pytest.fixture(scope="module")
def page():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield import_module("performance_page")


@pytest.fixture
def folder(tmp_path):
    """A folder with a page that has the marks of a few tables."""
    (tmp_path / "performance.md").write_text(
        "Before.\n<!-- shares -->\n<!-- end of shares -->\n<!-- hot -->\nold\n<!-- end of hot -->\n"
    )
    return tmp_path


def rows_of(folder):
    """The cells of the rows of all tables of a page."""
    lines = (folder / "performance.md").read_text().splitlines()
    rows = [[cell.strip() for cell in x[1:-1].split("|")] for x in lines if x.startswith("|")]
    return [row for row in rows if set(row) != {"---"}]


def hot(ours, others):
    """Times of a case: rounds of microseconds of two contenders."""
    return {
        "4 tensors": {
            "asgd_fast": [1e3 * x for x in ours],
            "torch.optim.ASGD": [1e3 * x for x in others],
        }
    }


def test_machines_stand_side_by_side(page, folder):
    # The ratios of the rounds are 2, 4 and 10, so that their median is not that of the medians.
    times = hot([1, 2, 3], [10, 4, 12])
    page.record(folder, ZEN, "aaa", {"hot": page.figures("hot", times)})
    page.record(folder, XEON, "bbb", {"hot": page.figures("hot", hot([5] * 3, [20] * 3))})
    head, ours, torchs = rows_of(folder)[1:]
    assert head[2:] == [
        "Zen, avx2: us",
        "Zen, avx2: times asgd_fast",
        "Xeon, avx512: us",
        "Xeon, avx512: times asgd_fast",
    ]
    assert ours == ["4 tensors", "asgd_fast", "2.00", "1.00", "5.00", "1.00"]
    assert torchs == ["", "torch.optim.ASGD", "10.0", "4.00", "20.0", "4.00"]
    assert (folder / "performance.md").read_text().startswith("Before.\n")
    assert "old" not in (folder / "performance.md").read_text()


def test_what_is_measured_again_replaces_the_same_machines_figures_alone(page, folder):
    for machine, commit in ((ZEN, "aaa"), (XEON, "bbb")):
        measured = {name: page.figures("hot", hot([1] * 3, [2] * 3)) for name in ("hot", "large")}
        page.record(folder, machine, commit, measured)
    page.record(folder, ZEN, "ccc", {"hot": page.figures("hot", hot([3] * 3, [9] * 3))})
    machines = json.loads((folder / "performance.json").read_text())
    commits = {
        name: {section: x["commit"] for section, x in own["sections"].items()}
        for name, own in machines.items()
    }
    assert commits == {
        "Zen, avx2": {"hot": "ccc", "large": "aaa"},
        "Xeon, avx512": {"hot": "bbb", "large": "bbb"},
    }
    assert [row[2] for row in rows_of(folder)[-2:]] == ["3.00", "9.00"]


def test_figures_of_a_machine_that_has_changed_go(page, folder):
    measured = {name: page.figures("hot", hot([1] * 3, [2] * 3)) for name in ("hot", "large")}
    page.record(folder, ZEN, "aaa", measured)
    page.record(folder, {**ZEN, "cores": 16}, "bbb", {"hot": measured["hot"]})
    (own,) = json.loads((folder / "performance.json").read_text()).values()
    assert own["machine"]["cores"] == 16
    assert own["sections"].keys() == {"hot"}


def test_the_share_of_the_plain_loop_is_its_time_divided_by_ours(page, folder):
    times = {"10 float32": {"asgd_fast": [4.0] * 3, "plain loop": [3.0] * 3}}
    page.record(folder, ZEN, "aaa", {"large": page.figures("large", times)})
    assert rows_of(folder)[1] == ["10 float32", "0.75"]
    assert len(rows_of(folder)) == 3  # with the head of another table


def test_the_engine_has_a_share_of_its_own(page, folder):
    times = {"10 float32": {"asgd_fast": [4.0] * 3, "plain loop": [3.0] * 3}}
    page.record(folder, XEON, "aaa", {"large": page.figures("large", times)})
    times["10 float32"]["asgd_fast, the engine alone"] = [3.75] * 3
    page.record(folder, ZEN, "bbb", {"large": page.figures("large", times)})
    assert rows_of(folder)[1:3] == [
        ["10 float32", "0.75", "0.75"],
        ["10 float32, the engine alone", "", "0.80"],
    ]


def test_the_tables_of_the_documentation_are_those_of_the_figures(page):
    text = (ROOT / "docs" / "performance.md").read_text()
    machines = json.loads((ROOT / "docs" / "performance.json").read_text())
    for name in ("machines", "shares", *page.SECTIONS):
        assert f"<!-- {name} -->" in text
        assert len(list(page.tables(name, machines))) > 2  # the head has two
    assert page.filled(text, machines) == text


def test_the_picture_is_drawn_anew_after_any_section(page, folder):
    """Of whatever the machine was last measured with, so that it does not lag behind the tables."""
    machines = json.loads((ROOT / "docs" / "performance.json").read_text())
    own = machines["AMD EPYC, avx2"]
    (folder / "performance.json").write_text(json.dumps(machines))
    page.record(folder, own["machine"], "aaa", {"large": own["sections"]["large"]["cases"]})
    assert (folder / "performance.png").read_bytes().startswith(b"\x89PNG")
