"""Lives of `ArrayASGD` beside a model: steps, changes, groups, averages, copies and checkpoints."""

from __future__ import annotations

import copy
import pickle
from contextlib import contextmanager

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import asgd_fast
from reliability.arrays import DTYPES, REFUSALS
from reliability.model import eta_after, mu_after, reals, same, stepped

HYPERPARAMETERS = {
    "lr": [0.0, 0.01, 0.1, 1.5],
    "lambd": [0.0, 1e-4, 0.3],
    "alpha": [0.0, 0.75, 1.0],
    "t0": [-1.0, 0.0, 1.0, 2.5, 1e6],
    "weight_decay": [0.0, 0.1],
    "maximize": [False, True],
    "lr_schedule": ["torch", "current"],
    "average_every": [1, 2, 3],
    "averaging": ["mean", ("ema", 0.9), ("polynomial", 2.5)],
}
groups = st.fixed_dictionaries({name: st.sampled_from(x) for name, x in HYPERPARAMETERS.items()})


class Owner:
    """What the model knows of one param."""

    def __init__(self, array, group, average_dtype):
        self.array, self.group = array.copy(), group
        wide = average_dtype and np.promote_types(array.dtype, average_dtype)
        self.average_dtype = np.dtype(wide or array.dtype)
        self.step, self.eta, self.mu, self.start = 0, group["lr"], 1.0, None
        self.begin_anew()

    def begin_anew(self):
        self.ax = self.array.astype(self.average_dtype)

    def make_step(self, grad):
        own = self.group
        t0 = own["t0"] if self.start is None else self.start
        if self.step == 0:
            self.eta = own["lr"]
        eta, decay = self.eta, None
        if own["lr_schedule"] == "current":
            eta = eta_after(self.step, own, t0)
            decay = 1.0 if self.step <= t0 else None
        p, ax = stepped(
            reals(self.array),
            reals(grad),
            None if self.mu == 0 else reals(self.ax),
            eta=eta,
            mu=self.mu,
            decay=decay,
            **{name: own[name] for name in ("lambd", "weight_decay", "maximize")},
        )
        if ax is not None:
            self.ax = ax.view(self.average_dtype).reshape(self.array.shape)
        self.array = p.view(self.array.dtype).reshape(self.array.shape)
        self.step += 1
        self.eta = eta_after(self.step, own, t0)
        self.mu = mu_after(self.step, own, t0)


