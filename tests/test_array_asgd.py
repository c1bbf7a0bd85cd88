"""ArrayASGD: groups, skipped params, saved states, and what it refuses."""

from __future__ import annotations

import copy
import pickle
import signal
import sys
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from averaging import asks_early
from runs import steps_made_by_threads

from asgd_fast import ArrayASGD, get_num_threads

OPTIONS = {"lr": 0.2, "lambd": 1e-2, "alpha": 0.6, "t0": 4, "weight_decay": 0.01}


def make_params(dtype=np.float64):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in ((3, 4), (5,), ())]


def make_grads(k, dtype=np.float64):
    rng = np.random.default_rng(1000 + k)
    return [np.asarray(rng.standard_normal(shape), dtype) for shape in ((3, 4), (5,), ())]


def torch_twin(params, **options):
    tensors = [torch.tensor(param, requires_grad=True) for param in params]
    return tensors, torch.optim.ASGD(tensors, foreach=False, **options)


def step_torch(optimizer, grads):
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    for tensor, grad in zip(tensors, grads, strict=True):
        tensor.grad = None if grad is None else torch.tensor(grad)
    optimizer.step()


def assert_twins(optimizer, theirs):
    tensors = [tensor for group in theirs.param_groups for tensor in group["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param, ax, tensor in zip(params, optimizer.averages, tensors, strict=True):
        assert np.array_equal(param, tensor.detach().numpy())
        if tensor in theirs.state:
            assert np.array_equal(ax, theirs.state[tensor]["ax"].numpy())
        else:
            assert np.array_equal(ax, param)


@asks_early
def test_a_param_without_grad_keeps_its_own_schedule(double_scalars):
    params = make_params()
    _, theirs = torch_twin(params, **OPTIONS)
    optimizer = ArrayASGD(params, **OPTIONS)
    for k in range(30):
        grads = make_grads(k)
        for i in range(3):
            # The last param joins at step 10, the second skips every third.
            if (i == 1 and k % 3 == 0) or (i == 2 and k < 10):
                grads[i] = None
        optimizer.step(grads)
        step_torch(theirs, grads)
        assert_twins(optimizer, theirs)
    assert optimizer.state_dict()["step"].tolist() == [30, 20, 20]


@asks_early
def test_groups_hyperparameters_changed_between_steps_and_a_group_added(double_scalars):
    params = make_params()
    optimizer = ArrayASGD(
        [{"params": params[0], "lr": 0.5, "maximize": True}, {"params": params[1:2], "t0": 2}],
        **OPTIONS,
    )
    tensors = [torch.tensor(param, requires_grad=True) for param in params]
    theirs = torch.optim.ASGD(
        [{"params": tensors[0], "lr": 0.5, "maximize": True}, {"params": tensors[1:2], "t0": 2}],
        foreach=False,
        **OPTIONS,
    )
    for k in range(30):
        for groups in (optimizer.param_groups, theirs.param_groups):
            if k == 0:
                groups[0]["lr"] = 0.4  # before the first step it acts at once
            if k == 5:
                groups[0]["lr"] = 0.05
                groups[1]["weight_decay"] = 0.3
            if k == 12:
                groups[1]["maximize"] = True
        if k == 9:
            optimizer.add_param_group({"params": params[2], "lambd": 0.0})
            theirs.add_param_group({"params": tensors[2], "lambd": 0.0})
        grads = make_grads(k)[: 3 if k >= 9 else 2]
        optimizer.step(grads)
        step_torch(theirs, grads)
        assert_twins(optimizer, theirs)


@asks_early
def test_one_array_alone_and_mixed_dtypes():
    single = np.ones(4)
    ArrayASGD(single, lr=0.5, lambd=0.0).step(np.ones(4))
    assert single.tolist() == [0.5] * 4

    params = [np.ones(2, np.float32), torch.ones(2, dtype=torch.float64)]
    optimizer = ArrayASGD(params, lr=0.5, lambd=0.0)
    optimizer.step([np.ones(2, np.float32), torch.ones(2, dtype=torch.float64)])
    assert [type(ax) for ax in optimizer.averages] == [np.ndarray, torch.Tensor]
    for array in (*params, *optimizer.averages):
        assert array.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.asfortranarray(np.ones((2, 3))),
        lambda: np.ones((2, 3, 4)).transpose(1, 2, 0),
        lambda: torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        lambda: torch.ones(100)[10:20],
    ],
    ids=["fortran", "permuted", "channels_last", "view"],
)
def test_averages_have_the_layout_of_their_params(make):
    param = make()
    optimizer = ArrayASGD(param, t0=-1)  # averages from the first step on
    optimizer.step(param * 1)
    (ax,) = optimizer.averages
    assert type(ax) is type(param)
    assert ax.shape == param.shape
    if isinstance(param, torch.Tensor):
        assert ax.stride() == param.stride()
        assert ax.untyped_storage().nbytes() == param.numel() * param.itemsize
    else:
        assert ax.strides == param.strides
    assert (ax == param).all()
    optimizer.step(param * 1)
    assert (optimizer.averages[0] == ax).all()
    assert not (ax == param).all()


