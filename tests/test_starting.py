"""When averages begin and what is in them, and the schedule that follows lr at once."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from twins import Twins, bits, parameters, same

from asgd_fast import ASGD, ArrayASGD, NonMonotonicTrigger

OPTIONS = {"lr": 0.3, "lambd": 1e-2}


class TorchRun:
    """An optimizer of torch params over random gradients, and every iterate that it made."""

    make = staticmethod(ASGD)

    def __init__(self, *shapes, groups=lambda own: own, dtype=torch.float64, **options):
        self.params = [nn.Parameter(torch.randn(s).to(dtype)) for s in shapes]
        self.optimizer = self.make(groups(self.params), **{**OPTIONS, **options})
        self.iterates = [[] for _ in self.params]

    def step(self, *skipped):
        for i, p in enumerate(self.params):
            p.grad = None if i in skipped else torch.randn_like(p)
        self.optimizer.step()
        self._note(skipped)

    def _note(self, skipped):
        for i, made in enumerate(self.iterates):
            if i not in skipped:
                made.append(self.value(i))

    def value(self, i):
        return self.params[i].detach().numpy().copy()

    def average(self, i):
        return self.optimizer.state[self.params[i]]["ax"].detach().numpy()

    def check(self, *firsts, every=1):
        """Assert that averages are the means of the iterates from their first ones on."""
        for i, first in enumerate(firsts):
            if first is not None:
                mean = np.mean(self.iterates[i][first::every], axis=0)
                np.testing.assert_allclose(self.average(i), mean, rtol=0, atol=1e-12)


class ArrayRun(TorchRun):
    make = staticmethod(ArrayASGD)

    def __init__(self, *shapes, groups=lambda own: own, **options):
        self.params = [np.random.default_rng(i).standard_normal(s) for i, s in enumerate(shapes)]
        options.pop("lazy_average", None)
        self.optimizer = ArrayASGD(groups(self.params), **{**OPTIONS, **options})
        self.iterates = [[] for _ in self.params]

    def step(self, *skipped):
        self.optimizer.step(
            [
                None if i in skipped else np.asarray(torch.randn(x.shape).double().numpy())
                for i, x in enumerate(self.params)
            ]
        )
        self._note(skipped)

    def value(self, i):
        return self.params[i].copy()

    def average(self, i):
        return self.optimizer.averages[i]


runs = pytest.mark.parametrize("make", [TorchRun, ArrayRun], ids=["torch", "arrays"])
lazy_or_eager = pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# Started by hand


@pytest.mark.parametrize("call", ["start_averaging", "reset_averages"])
@pytest.mark.parametrize("t0", [1e6, 0, 2.5])
@pytest.mark.parametrize("before", [0, 1, 2, 5])
@lazy_or_eager
@runs
def test_the_next_iterate_is_the_first_one(double_scalars, make, lazy, before, t0, call):
    """Whether averaging has begun already or not; and again whenever it is called."""
    run = make((3, 4), (5,), t0=t0, lazy_average=lazy)
    for _ in range(before):
        run.step()
    for first in (before, before + 6, before + 7):
        getattr(run.optimizer, call)()
        for _ in range(1 if first == before + 6 else 6):
            run.step()
            run.check(first, first)
    mean = np.mean(run.iterates[0][before:], axis=0)
    assert np.abs(run.average(0) - mean).max() > 1e-3  # which the last call made forgotten


@runs
def test_called_twice_before_a_step(double_scalars, make):
    run = make((3,), (4,))
    run.step()
    run.optimizer.start_averaging()
    run.optimizer.reset_averages()
    run.optimizer.start_averaging(0)
    for _ in range(4):
        run.step()
        run.check(1, 1)


@runs
def test_one_group_of_several(double_scalars, make):
    run = make((3,), (4,), (5,), groups=lambda own: [{"params": [p]} for p in own])
    run.step()
    run.optimizer.start_averaging(group=1)
    run.step()
    run.step()
    run.check(None, 1)
    for i in (0, 2):  # whose averages have not begun
        np.testing.assert_array_equal(run.average(i), run.value(i))
    run.optimizer.start_averaging(-1)
    for _ in range(3):
        run.step()
        run.check(None, 1, 3)
    run.optimizer.reset_averages(1)
    for _ in range(3):
        run.step()
        run.check(None, 6, 3)
    np.testing.assert_array_equal(run.average(0), run.value(0))


@pytest.mark.parametrize(("group", "error"), [(3, IndexError), (-4, IndexError), ("0", TypeError)])
@runs
def test_a_group_that_is_not_there(double_scalars, make, group, error):
    run = make((3,), (4,), (5,), groups=lambda own: [{"params": [p]} for p in own], t0=0)
    for _ in range(4):
        run.step()
    with pytest.raises(error):
        run.optimizer.start_averaging(group)
    run.step()
    run.check(1, 1, 1)


@lazy_or_eager
@runs
def test_params_of_other_step_counts_begin_each_with_its_next(double_scalars, make, lazy):
    """Those that had no gradient yet, with their first iterate of all."""
    run = make((3,), (4,), (5,), (6,), lazy_average=lazy)
    for k in range(6):
        run.step(*([2, 3] if k % 2 else [1, 2, 3]))
    run.optimizer.start_averaging()
    run.step(1, 2)  # the last one joins
    run.check(6)
    for _ in range(3):
        run.step(2)
        run.check(6, 3, None, 0)
    for _ in range(3):
        run.step()
        run.check(6, 3, 0, 0)
    run.optimizer.start_averaging()
    run.step(3)
    run.step()
    run.check(13, 9, 3, 7)


def test_where_torch_params_of_other_step_counts_keep_their_t0():
    run = TorchRun((3,), (4,), (5,))
    run.step()
    run.step(1, 2)
    run.step(1, 2)
    run.optimizer.start_averaging()
    state = run.optimizer.state
    assert run.optimizer.param_groups[0]["t0"] == 2
    assert ["t0" in state[p] for p in run.params] == [False, True, True]
    assert [state[p]["t0"] for p in run.params[1:]] == [0, 0]
    for _ in range(2):
        run.step(0)
    run.optimizer.start_averaging()  # all are at the same step now
    assert not any("t0" in state[p] for p in run.params)


@lazy_or_eager
@pytest.mark.parametrize("before", [0, 1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_the_bits_of_torch_with_such_a_t0(dtype, before, lazy):
    """And again in the midst of averaging, where torch's own state is set by hand."""
    params = parameters((3,), (40, 5), dtype=dtype)
    twins = Twins(params, weight_decay=0.1, lazy_average=lazy, **OPTIONS)
    twins.run(before)
    for first in (before, before + 6):
        twins.ours.start_averaging()
        twins.theirs.param_groups[0]["t0"] = first - 1
        for entry in twins.theirs.state.values():
            entry["mu"].fill_(1)
        twins.run(6)


