"""What is done on a machine with a GPU, without one: .ci/gpu.py and asv_benchmarks/gpu.py."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from time import monotonic

import fake_cuda
import fake_gpu
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "asv_benchmarks"

pytestmark = pytest.mark.skipif(
    not BENCHMARKS.is_dir(), reason="asv_benchmarks/ is in the repository only"
)


@pytest.fixture(scope="module")
def gpu():
    """The module that measures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield import_module("gpu")


@pytest.fixture
def devices(monkeypatch):
    with fake_cuda.installed(monkeypatch) as driver:
        yield driver


def new_results():
    return {"machine": {"card": "none"}, "cases": {}, "left out": {}}


def rows_of(page):
    """The cells of the rows of all tables of a page."""
    return [[x.strip() for x in line[1:-1].split("|")] for line in page.splitlines() if "|" in line]


def test_what_has_a_target_is_timed_first(gpu):
    labels = [case.label for case in gpu.cases()]
    assert len(set(labels)) == len(labels)
    page = import_module("gpu_page")
    wanted = {label for label, *_ in page.TARGETS + page.HOST_TARGETS}
    # Beside them are averages that are copied, and few tensors without averages.
    assert wanted < set(labels[: len(wanted) + 2])
    assert labels[:4] == [f"1e8 float32, {x}" for x in ("average", "lazy", "copy", "capturable")]


def test_the_bytes_that_a_step_moves(gpu):
    moved = {case.label: case.moved / case.n for case in gpu.cases()}
    assert {label: moved[f"1e8 {label}"] for label in (
        "float32, average",
        "float32, capturable",
        "float32, copy",
        "float32, lazy",
        "bfloat16, average",
        "float16 with averages of float32, average",
        "float32 with averages of float64, average",
    )} == {
        "float32, average": 20,
        "float32, capturable": 20,
        "float32, copy": 16,
        "float32, lazy": 12,
        "bfloat16, average": 10,
        "float16 with averages of float32, average": 14,
        "float32 with averages of float64, average": 28,
    }  # fmt: skip


def test_cases_that_do_not_fit_are_left_out_and_named(gpu, tmp_path):
    results, timed = new_results(), []

    def time(case):
        timed.append(case.label)
        if case.name == "1e9":
            raise RuntimeError("broken")
        return {"asgd_fast": {"device": 1.0, "host": 2.0}}

    gpu.measure(gpu.cases(), results, 30, time, tmp_path)
    left_out = results["left out"]
    compiled = {case.label for case in gpu.cases() if case.phase == "capturable"}
    assert {label for label, reason in left_out.items() if reason == "no time"} == compiled
    assert left_out["1e9 float32, lazy"] == "RuntimeError: broken"
    assert {*results["cases"], *left_out} == {case.label for case in gpu.cases()}
    assert not compiled & set(timed)
    page = (tmp_path / "gpu_figures.md").read_text()
    assert all(f"- left out: {label} ({reason})" in page for label, reason in left_out.items())


def test_figures_are_saved_after_each_case(gpu, tmp_path):
    results = new_results()

    def time(case):
        if len(results["cases"]) == 2:
            raise KeyboardInterrupt
        return {"asgd_fast": {"device": 1.0, "host": 2.0}}

    with pytest.raises(KeyboardInterrupt):
        gpu.measure(gpu.cases(), results, time=time, folder=tmp_path)
    page = (tmp_path / "gpu_figures.md").read_text()
    assert [row[0] for row in rows_of(page) if row[1] == "asgd_fast"] == [
        "1e8 float32, average",
        "1e8 float32, lazy",
    ]


def test_the_page_says_which_targets_were_met(gpu):
    def took(device, host=1.0):
        return {"device": device, "host": host}

    results = new_results()
    results["cases"] = {
        "1e8 float32, average": {
            "moved": 2 * 10**9,
            "times": {
                "asgd_fast": took(0.5),
                "copy of as many bytes": took(0.46),
                "torch.optim.ASGD": took(1.19),
            },
        },
        "300 of 1e4 float32, average": {"moved": 1, "times": {"asgd_fast": took(1.0, 60.1)}},
        "300 of 1e4 float32, capturable": {
            "moved": 1,
            "times": {
                "asgd_fast": took(0.1),
                "asgd_fast in a graph": took(0.1, 9.9),
                "torch.optim.ASGD, compiled": took(0.2),
            },
        },
    }
    rows = rows_of(gpu.report(results))
    assert ["1e8 float32, average", "asgd_fast", "0.5000", "4.00", "0.92", "1.00", "1.0"] in rows
    ends = {(row[0], row[1]): row[2:] for row in rows if row[-1] in ("met", "missed")}
    compiled = "speed of torch.optim.ASGD, compiled"
    assert ends == {
        ("1e8 float32, average", "bandwidth of a copy"): [">= 0.92", "0.92", "met"],
        ("1e8 float32, average", "speed of torch.optim.ASGD"): [">= 2.4", "2.38", "missed"],
        ("300 of 1e4 float32, capturable", compiled): [">= 2", "2.00", "met"],
        ("300 of 1e4 float32, average", "us of the host, asgd_fast"): ["<= 60", "60.1", "missed"],
        ("300 of 1e4 float32, capturable", "us of the host, asgd_fast in a graph"): [
            "<= 10",
            "9.9",
            "met",
        ],
    }
    missing = [row for row in rows if row[-1] == "not measured"]
    page = import_module("gpu_page")
    assert len(missing) + len(ends) == len(page.TARGETS) + len(page.HOST_TARGETS)