def test_the_list_of_averages_is_the_callers_own():
    optimizer = ArrayASGD(make_params())
    optimizer.averages.clear()
    assert len(optimizer.averages) == 3


def test_averages_before_the_first_step_are_the_params():
    params = make_params()
    averages = ArrayASGD(params).averages
    for param, ax in zip(params, averages, strict=True):
        assert np.array_equal(param, ax)
        assert not np.shares_memory(param, ax)


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 6, 7, 20])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_goes_on_from_a_saved_state_with_the_same_bits(through, stop, library):
    def start():
        params = [param.T for param in make_params(np.float32)]
        if library == "torch":
            params = [torch.from_numpy(param.copy(order="K")) for param in params]
        groups = [{"params": params[:2], "lr": 0.3}, {"params": params[2:], "maximize": True}]
        return params, ArrayASGD(groups, **OPTIONS)

    def steps(optimizer, *bounds):
        for k in range(*bounds):
            grads = [grad.T for grad in make_grads(k, np.float32)]
            if library == "torch":
                grads = [torch.from_numpy(grad) for grad in grads]
            optimizer.step(grads)

    straight_params, straight = start()
    steps(straight, 30)
    params, first = start()
    steps(first, stop)
    state = through(first.state_dict())

    resumed_params, resumed = start()
    for mine, saved in zip(resumed_params, params, strict=True):
        mine[...] = saved
    resumed.param_groups[0]["lr"] = 123.0
    resumed.load_state_dict(state)
    steps(resumed, stop, 30)

    for mine, right in zip(
        (*resumed_params, *resumed.averages), (*straight_params, *straight.averages), strict=True
    ):
        assert (mine == right).all()
    for name, value in straight.state_dict().items():
        assert np.array_equal(resumed.state_dict()[name], value)