def test_inside_a_group_that_follows_lr_at_once(double_scalars):
    """The first step after the start is the first one whose eta decays."""
    run = TorchRun((3,), lr_schedule="current", lr=0.5, lambd=0.25, alpha=1.0)
    (p,) = run.params
    for k in range(6):
        if k == 3:
            run.optimizer.start_averaging()
        before, p.grad = run.value(0), torch.ones_like(p)
        run.optimizer.step()
        eta = 0.5 if k < 3 else 0.5 / (1 + 0.25 * 0.5 * (k - 2))
        decay = 1.0 if k < 3 else 1 - 0.25 * eta
        np.testing.assert_allclose(run.value(0), before * decay - eta, rtol=1e-14)


def saved_and_loaded(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


WAYS = {
    "torch.save": saved_and_loaded,
    "deepcopy": copy.deepcopy,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("steps_after", [0, 1, 2, 5])
@pytest.mark.parametrize("target", [ASGD, torch.optim.ASGD], ids=["ours", "torch"])
def test_checkpoints_after_the_start(double_scalars, target, steps_after, way):
    """Go on with the right weights in torch, too, where all params are at the same step."""
    run = TorchRun((3,), (4, 5), (2,))
    for _ in range(4):
        run.step()
    run.optimizer.start_averaging()
    for _ in range(steps_after):
        run.step()
    other = target(run.params, lr=9.0)
    other.load_state_dict(way(run.optimizer.state_dict()))
    run.optimizer = other
    for _ in range(4):
        run.step()
        run.check(4, 4, 4)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("steps_after", [0, 1, 2, 5])
def test_checkpoints_of_params_of_other_step_counts(double_scalars, steps_after, way):
    run = TorchRun((3,), (4, 5), (2,))
    for k in range(4):
        run.step(*([2] if k % 2 else [1, 2]))
    run.optimizer.start_averaging()
    for _ in range(steps_after):
        run.step(2)
    other = ASGD(run.params, lr=9.0)
    other.load_state_dict(way(run.optimizer.state_dict()))
    run.optimizer = other
    for _ in range(4):
        run.step()  # the last one joins after the checkpoint
        run.check(4, 2, 0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("steps_after", [0, 1, 3])
@runs
def test_copies_of_the_optimizer_after_the_start(double_scalars, make, steps_after, duplicate):
    run = make((3,), (4, 5), (2,))
    for k in range(4):
        run.step(*([2] if k % 2 else [1, 2]))
    run.optimizer.start_averaging()
    for _ in range(steps_after):
        run.step(2)
    run.optimizer = duplicate(run.optimizer)
    run.params = run.optimizer.param_groups[0]["params"]
    for _ in range(4):
        run.step()
        run.check(4, 2, 0)


@pytest.mark.parametrize("steps_after", [0, 1, 4])
def test_saved_states_of_arrays_after_the_start(through, steps_after):
    run = ArrayRun((3,), (4, 5), (2,), groups=lambda own: [{"params": own[:2]}, {"params": own[2]}])
    for k in range(4):
        run.step(*([2] if k % 2 else [1, 2]))
    run.optimizer.start_averaging(0)
    for _ in range(steps_after):
        run.step(2)
    state = run.optimizer.state_dict()
    assert state["start"].tolist() == [3, 1, 1e6]
    other = ArrayASGD([{"params": run.params[:2]}, {"params": run.params[2]}], lr=9.0)
    other.load_state_dict(through(state))
    run.optimizer = other
    for _ in range(4):
        run.step()
        run.check(4, 2)
    np.testing.assert_array_equal(run.average(2), run.value(2))


def test_a_checkpoint_of_before_forgets_the_start(double_scalars):
    run = TorchRun((3,), (4,))
    run.step(1)
    before = copy.deepcopy(run.optimizer.state_dict())
    run.optimizer.start_averaging()
    run.step()
    run.optimizer.load_state_dict(before)
    assert run.optimizer.param_groups[0]["t0"] == 1e6
    for _ in range(4):
        run.step()
    for i in range(2):
        np.testing.assert_array_equal(run.average(i), run.value(i))


# When the loss has stalled


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


@runs
def test_a_trigger_that_may_not_start_can_be_asked_again(make):
    """Inside averaged_parameters(), nothing is lost and the check does not count."""
    run = make((3,))
    trigger = NonMonotonicTrigger(run.optimizer, patience=0)
    run.step()
    with run.optimizer.averaged_parameters():
        assert not trigger.step(1.0)
        with pytest.raises(RuntimeError, match=r"^start_averaging: not inside"):
            trigger.step(2.0)
    assert trigger.state_dict() == {"patience": 0, "losses": [1.0], "has_fired": False}
    assert trigger.step(2.0)


# An eta that follows lr


def with_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}], ids=str
)
@pytest.mark.parametrize("t0", [1e6, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@lazy_or_eager
def test_the_bits_of_sgd_before_averaging(simd_level, dtype, t0, options, lazy):
    """With an lr that changes in each step."""
    shapes = (3,), (40, 5), (), (1000,)
    params, others = parameters(*shapes, dtype=dtype), parameters(*shapes, dtype=dtype)
    for own in (params, others):  # and one that goes to torch
        generator = torch.Generator().manual_seed(1)
        own.append(nn.Parameter(torch.randn(6, 4, generator=generator).to(dtype)[:, ::2]))
    ours = ASGD(
        params, lr=9.0, lambd=0.1, t0=t0, lr_schedule="current", lazy_average=lazy, **options
    )
    theirs = torch.optim.SGD(others, lr=9.0, foreach=False, **options)
    for k in range(13):
        for optimizer in (ours, theirs):
            with_lr(optimizer, 0.1 / (k + 1) + 1e-3)
        for p, q in zip(params, others, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
        for p, q in zip(params, others, strict=True):
            same(p, q)


def reference_step(
    p, ax, grad, k, *, lr, lambd, alpha, t0, weight_decay=0.0, maximize=False, every=1
):
    """The documented step that follows k steps, in torch's operations; returns the new mu."""
    grad = -grad if maximize else grad
    if weight_decay != 0:
        grad = grad.add(p, alpha=weight_decay)
    eta = lr
    if k > t0:
        eta = lr / (1 + lambd * lr * (k - t0)) ** alpha
        p.mul_(1 - lambd * eta)
    p.add_(grad, alpha=-eta)
    number = k + 1 - (math.ceil(t0) + 2)  # of iterates since the first in the average
    if every == 1:
        mu = torch.tensor(1 / max(1, k - t0))
    else:
        mu = torch.tensor(1 / (number / every + 1) if number > 0 and number % every == 0 else 0.0)
    if number <= 0 and (every > 1 or k - t0 <= 1):
        ax.copy_(p)
    elif mu != 0:
        ax.add_(p.sub(ax).mul_(mu))


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("alpha", [0.75, 0.0, 1.0])
@pytest.mark.parametrize("t0", [0, 3, 2.5, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gappy", [False, True], ids=["engine", "gappy"])
def test_the_documented_formula_after_averaging_has_begun(gappy, dtype, t0, alpha, every):
    data = torch.randn(4, 6, dtype=dtype)
    p = nn.Parameter(data[:, ::2] if gappy else data[:, ::2].clone())
    options = {"lambd": 0.1, "alpha": alpha, "t0": t0, "weight_decay": 0.05, "maximize": True}
    q, ax = p.detach().clone(), torch.zeros(4, 3, dtype=dtype)
    optimizer = ASGD([p], lr=9.0, lr_schedule="current", average_every=every, **options)
    for k in range(15):
        lr = 0.3 + 0.1 * (k % 4)
        with_lr(optimizer, lr)
        p.grad = torch.randn(4, 3, dtype=dtype)
        reference_step(q, ax, p.grad, k, lr=lr, every=every, **options)
        optimizer.step()
        assert torch.equal(bits(p.detach()), bits(q))
        assert torch.equal(bits(optimizer.state[p]["ax"].detach()), bits(ax))


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("t0", [0, 3, 2.5, -1])
def test_the_documented_formula_for_arrays(double_scalars, t0, every):
    x = np.random.default_rng(0).standard_normal((4, 3))
    options = {"lambd": 0.1, "alpha": 0.75, "t0": t0, "weight_decay": 0.05}
    optimizer = ArrayASGD(x, lr=9.0, lr_schedule="current", average_every=every, **options)
    q, ax = torch.tensor(x), torch.zeros(4, 3)
    for k in range(15):
        lr = 0.3 + 0.1 * (k % 4)
        with_lr(optimizer, lr)
        grad = torch.randn(4, 3)
        reference_step(q, ax, grad, k, lr=lr, every=every, **options)
        optimizer.step(grad.numpy())
        assert np.array_equal(x, q.numpy())
        assert np.array_equal(optimizer.averages[0], ax.numpy())


SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.3),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, max_lr=0.5, total_steps=12, cycle_momentum=False
    ),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)),
}


