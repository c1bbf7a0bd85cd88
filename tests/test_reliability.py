"""A short campaign of fixed seed, and its planted faults; `make reliability` is the long one."""

from __future__ import annotations

from importlib import import_module

import pytest
from reliability import __main__ as campaigns
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
