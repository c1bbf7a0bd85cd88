"""The figures of docs/performance.md: whose they are, and that performance.json has the same.

Those that were not measured come of a simulation, threads_model.py.
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest

from asgd_fast import _core
from asgd_fast.threads import BYTES_PER_THREAD

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "asv_benchmarks"

pytestmark = pytest.mark.skipif(
    not BENCHMARKS.is_dir(), reason="asv_benchmarks/ is in the repository only"
)

FAMILY = "family/model/stepping"
ZEN = {"processor": "Zen", FAMILY: "25/1/1", "simd": "avx2", "cores": 2}
XEON = {"processor": "Xeon", FAMILY: "6/85/7", "simd": "avx512", "cores": 2}


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


@pytest.fixture
def save(page, folder, monkeypatch, capsys):
    """A function that has performance.py save sections, which here take no time.

    It returns the sections that were measured, and the message by which they were refused.
    """
    performance = import_module("performance")
    if not re.search(r"^cpu family\s*: \d", cpuinfo(), re.MULTILINE):
        pytest.skip("the family of this processor is not known")
    measured = []

    def section(name):
        def measure(_):
            measured.append(name)
            return hot([1] * 3, [2] * 3)

        return measure

    monkeypatch.setattr(performance, "SECTIONS", {x: section(x) for x in ("hot", "large")})
    monkeypatch.setattr(performance, "PlainLoops", lambda: None)
    monkeypatch.setattr(performance, "_commit", lambda: "aaa")
    level = _core.simd_level()
    _core.use_simd_level(_core.simd_levels()[0])

    def run(*sections):
        measured.clear()
        monkeypatch.setattr(sys, "argv", ["performance.py", *sections, "--save", str(folder)])
        with suppress(SystemExit):
            performance.main()
        return list(measured), capsys.readouterr().err

    yield run
    _core.use_simd_level(level)


def cpuinfo():
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def edit(folder, change):
    """Change the figures of the only machine in performance.json."""
    path = folder / "performance.json"
    machines = json.loads(path.read_text())
    (own,) = machines.values()
    change(own)
    path.write_text(json.dumps(machines))


def test_machines_stand_side_by_side(page, folder):
    # The ratios of the rounds are 2, 4 and 10, so that their median is not that of the medians.
    times = hot([1, 2, 3], [10, 4, 12])
    page.record(folder, ZEN, "aaa", {"hot": page.figures("hot", times)})
    page.record(folder, XEON, "bbb", {"hot": page.figures("hot", hot([5] * 3, [20] * 3))})
    head, ours, torchs = rows_of(folder)[1:]
    assert head[2:] == [
        "Zen 25/1/1, avx2: us",
        "Zen 25/1/1, avx2: times asgd_fast",
        "Xeon 6/85/7, avx512: us",
        "Xeon 6/85/7, avx512: times asgd_fast",
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
        "Zen 25/1/1, avx2": {"hot": "ccc", "large": "aaa"},
        "Xeon 6/85/7, avx512": {"hot": "bbb", "large": "bbb"},
    }
    assert [row[2] for row in rows_of(folder)[-2:]] == ["3.00", "9.00"]


@pytest.mark.skipif("len(_core.simd_levels()) == 1", reason="there is one SIMD level")
def test_a_lower_simd_level_than_the_processors_is_not_saved(save, folder):
    """On a processor with AVX-512, AVX2 would be in the column of one that has no more."""
    best = _core.simd_levels()[0]
    _core.use_simd_level("baseline")
    measured, message = save("hot")
    assert not measured
    assert f"baseline is in use, and this processor has {best}" in message
    assert not (folder / "performance.json").exists()


@pytest.mark.parametrize(
    ("fact", "value"),
    [("cores", 99), ("threads", 99), ("last cache", "1 MiB"), (FAMILY, "1/2/3"), (FAMILY, None)],
)
def test_another_machines_figures_are_not_replaced(save, folder, fact, value):
    assert save("hot") == (["hot"], "")
    edit(folder, lambda own: own["machine"].update({fact: value or "unknown"}))
    before = (folder / "performance.json").read_text()
    measured, message = save("hot")
    assert not measured
    assert f"{fact} is {value or 'unknown'} there" in message
    assert (folder / "performance.json").read_text() == before


def test_processors_of_one_name_have_columns_of_their_own(save, folder):
    """As many virtual machines have an "AMD EPYC"."""
    save("hot")
    path = folder / "performance.json"
    (own,) = json.loads(path.read_text()).values()
    path.write_text(path.read_text().replace(own["machine"][FAMILY], "1/2/3"))
    assert save("hot") == (["hot"], "")
    one, other = json.loads(path.read_text()).values()
    assert one["machine"][FAMILY] == "1/2/3"
    assert other == own


def test_the_family_is_that_of_the_first_processor(save, folder):
    save("hot")
    (own,) = json.loads((folder / "performance.json").read_text()).values()
    for fact, value in zip(FAMILY.split("/"), own["machine"][FAMILY].split("/"), strict=True):
        line = rf"^(cpu )?{fact}\s*: {value}$"
        assert re.search(line, cpuinfo().partition("\n\n")[0], re.MULTILINE)


def test_sections_that_older_versions_measured_do_not_go_without_a_word(save, folder):
    """Nor stay, under facts that are not theirs."""
    assert save("hot", "large") == (["hot", "large"], "")
    edit(folder, lambda own: own["machine"].update(torch="0.1"))
    before = (folder / "performance.json").read_text()
    measured, message = save("hot")
    assert not measured
    assert "torch is 0.1 there" in message
    assert "measure large as well" in message
    assert (folder / "performance.json").read_text() == before
    assert save("hot", "large") == (["hot", "large"], "")
    assert '"0.1"' not in (folder / "performance.json").read_text()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"Zen, avx2": {}}', '{"Zen, avx2": {"machine": {}, "sections": []}}'],
)
def test_malformed_figures_are_seen_before_anything_is_measured(save, folder, text):
    (folder / "performance.json").write_text(text)
    measured, message = save("hot")
    assert not measured
    assert "performance.json is malformed" in message
    assert (folder / "performance.json").read_text() == text


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
    own = machines["AMD EPYC 25/1/1, avx2"]
    (folder / "performance.json").write_text(json.dumps(machines))
    page.record(folder, own["machine"], "aaa", {"large": own["sections"]["large"]["cases"]})
    assert (folder / "performance.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def model(page):
    return import_module("threads_model")


def test_simulated_steps_of_few_threads_take_what_can_be_said_by_hand(model):
    alone = 512 * model.WORK
    assert model.step(512, 1, 70.0, 5.0) == alone
    assert model.step(512, 2, 0.0, 0.0) == pytest.approx(alone / 2)
    # The second comes when the first has done the shares of both; with 10 us to wake it.
    assert model.step(512, 2, 1000.0, 0.0) == 1000
    assert model.step(512, 2, 1000.0, 10.0) == 1010
    # Two chunks for each: the second does one, while the first does three.
    chunk = 2048 / 4 * model.WORK
    assert model.step(2048, 2, 2.5 * chunk, 0.0) == pytest.approx(3.5 * chunk)


def test_a_thread_stands_for_what_loses_least_at_most(model):
    worst = {kib: max(model.loss(kib, *x)[0] for x in model.CASES.values()) for kib in model.KIBS}
    assert min(worst, key=worst.get) << 10 == BYTES_PER_THREAD
    text = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    said = re.search(
        r"384 loses least where it loses most: (\d+) us .* 192 loses (\d+), .* 768 loses (\d+)",
        text,
    )
    assert said is not None
    assert list(map(int, said.groups())) == [round(worst[kib]) for kib in (384, 192, 768)]
