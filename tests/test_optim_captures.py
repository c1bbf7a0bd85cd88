"""Steps on CUDA devices that no host sees: captured into a graph, or skipped by a scaler.

As in test_optim_cuda.py, the devices' memory is the host's.
"""

from __future__ import annotations

import fake_cuda
import pytest
import torch
from device_twins import Graph, Scaler, Twins, on, params_of, same
from twins import NAMES

from asgd_fast import ASGD
from asgd_fast.cuda.launches import HEADER


@pytest.fixture
def gpu(monkeypatch):
    with fake_cuda.installed(monkeypatch) as driver:
        yield driver


# Graphs


def test_a_capture_needs_capturable(gpu):
    twins = Twins(params_of((5,)))
    twins.run(2)
    gpu.captured.add(1)
    twins.params[0].grad = torch.ones(5, device="cuda")
    before, n = twins.params[0].detach().clone(), len(gpu.launches)
    version = twins.params[0]._version
    with pytest.raises(RuntimeError, match=r"captured into a CUDA graph.*capturable=True$"):
        twins.ours.step()
    assert torch.equal(before, twins.params[0])
    assert (len(gpu.launches), twins.params[0]._version) == (n, version)
    gpu.captured.clear()
    twins.run(2)


def test_a_capture_needs_capturable_with_a_scaler_too(gpu):
    """The device has the scalars then; but the host would not know of the graph's steps."""
    twins = Twins(params_of((5,)), t0=20, fused_amp=True)
    twins.run(1)
    (p,) = twins.params
    scaler = Scaler(4.0)
    p.grad = torch.ones(5, device="cuda")
    scaler.step(twins.ours, False)
    gpu.captured.add(1)
    before, n = p.detach().clone(), len(gpu.launches)
    with pytest.raises(RuntimeError, match=r"captured into a CUDA graph.*capturable=True$"):
        scaler.step(twins.ours, False)
    assert torch.equal(before, p)
    assert len(gpu.launches) == n


