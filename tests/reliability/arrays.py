"""`asgd_` and `ArrayASGD` beside a model: arrays of all kinds in one arena of memory.

An accepted call changes the arena to what the model says, a refused one changes no byte of it.
What may be refused is found from the bytes of which the elements are made.
"""

from __future__ import annotations

import copy
import math
import pickle
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import asgd_fast
from reliability.model import eta_after, mu_after, reals, same, stepped

DTYPES = ["float16", "float32", "float64", "complex64", "complex128"]
REFUSALS = (TypeError, ValueError, BufferError)
FLAWS = [
    "read-only", "unaligned", "negative stride", "gaps", "repeated", "byte order", "other shape",
    "other dtype", "other axes", "overlap", "other array again",
]  # fmt: skip
WIDER = {"float16": ["float32", "float64"], "float32": ["float64"], "complex64": ["complex128"]}
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 6e-8, 6e4, 1e-45, 3e38, 5e-324, 1e308]


@dataclass
class Call:
    """The arrays of one call of `asgd_`, all in one arena, and its scalars."""

    arena: np.ndarray
    params: list = field(default_factory=list)
    grads: list = field(default_factory=list)
    axs: list | None = None
    scalars: dict = field(default_factory=dict)

    @property
    def written(self):
        return self.params + (self.axs or [])


def numbers(random, shape, dtype):
    """Random numbers, special ones among them."""
    x = random.standard_normal((2, *shape))
    special = random.choice(SPECIAL, x.shape)
    x = np.where(random.random(x.shape) < 0.1 * random.integers(2), special, x)
    with np.errstate(all="ignore"):
        return (x[0] + 1j * x[1]).astype(dtype) if "complex" in dtype else x[0].astype(dtype)


def placed(arena, start, shape, dtype, axes, flaw=None):
    """Return an array at an offset of the arena, and where the next one may begin."""
    dtype = np.dtype(dtype)
    if flaw == "unaligned":
        start += 1
    step = dtype.itemsize * (2 if flaw == "gaps" else 1)
    strides = [0] * len(shape)
    for axis in axes:  # the last one varies slowest
        strides[axis] = step
        step *= shape[axis]
    stop = start + max(step, dtype.itemsize)
    if flaw == "repeated":
        strides[axes[-1]] = 0
    if flaw == "byte order":
        dtype = dtype.newbyteorder()
    array = np.ndarray(shape, dtype, arena.data, start, strides)
    if flaw == "negative stride":
        array = np.flip(array, axes[-1])
    return array, stop


@st.composite
def calls(draw):
    """A call, in which usually little is wrong."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    arena = random.integers(0, 256, 1 << 14, dtype=np.uint8)
    arena = arena[-arena.ctypes.data % 64 :]
    call = Call(arena)
    n = draw(st.integers(1, 3))
    roles = ["params", "grads"] + ["axs"] * draw(st.booleans())
    flaws = draw(st.lists(st.sampled_from(FLAWS), max_size=draw(st.sampled_from([0, 0, 1, 2]))))
    flawed = {(draw(st.integers(0, n - 1)), draw(st.sampled_from(roles))): x for x in flaws}
    place = 0
    if "axs" in roles:
        call.axs = []
    for i in range(n):
        shape = draw(st.lists(st.integers(0, 7), max_size=3))
        long = draw(st.integers(0, 40))
        if long and not shape:
            shape = [long * draw(st.integers(1, 5))]
        axes = draw(st.permutations(range(len(shape))))
        param_dtype = draw(st.sampled_from(DTYPES))
        for role in roles:
            flaw = flawed.get((i, role))
            dtype, own_shape, own_axes = param_dtype, list(shape), axes
            if flaw in ("negative stride", "repeated", "gaps", "other axes") and not shape:
                flaw = None
            if role == "axs" and param_dtype in WIDER and draw(st.booleans()):
                dtype = draw(st.sampled_from(WIDER[param_dtype]))
            if flaw == "other dtype":
                dtype = draw(st.sampled_from([*DTYPES, "int32", "bool", "uint64", "longdouble"]))
            if flaw == "other shape":
                own_shape = draw(st.lists(st.integers(0, 7), max_size=3))
                own_axes = list(range(len(own_shape)))
            if flaw == "other axes":
                own_axes = draw(st.permutations(axes))
            place += -place % 64 + 64 * draw(st.integers(0, 1))
            if draw(st.booleans()):
                place += np.dtype(param_dtype).itemsize  # aligned to no more than it need be
            start = place
            if flaw == "overlap":
                start = max(0, place - 8 * draw(st.integers(0, 60)))
            if flaw == "other array again" and call.params:
                others = call.params + call.grads + (call.axs or [])
                array = others[draw(st.integers(0, len(others) - 1))]
            else:
                array, stop = placed(arena, start, own_shape, dtype, own_axes, flaw)
                place = max(place, stop)
                if flaw != "overlap" and array.dtype.kind in "fc":
                    array[...] = numbers(random, array.shape, array.dtype.newbyteorder("=").name)
                array.flags.writeable = flaw != "read-only"
            getattr(call, role).append(array)
    call.scalars = {
        "eta": draw(st.sampled_from([0.0, 0.1, 1e-40, 3.0, 1e30])),
        "mu": draw(st.sampled_from([1.0, 0.5, 1 / 3, 1e-9, 0.0])),
        "lambd": draw(st.sampled_from([0.0, 1e-4, 0.7])),
        "weight_decay": draw(st.sampled_from([0.0, 1e-2, 1e-300, 2.0])),
        "maximize": draw(st.booleans()),
        "grad_scale": draw(st.sampled_from([None, 1.0, 1 / 3, 0.0])),
    }
    if draw(st.integers(0, 19)) == 0:
        name = draw(st.sampled_from(["eta", "mu", "lambd", "weight_decay", "grad_scale"]))
        call.scalars[name] = draw(st.sampled_from([-1.0, math.nan, math.inf, "1", 2 + 1j, [], 1j]))
    return call


def bytes_of(array):
    """The offsets of the bytes of an array's elements, as a sorted array, repetitions kept."""
    places = np.zeros(array.shape, dtype=np.int64) + array.ctypes.data
    for axis, (n, stride) in enumerate(zip(array.shape, array.strides, strict=True)):
        places += (stride * np.arange(n)).reshape([-1] + [1] * (array.ndim - axis - 1))
    return np.sort((places.reshape(-1, 1) + np.arange(array.itemsize)).ravel())


