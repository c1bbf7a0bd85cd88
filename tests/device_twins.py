"""Our optimizer over params on the CUDA devices of fake_cuda, beside torch's on the CPU."""

from __future__ import annotations

import fake_cuda
import fake_gpu
import torch
from twins import NAMES, bits, entries_of, twin

from asgd_fast import ASGD


class Twins:
    """Our optimizer over params on a device, and torch's over the same on the CPU."""

    def __init__(self, params, devices=("cuda",), groups=None, **options):
        self.theirs_params = [twin(p) for p in params]
        self.params = [on(p, devices[i % len(devices)]) for i, p in enumerate(params)]
        pick = groups or (lambda own: own)
        self.ours = ASGD(pick(self.params), **options)
        own = ("lazy_average", "average_dtype", "capturable", "foreach", "fused_amp")
        options = {name: value for name, value in options.items() if name not in own}
        self.theirs = torch.optim.ASGD(pick(self.theirs_params), foreach=False, **options)

    def step(self, skip=()):
        for i, (ours, theirs) in enumerate(zip(self.params, self.theirs_params, strict=True)):
            theirs.grad = None if i in skip else torch.randn_like(theirs)
            ours.grad = None if i in skip else on(theirs.grad, ours.device)
        before = fake_cuda.waits()
        self.ours.step()
        self.waits = fake_cuda.waits() - before
        self.theirs.step()

    def run(self, steps, skip=lambda _: ()):
        for k in range(steps):
            self.step(skip(k))
            self.check()

    def scaled_step(self, scaler, is_infinite, skip=()):
        """A step by a scaler, which torch's optimizer makes without, or not at all."""
        for i, (ours, theirs) in enumerate(zip(self.params, self.theirs_params, strict=True)):
            grad = torch.randn_like(theirs)
            theirs.grad = None if i in skip or is_infinite else grad
            scale = float("inf") if is_infinite else scaler.factor
            ours.grad = None if i in skip else (grad * scale).to(ours.device)
        scaler.step(self.ours, is_infinite)
        self.theirs.step()
        self.check()

    def look(self):
        """Look into each state of ours, as loggers do: its scalars are tensors from then on."""
        for entry in self.ours.state.values():
            assert {*NAMES} >= entry.keys() >= {*NAMES} - {"ax"}

    def check(self):
        """Assert the same bits, read as a checkpoint has them: nobody looks into the state."""
        entries = entries_of(self.ours)
        for ours, theirs in zip(self.params, self.theirs_params, strict=True):
            same(ours, theirs)
            if theirs in self.theirs.state:
                for name in NAMES:
                    same(entries[ours][name], self.theirs.state[theirs][name])
            else:  # a scaler may have skipped all steps
                assert ours not in entries or entries[ours]["step"] == 0


def on(tensor, device):
    """A copy in the same layout."""
    data = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    data.copy_(tensor.detach())
    return torch.nn.Parameter(data) if isinstance(tensor, torch.nn.Parameter) else data


def same(ours, theirs):
    assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
    assert torch.equal(bits(ours.detach().cpu()), bits(theirs.detach()))


def params_of(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator)) for shape in shapes
    ]


class Scaler:
    """What a GradScaler does to an optimizer that takes the unscaling over."""

    def __init__(self, scale):
        self.factor = scale
        self.scale = torch.tensor([scale], device="cuda")

    def step(self, optimizer, is_infinite):
        assert optimizer._step_supports_amp_scaling
        optimizer.grad_scale = self.scale
        optimizer.found_inf = torch.tensor([float(is_infinite)], device="cuda")
        before = fake_cuda.waits()
        optimizer.step()
        self.waits = fake_cuda.waits() - before
        del optimizer.grad_scale, optimizer.found_inf


class Graph:
    """The launches of the steps in a with statement, to be made again as they were.

    The steps themselves are made, which a real capture does not.
    """

    def __init__(self, driver, stream=1):
        self.driver, self.stream = driver, stream

    def __enter__(self):
        self._first = len(self.driver.launches)
        self._waits = fake_cuda.waits()
        self.driver.captured.add(self.stream)
        return self

    def __exit__(self, *error):
        self.driver.captured.discard(self.stream)
        self.launches = self.driver.launches[self._first :]
        self.waits = fake_cuda.waits() - self._waits

    def replay(self):
        for launch in self.launches:
            fake_gpu.body(launch.kind._replace(n_words=0))(
                launch.words.ctypes.data, launch.n_blocks
            )