def test_a_capturable_step_is_captured(gpu):
    twins = Twins(params_of((5,)), capturable=True, t0=1)
    twins.run(2)
    gpu.captured.add(1)
    twins.run(2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr_schedule": "current"},
        {"average_every": 3},
        {"averaging": ("ema", 0.9)},
        {"averaging": ("polynomial", 3), "average_every": 2},
        {"maximize": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("average_dtype", [None, torch.float64], ids=str)
def test_replays_are_steps(gpu, options, average_dtype):
    """From before the first iterate of the averages on, with the bits of as many steps."""
    here = params_of((5, 3), (1000,))
    there = [on(p, "cuda") for p in here]
    options = {"lr": 0.1, "t0": 4, "lambd": 0.1, "average_dtype": average_dtype, **options}
    one = ASGD(here, lazy_average=False, **options)
    other = ASGD(there, capturable=True, **options)
    grads = [torch.randn_like(p) for p in here]
    for p, q, grad in zip(here, there, grads, strict=True):
        p.grad, q.grad = grad.clone(), grad.cuda()
    for _ in range(2):
        one.step()
    other.step()
    with Graph(gpu) as graph:
        other.step()
    assert graph.waits == 0
    for _ in range(12):
        for p, q in zip(here, there, strict=True):
            p.grad.copy_(torch.randn_like(p))
            q.grad.copy_(p.grad)
        one.step()
        graph.replay()
        for p, q in zip(here, there, strict=True):
            same(q, p)
            for name in NAMES:
                same(other.state[q][name], one.state[p][name])


def test_replays_of_a_scalers_step(gpu):
    """The graph reads found_inf and the scale where they are."""
    twins = Twins(params_of((5, 3)), capturable=True, t0=3, lr=0.1, fused_amp=True)
    (ours,), (theirs,) = twins.params, twins.theirs_params
    scaler, found_inf = torch.tensor([8.0], device="cuda"), torch.zeros(1, device="cuda")
    ours.grad = torch.zeros_like(ours)
    twins.ours.grad_scale, twins.ours.found_inf = scaler, found_inf
    found_inf.fill_(1)
    twins.ours.step()
    with Graph(gpu) as graph:
        twins.ours.step()
    for k in range(12):
        scaler.fill_(2.0**k)
        found_inf.fill_(k % 3 == 1)
        theirs.grad = torch.randn_like(theirs) if k % 3 != 1 else None
        ours.grad.copy_(torch.full_like(ours, float("inf")) if k % 3 == 1 else theirs.grad * 2**k)
        graph.replay()
        twins.theirs.step()
        twins.check()


def test_a_captured_step_keeps_its_state_when_averaging_is_started(gpu):
    """A graph has their addresses, and still writes there."""
    twins = Twins(params_of((5,), (6,)), capturable=True)
    own_groups = [{"params": [param]} for param in twins.theirs_params]
    twins.theirs = torch.optim.ASGD(own_groups, foreach=False)
    twins.run(3, skip=lambda k: {1} if k == 1 else ())
    places = _addresses(twins.ours.state)
    for _ in range(2):
        twins.ours.start_averaging()
        for param, group in zip(twins.theirs_params, twins.theirs.param_groups, strict=True):
            group["t0"] = twins.theirs.state[param]["step"].item() - 1
            twins.theirs.state[param]["mu"].fill_(1)
        twins.run(3)
        assert _addresses(twins.ours.state) == places


def _addresses(state):
    return [[entry[name].data_ptr() for name in NAMES] for entry in state.values()]


def test_no_kernel_is_loaded_in_a_capture(gpu):
    """Fewer params than in the step before it would take a smaller one."""
    twins = Twins(params_of(*[(3,)] * 200), capturable=True, t0=1)
    twins.run(2)
    n = len(gpu.loaded)
    gpu.captured.add(1)
    twins.step(skip=range(3, 200))
    twins.check()
    assert len(gpu.loaded) == n


def test_params_without_elements_make_steps(gpu):
    twins = Twins(params_of((0, 3)), capturable=True, t0=1)
    twins.run(3)
    assert twins.ours.state[twins.params[0]]["step"].item() == 3


@pytest.mark.parametrize("after_a_scaler", [False, True])
def test_a_lazy_average_is_not_captured(gpu, after_a_scaler):
    """Its address would be missing in the graph, when averaging begins there."""
    twins = Twins(params_of((5,)), t0=9, fused_amp=True)
    twins.run(2)
    (param,) = twins.params
    if after_a_scaler:
        param.grad = torch.full_like(param, float("inf"))
        Scaler(1.0).step(twins.ours, True)
    twins.ours.param_groups[0]["capturable"] = True
    gpu.captured.add(1)
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match="make a step before the capture"):
        twins.ours.step()
    assert torch.equal(param, before)
    assert "ax" not in twins.ours.state[param]
    gpu.captured.clear()
    twins.run(1)
    average = twins.ours.state[param]["ax"].data_ptr()
    n = len(gpu.launches)
    gpu.captured.add(1)
    twins.run(12)
    assert {int(launch.words[HEADER + 2]) for launch in gpu.launches[n:]} == {average}


def test_scalars_do_not_move_in_a_capture(gpu):
    twins = Twins(params_of((5,)), lazy_average=False)
    twins.run(2)
    (param,) = twins.params
    twins.ours.param_groups[0]["capturable"] = True
    gpu.captured.add(1)
    with pytest.raises(RuntimeError, match="make a step before the capture"):
        twins.ours.step()
    assert not twins.ours.state[param]["step"].is_cuda
    gpu.captured.clear()
    twins.run(1)
    assert twins.ours.state[param]["step"].is_cuda


@pytest.mark.parametrize("t0", [1, 5], ids=["averaging", "before"])
def test_a_checkpoint_is_loaded_before_a_capture(gpu, t0):
    twins = Twins(params_of((5,)), capturable=True, t0=t0)
    twins.run(3)
    checkpoint = twins.ours.state_dict()
    twins.ours = ASGD(twins.params, capturable=True)
    twins.ours.load_state_dict(checkpoint)
    gpu.captured.add(1)
    n = len(gpu.launches)
    for _ in range(6):
        twins.run(1)
        assert twins.waits == 0
    assert all(int(launch.words[HEADER + 2]) for launch in gpu.launches[n:])


def test_the_first_step_cannot_be_captured(gpu):
    gpu.captured.add(1)
    twins = Twins(params_of((5,)), capturable=True)
    with pytest.raises(RuntimeError, match="make a step before the capture"):
        twins.step()
    assert twins.ours.state == {}


def test_a_refused_capture_leaves_torchs_params_too(gpu):
    """Some params go to torch's function; it is not called when an engine refuses."""
    params = [torch.nn.Parameter(torch.randn(6, device="cuda")) for _ in range(2)]
    optimizer = ASGD([params[0], params[1]], t0=1)
    params[0].grad = torch.ones(6, device="cuda")
    params[1].grad = torch.ones(1, device="cuda").expand(6)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    gpu.captured.add(1)
    with pytest.raises(RuntimeError, match="CUDA graph"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


# Scalers


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"lazy_average": False}], ids=str)
def test_a_scaler_skips_steps_without_a_wait(gpu, options):
    scaler, n_waits = Scaler(1024.0), 0
    twins = Twins(params_of((5, 3), (1000,)), t0=3, lr=0.1, **options, fused_amp=True)
    for k in range(14):
        is_infinite = k in (0, 4, 5)
        twins.scaled_step(scaler, is_infinite)
        n_waits += scaler.waits
    assert n_waits == 0
    assert all(launch.kind.device_scalars for launch in gpu.launches)
    twins.run(2)  # a step without the scaler


