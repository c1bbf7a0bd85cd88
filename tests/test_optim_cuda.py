"""The torch optimizer over params on CUDA devices, whose memory here is the host's: see fake_cuda.

torch.optim.ASGD(foreach=False) on the CPU is the oracle, whose bits the device's must be.
"""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import fake_cuda
import pytest
import torch
from device_twins import Twins, on, params_of, same
from torch.optim.asgd import asgd as torch_asgd
from twins import NAMES

from asgd_fast import ASGD
from asgd_fast._torch import conversions, fallback
from asgd_fast.cuda import device as device_module
from asgd_fast.cuda.launches import HEADER


@pytest.fixture
def gpu(monkeypatch):
    with fake_cuda.installed(monkeypatch) as driver:
        yield driver


OPTIONS = {
    "usual": {"t0": 3},
    "copy": {},
    "all": {"t0": 2, "weight_decay": 0.1, "maximize": True, "lambd": 0.1, "alpha": 0.5},
}
SCALARS = {"host": {}, "device": {"capturable": True}}


@pytest.mark.parametrize("looks", [False, True], ids=["sealed", "looked at"])
@pytest.mark.parametrize("where", SCALARS.values(), ids=SCALARS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_a_run_has_torchs_bits(gpu, dtype, options, where, looks):
    params = params_of((5, 3), (1000,), (), (2, 3, 4, 4), (0, 3), dtype=dtype)
    params[3].data = params[3].data.to(memory_format=torch.channels_last)
    params[0].data = params[0].data.t()
    twins = Twins(params, lr=0.1, **options, **where)
    for k in range(12):
        twins.step({k % 5} if k > 2 else ())
        twins.check()
        if looks:
            twins.look()
    assert {launch.kind.device_scalars for launch in gpu.launches} == {bool(where)}
    assert twins.waits == 0


def test_many_params_make_one_launch(gpu):
    twins = Twins(params_of(*[(i % 7 + 1,) for i in range(300)]), t0=1)
    twins.run(4)
    assert [int(launch.words[0]) for launch in gpu.launches] == [300] * 4


def test_several_groups_and_a_scheduler(gpu):
    def groups(params):
        return [{"params": params[:2], "lr": 0.3}, {"params": params[2:], "weight_decay": 0.1}]

    twins = Twins(params_of((3,), (4,), (5,)), groups=groups, t0=2, lr=0.1)
    schedulers = [
        torch.optim.lr_scheduler.ExponentialLR(x, 0.7) for x in (twins.ours, twins.theirs)
    ]
    for _ in range(8):
        twins.run(1)
        for scheduler in schedulers:
            scheduler.step()
    assert len(gpu.launches) == 8


def test_params_on_all_devices(gpu):
    twins = Twins(params_of(*[(100,)] * 6), devices=("cuda:1", "cpu", "cuda:0"), t0=2)
    twins.run(6)
    assert sorted({launch.device for launch in gpu.launches}) == [0, 1]
    assert len(gpu.launches) == 12


def test_half_types_are_rounded_once(gpu):
    for dtype in (torch.float16, torch.bfloat16):
        here = params_of((1000,), dtype=dtype)
        there = [on(p, "cuda") for p in here]
        optimizers = [ASGD(params, t0=1, lr=0.1) for params in (here, there)]
        for _ in range(6):
            here[0].grad = torch.randn_like(here[0])
            there[0].grad = here[0].grad.cuda()
            for optimizer in optimizers:
                optimizer.step()
            same(there[0], here[0])
            same(optimizers[1].state[there[0]]["ax"], optimizers[0].state[here[0]]["ax"])


@pytest.mark.parametrize("averaging", ["mean", ("ema", 0.5), ("polynomial", 2)], ids=str)
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "device"])
def test_own_options_are_those_of_the_cpu(gpu, capturable, averaging):
    """Wide averages of every second iterate, with weights, and lr that acts at once."""
    here = params_of((1000,), (3, 4))
    there = [on(p, "cuda") for p in here]
    options = {"t0": 2, "lr": 0.1, "average_dtype": torch.float64, "lambd": 0.1}
    options |= {"lr_schedule": "current", "average_every": 2, "averaging": averaging}
    one, other = ASGD(here, **options), ASGD(there, capturable=capturable, **options)
    for k in range(10):
        if k == 6:
            one.start_averaging()
            other.start_averaging()
        for p, q in zip(here, there, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.cuda()
        one.step()
        other.step()
        for p, q in zip(here, there, strict=True):
            same(q, p)
            for name in NAMES:
                assert one.state[p][name].equal(other.state[q][name].cpu())


# The state


def test_scalars_are_the_hosts_until_the_device_must_have_them(gpu):
    twins = Twins(params_of((5,), (6,)))
    twins.run(2)
    for entry in twins.ours.state.values():
        assert [entry[name].device.type for name in NAMES] == ["cpu"] * 3 + ["cuda"]
    twins = Twins(params_of((5,), (6,)), capturable=True)
    twins.run(2)
    for entry in twins.ours.state.values():
        assert {entry[name].device for name in NAMES} == {torch.device("cuda", 0)}


def test_a_lazy_average_does_not_exist_before_it_begins(gpu):
    twins = Twins(params_of((50,)), t0=4)
    for k in range(1, 9):
        twins.run(1)
        average = int(gpu.launches[-1].words[HEADER + 2])
        assert (average == 0) == (k < 6)  # whose iterate is the first of the average
    assert twins.ours.state[twins.params[0]]["ax"].data_ptr() == average


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "device"])
def test_an_average_that_has_not_begun_is_answered_with_a_copy(gpu, capturable):
    twins = Twins(params_of((50,)), capturable=capturable, t0=5)
    (param,) = twins.params
    twins.run(2)
    twins.ours.state[param]["ax"].zero_()
    twins.run(8)


