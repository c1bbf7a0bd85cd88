"""The benchmarks over time: asv's configurations, the gate, the stored results and their page.

That every benchmark runs is checked by `make bench-smoke`, which has them all run once.
"""

from __future__ import annotations

import html
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from browser import find_browser, visiting

import asgd_fast
from asgd_fast import _core

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "asv_benchmarks"
RESULTS = BENCHMARKS / "results"

pytestmark = pytest.mark.skipif(
    not (ROOT / "asv.conf.json").is_file(), reason="asv runs in the repository only"
)


@pytest.fixture(scope="module")
def gate():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield import_module("gate")


def configuration_of(folder):
    """The configuration of asv in a folder: JSON with whole lines of comment."""
    text = (folder / "asv.conf.json").read_text()
    return json.loads(re.sub(r"^ *//.*$", "", text, flags=re.MULTILINE))


def test_both_configurations_name_the_same_things():
    own = configuration_of(BENCHMARKS)
    root = configuration_of(ROOT)
    for configuration, folder in ((own, BENCHMARKS), (root, ROOT)):
        for name in ("repo", "benchmark_dir", "env_dir", "results_dir", "html_dir"):
            configuration[name] = os.path.normpath(folder / configuration[name])
    assert own.pop("plugins") == [".asv_machine"]
    assert root.pop("plugins") == [".asv_benchmarks.asv_machine"]
    assert own == root


NEEDS_VALGRIND = pytest.mark.skipif(
    shutil.which("valgrind") is None, reason="valgrind is not installed"
)

# Packs the package as it stands, so that a build takes no compiler and nothing from an index.
BACKEND = """
from pathlib import Path
from zipfile import ZipFile

METADATA = "Metadata-Version: 2.1\\nName: asgd_fast\\nVersion: 1\\n"
WHEEL = "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"

def build_wheel(folder, config_settings=None, metadata_directory=None):
    with ZipFile(Path(folder, "asgd_fast-1-py3-none-any.whl"), "w") as wheel:
        for path in Path("asgd_fast").rglob("*.*"):
            wheel.write(path)
        for name, text in (("METADATA", METADATA), ("WHEEL", WHEEL), ("RECORD", "")):
            wheel.writestr(f"asgd_fast-1.dist-info/{name}", text)
    return Path(wheel.filename).name
"""


def git(folder, *arguments):
    name = ("-c", "user.name=tests", "-c", "user.email=tests@localhost")
    subprocess.run(["git", *name, *arguments], cwd=folder, check=True)