def test_the_first_step_that_is_made_has_its_learning_rate(gpu):
    """As in torch, where a skipped step makes no state."""
    scaler = Scaler(1.0)
    twins = Twins(params_of((50,), dtype=torch.float64), lr=0.1, fused_amp=True)
    twins.params[0].grad = torch.full_like(twins.params[0], float("inf"))
    scaler.step(twins.ours, True)
    for optimizer in (twins.ours, twins.theirs):
        optimizer.param_groups[0]["lr"] = 0.2
    twins.run(3)


def test_the_first_step_that_is_made_has_its_learning_rate_beside_the_cpu(gpu):
    """Where a param in CPU memory makes the host wait for the answer."""
    scaler = Scaler(1.0)
    twins = Twins(params_of((5,), (6,)), devices=("cuda", "cpu"), lr=0.1, t0=1, fused_amp=True)
    for param in twins.params:
        param.grad = torch.full_like(param, float("inf"))
    scaler.step(twins.ours, True)
    assert twins.ours.state == {}
    for optimizer in (twins.ours, twins.theirs):
        optimizer.param_groups[0]["lr"] = 0.2
    for k in range(4):
        twins.scaled_step(scaler, k == 2)


def test_a_param_whose_first_step_is_skipped_has_the_learning_rate_of_its_first(gpu):
    """Where the others have made steps before, and all scalars were on the device."""
    scaler = Scaler(1.0)
    twins = Twins(params_of((5,), (6,)), devices=("cuda", "cpu"), lr=0.1, fused_amp=True)
    for skip, is_infinite in (({1}, False), ((), True), ((), False), ((), False)):
        twins.scaled_step(scaler, is_infinite, skip)
        if is_infinite:
            for optimizer in (twins.ours, twins.theirs):
                optimizer.param_groups[0]["lr"] = 0.2


def test_a_loss_scale_may_be_a_number(gpu):
    twins = Twins(params_of((50,)), t0=1, fused_amp=True)
    scaler = Scaler(8.0)
    scaler.scale = 8.0
    for _ in range(3):
        twins.scaled_step(scaler, False)
    assert gpu.launches[-1].kind.device_scalars


