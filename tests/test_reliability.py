"""A short campaign of fixed seed, and its planted faults; `make reliability` is the long one."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from contextlib import nullcontext
from importlib import import_module
from types import ModuleType

import pytest
from reliability import __main__ as campaigns
from reliability import out_of_memory, report
from reliability.common import Campaign

pytestmark = pytest.mark.filterwarnings("ignore::asgd_fast.AveragingNotBegunWarning")

# As much of a full campaign as takes some seconds.
SCALES = {
    "arrays": 0.008,
    "array_lives": 0.01,
    "capsules": 0.02,
    "checkpoints": 0.01,
    "beside_torch": 0.01,
}
PARTS = {name: import_module(f"reliability.{name}") for name in SCALES}


@pytest.fixture
def part(monkeypatch):
    """A part that raises what it is given, and counts what it is given."""
    made = ModuleType("reliability.made_up")

    def run(campaign):
        campaign.counts.update(made.counts)
        if made.error is not None:
            raise made.error

    made.run, made.error, made.counts = run, None, {"calls": 1}
    made.CONTROLS = {"a fault": nullcontext}
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


@pytest.mark.parametrize("control", [None, "a fault"])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, 0),
        (AssertionError("torn"), campaigns.FOUND),
        (RuntimeError("the campaign's own"), campaigns.BROKEN),
    ],
    ids=repr,
)
def test_a_finding_is_told_from_what_breaks_a_campaign(part, error, status, control):
    part.error = error
    assert campaigns.run_here("made_up", 0, 1.0, control, None) == status
    assert campaigns.FOUND not in (0, 1, 2, campaigns.BROKEN)  # those of Python and argparse


@pytest.mark.parametrize(
    ("counts", "is_green"),
    [({"calls": 3, "accepted": 1}, True), ({"calls": 3, "accepted": 0}, False), ({}, False)],
    ids=str,
)
def test_a_part_that_has_tried_nothing_is_red(counts, is_green):
    assert report.Outcome("made up", True, counts, {"a fault": True}, 1.0).is_green == is_green


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None, reason="needs gcc, on Linux"
)
def test_a_load_that_finds_no_memory_is_whole_or_not_made(monkeypatch):
    """Each of its allocations fails in turn; a string of NumPy's crashed at one of them."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    program = """
        import sys
        sys.modules["torch"] = None  # a process without it is forked sooner
        from reliability import out_of_memory
        every = out_of_memory.SPARSELY
        out_of_memory.MOMENTS = {"a later step": 5}
        out_of_memory.go_through("ArrayASGD", 0, every, calls=["load_state_dict"])
    """
    failed = json.loads(out_of_memory.without_memory(textwrap.dedent(program)))
    assert failed["ArrayASGD.load_state_dict"] > 300


@pytest.mark.parametrize("name", PARTS)
def test_nothing_is_found(name):
    campaign = Campaign(seed=1, scale=SCALES[name])
    PARTS[name].run(campaign)
    assert min(campaign.counts.values()) > 0


@pytest.mark.parametrize(
    ("name", "control"), [(name, control) for name in PARTS for control in PARTS[name].CONTROLS]
)
def test_a_planted_fault_is_found(name, control):
    with PARTS[name].CONTROLS[control](), pytest.raises(AssertionError):
        PARTS[name].run(Campaign(seed=1, scale=campaigns.PARTS[name], is_control=True))