class Walk(RuleBasedStateMachine):
    """A life of `ArrayASGD`, its bits compared with the model's after each rule."""

    def new_arrays(self, n):
        dtypes = self.random.choice(DTYPES, n)
        shapes = [(), (3,), (2, 5), (33,), (0, 2)]
        return [
            np.asarray(self.random.standard_normal(shapes[self.random.integers(5)])).astype(x)
            for x in dtypes
        ]

    @initialize(seed_=st.integers(0, 2**32), group=groups, wide=st.sampled_from([None, "f4", "f8"]))
    def construct(self, seed_, group, wide):
        self.random = np.random.default_rng(seed_)
        self.wide = wide
        arrays = self.new_arrays(self.random.integers(1, 4))
        self.optimizer = asgd_fast.ArrayASGD(arrays, average_dtype=wide, **group)
        self.groups = [dict(group)]
        self.owners = [Owner(x, self.groups[0], wide) for x in arrays]

    @property
    def arrays(self):
        return [x for group in self.optimizer.param_groups for x in group["params"]]

    @rule(n=st.integers(1, 3), skips=st.integers(0, 7))
    def step(self, n, skips):
        for _ in range(n):
            grads = [
                None if skips >> i & 1 else self.random.standard_normal(x.shape).astype(x.dtype)
                for i, x in enumerate(self.arrays)
            ]
            self.optimizer.step(grads)
            for owner, grad in zip(self.owners, grads, strict=True):
                if grad is not None:
                    owner.make_step(grad)

    @rule(place=st.integers(0, 3))
    def refused_step(self, place):
        grads = [np.zeros_like(x) for x in self.arrays]
        i = place % len(grads)
        grads[i] = [
            np.zeros((9, 9)),
            np.zeros(grads[i].shape, "i4"),
            object(),
            grads[i][..., None],
        ][place]
        try:
            self.optimizer.step(grads)
        except REFUSALS:
            return
        raise AssertionError("accepted what must be refused")

    @rule(fault=st.sampled_from(["rate", "group", "state"]))
    def refuse(self, fault):
        group, state = self.optimizer.param_groups[-1], self.optimizer.state_dict()
        rate = group["lr"]
        try:
            if fault == "rate":
                group["lr"] = -1.0
                self.optimizer.step([np.ones_like(x) for x in self.arrays])
            elif fault == "group":
                self.optimizer.add_param_group({"params": [np.ones(2)], "alpha": -1.0})
            else:
                self.optimizer.load_state_dict({**state, "mu": state["mu"] + 2})
        except REFUSALS:
            group["lr"] = rate
            return
        raise AssertionError(f"accepted a wrong {fault}")

    @rule(name=st.sampled_from(sorted(HYPERPARAMETERS)), data=st.data(), place=st.integers(0, 9))
    def change(self, name, data, place):
        value = data.draw(st.sampled_from(HYPERPARAMETERS[name]))
        place %= len(self.groups)
        self.groups[place][name] = self.optimizer.param_groups[place][name] = value

    @rule(group=groups)
    def add_group(self, group):
        if len(self.groups) < 3:
            arrays = self.new_arrays(self.random.integers(1, 3))
            self.optimizer.add_param_group({"params": arrays, **group})
            self.groups.append(dict(group))
            self.owners += [Owner(x, self.groups[-1], self.wide) for x in arrays]

    @rule(place=st.integers(-1, 2))
    def start(self, place):
        group = place if 0 <= place < len(self.groups) else None
        self.optimizer.start_averaging(group)
        for owner in self.owners:
            if group is None or owner.group is self.groups[group]:
                owner.start, owner.mu = owner.step - 1, 1.0
                owner.begin_anew()

    @rule()
    def evaluate(self):
        before = self.optimizer.state_dict()
        with self.optimizer.averaged_parameters():
            for array, owner in zip(self.arrays, self.owners, strict=True):
                ax = owner.ax if owner.mu != 1 else owner.array
                with np.errstate(all="ignore"):
                    rounded = ax.astype(array.dtype)
                assert same(reals(array), reals(rounded))
            inside = self.optimizer.state_dict()
        assert list(before) == list(inside)
        assert all(same_entry(before[name], inside[name]) for name in before)

    @rule(way=st.sampled_from(["state", "deepcopy", "pickle"]))
    def pass_on(self, way):
        old = self.optimizer
        if way == "deepcopy":
            self.optimizer = copy.deepcopy(old)
        elif way == "pickle":
            self.optimizer = pickle.loads(pickle.dumps(old))
        else:
            self.optimizer = asgd_fast.ArrayASGD(
                [{"params": [x.copy() for x in own["params"]]} for own in old.param_groups],
                average_dtype=self.wide,
            )
            self.optimizer.load_state_dict(old.state_dict())
            for owner in self.owners:
                if owner.start == owner.group["t0"]:
                    owner.start = None  # a state does not tell the two apart

    @invariant()
    def has_the_bits_of_the_model(self):
        state = self.optimizer.state_dict()
        averages = self.optimizer.averages
        for i, (array, owner) in enumerate(zip(self.arrays, self.owners, strict=True)):
            assert same(reals(array), reals(owner.array))
            assert same(reals(averages[i]), reals(owner.ax))
            assert state["step"][i] == owner.step
            if owner.step:
                assert state["eta"][i] == owner.eta
            assert state["mu"][i] == owner.mu


def same_entry(one, other):
    kinds = [(x.dtype, x.shape) for x in (one, other)]
    return kinds[0] == kinds[1] and one.tobytes() == other.tobytes()


def run(campaign):
    class Counted(Walk):
        def __init__(self):
            super().__init__()
            campaign.counts["lives of ArrayASGD"] += 1

    campaign.walk(1500, Counted, 25)


@contextmanager
def _mu_of_the_step_before():
    """A schedule that is one step late."""
    original = asgd_fast.ArrayASGD.step

    def step(self, grads):
        before = self._scalars[:, 2].copy()
        original(self, grads)
        late = self._scalars[:, 0] == 7
        self._scalars[late, 2] = before[late]

    asgd_fast.ArrayASGD.step = step
    try:
        yield
    finally:
        asgd_fast.ArrayASGD.step = original


CONTROLS = {"an averaging weight that is late in step 7": _mu_of_the_step_before}