@pytest.mark.parametrize("devices", [("cuda",), ("cuda", "cpu")], ids=" and ".join)
def test_an_average_stays_lazy_under_a_scaler(gpu, devices):
    scaler = Scaler(2.0)
    twins = Twins(params_of((50,), (50,)), devices, t0=4, fused_amp=True)
    begin = 6 if devices == ("cuda",) else 7  # where the host knows of the step that is skipped
    for k in range(1, 9):
        twins.scaled_step(scaler, k == 2)
        average = int(gpu.launches[-1].words[HEADER + 2])
        assert (average == 0) == (k < begin)


def test_a_scaler_and_params_that_share_memory(gpu):
    memory = torch.randn(9, device="cuda")
    params = [torch.nn.Parameter(memory[:5]), torch.nn.Parameter(memory[4:])]
    here = memory.cpu()
    theirs = [torch.nn.Parameter(here[:5]), torch.nn.Parameter(here[4:])]
    one, other = (
        ASGD(params, foreach=False, fused_amp=True),
        torch.optim.ASGD(theirs, foreach=False),
    )
    scaler = Scaler(4.0)
    for is_infinite in (False, True, False):
        for p, q in zip(params, theirs, strict=True):
            p.grad, q.grad = torch.full_like(p, 4.0), torch.ones_like(q)
        scaler.step(one, is_infinite)
        if not is_infinite:
            other.step()
        assert torch.equal(memory.cpu(), here)


def test_a_scaler_and_a_param_on_the_cpu(gpu):
    scaler = Scaler(4.0)
    twins = Twins(params_of((5,), (6,)), devices=("cuda", "cpu"), t0=1, fused_amp=True)
    for k in range(6):
        twins.scaled_step(scaler, k == 3)


@pytest.mark.parametrize(
    "grad",
    [
        lambda: torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last),
        lambda: torch.randn(3, 3, 8, 4).permute(2, 3, 0, 1),
    ],
    ids=["channels last", "permuted"],
)
def test_a_gradient_of_another_layout_needs_no_answer(gpu, grad):
    twins = Twins(params_of((8, 4, 3, 3)), t0=1, fused_amp=True)
    scaler = Scaler(4.0)
    for k in range(6):
        new = grad()
        twins.theirs_params[0].grad = new.contiguous() if k != 4 else None
        twins.params[0].grad = on(new * 4, "cuda")
        scaler.step(twins.ours, k == 4)
        assert scaler.waits == 0
        twins.theirs.step()
        same(twins.params[0], twins.theirs_params[0])


@pytest.mark.parametrize("switch", ["scaler", "capturable"])
def test_scalars_go_to_the_device_after_a_param_got_other_memory(gpu, switch):
    """What it had before is not written to."""
    twins = Twins(params_of((5,)), t0=5, fused_amp=True)
    twins.run(2)
    (param,) = twins.params
    backup = param.data
    param.data = backup.clone()
    before = backup.clone()
    if switch == "capturable":
        twins.ours.param_groups[0]["capturable"] = True
        twins.run(8)
    else:
        scaler = Scaler(1.0)
        for _ in range(8):
            twins.scaled_step(scaler, False)
    assert torch.equal(backup, before)


@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu")], ids="to".join)
def test_a_param_moves_before_the_first_step_with_a_scaler(gpu, devices):
    twins = Twins(params_of((5,), (6,)), devices=(devices[0], "cuda"), t0=4, fused_amp=True)
    twins.run(2)
    param, scaler = twins.params[0], Scaler(4.0)
    param.grad = None
    param.data = param.data.to(devices[1])
    for k in range(8):
        twins.scaled_step(scaler, k == 1)


@pytest.mark.parametrize("switch", ["scaler", "capturable"])
def test_a_lazy_average_keeps_its_dtype_on_the_way_to_the_device(gpu, switch):
    """As without the switch, where its param has become narrower."""
    param = torch.nn.Parameter(torch.ones(5, device="cuda"))
    optimizer = ASGD([param], t0=5, fused_amp=True)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
    param.grad = None
    param.data = param.data.half()
    param.grad = torch.ones_like(param)
    if switch == "capturable":
        optimizer.param_groups[0]["capturable"] = True
        optimizer.step()
    else:
        Scaler(1.0).step(optimizer, False)
    assert optimizer.state[param]["ax"].dtype == torch.float32