def is_sound(array):
    """Whether an array is dense, aligned, and of a dtype that is taken."""
    native = array.dtype.isnative and array.dtype.name in DTYPES
    places = bytes_of(array)
    steps = [stride for n, stride in zip(array.shape, array.strides, strict=True) if n > 1]
    return (
        native
        and array.ctypes.data % (array.itemsize // (2 if array.dtype.kind == "c" else 1)) == 0
        and (np.diff(places) == 1).all()
        and all(step > 0 for step in steps)
    )


def same_order(one, other):
    return all(
        a == b
        for a, b, n in zip(
            (stride // one.itemsize for stride in one.strides),
            (stride // other.itemsize for stride in other.strides),
            one.shape,
            strict=True,
        )
        if n > 1
    )


def verdict(call):
    """Whether the call must be accepted (True), must be refused (False), or may be either."""
    numbers_ = {name: x for name, x in call.scalars.items() if name != "maximize"}
    for name, x in numbers_.items():
        if x is None and name == "grad_scale":
            continue
        if type(x) is not float or not 0 <= x <= (1 if name == "mu" else 1.7e308):
            return False
    doubtful = False
    spans = []
    for i, param in enumerate(call.params):
        for role, arrays in (("param", call.params), ("grad", call.grads), ("ax", call.axs)):
            if arrays is None:
                continue
            array = arrays[i]
            wide = [param.dtype.name, *(WIDER.get(param.dtype.name, []) if role == "ax" else [])]
            if array.shape != param.shape or array.dtype.name not in wide:
                return False
            if array.size == 0:
                # An empty one has no memory to be wrong, but its library may refuse to lend it.
                doubtful |= not (array.flags.c_contiguous and array.flags.writeable)
                doubtful |= not array.dtype.isnative or not array.flags.aligned
                continue
            if role != "grad" and not array.flags.writeable:
                return False
            if role == "grad" and not (is_sound(array) and same_order(array, param)):
                doubtful = True  # it is only read, and a copy would do
            elif not (is_sound(array) and same_order(array, param)):
                return False
            spans.append((role, bytes_of(array)))
    for i, (role, span) in enumerate(spans):
        for other_role, other in spans[:i]:
            if (role, other_role) != ("grad", "grad") and np.intersect1d(span, other).size:
                return False
    return None if doubtful else True


def in_copy(array, arena, copied):
    """The same array in a copy of the arena."""
    start = array.ctypes.data - arena.ctypes.data
    # With negative strides the first element is not at the lowest address.
    low = min(0, sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True) if s < 0))
    assert start + low >= 0
    return np.ndarray(array.shape, array.dtype, copied.data, start, array.strides)


def check_call(call):
    """Make the call, and compare the whole arena with the model's."""
    before = call.arena.copy()
    must = verdict(call)
    try:
        asgd_fast.asgd_(call.params, call.grads, call.axs, **call.scalars)
    except REFUSALS as error:
        assert must is not True, f"refused: {error}"
        assert call.arena.tobytes() == before.tobytes(), f"a refused call changed memory: {error}"
        return False
    assert must is not False, "accepted what must be refused"
    expected = before.copy()
    for i, param in enumerate(call.params):
        roles = [call.params, call.grads] + [call.axs] * (call.axs is not None)
        p, g, *ax = (
            reals(in_copy(x[i], call.arena, before)) for x in roles
        )
        shape = param.shape
        p, ax = stepped(p, g, ax[0] if ax else None, **call.scalars)
        in_copy(param, call.arena, expected)[...] = p.view(param.dtype).reshape(shape)
        if ax is not None:
            average = in_copy(call.axs[i], call.arena, expected)
            average[...] = ax.view(average.dtype).reshape(shape)
    for array in call.written:
        ours = reals(array)
        theirs = reals(in_copy(array, call.arena, expected))
        assert same(ours, theirs), f"{ours} instead of {theirs}"
        in_copy(array, call.arena, expected)[...] = array  # nan payloads
    assert call.arena.tobytes() == expected.tobytes(), "memory beside the arrays was written"
    return True


def check_large(seed_):
    """A step that several threads share has the bits of the small ones that it repeats."""
    random = np.random.default_rng(seed_)
    dtype = DTYPES[seed_ % 3]
    period = int(random.integers(3, 60))
    n = int(random.integers(2, 9)) * (1 << 20) // np.dtype(dtype).itemsize + seed_ % 7
    small = [numbers(random, (period,), dtype) for _ in range(3)]
    large = [np.resize(x, n) for x in small]
    scalars = {"eta": 0.1, "mu": 0.25, "lambd": 0.01, "weight_decay": 0.1}
    asgd_fast.asgd_(*large, **scalars)
    p, ax = stepped(*small, **scalars)
    assert same(large[0], np.resize(p, n))
    assert same(large[2], np.resize(ax, n))


HYPERPARAMETERS = {
    "lr": [0.0, 0.01, 0.1, 1.5],
    "lambd": [0.0, 1e-4, 0.3],
    "alpha": [0.0, 0.75, 1.0],
    "t0": [-1.0, 0.0, 1.0, 2.5, 1e6],
    "weight_decay": [0.0, 0.1],
    "maximize": [False, True],
    "lr_schedule": ["torch", "current"],
    "average_every": [1, 2, 3],
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
        grads[i] = [np.zeros((9, 9)), np.zeros(grads[i].shape, "i4"), object(), grads[i][..., None]][place]
        try:
            self.optimizer.step(grads)
        except REFUSALS:
            return
        raise AssertionError("accepted what must be refused")

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
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


def run(campaign):
    accepted = campaign.counts

    def check(call):
        accepted["calls of asgd_"] += 1
        accepted["of them accepted"] += check_call(call)

    campaign.explore(30_000, calls(), check)
    for k in range(campaign.times(100)):
        check_large(campaign.seed + k)
        accepted["steps of several threads"] += 1

    class Counted(Walk):
        def __init__(self):
            super().__init__()
            accepted["lives of ArrayASGD"] += 1

    campaign.walk(1500, Counted, 25)


@contextmanager
def _asgd(replacement):
    original = asgd_fast.asgd_
    asgd_fast.asgd_ = lambda *args, **kwargs: replacement(original, *args, **kwargs)
    try:
        yield
    finally:
        asgd_fast.asgd_ = original


def _one_bit(original, params, grads, axs=None, **scalars):
    """In the last place of the last element, where there are more than 8."""
    original(params, grads, axs, **scalars)
    for param in params:
        if param.size > 8 and param.dtype == np.float32:
            last = param[tuple(n - 1 for n in param.shape)]
            param[tuple(n - 1 for n in param.shape)] = np.nextafter(last, np.float32(0))


def _change_before_refusal(original, params, grads, axs=None, **scalars):
    """As an engine that checks one row after another."""
    if len(params) > 1:
        original(params[:1], grads[:1], axs and axs[:1], **scalars)
        original(params[1:], grads[1:], axs and axs[1:], **scalars)
    else:
        original(params, grads, axs, **scalars)


def _beside(original, params, grads, axs=None, **scalars):
    """One byte after an array."""
    original(params, grads, axs, **scalars)
    array = params[0]
    if array.dtype == np.float64 and array.flags.c_contiguous and 3 < array.size < 30:
        np.ndarray((1,), np.uint8, array.base.data, 0)
        np.lib.stride_tricks.as_strided(array.reshape(-1)[-1:], (2,), (8,))[1] = 0


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


CONTROLS = {
    "a wrong last bit": lambda: _asgd(_one_bit),
    "a refused call that changes its first param": lambda: _asgd(_change_before_refusal),
    "a write beside an array": lambda: _asgd(_beside),
    "an averaging weight that is late in step 7": _mu_of_the_step_before,
}