def test_a_saved_state_is_a_snapshot_and_a_loaded_one_is_not_shared():
    params = make_params()
    optimizer = ArrayASGD(params, **OPTIONS)
    optimizer.step(make_grads(0))
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    optimizer.load_state_dict(state)
    for k in range(1, 9):
        optimizer.step(make_grads(k))
    assert all(np.array_equal(state[name], before[name]) for name in before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_the_optimizer_itself_can_be_copied_and_pickled(copied):
    params = make_params()
    optimizer = ArrayASGD(params, **OPTIONS)
    optimizer.step(make_grads(0))
    other_params, other = copied((params, optimizer))
    for k in range(1, 9):
        optimizer.step(make_grads(k))
        other.step(make_grads(k))
    for mine, right in zip(other_params, params, strict=True):
        assert np.array_equal(mine, right)
        assert not np.shares_memory(mine, right)


def snapshot(optimizer):
    params = [param for group in optimizer.param_groups for param in group["params"]]
    hyperparameters = [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    return copy.deepcopy((params, optimizer.state_dict(), hyperparameters))


def assert_unchanged(optimizer, before):
    params, state, hyperparameters = snapshot(optimizer)
    assert all(np.array_equal(new, old) for new, old in zip(params, before[0], strict=True))
    assert state.keys() == before[1].keys()
    assert all(np.array_equal(state[name], before[1][name]) for name in state)
    assert hyperparameters == before[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("eta"), r"missing \['eta'\], unknown \[\]"),
        (lambda s: s.update(momentum=0), r"missing \[\], unknown \['momentum'\]"),
        (lambda s: s.pop("ax.2"), r"does not fit 3 params in 1 groups: missing \['ax\.2'\]"),
        (
            lambda s: s.update(step=s["step"][:2]),
            r"state_dict\['step'\]: shape \(2,\) does not match the optimizer's \(3,\)",
        ),
        (
            lambda s: s.update({"ax.1": np.zeros(6)}),
            r"state_dict\['ax\.1'\]: shape \(6,\) does not match the optimizer's \(5,\)",
        ),
        (
            lambda s: s.update({"ax.1": np.zeros(5, np.complex128)}),
            r"state_dict\['ax\.1'\]: dtype complex128 does not match the optimizer's float64",
        ),
        (
            lambda s: s.update({"ax.1": np.zeros(5, np.int64)}),
            r"state_dict\['ax\.1'\]: dtype int64 does not match the optimizer's float64",
        ),
        (
            lambda s: s.update(step=s["step"] + 0.5),
            r"state_dict\['step'\]: dtype float64 does not match the optimizer's int64",
        ),
        (lambda s: s.update(step=-s["step"]), r"Invalid state_dict\['step'\]\[0\]: -1"),
        (  # which is not what would be saved again
            lambda s: s.update(step=np.full(len(s["step"]), 2**63 - 1)),
            r"Invalid state_dict\['step'\]\[0\]: 9223372036854775807",
        ),
        (lambda s: s.update(eta=s["eta"] * np.nan), r"Invalid state_dict\['eta'\]\[0\]: nan"),
        (lambda s: s.update(mu=s["mu"] * 2), r"Invalid state_dict\['mu'\]\[0\]: 2"),
        (lambda s: s.update(lr=-s["lr"]), "Invalid learning rate: -0.2"),
        (
            lambda s: s.update(group=s["group"] + 1),
            r"state_dict\['group'\]: the params are grouped",
        ),
    ],
)
def test_refuses_a_state_that_does_not_fit(change, message):
    optimizer = ArrayASGD(make_params(), **OPTIONS)
    optimizer.step(make_grads(0))
    before = snapshot(optimizer)
    state = optimizer.state_dict()
    for i in range(3):
        state[f"ax.{i}"] += 1
    change(state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        (lambda: make_grads(1)[:2], ValueError, "^grads: got 2 arrays for 3 params"),
        (
            lambda: [*make_grads(1)[:2], np.ones(1)],
            ValueError,
            r"^grads\[2\]: shape \(1,\) does not match params\[2\] of shape \(\)$",
        ),
        (
            lambda: make_grads(1, np.float32),
            ValueError,
            r"^grads\[0\]: dtype float32 does not match params\[0\] of dtype float64$",
        ),
        (lambda: [*make_grads(1)[:2], "x"], TypeError, r"^grads\[2\]: str is not an array"),
        (lambda: np.ones(3), ValueError, "^grads: got 1 arrays for 3 params"),
        (lambda: None, TypeError, "^grads: expected an array or a sequence of arrays"),
        (lambda: [1.0, 2.0], TypeError, "^grads: got 2 elements of type float for 3 params"),
    ],
)
@pytest.mark.parametrize("started", [0, 1], ids=["fresh", "started"])
def test_a_refused_step_changes_nothing(grads, error, message, started):
    first, *rest = make_params()
    optimizer = ArrayASGD([{"params": first}, {"params": rest}], **OPTIONS)
    for k in range(started):
        optimizer.step(make_grads(k))
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step(grads())
    assert_unchanged(optimizer, before)


def test_a_grad_that_is_an_average_is_refused_under_both_names():
    optimizer = ArrayASGD([np.ones(3), np.ones(3)], t0=-1)  # averages from the first step on
    optimizer.step([np.ones(3), np.ones(3)])
    with pytest.raises(ValueError, match=r"^averages\[0\]: shares memory with grads\[0\]"):
        optimizer.step([optimizer.averages[0], np.ones(3)])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", -1.0, r"Invalid learning rate: -1\.0"),
        ("lambd", -1.0, "Invalid lambd"),
        ("alpha", -1.0, "Invalid alpha"),
        ("t0", np.inf, "Invalid t0"),
        ("t0", -np.inf, "Invalid t0"),
        ("t0", np.nan, "Invalid t0"),
        ("lr", np.nan, "Invalid learning rate: nan"),
        ("lr", np.inf, "Invalid learning rate: inf"),
        ("weight_decay", -1e-9, "Invalid weight_decay value"),
    ],
)
def test_hyperparameters_are_checked_whenever_they_may_have_changed(name, value, message):
    with pytest.raises(ValueError, match=message):
        ArrayASGD(make_params(), **{name: value})
    with pytest.raises(ValueError, match=message):
        ArrayASGD([{"params": make_params(), name: value}])
    optimizer = ArrayASGD([{"params": make_params()}, {"params": np.ones(2)}])
    before = snapshot(optimizer)
    sound = optimizer.param_groups[1][name]
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match=r"^param_groups\[1\]: " + message):
        optimizer.step([*make_grads(0), np.ones(2)])
    optimizer.param_groups[1][name] = sound
    assert_unchanged(optimizer, before)


