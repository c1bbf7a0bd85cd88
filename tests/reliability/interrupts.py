"""Steps that are interrupted, killed, forked, or find no memory.

A step is whole or not at all: what is found afterwards are the bits after k or after k + 1 steps.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import asgd_fast
from reliability.common import BUILD, ROOT, python

try:
    import torch
except ImportError:
    torch = None

OPTIONS = {"lr": 0.1, "lambd": 0.01, "t0": 2.0, "weight_decay": 0.01}
SHAPES = [(), (5,), (3, 4), (1000,), (0, 2)] + [(7,)] * 20


class Arrays:
    """ArrayASGD, its step number k with gradients that follow from k."""

    def __init__(self):
        self.params = [np.full(shape, 1.0 + i) for i, shape in enumerate(SHAPES)]
        self.optimizer = asgd_fast.ArrayASGD(self.params, **OPTIONS)

    def set_grads(self, k):
        self.grads = [np.full(x.shape, np.cos(k + i)) for i, x in enumerate(self.params)]

    def step(self):
        self.optimizer.step(self.grads)

    def facts(self):
        state = self.optimizer.state_dict()
        return [x.tobytes() for x in (*self.params, *state.values())]


class Tensors:
    """The same of ASGD."""

    def __init__(self):
        self.params = [
            torch.nn.Parameter(torch.full(shape, 1.0 + i)) for i, shape in enumerate(SHAPES)
        ]
        self.optimizer = asgd_fast.ASGD(self.params, **OPTIONS)

    def set_grads(self, k):
        for i, p in enumerate(self.params):
            p.grad = torch.full(p.shape, float(np.cos(k + i)))

    def step(self):
        self.optimizer.step()

    def facts(self):
        entries = self.optimizer.state_dict()["state"].values()
        tensors = [x for entry in entries for x in entry.values()]
        return [x.detach().numpy().tobytes() for x in (*self.params, *tensors)]


FACES = {"ArrayASGD": Arrays} if torch is None else {"ArrayASGD": Arrays, "ASGD": Tensors}


def interrupted_steps(face, n, random, counts):
    """Interrupt steps at random moments by a timer, and compare with steps that were not."""
    subject, calm = FACES[face](), FACES[face]()
    for x in (subject, calm):
        for k in range(4):  # the averages have begun
            x.set_grads(k)
            x.step()
    start = time.perf_counter()
    subject.set_grads(0)
    subject.step()
    calm.set_grads(0)
    calm.step()
    duration = time.perf_counter() - start
    for k in range(n):
        subject.set_grads(k)
        before = subject.facts()
        calm.set_grads(k)
        calm.step()
        after = calm.facts()
        is_interrupted = False
        try:
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, random.random() * duration))
            subject.step()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            is_interrupted = True
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        found = subject.facts()
        counts[f"steps of {face} at which an interrupt was aimed"] += 1
        counts[f"steps of {face} interrupted"] += is_interrupted
        if found == after and (is_interrupted or before != after):
            continue
        assert (is_interrupted, found) == (True, before), f"{face}: step {k} is torn"
        subject.step()
        assert subject.facts() == after, f"{face}: step {k}, made again, has other bits"


@contextmanager
def interruptible():
    def interrupt(*_):
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


SAVES = """
import os, sys
sys.modules["torch"] = None  # which takes seconds to import
import numpy as np
from reliability import interrupts
subject = interrupts.Arrays()
for k in range(10**6):
    subject.set_grads(k)
    subject.step()
    {save}
    if k == 0:
        print("saved", flush=True)
"""
ASIDE = """np.savez(sys.argv[1] + ".new.npz", **subject.optimizer.state_dict())
    os.replace(sys.argv[1] + ".new.npz", sys.argv[1])"""
OVER = "np.savez(sys.argv[1], **subject.optimizer.state_dict())"
_save = ASIDE


def killed_saves(n, random, counts):
    """Kill a process that saves all the time, and load what it left."""
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(n):
            path = Path(folder, "state.npz")
            program = SAVES.format(save=_save)
            saving = subprocess.Popen(
                [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
            )
            saving.stdout.readline()
            time.sleep(random.random() * 0.05)
            saving.kill()
            saving.communicate()
            subject = Arrays()
            try:
                with np.load(path, allow_pickle=False) as state:
                    subject.optimizer.load_state_dict(state)
            except Exception as error:
                raise AssertionError(f"a save that was killed left {error!r}") from error
            counts["saves killed"] += 1


OUTAGE = """
import ctypes, gc, os, sys
from reliability import interrupts
library = ctypes.CDLL(os.environ["LD_PRELOAD"])
face = interrupts.FACES[sys.argv[1]]
if {faulty}:
    interrupts.plant_half_steps()