@pytest.mark.parametrize("options", [{"lazy_average": False}, {"capturable": True}], ids=str)
def test_an_average_that_is_not_lazy(gpu, options):
    twins = Twins(params_of((50,)), **options)
    twins.run(2)
    average = int(gpu.launches[-1].words[HEADER + 2])
    assert twins.ours.state[twins.params[0]]["ax"].data_ptr() == average


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "device"])
@pytest.mark.parametrize(
    "devices", [("cpu", "cuda"), ("cuda", "cpu"), ("cuda:0", "cuda:1")], ids=str
)
def test_a_checkpoint_goes_between_devices(gpu, devices, capturable):
    torch.manual_seed(0)
    options = {"t0": 2, "lr": 0.1}
    start, goal = devices
    twins = Twins(params_of((5, 3), (7,)), devices=(start,), **options)
    twins.run(5)
    checkpoint = copy.deepcopy(_moved(twins.ours.state_dict(), "cpu"))
    twins.params = [on(p, goal) for p in twins.params]
    twins.ours = ASGD(twins.params, **options)
    twins.ours.load_state_dict(checkpoint)
    twins.ours.param_groups[0]["capturable"] = capturable and goal != "cpu"
    twins.run(5)
    for param, entry in twins.ours.state.items():
        assert entry["ax"].device == param.device
        assert entry["eta"].is_cuda == (capturable and goal != "cpu")


