"""The benchmarks over time: asv's configurations, the gate, the stored results and their page.

That every benchmark runs is checked by `make bench-smoke`, which has them all run once.
"""

from __future__ import annotations

import functools
import html
import http.server
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "asv_benchmarks"
RESULTS = BENCHMARKS / "results"

pytestmark = pytest.mark.skipif(
    not BENCHMARKS.is_dir(), reason="asv_benchmarks/ is in the repository only"
)


@pytest.fixture(scope="module")
def gate():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield import_module("gate")


def test_both_configurations_name_the_same_things(gate):
    own = gate.configuration(BENCHMARKS / "asv.conf.json")
    root = gate.configuration(ROOT / "asv.conf.json")
    for configuration, folder in ((own, BENCHMARKS), (root, ROOT)):
        for name in ("repo", "benchmark_dir", "env_dir", "results_dir", "html_dir"):
            configuration[name] = os.path.normpath(folder / configuration[name])
    assert own.pop("plugins") == [".asv_machine"]
    assert root.pop("plugins") == [".asv_benchmarks.asv_machine"]
    assert own == root


NAN = math.nan
SAID_SLOWER = "SOME BENCHMARKS HAVE CHANGED SIGNIFICANTLY.\nPERFORMANCE DECREASED."


@pytest.mark.parametrize(
    ("status", "output", "measured", "verdict"),
    [
        pytest.param(0, "NOT SIGNIFICANTLY CHANGED", {"x": (1.0, 1.0)}, "SAME", id="same"),
        pytest.param(1, SAID_SLOWER, {"x": (1.0, 1.2)}, "SLOWER", id="slower"),
        pytest.param(0, "", {}, "UNKNOWN", id="no benchmark"),
        pytest.param(0, "", {"x": (NAN, NAN)}, "UNKNOWN", id="all skipped"),
        pytest.param(0, "", {"x": (1.0, NAN), "y": (1.0, 1.0)}, "UNKNOWN", id="one lost"),
        pytest.param(0, "", {"x": (NAN, 1.0), "y": (1.0, 1.0)}, "SAME", id="one new"),
        pytest.param(1, "Build failed", {"x": (1.0, 1.0)}, "UNKNOWN", id="asv failed"),
        pytest.param(2, "", {"x": (1.0, 1.0)}, "UNKNOWN", id="a benchmark failed"),
        pytest.param(0, "", {"x": (1.0, 1.0, 0.11)}, "UNKNOWN", id="uncertain"),
        pytest.param(
            0, "", {"x": (1.0, 1.0, 0.11), "y": (1.0, 1.0, 0.09)}, "SAME", id="one uncertain"
        ),
        pytest.param(1, SAID_SLOWER, {"x": (1.0, 1.5, 0.2)}, "SLOWER", id="uncertain and slower"),
    ],
)
def test_gate_tells_slower_from_not_measured(gate, status, output, measured, verdict):
    measured = {name: gate.Figures(*figures) for name, figures in measured.items()}
    assert gate.verdict(status, output, measured, 1.1) == getattr(gate, verdict)


def table_of(*rows):
    """What asv prints of slower and of faster benchmarks."""
    return "\n".join(f"| {mark} | 10.1±0.2μs | 12.3±1μs |  1.22 | {name} |" for mark, name in rows)


@pytest.mark.parametrize(
    ("again", "error", "n_cases", "verdict"),
    [
        pytest.param(SAID_SLOWER, 0.0, 3, "SLOWER", id="slower again"),
        pytest.param("same", 0.0, 3, "SAME", id="not again"),
        pytest.param("same", 0.2, 3, "SAME", id="not again, as far as can be said"),
        pytest.param("same", 0.2, 1, "UNKNOWN", id="nothing can be said of most cases"),
    ],
)
def test_gate_measures_again_what_was_slower(
    gate, monkeypatch, tmp_path, again, error, n_cases, verdict
):
    name = "arrays.Sizes.time_asgd(100000, 'copy')"
    first = table_of(("+", name), ("-", "arrays.Other.time_x(1)")) + "\n" + SAID_SLOWER
    asked = []

    def figures(*_):
        if len(asked) == 1:
            return {str(i): gate.Figures(1.0, 1.2) for i in range(n_cases)}
        return {"0": gate.Figures(1.0, 1.2, error)}

    def asv(stage, benchmarks, base, head):
        asked.append(benchmarks)
        output = first if len(asked) == 1 else again
        return int(SAID_SLOWER in output), output

    monkeypatch.setattr(gate, "FOLDER", tmp_path / "gate")
    monkeypatch.setattr(gate, "_asv", asv)
    monkeypatch.setattr(gate, "figures", figures)
    times = gate.STAGES[1]
    assert gate.check(times, "base", "head") == getattr(gate, verdict)
    assert asked[0] == times.benchmarks
    (pattern,) = asked[1]
    assert re.search(pattern, name)
    assert not re.search(pattern, "arrays.Sizes.time_asgd(1000000, 'copy')")


