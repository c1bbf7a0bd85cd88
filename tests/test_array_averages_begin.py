"""The averages of arrays before they begin: they take no memory, and copies stand for them."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from averaging import arrays_of_all_kinds, asks_early, grads_like, raw, run

from asgd_fast import ArrayASGD, AveragingNotBegunWarning

T0 = 3
BEGINS = T0 + 2  # the step of the first iterate of the average
OPTIONS = {"lr": 0.3, "lambd": 1e-2, "t0": T0}

pytestmark = pytest.mark.usefixtures("seeded")
wide_or_not = pytest.mark.parametrize("wide", [None, "float64"])


def copied(arrays):
    return [x.clone() if hasattr(x, "clone") else x.copy(order="K") for x in arrays]


def everything(optimizer, arrays):
    """The bits of params, averages and the rest of the state."""
    return [raw(x) for x in optimizer.averages], everything_but_averages(optimizer, arrays)


def everything_but_averages(optimizer, arrays):
    """The same where nobody asks for averages."""
    state = {name: value.tolist() for name, value in optimizer.state_dict().items()}
    return [raw(x) for x in arrays], repr(state)


@wide_or_not
def test_memory_is_taken_by_the_step_of_the_first_iterate_alone(wide):
    """And by each param's own; start_averaging gives it back."""
    params = [np.ones(100_000, np.float32) for _ in range(2)]
    grads = [np.ones_like(x) for x in params]
    n_bytes = params[0].size * np.dtype(wide or "float32").itemsize
    optimizer = ArrayASGD(params, average_dtype=wide, **OPTIONS)
    tracemalloc.start()
    try:

        def taken(call):
            """How many averages a call keeps, and how many it has at most, in tenths."""
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            call()
            after, peak = tracemalloc.get_traced_memory()
            return round((after - before) / n_bytes, 1), round((peak - before) / n_bytes, 1)

        for k in range(1, BEGINS + 5):  # the second param comes two steps later
            second = grads[1] if k > 2 else None
            wanted = (1, 1) if k in (BEGINS, BEGINS + 2) else (0, 0)
            assert taken(lambda second=second: optimizer.step([grads[0], second])) == wanted, k
        assert taken(optimizer.start_averaging) == (-2, 0)
        assert taken(lambda: optimizer.step(grads)) == (2, 2)
    finally:
        tracemalloc.stop()


def stepped_once(optimizer, arrays):
    run(optimizer, arrays, 1)
    return optimizer


def without_some_grads(optimizer, arrays):
    """Every second param has none, and is at step 0."""
    for k in range(T0):
        grads = grads_like(arrays, k)
        optimizer.step([None if i % 2 else grad for i, grad in enumerate(grads)])
    return optimizer


def started_anew(optimizer, arrays):
    run(optimizer, arrays, BEGINS + 2)
    optimizer.start_averaging()
    return optimizer


def loaded(optimizer, arrays):
    """A state from before, by an optimizer whose averages have begun."""
    run(optimizer, arrays, 2)
    state = optimizer.state_dict()
    assert (state["mu"] == 1).all()
    run(optimizer, arrays, BEGINS)
    optimizer.load_state_dict(state)
    return optimizer


@pytest.mark.parametrize(
    "situation",
    [lambda optimizer, _: optimizer, stepped_once, without_some_grads, started_anew, loaded],
    ids=["new", "stepped once", "without some grads", "started anew", "loaded"],
)
@wide_or_not
@asks_early
def test_averages_read_before_they_begin_are_copies(situation, wide):
    """To write into them changes no params and no later averages."""
    kinds = arrays_of_all_kinds()[:-1]  # NumPy has no bfloat16
    arrays, others = copied(kinds), copied(kinds)
    ours, untouched = (
        situation(ArrayASGD(own, average_dtype=wide, **OPTIONS), own) for own in (arrays, others)
    )
    before = [raw(x) for x in arrays]
    for _ in range(2):
        for x, ax in zip(arrays, ours.averages, strict=True):
            assert type(ax) is type(x)
            assert ax.shape == x.shape
            assert np.array_equal(ax, x, equal_nan=True)
            ax[...] = 7
    assert [raw(x) for x in arrays] == before
    for k in range(BEGINS + 3):
        run(ours, arrays, 1, k)
        run(untouched, others, 1, k)
        assert everything(ours, arrays) == everything(untouched, others)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("steps", range(BEGINS + 3))