def _moved(state_dict, device):
    """What torch.load(map_location=device) makes of a checkpoint."""
    entries = {
        i: {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in entry.items()}
        for i, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": entries}


def test_a_checkpoint_goes_to_torch_on_the_device(gpu):
    torch.manual_seed(0)
    twins = Twins(params_of((5, 3), (7,)), t0=2)
    twins.run(5)
    params = [on(p.detach(), "cuda").requires_grad_() for p in twins.params]
    theirs = torch.optim.ASGD(params, t0=2, foreach=False)
    theirs.load_state_dict(copy.deepcopy(_moved(twins.ours.state_dict(), "cpu")))
    theirs.param_groups[0]["foreach"] = False  # which rounds in other places
    for _ in range(3):
        twins.run(1)
        for p, q in zip(params, twins.params, strict=True):
            p.grad = q.grad.clone()
        theirs.step()
        for p, q in zip(params, twins.params, strict=True):
            same(p, q.cpu())


def test_moving_a_model_while_it_trains(gpu):
    twins = Twins(params_of((5, 3)), devices=("cpu",), t0=6)
    for device in ("cpu", "cuda:0", "cuda:1", "cpu"):
        for p in twins.params:
            p.data = p.data.to(device)
            p.grad = None
        if entry := twins.ours.state.get(twins.params[0]):
            entry["ax"] = entry["ax"].to(device)
        twins.run(3)


@pytest.mark.parametrize("t0", [1, 2])
def test_moving_a_param_while_averages_begin(gpu, t0):
    twins = Twins(params_of((5, 3)), devices=("cpu",), t0=t0)
    twins.run(2)
    twins.params[0].data = twins.params[0].data.cuda()
    twins.run(3)
    assert len(gpu.launches) == 3


def test_moving_a_param_after_its_checkpoint_was_loaded(gpu):
    one, other = (Twins(params_of((5, 3)), devices=("cpu",), foreach=False) for _ in range(2))
    one.run(2)
    for optimizer, source in ((other.ours, one.ours), (other.theirs, one.theirs)):
        optimizer.load_state_dict(source.state_dict())
    for mine, params in ((one.params, other.params), (one.theirs_params, other.theirs_params)):
        params[0].data.copy_(mine[0].data)
    other.params[0].data = other.params[0].data.cuda()
    for _ in range(3):
        other.theirs_params[0].grad = torch.randn(5, 3)
        other.params[0].grad = other.theirs_params[0].grad.cuda()
        other.ours.step()
        other.theirs.step()
        same(other.params[0], other.theirs_params[0])


def test_moving_a_param_away_from_its_scalars(gpu):
    """They are found again, and put where it is."""
    twins = Twins(params_of((5, 3)), t0=2, capturable=True)
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        (param,) = twins.params
        param.grad = None
        param.data = param.data.to(device)
        if param in twins.ours.state:
            entry = twins.ours.state[param]
            entry["ax"] = entry["ax"].to(device)
            for name in ("step", "eta", "mu"):
                entry[name] = entry[name].to(device)
        twins.run(3)
        assert {twins.ours.state[param][name].device for name in NAMES} == {param.device}
        assert gpu.launches[-1].device == param.device.index
    # Where it alone has moved, torch's function says so, or makes the step.
    param.grad = None
    param.data = param.data.cpu()
    twins.ours.param_groups[0]["capturable"] = False
    twins.ours.state[param]["ax"] = twins.ours.state[param]["ax"].cpu()
    twins.run(3)
    assert twins.ours.state[param]["eta"].device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float16])
def test_a_learning_rate_of_another_dtype(gpu, dtype):
    param = torch.nn.Parameter(torch.zeros(4, device="cuda"))
    lr = torch.tensor(1, dtype=dtype, device="cuda")
    optimizer = ASGD([param], lr=lr, capturable=True, lambd=0.0)
    for k in range(1, 4):
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert param.tolist() == [-k] * 4


def test_a_learning_rate_on_another_device(gpu):
    lr = torch.tensor(0.1, device="cuda:1")
    twins = Twins(params_of((5, 3)), devices=("cuda:0",), capturable=True)
    twins.ours.param_groups[0]["lr"] = lr
    n = len(gpu.launches)
    with pytest.raises(RuntimeError, match="same device"):
        twins.step()
    assert len(gpu.launches) == n


