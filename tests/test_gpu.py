"""What only a CUDA device can show: its bits, streams, graphs, scalers and large arrays.

``python -m pytest -m gpu``; under NVIDIA's checker of memory and barriers:
``compute-sanitizer --tool memcheck python -m pytest -m gpu -k "bits or misaligned"``, and the same
with ``--tool synccheck`` and ``--tool initcheck``.
"""

from __future__ import annotations

import copy
import gc
import threading
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from twins import NAMES, bits

from asgd_fast import ASGD, ArrayASGD, asgd_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.float64),
    (torch.float64, torch.float64),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float64),
]


def _same(there, here):
    assert torch.equal(bits(there.detach().cpu()), bits(here.detach()))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "average_dtype"), PAIRS, ids=str)
def test_300_steps_have_the_bits_of_the_cpu(dtype, average_dtype, weight_decay):
    torch.manual_seed(0)
    sizes = [1, 2, 3, 7, 8, 9, 1000, 4099, 8192, 100_003]
    here = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in sizes]
    there = [torch.nn.Parameter(p.detach().cuda()) for p in here]
    options = {"lr": 0.1, "t0": 150, "weight_decay": weight_decay, "lambd": 1e-3}
    if average_dtype != dtype:
        options["average_dtype"] = average_dtype
    optimizers = [ASGD(params, **options) for params in (here, there)]
    for _ in range(300):
        for p, q in zip(here, there, strict=True):
            p.grad = torch.randn(p.shape).to(dtype)
            q.grad = p.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(here, there, strict=True):
        _same(q, p)
        for name in NAMES:
            _same(optimizers[1].state[q][name], optimizers[0].state[p][name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bits_are_torchs_on_the_cpu(dtype):
    torch.manual_seed(0)
    here = [torch.nn.Parameter(torch.randn(100_003, dtype=dtype))]
    there = [torch.nn.Parameter(p.detach().cuda()) for p in here]
    options = {"lr": 0.1, "t0": 20, "weight_decay": 0.01, "lambd": 0.01}
    theirs, ours = torch.optim.ASGD(here, foreach=False, **options), ASGD(there, **options)
    for _ in range(60):
        here[0].grad = torch.randn_like(here[0])
        there[0].grad = here[0].grad.cuda()
        theirs.step()
        ours.step()
    _same(there[0], here[0])
    _same(ours.state[there[0]]["ax"], theirs.state[here[0]]["ax"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_arrays(dtype):
    torch.manual_seed(0)
    for n in (1, 17, 8192 + 5, 100_003):
        for offsets in ((1, 1, 1), (3, 3, 3), (1, 2, 3), (0, 0, 1)):
            here = [torch.randn(n).to(dtype) for _ in range(3)]
            memory = [torch.zeros(n + 8, dtype=dtype, device="cuda") for _ in range(3)]
            there = [x[k : k + n] for x, k in zip(memory, offsets, strict=True)]
            for x, y in zip(here, there, strict=True):
                y.copy_(x)
            for mu in (1.0, 0.3):
                asgd_(*here, eta=0.1, mu=mu, weight_decay=0.1)
                asgd_(*there, eta=0.1, mu=mu, weight_decay=0.1)
            for x, y, whole, k in zip(here, there, memory, offsets, strict=True):
                _same(y, x)
                assert not whole[:k].any()
                assert not whole[k + n :].any()


def test_subnormal_numbers_are_not_flushed():
    here = [torch.full((1000,), 1e-40) * torch.arange(1000) for _ in range(3)]
    there = [x.cuda() for x in here]
    for arrays in (here, there):
        asgd_(*arrays, eta=0.5, mu=0.5, weight_decay=1e-3)
    for x, y in zip(here, there, strict=True):
        _same(y, x)
    assert (here[0] != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_more_than_two_to_the_31_elements(dtype):
    n = (1 << 31) + 12_345
    if torch.cuda.mem_get_info()[0] < 4 * n * dtype.itemsize:
        pytest.skip("takes more memory than the device has free")
    p, g, ax = (torch.zeros(n, dtype=dtype, device="cuda") for _ in range(3))
    g.fill_(1)
    asgd_(p, g, ax, eta=0.5, mu=1.0, lambd=0.0)
    asgd_(p, g, ax, eta=0.5, mu=0.5, lambd=0.0)
    for tensor, value in ((p, -1.0), (ax, -0.75)):
        assert tensor[-1].item() == tensor[1 << 31].item() == value
        assert (tensor == value).all()


def test_a_thousand_tensors():
    torch.manual_seed(0)
    here = [torch.nn.Parameter(torch.randn(i % 300 + 1)) for i in range(2500)]
    there = [torch.nn.Parameter(p.detach().cuda()) for p in here]
    optimizers = [ASGD(params, t0=2, lr=0.1) for params in (here, there)]
    for _ in range(5):
        for p, q in zip(here, there, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(here, there, strict=True):
        _same(q, p)


def test_the_step_follows_the_current_stream():
    """What the stream has yet to compute is the gradient that is used."""
    param = torch.nn.Parameter(torch.zeros(1 << 20, device="cuda"))
    param.grad = torch.zeros_like(param)
    optimizer = ASGD([param], lr=1.0, lambd=0.0)
    optimizer.step()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        param.grad.fill_(1)
        optimizer.step()
        assert not stream.query()
        total = param.sum()
    stream.synchronize()
    assert total.item() == -(1 << 20)


class _WorkedOnElsewhere:
    """A tensor as a library has it that works on a stream of its own."""

    def __init__(self, tensor, stream):
        self.tensor, self.stream = tensor, stream.cuda_stream

    @property
    def __cuda_array_interface__(self):
        return {**self.tensor.__cuda_array_interface__, "version": 3, "stream": self.stream}


def test_a_gradient_from_another_stream():
    """The step follows what that one has yet to write, and is followed by what it writes next."""
    n = 1 << 24
    mine, other = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(mine):
        param = torch.zeros(n, device="cuda")
    with torch.cuda.stream(other):
        grad = torch.zeros(n, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(mine):
        asgd_(param, _WorkedOnElsewhere(grad, other), eta=1.0, lambd=0.0)
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        torch.cuda._sleep(100_000_000)
        grad.fill_(1)
    with torch.cuda.stream(mine):
        asgd_(param, _WorkedOnElsewhere(grad, other), eta=1.0, lambd=0.0)
        assert not mine.query()
        torch.cuda._sleep(100_000_000)
        asgd_(param, _WorkedOnElsewhere(grad, other), eta=1.0, lambd=0.0)
    with torch.cuda.stream(other):
        grad.fill_(5)
    torch.cuda.synchronize()
    assert (param == -2).all()


@contextmanager
def _waits_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_does_not_wait():
    params = [torch.nn.Parameter(torch.zeros(100, device="cuda")) for _ in range(300)]
    for param in params:
        param.grad = torch.ones_like(param)
    for options in ({}, {"capturable": True}, {"lazy_average": False}):
        optimizer = ASGD(params, **options)
        for _ in range(3):
            optimizer.step()
        torch.cuda.synchronize()
        with _waits_are_errors():
            torch.cuda._sleep(500_000_000)
            for _ in range(10):
                optimizer.step()
            assert not torch.cuda.current_stream().query()


def test_nothing_is_allocated_in_a_step():
    params = [torch.nn.Parameter(torch.zeros(1000, device="cuda")) for _ in range(30)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = ASGD(params, t0=0)
    for _ in range(5):
        optimizer.step()
    gc.collect()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(5):
        optimizer.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def _captured(optimizer, params, grads):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for param, grad in zip(params, grads, strict=True):
            param.grad.copy_(grad)
        optimizer.step()
    return graph


def _twins(dtype, average_dtype, sizes=(3, 1000, 100_003), **options):
    """Params on the CPU and on the GPU, each with an optimizer."""
    torch.manual_seed(0)
    here = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in sizes]
    there = [torch.nn.Parameter(p.detach().cuda()) for p in here]
    if average_dtype != dtype:
        options["average_dtype"] = average_dtype
    on_gpu = ASGD(there, capturable=True, **options)
    return here, there, ASGD(here, lazy_average=False, **options), on_gpu


# With lambd=0 there is no power in eta, in which the device may round in another way.
EXACT = {"lr": 0.1, "t0": 4, "weight_decay": 0.01, "lambd": 0.0}


@pytest.mark.parametrize(("dtype", "average_dtype"), PAIRS, ids=str)
def test_a_graph_has_the_bits_of_steps_on_the_cpu(dtype, average_dtype):
    here, there, eager, captured = _twins(dtype, average_dtype, **EXACT)
    grads = [torch.zeros_like(p) for p in there]
    for p, q in zip(here, there, strict=True):
        p.grad = torch.randn(p.shape).to(dtype)
        q.grad = p.grad.cuda()
    eager.step()
    graph = _captured(captured, there, grads)
    for _ in range(20):
        for p, static in zip(here, grads, strict=True):
            p.grad = torch.randn(p.shape).to(dtype)
            static.copy_(p.grad)
        eager.step()
        graph.replay()
    for p, q in zip(here, there, strict=True):
        _same(q, p)
        for name in NAMES:
            _same(captured.state[q][name], eager.state[p][name])


@pytest.mark.parametrize(("dtype", "average_dtype"), PAIRS, ids=str)
def test_steps_that_a_scaler_skips(dtype, average_dtype):
    here, there, eager, skipping = _twins(dtype, average_dtype, **EXACT)
    skipping.fused_amp = True
    for k in range(12):
        is_infinite = k in (0, 3, 4, 8)
        for p, q in zip(here, there, strict=True):
            p.grad = torch.randn(p.shape).to(dtype)
            q.grad = p.grad.cuda() * 8
            if is_infinite:
                q.grad[0] = float("inf")
        skipping.grad_scale = torch.tensor([8.0], device="cuda")
        skipping.found_inf = torch.tensor([float(is_infinite)], device="cuda")
        skipping.step()
        if not is_infinite:
            eager.step()
    for p, q in zip(here, there, strict=True):
        _same(q, p)
        for name in NAMES:
            _same(skipping.state[q][name], eager.state[p][name])


def test_a_graph_has_the_values_of_steps_without_one():
    torch.manual_seed(0)
    here = [torch.nn.Parameter(torch.randn(n)) for n in (3, 1000, 100_003)]
    there = [torch.nn.Parameter(p.detach().cuda()) for p in here]
    grads = [torch.zeros_like(p) for p in there]
    options = {"lr": 0.1, "t0": 50, "weight_decay": 0.01, "lambd": 1e-3}
    eager, captured = ASGD(here, **options), ASGD(there, capturable=True, **options)
    new = [torch.randn_like(p) for p in here]
    for p, q, grad in zip(here, there, new, strict=True):
        p.grad, q.grad = grad, grad.cuda()
    eager.step()
    graph = _captured(captured, there, grads)
    for _ in range(100):
        new = [torch.randn_like(p) for p in here]
        for p, grad, static in zip(here, new, grads, strict=True):
            p.grad = grad
            static.copy_(grad)
        eager.step()
        graph.replay()
    for p, q in zip(here, there, strict=True):
        # eta and mu come of the device's own power, within a rounding of the host's.
        torch.testing.assert_close(q.cpu(), p.detach(), rtol=1e-6, atol=1e-7)
        assert captured.state[q]["step"].item() == eager.state[p]["step"].item() == 101
        for name in ("eta", "mu"):
            ours, theirs = captured.state[q][name].item(), eager.state[p][name].item()
            assert ours == pytest.approx(theirs, rel=2e-7)


def test_a_capture_without_capturable_is_refused():
    param = torch.nn.Parameter(torch.zeros(10, device="cuda"))
    param.grad = torch.ones_like(param)
    optimizer = ASGD([param])
    optimizer.step()

    def capture():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            param.grad.mul_(1)  # torch warns of graphs that are empty
            optimizer.step()

    with pytest.raises(RuntimeError, match="captured into a CUDA graph"):
        capture()
    optimizer.step()


def test_a_learning_rate_changes_what_a_graph_does():
    param = torch.nn.Parameter(torch.zeros(10, device="cuda"))
    param.grad = torch.ones_like(param)
    lr = torch.tensor(1.0, device="cuda")
    optimizer = ASGD([param], lr=lr, capturable=True, lambd=0.0)
    graph = _captured(optimizer, [param], [torch.ones_like(param)])
    lr.fill_(0.5)
    graph.replay()
    lr.fill_(0.25)
    graph.replay()
    graph.replay()
    # Each acts one step late.
    assert param[0].item() == -(1 + 1 + 0.5 + 0.25)


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler(fused):
    torch.manual_seed(0)
    model = torch.nn.Linear(32, 1).cuda()
    optimizer = ASGD(model.parameters(), lr=0.1, t0=5, fused_amp=fused)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=1000)
    steps = 0
    for k in range(12):
        optimizer.zero_grad()
        x = torch.randn(16, 32, device="cuda")
        with torch.autocast("cuda", dtype=torch.float16):
            loss = model(x).float().square().mean()
        if k in (3, 7):
            loss = loss * float("inf")
        before = model.weight.detach().clone()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, model.weight) == (k in (3, 7))
        steps += k not in (3, 7)
    assert optimizer.state[model.weight]["step"].item() == steps
    assert scaler.get_scale() == 2.0**8


def test_checkpoints_and_copies(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(20, 3).cuda()
    optimizer = ASGD(model.parameters(), t0=2, lr=0.1)

    def step(model, optimizer, seed):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        x = torch.randn(8, 20).to(model.weight.device)
        model(x).square().sum().backward()
        optimizer.step()

    for k in range(5):
        step(model, optimizer, k)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "checkpoint.pt")
    both = copy.deepcopy((model, optimizer))
    weights, state = torch.load(tmp_path / "checkpoint.pt", map_location="cpu")
    on_cpu = torch.nn.Linear(20, 3)
    on_cpu.load_state_dict(weights)
    other = ASGD(on_cpu.parameters(), t0=2, lr=0.1)
    other.load_state_dict(state)
    again = torch.nn.Linear(20, 3).cuda()
    again.load_state_dict(weights)
    third = ASGD(again.parameters(), t0=2, lr=0.1)
    third.load_state_dict(state)
    for k in range(5):
        for pair in ((model, optimizer), both, (again, third)):
            step(*pair, k)
    assert torch.equal(model.weight, both[0].weight)
    assert torch.equal(model.weight, again.weight)
    assert other.state[on_cpu.weight]["ax"].device.type == "cpu"


def test_averaged_parameters():
    param = torch.nn.Parameter(torch.randn(100_003, device="cuda"))
    for options in ({}, {"average_dtype": torch.float64}):
        optimizer = ASGD([param], t0=0, lr=0.1, **options)
        for _ in range(4):
            param.grad = torch.randn_like(param)
            optimizer.step()
        before = param.detach().clone()
        average = optimizer.state[param]["ax"].float().clone()
        with optimizer.averaged_parameters():
            assert torch.equal(param, average)
        assert torch.equal(param, before)


def test_threads_with_streams_of_their_own():
    """Each trains a model of its own; none disturbs another's words."""
    results = {}

    def train(seed):
        generator = torch.Generator().manual_seed(seed)
        params = [torch.randn(n, generator=generator) for n in (10, 1000, 50_000)]
        grads = [[torch.randn(p.shape, generator=generator) for p in params] for _ in range(30)]
        there = [torch.nn.Parameter(p.cuda()) for p in params]
        here = [torch.nn.Parameter(p) for p in params]
        with torch.cuda.stream(torch.cuda.Stream()):
            optimizers = [ASGD(x, t0=10, lr=0.1) for x in (here, there)]
            for new in grads:
                for p, q, grad in zip(here, there, new, strict=True):
                    p.grad, q.grad = grad, grad.cuda()
                for optimizer in optimizers:
                    optimizer.step()
            torch.cuda.current_stream().synchronize()
        results[seed] = all(torch.equal(q.cpu(), p) for p, q in zip(here, there, strict=True))

    threads = [threading.Thread(target=train, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(6), True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_two_devices():
    params = [torch.nn.Parameter(torch.zeros(1000, device=f"cuda:{i}")) for i in (1, 0)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = ASGD(params, lr=0.5, lambd=0.0)
    optimizer.step()
    assert all(param[0].item() == -0.5 for param in params)


def test_array_asgd_and_its_checkpoint():
    torch.manual_seed(0)
    here = [torch.randn(5, 3), torch.randn(20_000)]
    there = [x.cuda() for x in here]
    optimizers = [ArrayASGD(x, t0=2, lr=0.1) for x in (here, there)]
    for _ in range(6):
        grads = [torch.randn_like(x) for x in here]
        optimizers[0].step(grads)
        optimizers[1].step([x.cuda() for x in grads])
    states = [optimizer.state_dict() for optimizer in optimizers]
    for name, value in states[0].items():
        assert np.array_equal(states[1][name], value)
    optimizers[1].load_state_dict(states[0])
    with optimizers[1].averaged_parameters():
        assert np.array_equal(there[1].cpu().numpy(), states[0]["ax.1"])


def test_numba_arrays():
    from numba import cuda

    p, g, ax = (cuda.to_device(np.full(1000, x)) for x in (1.0, 1.0, 0.0))
    asgd_(p, g, ax, eta=0.25, mu=0.5, lambd=0.0)
    assert (p.copy_to_host() == 0.75).all()
    assert (ax.copy_to_host() == 0.375).all()


def test_cupy_arrays():
    cupy = pytest.importorskip("cupy")
    with cupy.cuda.Stream(non_blocking=True) as stream:
        p, g, ax = cupy.ones(1000), cupy.ones(1000), cupy.zeros(1000)
        asgd_(p, g, ax, eta=0.25, mu=0.5, lambd=0.0)
        stream.synchronize()
        assert (p == 0.75).all()
        assert (ax == 0.375).all()