def hide(package, function):
    """Give a compiled function another name, as if the commit did not have it."""
    for path in package.rglob("*.so"):
        name = rb"(?<=\d)" + function.encode() + rb"(?=\0)"
        path.write_bytes(re.sub(name, b"_" * len(function), path.read_bytes()))


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository of this build of the package; each tag is a commit with one more change."""
    root = tmp_path_factory.mktemp("repository")
    package = root / "asgd_fast"
    shutil.copytree(
        Path(asgd_fast.__file__).parent,
        package,
        ignore=shutil.ignore_patterns("*.c", "*.h", "*.p[xy][xdi]", "*.pxi", "__pycache__"),
    )
    (root / "backend.py").write_text(BACKEND)
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )

    def commit(tag):
        git(root, "add", "--all")
        git(root, "commit", "--quiet", "--allow-empty", "--message", tag)
        git(root, "tag", tag)

    git(root, "init", "--quiet")
    commit("base")
    commit("identical")
    hide(package, "extend")
    commit("no-rows")
    with (package / "__init__.py").open("a") as init:
        init.write("from asgd_fast import _core\n_core.use_simd_level('baseline')\n")
    commit("slower-loops")
    hide(package, "update")
    commit("neither")
    commit("neither-again")
    (root / "backend.py").write_text("1 / 0")
    commit("no-build")
    return root


@pytest.fixture
def check(gate, repository, monkeypatch, capsys):
    """Return a function that runs the gate, and returns its exit status and what it printed."""

    def run(*commits):
        monkeypatch.setattr(gate, "ROOT", repository)
        monkeypatch.setattr(sys, "argv", ["gate.py", *commits])
        return gate.main(), capsys.readouterr().out

    return run


@NEEDS_VALGRIND
def test_gate_passes_a_commit_of_the_same_code(check):
    status, output = check("base", "identical")
    assert status == 0
    ratios = dict(re.findall(r"^((?:loops|rows): .+?)  +\S+ +\S+ +(\S+)$", output, re.MULTILINE))
    assert {"loops: float32, averaging", "rows: averaging, again"} <= ratios.keys()
    assert all(0.999 <= float(ratio) <= 1.001 for ratio in ratios.values())
    assert f"0 of {len(ratios)} cases" in output


@NEEDS_VALGRIND
@pytest.mark.skipif("avx2" not in _core.simd_levels(), reason="all loops are equally slow")
def test_gate_fails_slower_loops(check):
    status, output = check("no-rows", "slower-loops")
    assert status == 1
    ((before, after, ratio),) = re.findall(
        r"^loops: float32, averaging +(\S+) +(\S+) +(\S+)  SLOWER$", output, re.MULTILINE
    )
    assert float(ratio) == pytest.approx(float(after) / float(before), abs=0.1)
    assert "rows:" not in output


@NEEDS_VALGRIND
@pytest.mark.parametrize(
    ("commits", "reason"),
    [
        pytest.param(("base", "base"), "base and base are the same commit", id="one commit"),
        pytest.param(("base", "missing"), "git rev-parse .*missing", id="no commit"),
        pytest.param(("neither", "no-build"), "commit .* could not be built", id="no build"),
        pytest.param(("neither", "neither-again"), "no case in common", id="no case"),
    ],
)
def test_gate_says_why_nothing_was_measured(check, commits, reason):
    status, output = check(*commits)
    assert status == 2
    assert re.search(f"^Nothing was measured: .*{reason}", output, re.MULTILINE)


def test_gate_measures_nothing_without_valgrind(check, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check("base", "identical") == (2, "Nothing was measured: valgrind is not installed\n")


def test_gate_does_not_take_its_own_failure_for_a_slower_commit(check, gate, monkeypatch):
    monkeypatch.setattr(gate, "measure", lambda *_: [{"x": 1.0}, {"x": None}])
    assert check("base", "identical")[0] == 2


@pytest.mark.parametrize(
    ("before", "after", "status"),
    [
        pytest.param({"x": 100.0}, {"x": 101.9}, 0, id="more, within the limit"),
        pytest.param({"x": 100.0}, {"x": 102.1}, 1, id="more"),
        pytest.param({"x": 100.0}, {"x": 50.0}, 0, id="fewer"),
        pytest.param({"x": 100.0, "y": 1.0}, {"x": 50.0, "y": 1.1}, 1, id="fewer, and more"),
        pytest.param({"x": 1.0, "old": 1.0}, {"x": 1.0}, 0, id="one case lost"),
        pytest.param({"x": 1.0}, {"x": 1.0, "new": 9.0}, 0, id="one case new"),
    ],
)
def test_gate_fails_from_two_percent_on(check, gate, monkeypatch, before, after, status):
    monkeypatch.setattr(gate, "measure", lambda *_: [before, after])
    found, output = check("base", "identical")
    assert found == status
    assert ("SLOWER" in output) == bool(status)
    for name in before.keys() ^ after.keys():
        assert re.search(
            rf"^Cases of the (first|second) commit alone: {name}$", output, re.MULTILINE
        )


@NEEDS_VALGRIND
def test_a_call_that_callgrind_does_not_see_is_an_error(gate, repository, tmp_path):
    """The counts would be those of another call, or of nothing."""
    git(repository, "checkout", "--quiet", "base")
    shutil.copytree(repository / "asgd_fast", tmp_path / "asgd_fast")
    with (tmp_path / "asgd_fast" / "__init__.py").open("a") as init:
        init.write("def asgd_(*_, **__): pass\n")
    with pytest.raises(RuntimeError, match="did not see every call"):
        gate.callgrind.count(tmp_path, "rows")


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
    configuration = configuration_of(BENCHMARKS)
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
    """Of some machine; but those of a GPU."""
    if not stored():
        pytest.skip("not a clone")
    described = json.loads((RESULTS / "benchmarks.json").read_text())
    del described["version"]
    versions = {}
    for path in stored():
        result = json.loads(path.read_text())
        assert result["results"].keys() <= described.keys()
        for name, columns in result["results"].items():
            own = dict(zip(result["result_columns"], columns, strict=False))
            versions.setdefault((result["commit_hash"], name), set()).add(own.get("version"))
    history = [line.split()[0] for line in (BENCHMARKS / "history.txt").read_text().splitlines()]
    assert {commit for commit, _ in versions} == set(history)
    for name, each in described.items():
        if not name.startswith("cuda."):
            for commit in history:
                assert versions.get((commit, name)) == {each["version"]}, (commit, name)


def test_results_lie_in_the_folder_of_their_processor():
    """Results of different processors in one folder would be drawn as one line."""
    folders = {path.parent for path in stored()}
    for folder in folders:
        machine = json.loads((folder / "machine.json").read_text())
        words = re.findall("[a-z0-9]+", machine["cpu"].lower())
        assert folder.name == machine["machine"] == f"{'-'.join(words)}-{machine['num_cpu']}-cores"
        assert words[-1] in ("avx512", "avx2")
        for path in folder.glob("????????-*.json"):
            params = json.loads(path.read_text())["params"]
            assert {name: params[name] for name in ("cpu", "machine")} == {
                name: machine[name] for name in ("cpu", "machine")
            }, path


def test_results_of_several_commits_are_published(published):
    index = json.loads((published / "index.json").read_text())
    assert len(index["revision_to_hash"]) >= 10
    for name, benchmark in index["benchmarks"].items():
        assert benchmark["pretty_name"], name
        assert benchmark["unit"] not in ("", "unit"), name
        assert not any(re.fullmatch(r"param\d+", param) for param in benchmark["param_names"]), name


def test_compare_takes_this_machines_results(gate, published, tmp_path):
    """Of the stored ones, a copy that is said to be this machine's."""
    of_loops = [path for path in stored() if '"instructions.Loop' in path.read_text()]
    one, other = [json.loads(path.read_text())["commit_hash"] for path in of_loops[:2]]
    theirs = of_loops[0].parent
    results = tmp_path / "results"
    shutil.copytree(theirs, results / theirs.name)
    ours = results / platform.node()
    shutil.copytree(theirs, ours)
    shutil.copy(RESULTS / "benchmarks.json", results)
    for path in ours.glob("*.json"):
        path.write_text(path.read_text().replace(theirs.name, ours.name))
    configuration = configuration_of(BENCHMARKS)
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


