"""NonMonotonicTrigger: when a loss has stalled, and that averages then start."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from averaging import asks_early
from runs import runs, saved_and_loaded
from torch import nn
from twins import parameters

from asgd_fast import NonMonotonicTrigger

pytestmark = pytest.mark.usefixtures("seeded")


class Counting:
    """Stands for an optimizer, and counts how often its averages were started."""

    calls = 0

    def start_averaging(self):
        self.calls += 1


@pytest.mark.parametrize(
    ("patience", "losses", "fires_at"),
    [
        # With patience 2, a loss counts only when two later ones have been seen.
        (2, [5, 3, 4, 3.5, 3.2], 4),  # 3.2 > min(5, 3); 3.5 > min(5) is false
        (2, [5, 4, 3, 2, 1, 0], None),
        (2, [5, 5, 5, 5, 5, 5], None),  # equal is not worse
        (2, [1, 2, 3, 4], 3),  # 4 > min(1)
        (1, [3, 4, 2], None),  # 4 has no earlier loss that counts
        (1, [3, 4, 3.5], 2),
        (5, [1, 9, 9, 9, 9, 9, 9], 6),  # the seventh is the first that is compared
        (0, [3, 2, 2, 2.5], 3),
        (0, [3, 4], 1),
        (3, [4.0, math.inf, 2, 3, 5], 4),
        (0, [math.inf, math.inf, 1, 2], 3),
        (1, [2.0, 1.0, math.inf], 2),
    ],
)
def test_sequences_computed_by_hand(patience, losses, fires_at):
    optimizer = Counting()
    trigger = NonMonotonicTrigger(optimizer, patience)
    fired = [trigger.step(loss) for loss in losses]
    assert fired == [k == fires_at for k in range(len(losses))]
    assert trigger.has_fired == (fires_at is not None)
    assert optimizer.calls == (fires_at is not None)


def published(losses, n):
    """The check at which the code of AWD-LSTM switches to ASGD; None if it never does."""
    best_val_loss = []
    for k, val_loss in enumerate(losses):
        if len(best_val_loss) > n and val_loss > min(best_val_loss[:-n]):
            return k
        best_val_loss.append(val_loss)
    return None


@pytest.mark.parametrize("n", range(1, 7))
def test_the_rule_of_the_published_code(n):
    rng = np.random.default_rng(n)
    seen = set()
    for _ in range(300):
        noise = rng.choice([0.02, 0.3, 2.0])
        losses = 5 * np.exp(-np.arange(25) / 8) + noise * rng.standard_normal(25)
        losses = losses.round(1)  # with ties
        trigger = NonMonotonicTrigger(Counting(), patience=n)
        fired = [trigger.step(loss) for loss in losses]
        at = published(losses.tolist(), n)
        seen.add(at)
        assert [k for k, x in enumerate(fired) if x] == ([] if at is None else [at])
    assert len(seen) > 5


def test_nan_is_refused_and_does_not_count():
    trigger = NonMonotonicTrigger(Counting(), patience=1)
    for loss in (3.0, 2.0):
        assert not trigger.step(loss)
        with pytest.raises(
            ValueError, match=r"^validation_loss: is nan; expected a number, or inf"
        ):
            trigger.step(math.nan)
    assert trigger.losses == [3.0, 2.0]
    assert not trigger.step(2.5)
    assert trigger.step(2.6)


@pytest.mark.parametrize(
    "number",
    [
        np.float32,
        np.float64,
        np.array,
        lambda x: np.array([x]),
        torch.tensor,
        lambda x: torch.tensor([x]),
        lambda x: torch.tensor(x, dtype=torch.bfloat16),
        int,
    ],
    ids=["float32", "float64", "0-d", "1-d", "tensor", "1-d tensor", "bfloat16", "int"],
)
def test_losses_of_any_kind_of_number(number):
    trigger = NonMonotonicTrigger(Counting(), patience=1)
    assert [trigger.step(number(x)) for x in (4.0, 2.0, 3.0, 3.0)] == [False, False, False, True]
    assert trigger.losses == [4.0, 2.0, 3.0, 3.0]
    assert all(type(x) is float for x in trigger.losses)


@pytest.mark.parametrize(
    "loss", ["3.0", b"3", None, 1j, [1.0], torch.ones(2), np.ones(2), {}], ids=repr
)
def test_what_is_no_number_is_refused(loss):
    trigger = NonMonotonicTrigger(Counting())
    with pytest.raises(TypeError, match=r"^validation_loss: expected a real number, got"):
        trigger.step(loss)
    assert trigger.losses == []


def test_it_fires_once():
    optimizer = Counting()
    trigger = NonMonotonicTrigger(optimizer, patience=0)
    assert [trigger.step(x) for x in (1, 2, 3, 0, 9)] == [False, True, False, False, False]
    assert optimizer.calls == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (nn.Linear(2, 2),),
            TypeError,
            r"^optimizer: expected one with start_averaging\(\).* Linea",
        ),
        ((torch.optim.ASGD(parameters((2,))),), TypeError, "^optimizer: .* got ASGD$"),
        ((Counting(), -1), ValueError, r"^Invalid patience: -1 \(expected 0 <= patience\)$"),
        ((Counting(), 2.0), TypeError, "^patience: expected an integer, got 2.0 of type float$"),
        ((Counting(), "5"), TypeError, "^patience: expected an integer, got '5' of type str$"),
        ((Counting(), None), TypeError, "^patience: expected an integer"),
    ],
)
def test_triggers_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        NonMonotonicTrigger(*arguments)


class Wrapper:
    """Keeps an optimizer under some name, as training frameworks do."""

    def __init__(self, **kept):
        vars(self).update(kept)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: Wrapper(optimizer=x),
        lambda x: Wrapper(opt=x),
        lambda x: Wrapper(_optimizer=x),
        lambda x: Wrapper(optimizer=None, opt=Wrapper(_optimizer=Wrapper(optimizer=x))),
    ],
    ids=["accelerate", "fastai", "lightning", "all"],
)
def test_an_optimizer_in_wrappers_is_found(wrap):
    optimizer = Counting()
    trigger = NonMonotonicTrigger(wrap(optimizer), patience=0)
    assert [trigger.step(x) for x in (1.0, 2.0)] == [False, True]
    assert optimizer.calls == 1


def test_a_wrapper_that_starts_averages_itself_is_asked():
    wrapper = Counting()
    wrapper.optimizer = Counting()
    trigger = NonMonotonicTrigger(wrapper, patience=0)
    assert [trigger.step(x) for x in (1.0, 2.0)] == [False, True]
    assert (wrapper.calls, wrapper.optimizer.calls) == (1, 0)


def test_wrappers_of_something_else_are_refused():
    (p,) = parameters((2,))
    wrapper = Wrapper(opt=Wrapper(optimizer=torch.optim.SGD([p])))
    with pytest.raises(TypeError, match=r"got Wrapper, which wraps Wrapper, which wraps SGD$"):
        NonMonotonicTrigger(wrapper)
    wrapper.opt = wrapper
    with pytest.raises(TypeError, match=r"got Wrapper$"):
        NonMonotonicTrigger(wrapper)


@pytest.mark.parametrize(
    "way", [lambda x: x, copy.deepcopy, lambda x: json.loads(json.dumps(x)), saved_and_loaded]
)
def test_a_trigger_goes_on_where_another_stood(way):
    losses = [5.0, math.inf, 3.0, 4.0, 2.9, 3.1, 3.2, 2.0]
    for stop in range(len(losses)):
        whole, part, other = (NonMonotonicTrigger(Counting(), n) for n in (2, 2, 7))
        wanted = [whole.step(x) for x in losses]
        begun = [part.step(x) for x in losses[:stop]]
        state = way(part.state_dict())
        other.load_state_dict(state)
        assert begun + [other.step(x) for x in losses[stop:]] == wanted
        assert any(wanted)
        assert other.patience == 2
        assert state == part.state_dict()  # with which nothing is shared


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda s: s.pop("losses"), ValueError),
        (lambda s: s.update(best=1.0), ValueError),
        (lambda s: s.update(patience=-1), ValueError),
        (lambda s: s.update(patience="5"), TypeError),
        (lambda s: s.update(losses=[1.0, math.nan]), ValueError),
        (lambda s: s.update(losses=[1.0, "2"]), TypeError),
        (lambda s: s.update(losses=None), TypeError),
        (lambda s: s.update(has_fired="False"), (TypeError, ValueError)),
    ],
)
def test_a_bad_state_changes_nothing(change, error):
    trigger = NonMonotonicTrigger(Counting(), patience=3)
    trigger.step(2.0)
    before = trigger.state_dict()
    state = NonMonotonicTrigger(Counting(), patience=1).state_dict()
    change(state)
    with pytest.raises(error):
        trigger.load_state_dict(state)
    assert trigger.state_dict() == before


@runs
def test_the_iterate_after_it_fired_is_the_first_one(double_scalars, make):
    run = make((3,), (4,))
    trigger = NonMonotonicTrigger(run.optimizer, patience=1)
    for loss in (3.0, 2.0, 2.5, 2.6, 2.7):
        for _ in range(3):
            run.step()
        fired = trigger.step(loss)
        assert fired == (loss == 2.6)
    assert len(run.iterates[0]) == 15
    run.step()
    run.check(12, 12)


@asks_early
@runs
def test_a_trigger_that_may_not_start_can_be_asked_again(make):
    """Inside averaged_parameters(), nothing is lost and the check does not count."""
    run = make((3,))
    trigger = NonMonotonicTrigger(run.optimizer, patience=0)
    run.step()
    with run.optimizer.averaged_parameters():
        assert not trigger.step(1.0)
        with pytest.raises(RuntimeError, match=r"^start_averaging: is not possible inside"):
            trigger.step(2.0)
    assert trigger.state_dict() == {"patience": 0, "losses": [1.0], "has_fired": False}
    assert trigger.step(2.0)