def test_a_missing_hyperparameter_is_named():
    optimizer = ArrayASGD(np.ones(2))
    del optimizer.param_groups[0]["t0"]
    with pytest.raises(ValueError, match=r"^param_groups\[0\]: missing \['t0'\]$"):
        optimizer.step(np.ones(2))


def test_hyperparameters_of_other_types_are_saved_as_what_they_stand_for():
    optimizer = ArrayASGD(np.ones(2), lr=0.5)
    good = optimizer.state_dict()
    optimizer.param_groups[0].update(lr=Fraction(1, 4), maximize=1, t0=3)
    state = optimizer.state_dict()
    assert (state["lr"], state["maximize"], state["t0"]) == (0.25, True, 3.0)
    assert {state[name].dtype for name in good} == {good[name].dtype for name in good}
    optimizer.load_state_dict(good)
    assert optimizer.param_groups[0]["lr"] == 0.5


@asks_early
def test_a_library_without_copies_gets_averages_of_numpy():
    class Bare:
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **options):
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    param = np.ones((2, 3)).T
    optimizer = ArrayASGD(Bare(param), lr=0.5, lambd=0.0)
    optimizer.step(np.ones((2, 3)).T)
    assert (param == 0.5).all()
    assert np.array_equal(optimizer.averages[0], param)


def test_a_group_that_grows_while_memory_is_lent_is_not_read_again():
    optimizer = ArrayASGD([{"params": np.ones(2)}, {"params": np.ones(2)}], lr=0.5, lambd=0.0)

    class Grows:
        def __dlpack__(self, **options):
            optimizer.param_groups[1]["params"].extend(np.ones(2) for _ in range(50))
            return np.ones(2).__dlpack__(**options)

    optimizer.step([Grows(), np.ones(2)])
    for call in (lambda: optimizer.step([np.ones(2), np.ones(2)]), optimizer.state_dict):
        with pytest.raises(RuntimeError, match="holds 52 params, but the optimizer was given 2"):
            call()
    del optimizer.param_groups[1]["params"][1:]
    assert optimizer.state_dict()["step"].tolist() == [1, 1]


def test_a_state_that_is_no_mapping_is_refused():
    with pytest.raises(TypeError, match=r"^state_dict: expected a mapping, got NoneType$"):
        ArrayASGD(np.ones(2)).load_state_dict(None)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (list, ValueError, "^params: expected at least one array, got none$"),
        (lambda: [np.ones(2), [1.0]], TypeError, r"^params\[1\]: list is not an array"),
        (lambda: [p := np.ones(2), p], ValueError, r"^params\[1\]: is params\[0\] again"),
        (
            lambda: [{"params": (p := np.ones(2))}, {"params": p}],
            ValueError,
            r"^params\[1\]: is params\[0\] again",
        ),
        (lambda: [np.ones(2, int)], ValueError, r"^params\[0\]: dtype int64 is not supported"),
        (
            lambda: [torch.ones(2, requires_grad=True)],
            BufferError,
            r"^params\[0\]: it requires grad",
        ),
        (
            lambda: [{"params": np.ones(2), "momentum": 0.9}],
            ValueError,
            r"^param_groups\[0\]: unknown keys \['momentum'\]; expected 'params' and any of",
        ),
        (lambda: [{"lr": 0.1}], TypeError, r"^param_groups\[0\]: expected a dict with the key"),
        (
            lambda: [{"params": np.ones(2)}, np.ones(2)],
            TypeError,
            r"^param_groups\[1\]: expected a dict with the key",
        ),
        (lambda: 3.0, TypeError, "^params: expected an array or a sequence of arrays, got float$"),
    ],
)
def test_refuses_params_that_could_not_be_updated(params, error, message):
    with pytest.raises(error, match=message):
        ArrayASGD(params())


def test_a_refused_group_changes_nothing():
    params = make_params()
    optimizer = ArrayASGD(params, **OPTIONS)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"^params\[3\]: is params\[0\] again"):
        optimizer.add_param_group({"params": params[0]})
    assert_unchanged(optimizer, before)