def test_bits_of_the_cpu_are_found_right(gpu, devices):
    assert gpu.wrong_bits(1000) == []
    assert len(devices.launches) == 2 * 3 * 7


def test_wrong_bits_are_found(gpu, devices, monkeypatch):
    body = fake_gpu.body

    def faulty(kind):
        return (lambda *_: None) if kind.param == "float64" else body(kind)

    monkeypatch.setattr(fake_gpu, "body", faulty)
    assert gpu.wrong_bits(1000) == [
        f"{name} of torch.float64, torch.float64, offsets {offsets}"
        for offsets in ((0, 0, 0), (1, 1, 1), (1, 2, 3))
        for name in ("param", "average")
    ]


def test_a_kernel_that_fails_leaves_the_others_to_be_compared(gpu, devices, monkeypatch):
    step = gpu.asgd_

    def broken(param, *others, **scalars):
        if param.dtype == torch.float64:
            raise RuntimeError("no kernel")
        step(param, *others, **scalars)

    monkeypatch.setattr(gpu, "asgd_", broken)
    assert gpu.wrong_bits(1000) == [
        f"RuntimeError: no kernel of torch.float64, torch.float64, offsets {offsets}"
        for offsets in ((0, 0, 0), (1, 1, 1), (1, 2, 3))
    ]


def test_the_steps_of_each_case_can_be_made(gpu, devices, monkeypatch):
    """Each contender changes the params, but the copy; compiled and captured ones take a GPU."""
    monkeypatch.setattr(gpu, "SIZES", {name: [5, 1000] for name in gpu.SIZES})
    monkeypatch.setattr(gpu, "_replay", lambda optimizer: optimizer.step)
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    for case in gpu.cases():
        steps = gpu.contenders(case)
        params = steps["asgd_fast"].__self__.param_groups[0]["params"]
        assert [p.dtype for p in params] == [case.dtype] * 2
        for param in params:
            param.grad.mul_(1e4)  # of which lr leaves something that bfloat16 shows
        for name, step in steps.items():
            if name == "torch.optim.ASGD, compiled":
                continue
            before = [p.clone() for p in params]
            for _ in range(3):
                step()
            is_same = all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
            assert is_same == (name == "copy of as many bytes"), (case.label, name)


@pytest.fixture(scope="module")
def command():
    """The module of the command for a machine with a GPU."""
    spec = spec_from_file_location("gpu_command", ROOT / ".ci" / "gpu.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_step_that_fails_or_takes_too_long_does_not_stop_the_next(command, tmp_path, capfd):
    def step(name, weight, code):
        return command.Step(name, weight, f"{name[0]}.log", 9, ["{python}", "-c", code])

    start = monotonic()
    passed = command.run_all(
        [
            step("fails", 1, "print('first'); raise SystemExit(3)"),
            command.Step("absent", 1, "a.log", 1, ["there-is-no-such-command"]),
            step("sleeps", 1, "import time; print('so far', flush=True); time.sleep(60)"),
            step("ends", 2, "import asgd_fast, pytest, sys; print(sys.prefix, {seconds}, 'end')"),
        ],
        tmp_path / "out",
        12,
    )
    assert monotonic() - start < 14
    assert not passed
    said = capfd.readouterr().out
    assert "fails: failed (3)" in said
    assert "absent: not run: " in said
    assert "sleeps: cut short" in said
    assert "ends: passed" in said
    assert "so far" in said
    assert "did not pass: fails, absent, sleeps\n" in said
    logs = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert sorted(logs) == ["a.log", "e.log", "f.log", "s.log"]
    assert logs["f.log"].endswith("first\n")
    assert not logs["e.log"].splitlines()[-1].startswith(sys.prefix)  # an environment of its own


def test_without_what_is_needed_nothing_else_is_tried(command, tmp_path, capfd):
    steps = [
        command.Step("build", 1, "b.log", 9, ["false"], is_needed=True),
        command.Step("tests", 1, "t.log", 9, ["true"]),
    ]
    assert not command.run_all(steps, tmp_path, 60)
    said = capfd.readouterr().out
    assert "build: failed (1)" in said
    assert said.endswith("without build nothing else is tried\ndid not pass: build\n")
    assert "tests" not in said
    assert [step.name for step in command.all_steps() if step.is_needed] == ["build", "a kernel"]


def test_the_compiler_is_found_wherever_a_toolkit_has_it(command, tmp_path):
    for i, place in enumerate(("nvvm/lib64", "lib", "targets/x86_64-linux/lib")):
        folder = tmp_path / str(i) / place
        folder.mkdir(parents=True)
        (folder / "libnvvm.so.4").write_text(place)
        command._show_compiler(tmp_path / str(i), tmp_path / f"shown{i}")
        assert (tmp_path / f"shown{i}" / "libnvvm.so.4").read_text() == place


def test_the_steps_write_no_more_files_than_are_brought_back(command):
    steps = command.all_steps()
    assert len({step.log for step in steps} | {"gpu.json", "gpu_figures.md"}) <= 8
    for step in steps:
        for word in step.command:
            word.format(python="python", out="out", seconds=1)
            if word.startswith(("tests/", "asv_benchmarks/", ".ci/")):
                assert (ROOT / word).is_file()
