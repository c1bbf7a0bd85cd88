"""averaging: the weights of the iterates in an average, equal, decayed or growing."""

from __future__ import annotations

import copy
import json
import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from averaging import asks_early
from oracle import averaged, weights_of
from runs import WAYS, ArrayRun, TorchRun, lazy_or_eager, runs, saved_and_loaded
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from twins import Twins, bits, parameters, same

from asgd_fast import ASGD, ArrayASGD, NonMonotonicTrigger, Schedule

pytestmark = pytest.mark.usefixtures("seeded")

KINDS = [("ema", 0.9), ("ema", 0.25), ("polynomial", 1), ("polynomial", 3), ("polynomial", 0.5)]
kinds = pytest.mark.parametrize("averaging", KINDS, ids=str)


def mu_of(averaging, m):
    """The weight with which the m-th iterate of an average comes into it, from the exact ones."""
    return weights_of(averaging, m)[-1]


# The weights


@pytest.mark.parametrize(
    "averaging", [*KINDS, "mean", *(("ema", x) for x in (1e-6, 1 - 1e-9, 1 - 2**-53))], ids=str
)
def test_weights_of_the_iterates(averaging):
    schedule = Schedule(t0=-1, averaging=averaging)
    for m in range(1, 60):
        exact = mu_of(averaging, m)
        assert abs(Fraction(schedule.mu) / exact - 1) <= 2 * Fraction(2) ** -52
        schedule.advance()


def test_weights_computed_by_hand():
    """Of the newest iterate: 4 of 1 + 2 + 4 for the decay 1/2, 3 of 1 + 2 + 3 for the power 1."""
    for averaging, mus in {
        ("ema", 0.5): [1, 2 / 3, 4 / 7, 8 / 15],
        ("polynomial", 1): [1, 2 / 3, 3 / 6, 4 / 10],
        ("polynomial", 2): [1, 3 / 4, 6 / 10, 10 / 20],
    }.items():
        schedule = Schedule(t0=-1, averaging=averaging)
        for mu in mus:
            assert schedule.mu == pytest.approx(mu, rel=1e-15)
            schedule.advance()


def test_many_iterates():
    """Decayed weights come to an end, growing ones do not; none is ever 1 or 0 again."""
    for averaging, limit in ((("ema", 0.999), 0.001), (("ema", 1e-6), 1 - 1e-6)):
        schedule = Schedule(t0=-1, averaging=averaging)
        for _ in range(50_000):
            schedule.advance()
        assert schedule.mu == pytest.approx(limit, rel=1e-12)
    for power in (2, 1e6):
        schedule = Schedule(t0=-1, averaging=("polynomial", power))
        for _ in range(50_000):
            schedule.advance()
        assert schedule.mu == (power + 1) / (50_001 + power)


# Averages


@kinds
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(("t0", "first"), [(-1, 0), (0, 1), (3, 4), (2.5, 4)])
@lazy_or_eager
@runs
def test_averages_are_weighted_means(double_scalars, make, lazy, t0, first, every, averaging):
    run = make((3, 4), (5,), t0=t0, average_every=every, lazy_average=lazy, averaging=averaging)
    for k in range(first + 4 * every + 2):
        run.step()
        if k >= first:
            run.check(first, first, every=every, averaging=averaging)


@kinds
@pytest.mark.parametrize("every", [1, 2])
@runs
def test_after_a_start_by_hand(double_scalars, make, every, averaging):
    """Of params at different steps, that skip some, and begun anew after many."""
    run = make((3,), (4,), (5,), average_every=every, averaging=averaging)
    for k in range(3):
        run.step(*([1, 2] if k else [2]))
    run.optimizer.start_averaging()
    for k in range(9):
        run.step(*([] if k % 2 else [1]))
        if k:
            run.check(3, 1, 0, every=every, averaging=averaging)
    run.optimizer.reset_averages()
    assert not run.optimizer.is_averaging
    for _ in range(4):
        run.step()
        run.check(12, 5, 9, every=every, averaging=averaging)


