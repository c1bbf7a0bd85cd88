"""Lives of `ASGD` beside torch's: edits to params, state, groups, gradients and checkpoints.

After each rule the params and the state have torch's bits. Wide averages, and those by other
weights, which torch has not, are those of tests/oracle.py, by the weights of model.py.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from contextlib import contextmanager

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from oracle import averaged
from runs import saved_and_loaded
from twins import NAMES, Twins, bits, entries_of, same, twin

import asgd_fast
from asgd_fast.integrations.train_eval import TrainEvalASGD
from reliability.model import mu_after

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
SHAPES = [(), (3,), (2, 5), (33,), (0, 2), (4, 3, 2)]
HYPERPARAMETERS = {
    "lr": [0.0, 0.01, 0.1, 0.7],
    "lambd": [0.0, 1e-4, 0.3],
    "alpha": [0.0, 0.75, 1.0],
    "t0": [-1.0, 0.0, 1.0, 2.5, 1e6],
    "weight_decay": [0.0, 0.1],
    "maximize": [False, True],
}
# Averages as torch has them most of the time.
WEIGHTS = [
    *[{"averaging": "mean", "average_every": 1}] * 5,
    {"averaging": ("ema", 0.9), "average_every": 1},
    {"averaging": ("polynomial", 2.5), "average_every": 2},
    {"averaging": "mean", "average_every": 3},
]
groups = st.fixed_dictionaries({name: st.sampled_from(x) for name, x in HYPERPARAMETERS.items()})
places = st.integers(0, 9)


class Model(torch.nn.Module):
    """Batch normalization of what comes in, multiplied by a number that params give."""

    def __init__(self, params):
        super().__init__()
        self.params = torch.nn.ParameterList(params)
        self.norm = torch.nn.BatchNorm1d(1)

    def factor(self):
        first = torch.view_as_real(p) if (p := self.params[0].detach()).is_complex() else p
        return first.sum().nan_to_num().tanh().float()

    def forward(self, x):
        return self.norm(x * self.factor())


BATCHES = [torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[3.0], [-1.0]])]
MEAN = (7 / 3 + 1) / 2  # of their means


class Walk(RuleBasedStateMachine):
    """One life of both optimizers."""

    @initialize(
        seed=st.integers(0, 2**32),
        group=groups,
        lazy=st.booleans(),
        wide=st.sampled_from([None, None, torch.float32, torch.float64]),
        only_float32=st.booleans(),
        kind=st.sampled_from([asgd_fast.ASGD, asgd_fast.ASGD, TrainEvalASGD]),
        weights=st.sampled_from(WEIGHTS),
    )
    def construct(self, seed, group, lazy, wide, only_float32, kind, weights):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtypes = [torch.float32] if only_float32 else DTYPES
        self.twins = Twins(self.new_params(3), lazy_average=lazy, **group)
        self.wide, self.weights = wide, weights
        self.has_own_weights = weights != WEIGHTS[0]
        self.has_own_averages = wide is not None or self.has_own_weights  # torch knows none of them
        self.twins.ours = kind(
            self.twins.params, lazy_average=lazy, average_dtype=wide, **weights, **group
        )
        self.axs = [None] * len(self.twins.params)  # our own averages
        self.mus = [1.0] * len(self.twins.params)  # and their weights, where these are our own
        self.is_written = False  # since the last step
        self.schedulers = []
        self.has_started = False

    def draw(self, n):
        return int(torch.randint(n, (), generator=self.generator))

    def new_params(self, n):
        params = []
        for _ in range(1 + self.draw(n)):
            shape, dtype = SHAPES[self.draw(len(SHAPES))], self.dtypes[self.draw(len(self.dtypes))]
            tensor = torch.randn(shape, dtype=dtype, generator=self.generator)
            if len(shape) > 1 and self.draw(2):
                tensor = tensor.transpose(0, 1).contiguous().transpose(0, 1)
            params.append(torch.nn.Parameter(tensor))
        return params

    def pairs(self):
        return list(zip(self.twins.params, self.twins.theirs_params, strict=True))

    @rule(n=st.integers(1, 3), skips=st.integers(0, 15), reuse=st.booleans())
    def step(self, n, skips, reuse):
        for _ in range(n):
            grads = [
                None if skips >> i & 1
                else p.grad if reuse and p.grad is not None and p.grad.shape == p.shape
                else torch.randn(p.shape, dtype=p.dtype, generator=self.generator)
                for i, p in enumerate(self.twins.params)
            ]  # fmt: skip
            self.make_step(grads)

    def new_grads(self):
        return [
            torch.randn(p.shape, dtype=p.dtype, generator=self.generator) for p in self.twins.params
        ]

    def make_step(self, grads):
        mus = [self.mu(i) for i in range(len(self.mus))]
        self.twins.step(grads)
        self.is_written = False
        if not self.has_own_averages:
            return
        t0s = [own["t0"] for own in self.twins.theirs.param_groups for _ in own["params"]]
        for i, (_, q) in enumerate(self.pairs()):
            if grads[i] is None:
                continue
            if self.axs[i] is None:
                self.axs[i] = torch.empty_like(q, dtype=self.average_dtype(q)).detach()
            if mus[i] != 0:
                averaged(self.axs[i], q.detach(), torch.tensor(mus[i], dtype=torch.float64))
            step = self.twins.theirs.state[q]["step"].item()
            self.mus[i] = torch.tensor(mu_after(step, self.weights, t0s[i])).item()

    def mu(self, i):
        """The weight of the next iterate of a param in its average."""
        if self.has_own_weights:
            return self.mus[i]
        entry = self.twins.theirs.state.get(self.twins.theirs_params[i])
        return entry["mu"].item() if entry else 1.0

    def average_dtype(self, p):
        return p.dtype if self.wide is None else torch.promote_types(p.dtype, self.wide)

    @rule(name=st.sampled_from(sorted(HYPERPARAMETERS)), place=places, data=st.data())
    def change(self, name, place, data):
        value = data.draw(st.sampled_from(HYPERPARAMETERS[name]))
        for optimizer, _ in self.twins.sides:
            optimizer.param_groups[place % len(optimizer.param_groups)][name] = value

    @rule(group=groups)
    def add_group(self, group):
        if len(self.twins.ours.param_groups) < 3:
            params = self.new_params(2)
            theirs = [twin(p) for p in params]
            self.twins.ours.add_param_group({"params": params, **group})
            self.twins.theirs.add_param_group({"params": theirs, **group})
            self.twins.params += params
            self.twins.theirs_params += theirs
            self.axs += [None] * len(params)
            self.mus += [1.0] * len(params)

    @rule(place=places, layout=st.booleans())
    def replace_data(self, place, layout):
        p, q = self.pairs()[place % len(self.twins.params)]
        if layout and p.ndim > 1:
            return  # averages of another layout than their params: tests/test_optim_state.py
        p.data, q.data = p.data.clone(), q.data.clone()
        self.is_written = True

    @rule(place=places)
    def edit_param(self, place):
        """With a step, since an average that has not begun is the param at any time."""
        with torch.no_grad():
            for p in self.pairs()[place % len(self.twins.params)]:
                p.mul_(0.5)
        self.make_step(self.new_grads())

    @rule()
    def look(self):
        self.twins.look()

    @rule(fault=st.sampled_from(["power", "gradient", "group", "checkpoint"]), place=places)
    def refuse(self, fault, place):
        """Let ours refuse something, which must change nothing."""
        ours, p = self.twins.ours, self.twins.params[place % len(self.twins.params)]
        group = ours.param_groups[place % len(ours.param_groups)]
        power, grads = group["alpha"], [p.grad for p in self.twins.params]
        for own, grad in zip(self.twins.params, self.new_grads(), strict=True):
            own.grad = grad
        state = copy.deepcopy(ours.state_dict())
        try:
            if fault == "power":
                group["alpha"] = -1.0
                ours.step()
            elif fault == "gradient":
                p.grad = torch.zeros(p.shape, dtype=p.dtype).to_sparse()
                ours.step()
            elif fault == "group":
                ours.add_param_group({"params": [torch.nn.Parameter(torch.ones(2)), p]})
            else:
                state["param_groups"][-1]["alpha"] = "fast"
                ours.load_state_dict(state)
        except (TypeError, ValueError, RuntimeError):
            pass
        else:
            raise AssertionError(f"accepted a wrong {fault}")
        group["alpha"] = power
        for own, grad in zip(self.twins.params, grads, strict=True):
            own.grad = grad

    @rule(name=st.sampled_from(NAMES), place=places, replace=st.booleans())
    def edit_state(self, name, place, replace):
        p, q = self.pairs()[place % len(self.twins.params)]
        theirs = self.twins.theirs.state.get(q)
        if not theirs or (name == "ax" and (self.has_own_averages or theirs["mu"] == 1)):
            return
        if name in ("mu", "step") and self.has_own_weights:
            return  # which torch would compute otherwise
        if name == "mu" and theirs["mu"] == 1:
            return  # an average that has not begun may stand for something else: see averages.md
        for entry in (self.twins.ours.state[p], theirs):
            if replace:
                entry[name] = entry[name].clone()
            if name == "step":
                entry[name].add_(2)
            elif name != "ax" or entry["mu"] != 1:
                entry[name].mul_(0.5)

    @rule(place=places, everything=st.booleans())
    def forget_state(self, place, everything):
        if self.has_started:
            return  # a new state then begins to average at once, which torch's cannot
        i = place % len(self.twins.params)
        for optimizer, params in self.twins.sides:
            if everything:
                optimizer.state.clear()
            else:
                optimizer.state.pop(params[i], None)
        for k in range(len(self.axs)):
            if everything or k == i:
                self.axs[k], self.mus[k] = None, 1.0

    def may_cross(self):
        """torch rounds the scalars of a loaded checkpoint to the dtype of their params."""
        return all(p.dtype in (torch.float32, torch.complex64) for p in self.twins.params)

    @precondition(lambda self: self.may_cross())
    @rule(
        way=st.sampled_from(["theirs to ours", "ours to theirs", "each its own"]), f=st.booleans()
    )
    def load(self, way, f):
        ours, theirs = self.twins.ours, self.twins.theirs
        if way != "each its own" and self.has_own_weights:
            return
        if way == "theirs to ours" and self.wide is not None:
            return  # it has no wide averages
        self.is_written = True  # if another optimizer's steps came before
        states = {
            "theirs to ours": (theirs, None), "ours to theirs": (None, ours),
            "each its own": (ours, theirs),
        }[way]  # fmt: skip
        for optimizer, source in zip((ours, theirs), states, strict=True):
            if source is not None:
                state = saved_and_loaded(source.state_dict()) if f else source.state_dict()
                if optimizer is theirs:  # which would share its tensors with ours
                    state = copy.deepcopy(state)
                with warnings.catch_warnings():  # where the step or t0 was edited
                    warnings.filterwarnings("ignore", "load_state_dict: mu is")
                    optimizer.load_state_dict(state)
                optimizer.param_groups[0].pop("foreach", None)
                for group in optimizer.param_groups:
                    group["foreach"] = False

    @rule(way=st.sampled_from([copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]))
    def pass_on(self, way):
        self.twins.params, self.twins.ours = way((self.twins.params, self.twins.ours))
        self.twins.theirs_params, self.twins.theirs = way(
            (self.twins.theirs_params, self.twins.theirs)
        )
        self.schedulers = []

    @rule(kind=st.sampled_from(["ExponentialLR", "StepLR", "CosineAnnealingLR"]))
    def add_scheduler(self, kind):
        argument = {"ExponentialLR": 0.9, "StepLR": 2, "CosineAnnealingLR": 10}[kind]
        if not self.schedulers:
            make = getattr(torch.optim.lr_scheduler, kind)
            self.schedulers = [make(x, argument) for x, _ in self.twins.sides]

    @rule()
    def step_scheduler(self):
        n_groups = len(self.twins.ours.param_groups)
        if self.schedulers and len(self.schedulers[0].base_lrs) == n_groups:
            self.make_step(self.new_grads())
            for scheduler in self.schedulers:
                scheduler.step()

    def check_averages(self):
        """Assert that the params are their averages."""
        for i, (p, q) in enumerate(self.pairs()):
            if self.mu(i) == 1:
                same(p, q)
            elif self.has_own_averages:
                same(p, self.axs[i].to(q.dtype))
            else:
                same(p, self.twins.theirs.state[q]["ax"])

    @rule(updates=st.booleans())
    def evaluate(self, updates):
        before = [bits(p.detach()).clone() for p in self.twins.params]
        model = Model(self.twins.params)
        options = {"model": model, "update_bn": BATCHES} if updates else {}
        with self.twins.ours.averaged_parameters(**options):
            self.check_averages()
            if updates and self.twins.ours.is_averaging:
                mean = (model.factor() * MEAN).reshape(1)
                torch.testing.assert_close(model.norm.running_mean, mean)
        assert model.norm.running_mean.item() == model.norm.num_batches_tracked.item() == 0
        for p, old in zip(self.twins.params, before, strict=True):
            assert torch.equal(bits(p.detach()), old)

    @rule(saves=st.booleans())
    def change_modes(self, saves):
        """To eval mode and back, through a checkpoint of it if wanted."""
        ours = self.twins.ours
        if not isinstance(ours, TrainEvalASGD) or self.is_written:
            return  # params that somebody has written are left alone
        before = [bits(p.detach()).clone() for p in self.twins.params]
        ours.eval()
        self.check_averages()
        if saves:
            ours.load_state_dict(saved_and_loaded(ours.state_dict()))
            self.check_averages()
        ours.train()
        for p, old in zip(self.twins.params, before, strict=True):
            assert torch.equal(bits(p.detach()), old)

    @rule(place=places)
    def start_averaging(self, place):
        """torch's t0 set to the step before, its mu to 1, and a step, where all stand alike."""
        i = place % len(self.twins.ours.param_groups)
        group = self.twins.theirs.param_groups[i]
        states = [self.twins.theirs.state.get(q) for q in group["params"]]
        if not all(states) or len({float(x["step"]) for x in states}) != 1:
            return
        self.has_started = True
        self.twins.ours.start_averaging(i)
        group["t0"] = float(states[0]["step"]) - 1
        for entry in states:
            entry["mu"].fill_(1)
        for k, q in enumerate(self.twins.theirs_params):
            if any(q is own for own in group["params"]):
                self.mus[k] = 1.0
        self.make_step(self.new_grads())

    @invariant()
    def has_the_bits_of_torch(self):
        if not self.has_own_averages:
            self.twins.check()
            return
        ours, theirs = (entries_of(x) for x, _ in self.twins.sides)
        for i, (p, q) in enumerate(self.pairs()):
            same(p, q)
            assert (p in ours) == (q in theirs)
            if q in theirs:
                for name in ("step", "eta"):
                    same(ours[p][name], theirs[q][name])
                assert ours[p]["mu"].item() == self.mu(i)
                if self.mu(i) != 1:
                    same(ours[p]["ax"], self.axs[i])