@pytest.mark.skipif(find_spec("asv") is None, reason="asv is not installed")
def test_asv_finds_the_interpreter_that_runs_it(tmp_path):
    """Although another of its version is first on PATH."""
    name = f"python3.{sys.version_info.minor}"
    if not Path(sys.executable).with_name(name).is_file():
        pytest.skip(f"this interpreter is not called {name}")
    (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / name).chmod(0o755)
    shutil.copy(BENCHMARKS / "asv_machine.py", tmp_path)
    program = f"import asv_machine, shutil; asv_machine.setup(); print(shutil.which({name!r}))"
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(Path(sys.executable).with_name(name))


@pytest.mark.skipif(find_spec("asv") is None, reason="asv is not installed")
def test_the_name_of_a_machine_is_that_of_its_processor(tmp_path):
    printed = subprocess.run(
        [sys.executable, BENCHMARKS / "asv_machine.py"],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    name = printed.stdout.strip()
    assert re.fullmatch(rf"[a-z0-9-]+-{os.cpu_count()}-cores", name)
    assert ("avx" in name) == (_core.simd_levels()[0] != "baseline")
    # Many virtual machines have an "AMD EPYC", so its name does not tell it from others.
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    family = re.findall(r"^(?:cpu family|model|stepping)\s*: (\d+)$", text, re.MULTILINE)[:3]
    assert "-".join(family) in name


@pytest.mark.parametrize("name", ["zen-2-cores", None])
def test_results_are_recorded_under_a_name_or_not_at_all(tmp_path, name):
    """asv would otherwise take no name for that of a machine."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    named = f"echo {name}" if name else "exit 1"
    for program, text in (("python", named), ("asv", 'echo "$@" > measured')):
        path = tmp_path / ".venv" / "bin" / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    (tmp_path / "asv_benchmarks").mkdir()
    (tmp_path / "asv_benchmarks" / "history.txt").write_text("d083d367 first\n")
    makefile = str(ROOT / "Makefile")
    made = subprocess.run(
        ["make", "-f", makefile, "-o", ".venv/bench", "bench-record"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    measured = tmp_path / "measured"
    assert (made.returncode == 0) == measured.exists() == (name is not None), made.stderr
    if name:
        assert f"--machine {name} HASHFILE:-" in measured.read_text()


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
    find_browser()
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

    with visiting(published, tmp_path_factory.mktemp("profile")) as visit:
        yield lambda part: visit(f"index.html#{part}")


def graphs_of(published, name):
    """The lines of a benchmark: of each machine those of all combinations of params."""
    graphs = published.glob(f"graphs/arch-*/**/{name}.json")
    return [json.loads(graph.read_text()) for graph in graphs]


def figures_in(graph):
    """The figures of all combinations of params over all commits."""
    columns = [x if isinstance(x, list) else [x] for _, x in graph]
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
    largest = scale * max(x for graph in graphs_of(published, name) for x in figures_in(graph))
    ticks = [float(x) for x in re.findall(r"tickLabel[^>]*>([^<]*)", dom)]
    assert largest / 10 < max(ticks) < 1.5 * largest


def test_each_benchmark_has_a_line(published):
    """But those of a GPU."""
    for name in json.loads((published / "index.json").read_text())["benchmarks"]:
        if not name.startswith("cuda."):
            assert any(len(graph) >= 10 for graph in graphs_of(published, name)), name


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