@pytest.mark.parametrize(
    ("error", "verdict"), [pytest.param(0.0, "SAME", id="quiet then"), (0.2, "UNKNOWN")]
)
def test_gate_measures_all_again_where_most_is_uncertain(
    gate, monkeypatch, tmp_path, error, verdict
):
    errors = [0.2, error]
    asked = []

    def asv(stage, benchmarks, base, head):
        asked.append(benchmarks)
        return 0, "same"

    monkeypatch.setattr(gate, "FOLDER", tmp_path / "gate")
    monkeypatch.setattr(gate, "_asv", asv)
    monkeypatch.setattr(
        gate, "figures", lambda *_: {"x": gate.Figures(1.0, 1.0, errors[len(asked) - 1])}
    )
    times = gate.STAGES[1]
    assert gate.check(times, "base", "head") == getattr(gate, verdict)
    assert asked == [times.benchmarks] * 2


def test_gate_measures_once_what_failed(gate, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(gate, "FOLDER", tmp_path / "gate")
    monkeypatch.setattr(gate, "_asv", lambda *_: asked.append(1) or (2, "failed"))
    monkeypatch.setattr(gate, "figures", lambda *_: {"x": gate.Figures(1.0, 1.0)})
    assert gate.check(gate.STAGES[1], "base", "head") == gate.UNKNOWN
    assert len(asked) == 1


def test_gate_can_say_nothing_where_it_cannot_read_what_was_slower(gate, monkeypatch, tmp_path):
    monkeypatch.setattr(gate, "FOLDER", tmp_path / "gate")
    monkeypatch.setattr(gate, "_asv", lambda *_: (1, SAID_SLOWER))
    monkeypatch.setattr(gate, "figures", lambda *_: {"x": gate.Figures(1.0, 1.2)})
    assert gate.check(gate.STAGES[1], "base", "head") == gate.UNKNOWN


@pytest.mark.parametrize("commits", [("no-such-commit", "HEAD"), ("HEAD", "HEAD")], ids=str)
def test_gate_can_say_nothing_of_no_commit_and_of_one(gate, monkeypatch, commits):
    monkeypatch.setattr(gate, "check", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["gate.py", *commits])
    assert gate.main() == gate.UNKNOWN


def test_gate_reads_what_asv_writes(gate, tmp_path):
    folder = tmp_path / "machine"
    folder.mkdir()
    columns = '["result", "params", "stats_q_25", "stats_q_75"]'
    for commit, figures, low, high in (
        ("a" * 40, "[1.5, NaN, 2]", "[1.2, NaN, 2]", "[1.8, NaN, 2]"),
        ("b" * 40, "[1.75, null, 2]", "[1.7, null, null]", "[1.8, null, null]"),
    ):
        (folder / f"{commit[:8]}-environment.json").write_text(
            f'{{"commit_hash": "{commit}", "result_columns": {columns}, "results": {{'
            f'"x.X.time_x": [{figures}, [["1", "2", "3"]], {low}, {high}], '
            f'"x.X.track_x": [{figures}, [["1", "2", "3"]]], "y.time_y": [null, []]}}}}'
        )
    found = gate.figures(tmp_path, "a" * 40, "b" * 40)
    assert found.pop("x.X.time_x #0") == (1.5, 1.75, pytest.approx(0.2))
    assert found.pop("x.X.time_x #2") == (2, 2, math.inf)
    assert found.pop("x.X.track_x #0") == (1.5, 1.75, 0.0)
    assert found.pop("x.X.track_x #2") == (2, 2, 0.0)
    assert set(found) == {"x.X.time_x #1", "x.X.track_x #1", "y.time_y #0"}
    assert all(math.isnan(x) for each in found.values() for x in (each.base, each.head))


@pytest.mark.skipif(find_spec("asv_runner") is None, reason="asv is not installed")
def test_a_benchmark_that_finds_nothing_is_no_skip_in_the_smoke_run(gate, monkeypatch):
    """Whatever the commit is said to lack: it is the one that the benchmarks are for."""
    cases = import_module("benchmarks.cases")
    with pytest.raises(NotImplementedError, match="no such thing"):
        cases.skip_old("no such thing")
    monkeypatch.setenv("ASGD_FAST_HAS_ALL", "1")
    with pytest.raises(RuntimeError, match="no such thing"):
        cases.skip_old("no such thing")
    with pytest.raises(NotImplementedError, match="no GPU"):
        cases.skip("no GPU")


def tracked_results():
    """What the repository keeps, without what its user has measured."""
    tracked = subprocess.run(
        ["git", "ls-files", RESULTS], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    return [ROOT / path for path in tracked]


def stored():
    """The results that the repository keeps of each machine and commit."""
    return [path for path in tracked_results() if re.match(r"[0-9a-f]{8}-", path.name)]


def in_history(path):
    commit = json.loads(path.read_text())["commit_hash"]
    found = subprocess.run(
        ["git", "merge-base", "--is-ancestor", commit, "HEAD"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    return found.returncode == 0


def test_the_smoke_run_has_cases_of_each_benchmark():
    """It leaves out those of many elements, by an expression of names with params."""
    makefile = (ROOT / "Makefile").read_text()
    (expression,) = re.findall(r"asv run .*--dry-run .*--bench '(.*)'$", makefile, re.MULTILINE)
    described = json.loads((RESULTS / "benchmarks.json").read_text())
    del described["version"]
    for name, each in described.items():
        cases = [f"{name}({', '.join(case)})" for case in itertools.product(*each["params"])]
        assert any(re.search(expression, case) for case in cases), name


@pytest.fixture(scope="module")
def published(gate, tmp_path_factory):
    """The folder of the page that asv makes of the stored results."""
    if find_spec("asv") is None:
        pytest.skip("asv is not installed")
    if not stored() or not all(map(in_history, stored())):
        pytest.skip("not a clone with the whole history")
    folder = tmp_path_factory.mktemp("published")
    for path in tracked_results():
        kept = folder / "results" / path.relative_to(RESULTS)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, kept)
    configuration = gate.configuration(BENCHMARKS / "asv.conf.json")
    configuration.update(repo=str(ROOT), results_dir="results", html_dir="html", plugins=[])
    (folder / "asv.conf.json").write_text(json.dumps(configuration))
    subprocess.run(
        [sys.executable, "-m", "asv", "publish"],
        cwd=folder,
        env={**os.environ, "HOME": str(folder)},
        capture_output=True,
        check=True,
    )
    return folder / "html"


@pytest.mark.skipif(find_spec("asv_runner") is None, reason="asv is not installed")
@pytest.mark.usefixtures("gate")
def test_each_benchmark_is_stored_as_it_is():
    """A higher version, without which stored figures of another kind would be taken for its own."""
    own = {}
    for path in (BENCHMARKS / "benchmarks").glob("*.py"):
        for each in vars(import_module(f"benchmarks.{path.stem}")).values():
            for name in vars(each) if isinstance(each, type) else ():
                if re.match(r"(time|timeraw|track|peakmem)_", name):
                    own[f"{path.stem}.{each.__name__}.{name}"] = each.version
    described = json.loads((RESULTS / "benchmarks.json").read_text())
    del described["version"]
    assert own == {name: each["version"] for name, each in described.items()}


def test_each_commit_of_the_history_has_results_of_each_benchmark():
    """But those of a GPU."""
    if not stored():
        pytest.skip("not a clone")
    described = json.loads((RESULTS / "benchmarks.json").read_text())
    del described["version"]
    commits = set()
    for path in stored():
        result = json.loads(path.read_text())
        commits.add(result["commit_hash"])
        assert result["results"].keys() <= described.keys()
        for name, each in described.items():
            if not name.startswith("cuda."):
                columns = result["results"].get(name, [])
                own = dict(zip(result["result_columns"], columns, strict=False))
                assert own.get("version") == each["version"], (path.name, name)
    history = [line.split()[0] for line in (BENCHMARKS / "history.txt").read_text().splitlines()]
    assert commits == set(history)


def test_results_of_several_commits_are_published(published):
    index = json.loads((published / "index.json").read_text())
    assert len(index["revision_to_hash"]) >= 10
    for name, benchmark in index["benchmarks"].items():
        assert benchmark["pretty_name"], name
        assert benchmark["unit"] not in ("", "unit"), name
        assert not any(re.fullmatch(r"param\d+", param) for param in benchmark["param_names"]), name


def test_compare_takes_this_machines_results(gate, published, tmp_path):
    """Of the stored ones, a copy that is said to be this machine's."""
    one, other = [json.loads(path.read_text())["commit_hash"] for path in stored()[:2]]
    (theirs,) = {path.parent for path in stored()}
    results = tmp_path / "results"
    shutil.copytree(theirs, results / theirs.name)
    ours = results / platform.node()
    shutil.copytree(theirs, ours)
    shutil.copy(RESULTS / "benchmarks.json", results)
    for path in ours.glob("*.json"):
        path.write_text(path.read_text().replace(theirs.name, ours.name))
    configuration = gate.configuration(BENCHMARKS / "asv.conf.json")
    configuration.update(repo=str(ROOT), results_dir=str(results))
    (tmp_path / "asv.conf.json").write_text(json.dumps(configuration))
    shutil.copy(BENCHMARKS / "asv_machine.py", tmp_path)
    compared = subprocess.run(
        [sys.executable, "-m", "asv", "compare", one, other],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert "instructions.Loop.track_loop" in compared.stdout


# What the page loads from elsewhere, as Debian has it: libjs-jquery, libjs-jquery-flot and so on.
SHARED = Path("/usr/share/javascript")
LIBRARIES = (
    "jquery/jquery.min.js",
    "jquery-flot/jquery.flot.min.js",
    "jquery-stupidtable/stupidtable.min.js",
    "blueimp-md5/md5.min.js",
    "bootstrap/js/bootstrap.min.js",
)


@pytest.fixture(scope="module")
def browse(published, tmp_path_factory):
    """A function that returns what a browser makes of a part of the page."""
    browsers = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, browsers)), None)
    if browser is None:
        pytest.skip("there is no chromium")
    if not all((SHARED / library).is_file() for library in LIBRARIES):
        pytest.skip("there are no JavaScript libraries of Debian's")
    page = published / "index.html"
    text = re.sub(r'<(script|link)\b[^>]*"https://[^>]*>(</script>)?', "", page.read_text())
    scripts = []
    for library in LIBRARIES:
        name = Path(library).name
        shutil.copy(SHARED / library, published / name)
        scripts.append(f'<script src="{name}"></script>')
    page.write_text(text.replace("</title>", "</title>" + "\n".join(scripts), 1))

    handler = functools.partial(QuietHandler, directory=published)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    profile = tmp_path_factory.mktemp("profile")

    def visit(part):
        return subprocess.run(
            [
                browser,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                f"--user-data-dir={profile}",
                "--window-size=1400,900",
                "--virtual-time-budget=10000",
                "--dump-dom",
                f"http://127.0.0.1:{server.server_port}/index.html#{part}",
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout

    yield visit
    server.shutdown()
    server.server_close()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def figures_in(graph):
    """The figures of all combinations of params over all commits."""
    columns = [x if isinstance(x, list) else [x] for _, x in json.loads(graph.read_text())]
    return [x for column in columns for x in column if x is not None]


@pytest.mark.parametrize(
    ("name", "title", "unit", "scale"),
    [
        (
            "instructions.Loop.track_loop",
            "instructions of the inner loop (AVX2)",
            "instructions per element",
            1,
        ),
        ("torch_optimizer.Sizes.time_step", "ASGD.step() of one tensor", "microseconds", 1e6),
    ],
)
def test_browser_shows_a_graph_with_its_name_and_unit(published, browse, name, title, unit, scale):
    dom = browse(name)
    benchmark = json.loads((published / "index.json").read_text())["benchmarks"][name]
    assert benchmark["pretty_name"] == title
    assert title in dom
    assert [html.unescape(x) for x in re.findall(r"y1Label axisLabels[^>]*>([^<]*)", dom)] == [unit]
    buttons = re.findall(r'role="button"[^>]*>([^<]*)', dom)
    for values in benchmark["params"]:
        assert {value.strip("'") for value in values} <= set(buttons)

    # The axis is that of the data: one without any ends at 1.2.
    (graph,) = (path for path in published.glob(f"graphs/arch-*/**/{name}.json"))
    largest = scale * max(figures_in(graph))
    ticks = [float(x) for x in re.findall(r"tickLabel[^>]*>([^<]*)", dom)]
    assert largest / 10 < max(ticks) < 1.5 * largest


def test_each_benchmark_has_a_line(published):
    """But those of a GPU."""
    for name in json.loads((published / "index.json").read_text())["benchmarks"]:
        if not name.startswith("cuda."):
            (graph,) = (path for path in published.glob(f"graphs/arch-*/**/{name}.json"))
            assert len(json.loads(graph.read_text())) >= 10, name


def test_browser_shows_the_regressions(published, browse):
    dom = browse("/regressions")
    found = json.loads((published / "regressions.json").read_text())["regressions"]
    assert found  # the history has some
    table = dom[dom.index('id="regressions-body"') :]
    jumps = 0
    for name, _, _, _, _, _, own_jumps in found:
        assert html.unescape(name) in html.unescape(table)
        jumps += len(own_jumps)
    assert len(re.findall(r"\d\.\d\dx", table)) == jumps
