"""eta and mu against their closed formulas, and what the schedule refuses."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgd_fast import Schedule


def run(schedule, steps):
    for _ in range(steps):
        schedule.advance()
    return schedule


def test_starts_at_step_0_with_eta_lr_and_mu_1():
    schedule = Schedule(lr=0.25)
    assert (schedule.step, schedule.eta, schedule.mu) == (0, 0.25, 1.0)


@given(
    lr=st.floats(1e-6, 100),
    lambd=st.floats(0, 10),
    alpha=st.floats(0, 2),
    t0=st.floats(-5, 30),
    steps=st.integers(1, 40),
)
def test_follows_the_closed_formulas(lr, lambd, alpha, t0, steps):
    schedule = run(Schedule(lr, lambd, alpha, t0), steps)
    assert schedule.step == steps
    with localcontext() as context:
        context.prec = 60
        growth = 1 + Decimal(lambd) * Decimal(lr) * steps
        eta = Decimal(lr) / growth ** Decimal(alpha)
        # Rounding the base of a power by half an ulp moves the result by alpha halves.
        assert abs(Decimal(schedule.eta) / eta - 1) < 6 * Decimal(np.finfo(float).eps)
        mu = 1 / max(Decimal(1), Decimal(steps) - Decimal(t0))
        assert abs(Decimal(schedule.mu) / mu - 1) < 2 * Decimal(np.finfo(float).eps)


@pytest.mark.parametrize("lr", [0.1, 30.0])
@pytest.mark.parametrize(("lambd", "alpha"), [(0.0, 0.75), (1e-4, 0.75), (1e-2, 0.0), (1.0, 1.5)])
@pytest.mark.parametrize("t0", [0, 2.5, 1e6])
def test_has_the_bits_of_the_listing(lr, lambd, alpha, t0):
    schedule = Schedule(lr, lambd, alpha, t0)
    for k in range(1, 300):
        schedule.advance()
        assert schedule.eta == lr / math.pow(1 + lambd * lr * k, alpha)
        assert schedule.mu == 1 / max(1, k - t0)


def test_the_first_averaged_iterate_is_number_t0_plus_3():
    schedule = Schedule(t0=5)
    weights = []
    for _ in range(9):
        weights.append(schedule.mu)
        schedule.advance()
    # The weight of iterates 1, 2, ...: copied up to number 7, averaged from number 8.
    assert weights == [1, 1, 1, 1, 1, 1, 1, 1 / 2, 1 / 3]


def test_a_changed_lr_acts_one_step_late():
    schedule = Schedule(lr=0.1, lambd=0.0)
    schedule.lr = 1.0
    assert schedule.eta == 0.1
    schedule.advance()
    assert schedule.eta == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, r"Invalid learning rate: -0\.1"),
        ({"lr": math.nan}, "Invalid learning rate: nan"),
        ({"lr": math.inf}, "Invalid learning rate: inf"),
        ({"lambd": -1.0}, r"Invalid lambd value: -1\.0 \(expected a finite 0 <= lambd\)"),
        ({"lambd": math.nan}, "Invalid lambd value: nan"),
        ({"alpha": -0.5}, r"Invalid alpha value: -0\.5"),
        ({"alpha": math.inf}, "Invalid alpha value: inf"),
        ({"t0": math.nan}, r"Invalid t0 value: nan \(expected a finite t0\)"),
        ({"t0": -math.inf}, "Invalid t0 value: -inf"),
    ],
)
def test_refuses_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**options)
    schedule = Schedule()
    for name, value in options.items():
        setattr(schedule, name, value)
    with pytest.raises(ValueError, match=message):
        schedule.advance()
    assert (schedule.step, schedule.eta, schedule.mu) == (0, 1e-2, 1.0)


@pytest.mark.parametrize("value", ["0.1", None, 1j, [0.1]], ids=repr)
def test_refuses_what_is_no_number(value):
    with pytest.raises(TypeError, match="lr: expected a real number, got"):
        Schedule(lr=value)


@pytest.mark.parametrize("value", [np.float32(0.5), np.array(0.5), 1, True], ids=repr)
def test_takes_any_real_number(value):
    assert Schedule(lr=value).eta == float(value)


def test_goes_on_from_a_saved_state(through):
    straight = run(Schedule(0.3, 1e-2, 0.6, 4.5), 20)
    halfway = run(Schedule(0.3, 1e-2, 0.6, 4.5), 9)
    resumed = Schedule()
    resumed.load_state_dict(through(halfway.state_dict()))
    assert resumed.state_dict() == halfway.state_dict()
    assert run(resumed, 11).state_dict() == straight.state_dict()
    assert type(resumed.step) is int


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"eta": math.nan}, ValueError, "Invalid eta: nan"),
        ({"mu": 1.5}, ValueError, r"Invalid mu: 1\.5 \(expected a finite 0 <= mu <= 1\)"),
        ({"step": -1}, ValueError, "Invalid step: -1"),
        ({"step": 2.5}, ValueError, r"Invalid step: 2\.5"),
        ({"alpha": "x"}, TypeError, "alpha: expected a real number"),
        ({"momentum": 0.9}, ValueError, "expected the names"),
    ],
)
def test_refuses_a_state_that_does_not_fit(change, error, message):
    schedule = run(Schedule(lr=0.5), 3)
    before = schedule.state_dict()
    with pytest.raises(error, match=message):
        schedule.load_state_dict({**before, **change})
    assert schedule.state_dict() == before
    with pytest.raises(ValueError, match="expected the names"):
        schedule.load_state_dict({"step": 1})


def test_repr_shows_where_it_stands():
    assert repr(Schedule(lr=0.5, t0=3)) == (
        "Schedule(lr=0.5, lambd=0.0001, alpha=0.75, t0=3.0; step=0, eta=0.5, mu=1.0)"
    )