@kinds
@runs
def test_groups_have_their_own(double_scalars, make, averaging):
    def groups(params):
        return [{"params": [params[0]], "averaging": averaging}, {"params": [params[1]]}]

    run = make((3,), (4,), groups=groups, t0=0, averaging="mean")
    for k in range(8):
        run.step()
        if k:
            run.check(1, averaging=averaging)
            run.check(None, 1)


@runs
def test_it_may_be_changed_between_steps(double_scalars, make):
    """The mu of the next iterate is there already; from the one after it on the weight is new."""
    run = make((3,), t0=0, averaging="mean")
    expected = None
    changes = {4: ["ema", 0.5], 7: ("polynomial", 2.0), 9: "mean"}
    mu, averaging = Fraction(1), "mean"
    for k in range(12):
        if k in changes:
            averaging = run.optimizer.param_groups[0]["averaging"] = changes[k]
        run.step()
        if k:
            ax = run.value(0) if mu == 1 else expected + (run.value(0) - expected) * float(mu)
            expected = ax
            np.testing.assert_allclose(run.average(0), expected, rtol=0, atol=1e-12)
        mu = mu_of(averaging, max(1, k + 1))


@kinds
@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("gappy", [False, True], ids=["engine", "gappy"])
def test_bits(simd_level, gappy, dtype, wide, averaging):
    """Of torch's iterates, and of its last line for the average, with other weights."""
    data = torch.randn(37, 2).to(dtype)
    p = nn.Parameter(data[:, 0] if gappy else data[:, 0].clone())
    q = nn.Parameter(p.detach().clone())
    ours = ASGD([p], t0=1, lr=0.3, averaging=averaging, average_dtype=wide)
    theirs = torch.optim.ASGD([q], t0=1, lr=0.3, foreach=False)
    ax = torch.zeros(37, dtype=torch.promote_types(dtype, wide or dtype))
    for k in range(9):
        p.grad = torch.randn(37).to(dtype)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
        assert torch.equal(bits(p.detach()), bits(q.detach()))
        # The weights are kept as float32, as torch keeps its own.
        averaged(ax, p.detach(), torch.tensor(float(mu_of(averaging, max(1, k - 1)))))
        assert torch.equal(bits(ours.state[p]["ax"].detach()), bits(ax))


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
@runs
def test_beside_torchs_moving_average(double_scalars, make, decay):
    """Torch begins with the whole weight of 1 on the first iterate, which decays as the others do.

    Without it, and with the weights that are left normalized, it is the average here.
    """
    run = make((3, 4), t0=-1, averaging=("ema", decay))
    theirs, first = None, None
    for n in range(1, 40):
        run.step()
        model = nn.Module()
        model.p = nn.Parameter(torch.from_numpy(run.value(0)))
        if theirs is None:
            theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
            first = run.value(0)
        theirs.update_parameters(model)
        left = theirs.module.p.detach().numpy() - decay**n * first
        np.testing.assert_allclose(run.average(0), left / (1 - decay**n), rtol=0, atol=1e-12)


