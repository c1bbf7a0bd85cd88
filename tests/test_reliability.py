"""A short campaign of fixed seed, and its planted faults; `make reliability` is the long one."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from importlib import import_module
from types import ModuleType

import pytest
from reliability import __main__ as campaigns
from reliability import report
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