def run(campaign):
    class Counted(Walk):
        def __init__(self):
            super().__init__()
            campaign.counts["lives of ASGD beside torch's"] += 1

        def make_step(self, grads):
            campaign.counts["their steps"] += 1
            super().make_step(grads)

    campaign.walk(1500, Counted, 30)


@contextmanager
def _stepping(change):
    original = asgd_fast.ASGD.step

    def step(self, closure=None):
        result = original(self, closure)
        change(self)
        return result

    asgd_fast.ASGD.step = step
    try:
        yield
    finally:
        asgd_fast.ASGD.step = original


@torch.no_grad()
def _one_bit(optimizer):
    for p, entry in optimizer.state.items():
        if p.dtype == torch.float64 and entry["step"] == 5:
            p.nextafter_(torch.zeros_like(p))


def _stale_rate(optimizer):
    for p, entry in optimizer.state.items():
        if entry["step"] == 6 and p.ndim == 2:
            entry["eta"].mul_(1 + 2**-23)


@contextmanager
def _replaced(owner, name, value):
    original = getattr(owner, name)
    setattr(owner, name, value(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def _almost_back(train):
    @torch.no_grad()
    def change(self):
        train(self)
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 + 2**-20)

    return change


def _without_statistics(averaged_parameters):
    return lambda self, **_: averaged_parameters(self)


CONTROLS = {
    "iterates that train() does not put back exactly": lambda: _replaced(
        TrainEvalASGD, "train", _almost_back
    ),
    "statistics that are not updated for averages": lambda: _replaced(
        asgd_fast.ASGD, "averaged_parameters", _without_statistics
    ),
    "a wrong last bit of params of float64 in step 5": lambda: _stepping(_one_bit),
    "a wrong last bit of eta in step 6": lambda: _stepping(_stale_rate),
}