def test_capturable_may_be_switched_on_and_off(gpu):
    twins = Twins(params_of((5, 3)), t0=2)
    for capturable in (False, True, False):
        twins.ours.param_groups[0]["capturable"] = capturable
        twins.run(3)
        assert gpu.launches[-1].kind.device_scalars == capturable


def test_averaged_parameters(gpu):
    for options in ({}, {"capturable": True}, {"average_dtype": torch.float64}):
        twins = Twins(params_of((5, 3), (1000,)), t0=1, **options)
        for _ in range(5):
            twins.step()
        averages = [twins.ours.state[p]["ax"].to(p.dtype) for p in twins.params]
        averages = [ax.clone() for ax in averages]
        before = [p.detach().clone() for p in twins.params]
        with twins.ours.averaged_parameters():
            for p, ax in zip(twins.params, averages, strict=True):
                assert torch.equal(p, ax)
                assert not torch.equal(p, before[0]) if p.shape == before[0].shape else True
        for p, q in zip(twins.params, before, strict=True):
            assert torch.equal(p, q)
        targets = [torch.zeros_like(p) for p in twins.params]
        twins.ours.copy_averages_to(targets)
        assert all(torch.equal(x, y) for x, y in zip(targets, averages, strict=True))
        twins.step()


def test_an_interrupted_exchange_is_undone(gpu):
    twins = Twins(params_of((5, 3), (1000,)), t0=1)
    for _ in range(5):
        twins.step()
    before = [p.detach().clone() for p in twins.params]
    with pytest.raises(KeyboardInterrupt), twins.ours.averaged_parameters():
        raise KeyboardInterrupt
    assert all(torch.equal(p, q) for p, q in zip(twins.params, before, strict=True))
    gpu.fails = True
    with pytest.raises(RuntimeError, match="CUDA: "), twins.ours.averaged_parameters():
        pass
    gpu.fails = False


# Scalars on the device


def test_a_learning_rate_on_the_device(gpu):
    lr = torch.tensor(0.1, dtype=torch.float64, device="cuda")
    twins = Twins(params_of((5, 3)), t0=2, capturable=True, lr=0.1)
    twins.ours.param_groups[0]["lr"] = lr
    for k in range(8):
        twins.run(1)
        assert twins.waits == (k == 0)  # to make the state
        lr.fill_(0.1 / (k + 1))
        twins.theirs.param_groups[0]["lr"] = 0.1 / (k + 1)


def test_double_scalars(gpu, double_scalars):
    twins = Twins(params_of((5, 3), dtype=torch.float64), t0=2, capturable=True, lambd=0.3)
    twins.run(8)
    assert twins.ours.state[twins.params[0]]["eta"].dtype == torch.float64


# What is refused


def _missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    return ImportError, r"need the packages of the cuda extra; .* pip install '\.\[cuda\]'$"


def _no_driver(monkeypatch):
    def init(flags):
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    _bindings(monkeypatch, init)
    return RuntimeError, "the CUDA driver was not found: Failed to dlopen libcuda.so.1$"


def _broken_driver(monkeypatch):
    status = SimpleNamespace(name="CUDA_ERROR_NO_DEVICE")
    _bindings(monkeypatch, lambda flags: (status,))
    return RuntimeError, "the CUDA driver does not work: cuInit returned CUDA_ERROR_NO_DEVICE$"


def _bindings(monkeypatch, init):
    functions = SimpleNamespace(cuInit=init, CUresult=SimpleNamespace(CUDA_SUCCESS=None))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=functions))


@pytest.mark.parametrize("fault", [_missing, _no_driver, _broken_driver])
def test_what_is_not_installed_is_named(gpu, monkeypatch, fault):
    twins = Twins(params_of((5,)))
    monkeypatch.setattr(device_module, "driver", REAL_DRIVER)
    error, message = fault(monkeypatch)
    before = twins.params[0].detach().clone()
    twins.params[0].grad = torch.ones(5, device="cuda")
    with pytest.raises(error, match=message):
        twins.ours.step()
    assert torch.equal(before, twins.params[0])