def test_late_it_is_torchs_moving_average(double_scalars):
    model = nn.Linear(3, 2).double()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = ASGD(model.parameters(), lr=0.1, t0=-1, averaging=("ema", 0.5))
    for _ in range(70):  # after which the first iterate weighs 2 ** -70
        optimizer.zero_grad()
        model(torch.randn(4, 3, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        theirs.update_parameters(model)
    with optimizer.averaged_parameters():
        for p, q in zip(model.parameters(), theirs.module.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-14)


@pytest.mark.parametrize("averaging", ["mean", ("ema", 1), ["polynomial", 0.0]], ids=str)
@pytest.mark.parametrize("t0", [-5, 0, 2.5, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_what_makes_the_mean_has_the_bits_of_torch(dtype, t0, averaging):
    params = parameters((3,), (40, 5), dtype=dtype)
    twins = Twins(params, t0=t0, lr=0.3, lambd=1e-2)
    twins.ours.param_groups[0]["averaging"] = averaging
    twins.run(12)


@runs
def test_an_average_begins_and_goes_on(make):
    """Also with a weight that changes no more."""
    run = make((3,), t0=2, averaging=("ema", 0.5))
    for k in range(100):
        assert run.optimizer.is_averaging == (k >= 4)
        run.step()


@asks_early
@runs
def test_a_trigger_starts_it(double_scalars, make):
    run = make((3,), averaging=("ema", 0.75))
    trigger = NonMonotonicTrigger(run.optimizer, patience=1)
    for loss in (3.0, 2.0, 4.0, 4.0, 4.0, 4.0):
        run.step()
        trigger.step(loss)
    run.check(3, averaging=("ema", 0.75))


# Kept


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("steps", [1, 4, 9])
@kinds
def test_checkpoints_keep_it(double_scalars, averaging, steps, way):
    run = TorchRun((3,), (4,), t0=2, averaging=averaging)
    for _ in range(steps):
        run.step()
    run.optimizer, old = ASGD(run.params), run.optimizer
    run.optimizer.load_state_dict(way(old.state_dict()))
    assert run.optimizer.param_groups[0]["averaging"] == averaging
    for _ in range(6):
        run.step()
    run.check(3, 3, averaging=averaging)


@pytest.mark.parametrize("copied", [copy.deepcopy, WAYS["pickle"]], ids=["deepcopy", "pickle"])
@runs
def test_copies_keep_it(double_scalars, make, copied):
    run = make((3,), t0=0, averaging=("polynomial", 2))
    for _ in range(4):
        run.step()
    run.optimizer, run.params = copied((run.optimizer, run.params))
    for _ in range(4):
        run.step()
    run.check(1, averaging=("polynomial", 2))
    run.optimizer.add_param_group({"params": make((3,)).params})
    assert tuple(run.optimizer.param_groups[1]["averaging"]) == ("polynomial", 2)


@kinds
def test_saved_states_of_arrays_keep_it(through, averaging):
    groups = [{"averaging": averaging}, {}]
    run = ArrayRun(
        *((3,), (4,)),
        t0=1,
        groups=lambda own: [{"params": [x], **g} for x, g in zip(own, groups, strict=True)],
    )
    for _ in range(6):
        run.step()
    other = ArrayASGD([{"params": [x]} for x in run.params], averaging=("ema", 0.3))
    other.load_state_dict(through(run.optimizer.state_dict()))
    run.optimizer = other
    for _ in range(6):
        run.step()
        run.check(2, averaging=averaging)
        run.check(None, 2)


def test_saved_states_of_arrays_without_it_are_means(through):
    """As those that were saved before there were others."""
    before = ArrayASGD(np.ones(3), t0=0)
    before.step(np.ones(3))
    saved = through(before.state_dict())
    assert "averaging" not in saved
    after = ArrayASGD(np.ones(3), averaging=("ema", 0.5))
    after.load_state_dict(saved)
    assert after.param_groups[0]["averaging"] == "mean"


@kinds
def test_schedules_keep_it(through, averaging):
    schedule = Schedule(t0=1, averaging=averaging)
    for _ in range(6):
        schedule.advance()
    other = Schedule()
    other.load_state_dict(through(schedule.state_dict()))
    for _ in range(3):
        assert (other.step, other.mu) == (schedule.step, schedule.mu)
        assert other.mu != 1 / (other.step - 1)
        for one in (schedule, other):
            one.advance()
    assert Schedule().state_dict().keys() == {"lr", "lambd", "alpha", "t0", "step", "eta", "mu"}
    with pytest.raises(ValueError, match="expected the names"):
        other.load_state_dict({**Schedule().state_dict(), "ema": 0.5, "polynomial": 1.0})


@runs
def test_it_comes_from_json(double_scalars, make):
    run = make((3,), t0=0, **json.loads(json.dumps({"averaging": ("ema", 0.5)})))
    for _ in range(5):
        run.step()
    run.check(1, averaging=("ema", 0.5))


def test_a_checkpoint_has_it_where_it_is_not_the_mean():
    (p,) = parameters((3,))
    polynomial = ["polynomial", 2], ("polynomial", 2.0)
    for given, stored in (("mean", "mean"), (("ema", 0.5), ("ema", 0.5)), polynomial):
        saved = saved_and_loaded(ASGD([p], averaging=given).state_dict())
        assert saved["param_groups"][0].get("averaging", "mean") == stored
    assert "averaging" not in ASGD([p]).state_dict()["param_groups"][0]


def test_torch_goes_on_with_the_mean(double_scalars):
    """What it has of the checkpoint is the average so far, and how many iterates there were."""
    run = TorchRun((3,), t0=0, averaging=("ema", 0.5))
    for _ in range(5):
        run.step()
    ax, mu = run.average(0).copy(), float(mu_of(("ema", 0.5), 5))
    saved = saved_and_loaded(run.optimizer.state_dict())
    run.optimizer = torch.optim.ASGD(run.params, foreach=False)
    run.optimizer.load_state_dict(saved)
    for weight in (mu, 1 / 6):
        run.step()
        ax += (run.value(0) - ax) * weight
        np.testing.assert_allclose(run.average(0), ax, rtol=0, atol=1e-12)


STARTED = list(product([1, 3], [*KINDS, ("ema", 0.001)], [1, 2, 3, 4, 60]))


@pytest.mark.parametrize(("every", "averaging", "after"), STARTED, ids=str)
def test_where_each_average_began_stands_in_checkpoints(every, averaging, after):
    """Without a key that torch does not know, and with the bits of all that is there."""
    runs_ = [
        TorchRun((3,), (4,), (2,), averaging=averaging, average_every=every, dtype=torch.float32)
        for _ in range(2)
    ]
    for run, resumes in zip(runs_, (False, True), strict=True):
        torch.manual_seed(0)
        for p in run.params:
            p.data = torch.ones_like(p)
        run.step(2)
        run.step(1, 2)
        run.optimizer.start_averaging()
        for _ in range(after):
            run.step(2)
        if resumes:
            saved = saved_and_loaded(run.optimizer.state_dict())
            assert [list(entry) for entry in saved["state"].values()] == 2 * [
                ["step", "eta", "mu", "ax"]
            ]
            run.optimizer = ASGD(run.params)
            run.optimizer.load_state_dict(saved)
        for _ in range(5):
            run.step()
        run.check(2, 1, 0, every=every, averaging=averaging, atol=1e-5)
    for p, q in zip(*(run.params for run in runs_), strict=True):
        same(p, q)
        for name in ("step", "eta", "mu", "ax"):
            same(*(run.optimizer.state[x][name] for run, x in zip(runs_, (p, q), strict=True)))


def test_where_each_average_began_is_a_key_where_it_cannot_be_found_again():
    """As after a change of the weights, of which mu still is that of before."""
    run = TorchRun((3,), (4,), averaging=("ema", 0.5))
    run.step()
    run.step(1)
    run.optimizer.start_averaging()
    for _ in range(4):
        run.step()
    run.optimizer.param_groups[0]["averaging"] = ("ema", 0.25)
    mus = [run.optimizer.state[p]["mu"].item() for p in run.params]
    run.optimizer, old = ASGD(run.params), run.optimizer
    run.optimizer.load_state_dict(saved_and_loaded(old.state_dict()))
    assert [run.optimizer.state[p]["mu"].item() for p in run.params] == mus
    for optimizer in (run.optimizer, old):
        assert [optimizer.state[p].get("t0") for p in run.params] == [None, 0]


def test_repr_shows_it():
    pairs = ("ema", 0.5), ("polynomial", 2.0)
    for averaging in pairs:
        line = f"averaging: {averaging}"
        assert line in repr(ASGD(parameters((3,)), averaging=averaging))
        assert line in repr(ArrayASGD(np.ones(3), averaging=averaging))
        assert f"averaging={averaging}" in repr(Schedule(averaging=averaging))
    assert "averaging" not in repr(ASGD(parameters((3,))))


REFUSED = {
    "other name": (
        "median",
        ValueError,
        r"^Invalid averaging: 'median' \(expected 'mean', \('",
    ),
    "no decay": ("ema", ValueError, "^Invalid averaging: 'ema'"),
    "mean of": (("mean", 2), ValueError, r"^Invalid averaging: \('mean', 2\)"),
    "other pair": (("poly", 2), ValueError, r"^Invalid averaging: \('poly', 2\)"),
    "turned": ((0.9, "ema"), ValueError, r"^Invalid averaging: \(0.9, 'ema'\)"),
    "number": (0.9, TypeError, "^averaging: expected 'mean', .*, got 0.9 of type float$"),
    "None": (None, TypeError, "^averaging: expected 'mean', .*, got None of type NoneType$"),
    "single": (("ema",), TypeError, "^averaging: expected 'mean', .* of type tuple$"),
    "three": (["ema", 1, 2], TypeError, "^averaging: expected 'mean', .* of type list$"),
    "dict": ({"ema": 0.9}, TypeError, "^averaging: expected 'mean', .* of type dict$"),
    "decay of 0": (("ema", 0), ValueError, r"^Invalid averaging decay: 0 \(expected .* 1e-06 <="),
    "large decay": (("ema", 1.5), ValueError, "^Invalid averaging decay: 1.5 .*decay <= 1.$"),
    "nan": (("ema", math.nan), ValueError, "^Invalid averaging decay: nan"),
    "str": (("ema", "0.9"), TypeError, "^averaging decay: expected a real number, got '0.9'"),
    "negative power": (("polynomial", -1), ValueError, "^Invalid averaging power: -1 .* 0 <="),
    "infinite power": (("polynomial", math.inf), ValueError, "^Invalid averaging power: inf"),
}


def in_groups(message):
    """What names the group, too, where it is one of several."""
    return message.replace("^", r"(^|^param_groups\[\d\]: )", 1)


@asks_early
@pytest.mark.parametrize(("value", "error", "message"), REFUSED.values(), ids=REFUSED)
@runs
def test_what_is_refused(make, value, error, message):
    with pytest.raises(error, match=message):
        make((3,), averaging=value)
    with pytest.raises(error, match=message):
        Schedule(averaging=value)
    schedule = Schedule()
    schedule.averaging = value
    with pytest.raises(error, match=message):
        schedule.advance()
    assert schedule.step == 0
    run = make((3,), t0=-1, averaging=("ema", 0.5))
    run.step()
    before = run.value(0).tolist(), run.average(0).tolist()
    (group,) = run.optimizer.param_groups
    good, group["averaging"] = group["averaging"], value
    with pytest.raises(error, match=in_groups(message)):
        run.step()
    assert (run.value(0).tolist(), run.average(0).tolist()) == before
    with pytest.raises(error, match=in_groups(message)):
        run.optimizer.add_param_group({"params": make((3,)).params, "averaging": value})
    group["averaging"] = good
    run.step()


@pytest.mark.parametrize("option", ["differentiable", "capturable"])
def test_torchs_own_step_does_not_take_it(option):
    (p,) = parameters((3,))
    optimizer = ASGD([p], averaging=("ema", 0.5))
    p.grad = torch.ones(3)
    optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0][option] = True
    with pytest.raises(ValueError, match=f"^{option}: .*averaging"):
        optimizer.step()
    same(p, before)