@wide_or_not
@asks_early
def test_a_saved_state_goes_on_with_the_same_bits(through, wide, steps, every):
    """From each step around t0 on, one param of which has come later."""
    options = {**OPTIONS, "average_every": every}
    arrays = arrays_of_all_kinds()[:-1]
    ours = ArrayASGD(arrays, average_dtype=wide, **options)

    def step(optimizer, own, k):
        grads = grads_like(own, k)
        optimizer.step([None if i == 1 and k < 2 else grad for i, grad in enumerate(grads)])

    for k in range(steps):
        step(ours, arrays, k)
    others = copied(arrays)
    theirs = ArrayASGD(others, lr=9.0, average_dtype=wide)
    run(theirs, others, BEGINS + 1)  # with averages and scalars of its own, to be replaced
    for x, wanted in zip(others, arrays, strict=True):
        x[...] = wanted
    theirs.load_state_dict(through(ours.state_dict()))
    for k in range(steps, steps + BEGINS + 3):
        assert everything(ours, arrays) == everything(theirs, others)
        step(ours, arrays, k)
        step(theirs, others, k)
    assert everything(ours, arrays) == everything(theirs, others)


def test_is_averaging_from_the_first_iterate_of_any_average_on():
    arrays = [np.ones(3), np.ones(2)]
    optimizer = ArrayASGD([{"params": arrays[0]}, {"params": arrays[1], "t0": 1e6}], **OPTIONS)
    assert optimizer.is_averaging is False
    for k in range(1, BEGINS + 2):
        run(optimizer, arrays, 1)
        assert optimizer.is_averaging is (k >= BEGINS)
    other = ArrayASGD([{"params": arrays[0]}, {"params": arrays[1]}])
    other.load_state_dict(optimizer.state_dict())
    assert other.is_averaging is True
    with optimizer.averaged_parameters():
        assert optimizer.is_averaging is True
    optimizer.start_averaging()
    assert optimizer.is_averaging is False
    run(optimizer, arrays, 1)
    assert optimizer.is_averaging is True


def enter(optimizer):
    with optimizer.averaged_parameters():
        pass


ASKED = {
    "averages": lambda optimizer: optimizer.averages,
    "averaged_parameters": enter,
    "copy_averages_to": lambda optimizer: optimizer.copy_averages_to([np.ones(3), np.ones(2)]),
}


@pytest.mark.parametrize("asked", ASKED)
def test_who_asks_for_averages_that_have_not_begun_is_warned_once(asked):
    arrays = [np.ones(3), np.ones(2)]
    optimizer = ArrayASGD([{"params": arrays[0]}, {"params": arrays[1], "t0": 7}])
    ASKED[asked](optimizer)  # no step was made
    run(optimizer, arrays, 3)
    optimizer.state_dict()  # nor does a checkpoint ask for averages
    before = everything_but_averages(optimizer, arrays)
    message = (
        "^averages were asked for after step 3, but none has begun: t0 is 7, so the params "
        r"themselves stand for them; set t0, or call start_averaging\(\) to begin with the next "
        "step$"
    )
    with pytest.warns(AveragingNotBegunWarning, match=message) as caught:
        ASKED[asked](optimizer)
    assert [warning.filename for warning in caught] == [__file__]
    for call in ASKED.values():
        call(optimizer)  # warnings are errors here
    assert everything_but_averages(optimizer, arrays) == before
    with pytest.warns(AveragingNotBegunWarning):  # each optimizer has its own
        ASKED[asked](stepped_once(ArrayASGD([x.copy() for x in arrays]), arrays))


@pytest.mark.parametrize("asked", ASKED)
def test_nobody_is_warned_of_averages_that_have_begun_or_were_told_to(asked):
    arrays = [np.ones(3), np.ones(2)]
    optimizer = ArrayASGD(arrays, **OPTIONS)
    run(optimizer, arrays, BEGINS)
    ASKED[asked](optimizer)
    other = stepped_once(ArrayASGD([x.copy() for x in arrays]), arrays)
    other.start_averaging()
    ASKED[asked](other)