REAL_DRIVER = device_module.driver


def test_params_that_share_memory_go_to_torch(gpu):
    memory = torch.randn(9, device="cuda")
    params = [torch.nn.Parameter(memory[:5]), torch.nn.Parameter(memory[4:])]
    optimizer = ASGD(params, t0=1)
    copies = torch.nn.Parameter(memory.cpu()[:5].clone())
    assert params[0].data_ptr() == memory.data_ptr()
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert gpu.launches == []
    assert not torch.equal(params[0].cpu(), copies)


@pytest.mark.parametrize("takes_them", [False, True])
def test_torchs_foreach_gets_scalars_that_it_takes(gpu, monkeypatch, takes_them):
    """Those of the host, for params on a GPU, since torch 2.7."""
    asked = []

    def recorded(*args, foreach, **options):
        asked.append(foreach)
        return torch_asgd(*args, foreach=foreach, **options)

    monkeypatch.setattr(fallback, "FOREACH_TAKES_HOST_SCALARS", takes_them)
    monkeypatch.setattr(fallback, "torch_asgd", recorded)
    for device in ("cuda", "cpu"):
        param = torch.nn.Parameter(torch.zeros(4, device=device))
        param.grad = torch.ones(1, device=device).expand(4)
        ASGD([param]).step()
    assert asked == [None if takes_them else False, None]


def test_gradients_of_another_layout_are_converted(gpu):
    twins = Twins(params_of((4, 6)), t0=1)
    for _ in range(4):
        theirs = twins.theirs_params[0]
        theirs.grad = torch.randn(6, 4).t()
        twins.params[0].grad = on(theirs.grad, "cuda")
        twins.ours.step()
        twins.theirs.step()
        twins.check()
    assert len(gpu.launches) == 4


def test_autograd_is_told(gpu):
    twins = Twins(params_of((5,)), t0=1)
    twins.run(3)
    before = twins.params[0]._version
    twins.run(1)
    assert twins.params[0]._version == before + 1


def test_a_state_for_another_kind_of_gpu_is_made_as_torch_makes_it(gpu, monkeypatch):
    """Of AMD's devices, which torch calls cuda too, no engine knows."""
    monkeypatch.setattr(conversions, "_DEVICES", ("cpu",))
    twins = Twins(params_of((5, 3)), t0=2, foreach=False)
    for _ in range(5):
        twins.theirs_params[0].grad = torch.randn(1).expand(5, 3)
        twins.params[0].grad = twins.theirs_params[0].grad[:1, :1].cuda().expand(5, 3)
        twins.ours.step()
        twins.theirs.step()
        twins.check()
    assert gpu.launches == []
    assert {twins.ours.state[twins.params[0]][name].device.type for name in NAMES} == {"cuda"}


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "device"])
def test_torchs_function_finds_scalars_where_it_looks(gpu, capturable):
    """A gradient that repeats its memory is left to it."""
    options = {"lambd": 0.0, "foreach": False}  # in whose eta there is no power to be rounded
    twins = Twins(params_of((5,), (3,)), t0=1, capturable=capturable, **options)
    for _ in range(4):
        twins.theirs_params[0].grad = torch.randn(1).expand(5)
        twins.theirs_params[1].grad = torch.randn(3)
        twins.params[0].grad = twins.theirs_params[0].grad[:1].cuda().expand(5)
        twins.params[1].grad = twins.theirs_params[1].grad.cuda()
        twins.ours.step()
        twins.theirs.step()
        twins.check()
    assert len(gpu.launches) == 4
    twins.ours.start_averaging()
    for group in twins.theirs.param_groups:
        group["t0"] = 3
    for entry in twins.theirs.state.values():
        entry["mu"].fill_(1)
    twins.run(4)