def prepared(steps):
    subject = face()
    for k in range(steps):
        subject.set_grads(k)
        subject.step()
    subject.set_grads(steps)
    return subject

total = 0
for steps in (0, 3, 5):  # the first step, the one that makes the averages, a later one
    calm = prepared(steps)
    calm.step()
    after = calm.facts()
    n = int(sys.argv[2]) % 7
    while True:
        subject = prepared(steps)
        before = subject.facts()
        gc.collect()
        gc.disable()
        raised = None
        library.fail_at(n, sys.argv[4].encode())
        try:
            subject.step()
        except BaseException as error:
            failed = library.stop_failing()
            raised = error
        else:
            failed = library.stop_failing()
        gc.enable()
        found = subject.facts()
        if raised is None:
            assert found == after, ("torn without an error", steps, n)
        else:
            assert isinstance(raised, (MemoryError, RuntimeError)) or "memory" in str(raised), (
                steps, n, repr(raised))
            assert found in (before, after), ("torn", steps, n, repr(raised))
            if found == before:
                subject.step()
                assert subject.facts() == after, ("another step afterwards", steps, n)
        if not failed:
            break
        total += 1
        n += int(sys.argv[3])
print(total)
"""
_has_half_steps = False


def plant_half_steps():
    """Let each step count before it has its memory, a planted fault."""
    original = asgd_fast.ArrayASGD.step

    def step(self, grads):
        self._scalars[:, 0] += 1
        original(self, grads)
        self._scalars[:, 0] -= 1

    asgd_fast.ArrayASGD.step = step


def without_memory(campaign):
    """Let each allocation of a step fail in turn."""
    BUILD.mkdir(parents=True, exist_ok=True)
    library = BUILD / "outage.so"
    source = ROOT / "tests" / "reliability" / "outage.c"
    flags = ["-O1", "-Wall", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["gcc", *flags, source, "-o", library], check=True)
    stride = max(1, round(1 / campaign.scale))
    for face in FACES:
        program = OUTAGE.format(faulty=_has_half_steps)
        # torch crashes where an allocation of Python's own fails.
        whose = "asgd_fast/" if face == "ASGD" else ""
        printed = python(
            program,
            *(face, campaign.seed, stride, whose),
            LD_PRELOAD=str(library),
            PYTHONMALLOC="malloc",
        )
        campaign.counts[f"allocations in steps of {face} that failed"] += int(printed)


def _go_on(data):
    """Make a step in whichever process this is; as bytes, tensors are not shared with it."""
    subject = pickle.loads(data)
    subject.set_grads(9)
    subject.step()
    return subject.facts()


def other_processes(n, counts):
    for face, make in FACES.items():
        for way in ("fork", "spawn"):
            context = multiprocessing.get_context(way)
            for _ in range(n if way == "fork" else max(1, n // 10)):
                subject = make()
                for k in range(5):
                    subject.set_grads(k)
                    subject.step()
                data = pickle.dumps(subject)
                with context.Pool(1) as pool:
                    found = pool.apply(_go_on, (data,))
                assert found == _go_on(data), f"{face}: other bits after {way}"
                counts[f"steps after {way}"] += 1


def run(campaign):
    random = campaign.random()
    with interruptible():
        for face in FACES:
            interrupted_steps(face, campaign.times(4000), random, campaign.counts)
    killed_saves(campaign.times(60), random, campaign.counts)
    other_processes(campaign.times(60), campaign.counts)
    if sys.platform == "linux" and os.environ.get("LD_PRELOAD") is None:
        without_memory(campaign)


@contextmanager
def _global(name, value):
    before = globals()[name]
    globals()[name] = value
    try:
        yield
    finally:
        globals()[name] = before


@contextmanager
def _counting_first():
    original = asgd_fast.ArrayASGD.step
    plant_half_steps()
    try:
        yield
    finally:
        asgd_fast.ArrayASGD.step = original


CONTROLS = {
    "a step that counts before it is made": _counting_first,
    "a checkpoint that is written over the last one": lambda: _global("_save", OVER),
    "a step that counts before it has its memory": lambda: _global("_has_half_steps", True),
}