@pytest.mark.parametrize("lr", [0.25, torch.tensor(0.3)], ids=["float", "tensor"])
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_act_at_once(make, lr):
    params, others = parameters((3,), (4, 5)), parameters((3,), (4, 5))
    ours = ASGD(params, lr=copy.deepcopy(lr), lr_schedule="current")
    theirs = torch.optim.SGD(others, lr=copy.deepcopy(lr), foreach=False)
    schedulers = [make(ours), make(theirs)]
    for _ in range(10):
        for p, q in zip(params, others, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer, scheduler in zip((ours, theirs), schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        for p, q in zip(params, others, strict=True):
            same(p, q)


def test_by_default_a_change_acts_one_step_late():
    """As in torch: what the other schedule is for."""
    twins = Twins(parameters((3,)), lr=0.5, lambd=0.0)
    twins.run(1)
    for optimizer in (twins.ours, twins.theirs):
        with_lr(optimizer, 0.125)
    before = twins.params[0].detach().clone()
    twins.step([torch.ones(3)])
    assert torch.equal(twins.params[0], before - 0.5)
    twins.check()


@pytest.mark.parametrize("gappy", [False, True], ids=["engine", "gappy"])
def test_schedules_changed_between_steps(gappy):
    """To the other one and back: eta of the next step is the one that the new schedule gives."""
    data = torch.zeros(3, 2, dtype=torch.float64)
    p = nn.Parameter(data[:, 0] if gappy else data[:, 0].clone())
    optimizer = ASGD([p], lr=0.5, lambd=0.0)
    p.grad = torch.ones(3, dtype=torch.float64)
    (group,) = optimizer.param_groups
    moved = []
    for schedule, lr in (
        ("torch", 0.5),
        ("current", 0.25),
        ("current", 0.125),
        ("torch", 1.0),
        ("torch", 1.0),
    ):
        group["lr_schedule"], group["lr"] = schedule, lr
        before = p.detach().clone()
        optimizer.step()
        moved.append((before - p.detach())[0].item())
    assert moved == [0.5, 0.25, 0.125, 0.125, 1.0]


# Every so many-th iterate


MUS = {
    (0, 1): [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6, 1 / 7, 1 / 8],
    (0, 2): [1, 0, 1 / 2, 0, 1 / 3, 0, 1 / 4, 0],
    (0, 3): [1, 0, 0, 1 / 2, 0, 0, 1 / 3, 0],
    (2, 3): [1, 1, 1, 0, 0, 1 / 2, 0, 0],
    (-1, 4): [0, 0, 0, 1 / 2, 0, 0, 0, 1 / 3],
    (1.5, 2): [1, 1, 1, 0, 1 / 2, 0, 1 / 3, 0],
    (6, 100): [1, 1, 1, 1, 1, 1, 1, 0],
}


@pytest.mark.parametrize(("t0", "every"), MUS)
@pytest.mark.parametrize("kind", ["engine", "gappy", "arrays"])
def test_weights_computed_by_hand(double_scalars, kind, t0, every):
    """After each step, that of the next iterate."""
    data = torch.randn(5, 2)
    p = nn.Parameter(data[:, 0] if kind == "gappy" else data[:, 0].clone())
    make = ArrayASGD if kind == "arrays" else ASGD
    optimizer = make([p.detach()] if kind == "arrays" else [p], t0=t0, average_every=every)
    p.grad = torch.ones(5)
    for mu in MUS[t0, every]:
        if kind == "arrays":
            optimizer.step([p.grad])
            assert optimizer.state_dict()["mu"] == [mu]
        else:
            optimizer.step()
            assert optimizer.state[p]["mu"].item() == mu


@pytest.mark.parametrize("every", [2, 3, 7])
@pytest.mark.parametrize(("t0", "first"), [(-1, 0), (0, 1), (4, 5), (2.5, 4), (0.25, 2)])
@lazy_or_eager
@runs
def test_the_mean_of_each_so_many_th(double_scalars, make, lazy, t0, first, every):
    run = make((3, 4), (5,), t0=t0, average_every=every, lazy_average=lazy)
    for k in range(first + 2 * every + 2):
        run.step()
        if k >= first:
            run.check(first, first, every=every)
    assert np.abs(run.average(0) - np.mean(run.iterates[0][first:], axis=0)).max() > 1e-3


@pytest.mark.parametrize("every", [2, 5])
@runs
def test_each_so_many_th_after_a_start_by_hand(double_scalars, make, every):
    """Of params at different steps, that skip some."""
    run = make((3,), (4,), (5,), average_every=every)
    for k in range(3):
        run.step(*([1, 2] if k else [2]))
    run.optimizer.start_averaging()
    for k in range(2 * every + 2):
        run.step(*([] if k % 2 else [1]))
        if k:
            run.check(3, 1, 0, every=every)


@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("gappy", [False, True], ids=["engine", "gappy"])
def test_other_steps_leave_the_average_alone(simd_level, gappy, dtype, wide):
    """Its bits, whatever they are, its place and its version."""
    data = torch.randn(37, 2).to(dtype)
    p = nn.Parameter(data[:, 0] if gappy else data[:, 0].clone())
    optimizer = ASGD([p], t0=0, lr=0.3, average_every=4, average_dtype=wide)
    for k in range(1, 15):
        p.grad = torch.randn(37).to(dtype)
        if k < 3 or k % 4 == 2:  # iterates 2, 6, 10 and 14 are averaged
            optimizer.step()
            continue
        ax = optimizer.state[p]["ax"]
        kept = ax.detach().clone()
        ax.detach().fill_(math.nan)
        noted, version = bits(ax.detach()).clone(), ax._version
        before = p.detach().clone()
        optimizer.step()
        assert not torch.equal(p, before)
        assert optimizer.state[p]["ax"] is ax
        assert ax._version == version
        assert torch.equal(bits(ax.detach()), noted)
        ax.detach().copy_(kept)
    assert optimizer.state[p]["mu"].item() == 0
    assert torch.isfinite(torch.view_as_real(ax) if ax.is_complex() else ax).all()


def test_other_steps_leave_the_averages_of_arrays_alone():
    run = ArrayRun((3,), t0=0, average_every=4)
    for k in range(1, 15):
        if k < 3 or k % 4 == 2:
            run.step()
            continue
        (ax,) = run.optimizer.averages
        kept = ax.copy()
        ax[:] = math.nan
        run.step()
        assert np.isnan(ax).all()
        ax[:] = kept
    run.check(1, every=4)


@pytest.mark.parametrize("t0", [-5, 0, 2.5, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_each_iterate_has_the_bits_of_torch(dtype, t0):
    params = parameters((3,), (40, 5), dtype=dtype)
    twins = Twins(params, **OPTIONS, t0=t0)
    twins.ours.param_groups[0]["average_every"] = np.int64(1)
    twins.run(12)


@pytest.mark.parametrize(
    ("schedule", "every", "t0", "started"),
    list(product(["torch", "current"], [1, 3], [0, 2.5, 1e6], [None, 4])),
)
@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_goes_to_torch_has_the_bits_of_the_engine(dtype, wide, schedule, every, t0, started):
    """With all keywords together, and an lr that changes."""
    data = torch.randn(5, 7, 2).to(dtype)
    dense, gappy = nn.Parameter(data[..., 0].clone()), nn.Parameter(data[..., 0])
    assert not gappy.is_contiguous()
    options = {"lambd": 0.1, "t0": t0, "weight_decay": 0.05, "maximize": True}
    optimizers = [
        ASGD([p], average_dtype=wide, lr_schedule=schedule, average_every=every, **options)
        for p in (dense, gappy)
    ]
    for k in range(13):
        dense.grad = torch.randn(5, 7).to(dtype)
        gappy.grad = dense.grad.clone()
        for optimizer in optimizers:
            with_lr(optimizer, 0.3 + 0.1 * (k % 3))
            if k == started:
                optimizer.start_averaging()
            optimizer.step()
        assert torch.equal(bits(dense.detach()), bits(gappy.detach()))
        ours, theirs = (o.state[p] for o, p in zip(optimizers, (dense, gappy), strict=True))
        for name in ("step", "eta", "mu"):
            assert torch.equal(ours[name], theirs[name]), name
        assert torch.equal(ours["ax"], theirs["ax"])


@pytest.mark.parametrize("source", ["ours", "torch"])
def test_checkpoints_keep_the_keywords_where_they_have_them(source):
    (p,) = parameters((3,))
    options = {"lr_schedule": "current", "average_every": 5}
    before = ASGD([p], **options) if source == "ours" else torch.optim.ASGD([p])
    p.grad = torch.ones(3)
    before.step()
    own = {} if source == "ours" else options
    after = ASGD(parameters((3,)), **own)
    after.load_state_dict(saved_and_loaded(before.state_dict()))
    assert {name: after.param_groups[0][name] for name in options} == options


@pytest.mark.parametrize("schedule", ["torch", "current"])
def test_saved_states_of_arrays_with_the_keywords(through, schedule):
    run = ArrayRun((3,), t0=1, average_every=3, lr_schedule=schedule)
    for _ in range(6):
        run.step()
    other = ArrayASGD(run.params)
    other.load_state_dict(through(run.optimizer.state_dict()))
    assert other.param_groups[0]["lr_schedule"] == schedule
    assert other.param_groups[0]["average_every"] == 3
    run.optimizer = other
    for _ in range(6):
        run.step()
        run.check(2, every=3)


# What is refused

REFUSED = [
    ("lr_schedule", "cosine", ValueError, "Invalid lr_schedule: 'cosine' .expected 'torch' or 'cu"),
    ("lr_schedule", None, ValueError, "Invalid lr_schedule: None"),
    ("lr_schedule", True, ValueError, "Invalid lr_schedule: True"),
    ("lr_schedule", [], ValueError, r"Invalid lr_schedule: \[\]"),
    ("average_every", 0, ValueError, "Invalid average_every: 0 .expected 1 <= average_every"),
    ("average_every", -3, ValueError, "Invalid average_every: -3"),
    ("average_every", 2.0, TypeError, "average_every: expected an integer, got 2.0 of type float"),
    ("average_every", True, TypeError, "average_every: expected an integer, got True of type bool"),
    ("average_every", "2", TypeError, "average_every: expected an integer, got '2' of type str"),
    ("average_every", None, TypeError, "average_every: expected an integer, got None"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), REFUSED)
@runs
def test_keywords_that_are_refused(make, name, value, error, message):
    with pytest.raises(error, match=message):
        make((3,), **{name: value})
    run = make((3,), (4,), t0=0)
    run.step()
    with pytest.raises(error, match=message):
        run.optimizer.add_param_group({"params": make((3,)).params, name: value})
    assert len(run.optimizer.param_groups) == 1
    before = [run.value(i).tolist() for i in range(2)]
    averages = [run.average(i).tolist() for i in range(2)]
    (group,) = run.optimizer.param_groups
    good, group[name] = group[name], value
    with pytest.raises(error, match=message):
        run.step()
    assert [run.value(i).tolist() for i in range(2)] == before
    assert [run.average(i).tolist() for i in range(2)] == averages
    group[name] = good
    run.step()


@pytest.mark.parametrize("option", ["differentiable", "capturable"])
@pytest.mark.parametrize("own", [{"lr_schedule": "current"}, {"average_every": 2}], ids=str)
def test_keywords_that_torchs_own_step_does_not_take(option, own):
    message = "^differentiable: goes only with lr_schedule='torch' and average_every=1$"
    if option == "capturable":  # which a GPU's params may be
        message = "^capturable: .*; got one on cpu$"
    else:
        with pytest.raises(ValueError, match=message):
            ASGD(parameters((3,)), **{option: True}, **own)
    (p,) = params = parameters((3,))
    optimizer = ASGD(params, **own)
    p.grad = torch.ones(3)
    optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0][option] = True
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    same(p, before)


def test_whole_numbers_of_other_types():
    for make in (lambda **o: ASGD(parameters((3,)), **o), lambda **o: ArrayASGD(np.ones(3), **o)):
        optimizer = make(average_every=np.int64(3))
        assert optimizer.param_groups[0]["average_every"] == 3


def test_an_average_of_a_dtype_of_its_own_keeps_it_when_it_starts_anew():
    """It was made before the model changed its dtype; torch keeps it too."""
    (p,) = parameters((3,), dtype=torch.float64)
    optimizer = ASGD([p], lr=0.1, lambd=0.0, t0=0)
    for _ in range(4):
        p.grad = torch.randn_like(p)
        optimizer.step()
    p.data = p.data.float()
    optimizer.start_averaging()
    iterates = []
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
        iterates.append(p.detach().double())
    ax = optimizer.state[p]["ax"]
    assert ax.dtype == torch.float64
    torch.testing.assert_close(ax, torch.stack(iterates).mean(dim=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
@pytest.mark.parametrize("first", ["replaced", "started"])
def test_a_param_that_gets_other_memory_around_the_start(first, wide):
    """Its average leaves the memory that the param had, which may be the user's, alone."""
    data = torch.randn(3)
    p = nn.Parameter(data)
    optimizer = ASGD([p], lr=0.1, lambd=0.0, average_dtype=wide)
    p.grad = torch.randn_like(p)
    optimizer.step()
    if first == "started":
        optimizer.start_averaging()
    before = data.clone()
    p.data = data.clone()
    if first == "replaced":
        optimizer.start_averaging()
    iterates = []
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
        iterates.append(p.detach().double())
    assert torch.equal(data, before)
    ax = optimizer.state[p]["ax"]
    assert ax.dtype == (wide or p.dtype)
    torch.testing.assert_close(ax.double(), torch.stack(iterates).mean(dim=0), rtol=1e-6, atol=1e-7)