def test_params_put_into_a_group_by_hand_are_refused():
    optimizer = ArrayASGD(make_params())
    optimizer.param_groups[0]["params"].append(np.ones(2))
    with pytest.raises(RuntimeError, match="add params with add_param_group"):
        optimizer.step([*make_grads(0)])


def test_a_param_may_be_replaced_by_another_array():
    """Its address is looked up in each step."""
    param = np.ones(3)
    optimizer = ArrayASGD(param, lr=0.5, lambd=0.0)
    optimizer.step(np.ones(3))
    moved = optimizer.param_groups[0]["params"][0] = param.copy()
    optimizer.step(np.ones(3))
    assert param.tolist() == [0.5] * 3
    assert moved.tolist() == [0.0] * 3


@pytest.mark.heavy
@asks_early
def test_an_interrupt_finds_arrays_and_scalars_of_one_step():
    params = np.ones(4_000_000), np.ones(4_000_000)
    optimizer = ArrayASGD(params, lr=0.5, lambd=0.0)
    grads = [np.ones_like(param) for param in params]
    get_num_threads()  # looks for a runtime, which lets other threads run
    started = threading.Event()

    def step_on():  # on a busy machine, the other thread may miss the first pass
        while True:
            optimizer.step(grads)

    def interrupt():
        started.wait()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    # Ignored where the tests run in the background of a script.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    interval = sys.getswitchinterval()
    # With so long an interval, the other thread only runs where the pass itself lets go.
    sys.setswitchinterval(100)
    try:
        started.set()
        with pytest.raises(KeyboardInterrupt):
            step_on()
    finally:
        sys.setswitchinterval(interval)
        thread.join()
        signal.signal(signal.SIGINT, handler)
    steps = optimizer.state_dict()["step"]
    assert steps[0] == steps[1] > 0
    value = 1 - 0.5 * steps[0]
    assert all((array == value).all() for array in (*params, *optimizer.averages))


def test_repr_lists_the_groups():
    assert repr(ArrayASGD([np.ones(2), np.ones(3)], t0=5)) == (
        "ArrayASGD (\n    group 0: 2 params\n        lr: 0.01\n        lambd: 0.0001\n"
        "        alpha: 0.75\n        t0: 5.0\n        weight_decay: 0.0\n"
        "        maximize: False\n        lr_schedule: torch\n        average_every: 1\n"
        "        averaging: mean\n)"
    )


def test_an_average_that_numpy_cannot_hold_is_named_when_saved():
    optimizer = ArrayASGD([np.ones(2), torch.ones(3, dtype=torch.bfloat16)])
    optimizer.step([np.ones(2), torch.ones(3, dtype=torch.bfloat16)])
    with pytest.raises(
        TypeError, match=r"^averages\[1\]: no NumPy array can hold it .*Unsupported"
    ):
        optimizer.state_dict()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_the_optimizer_go_on_alike(way):
    optimizer = ArrayASGD([np.ones(3), np.ones(4)], lr=0.1, t0=0)
    grads = [np.arange(3.0), np.arange(4.0)]
    optimizer.step(grads)
    twin = way(optimizer)
    for _ in range(4):
        optimizer.step(grads)
        twin.step(grads)
    for ours, theirs in zip(optimizer.averages, twin.averages, strict=True):
        assert ours is not theirs
        assert np.array_equal(ours, theirs)
        assert not np.array_equal(ours, np.ones(len(ours)))


def test_a_step_that_comes_into_another_threads_is_refused_rather_than_lost():
    """Those that are made are counted, and move the params."""
    param, grad = np.zeros(300_000), np.ones(300_000)
    optimizer = ArrayASGD([param], lr=1.0, lambd=0.0)
    made = steps_made_by_threads(lambda: optimizer.step([grad]))
    assert optimizer.state_dict()["step"] == made
    np.testing.assert_array_equal(param, -float(made))


def test_a_copy_made_in_a_step_can_step():
    copies = []
    param = np.zeros(3)
    optimizer = ArrayASGD([param], lr=1.0, lambd=0.0)

    class Grads(list):
        def __iter__(self):
            copies.append(copy.deepcopy(optimizer))
            return super().__iter__()

    optimizer.step(Grads([np.ones(3)]))
    copies[0].step([np.ones(3)])
    assert copies[0].state_dict()["step"] == 1
    optimizer.step([np.ones(3)])
    assert optimizer.state_dict()["step"] == 2
