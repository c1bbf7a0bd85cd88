"""Steps that are interrupted, killed or forked.

A step is whole or not at all: what is found afterwards are the bits after k or after k + 1 steps.
"""

from __future__ import annotations

import multiprocessing
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
from asgd_fast import threads
from reliability.arrays import several_threads
from reliability.subjects import FACES, MOMENTS, prepared


def interrupted_steps(face, n, random, counts):
    """Interrupt steps at random moments by a timer, and compare with steps that were not."""
    for moment, steps in MOMENTS.items():
        calm = prepared(face, steps)
        before = calm.facts()
        start = time.perf_counter()
        calm.step()
        duration = time.perf_counter() - start
        after = calm.facts()
        for k in range(n if steps == max(MOMENTS.values()) else max(1, n // 10)):
            subject = prepared(face, steps)
            is_interrupted = interrupted(subject.step, random.random() * duration)
            counts[f"steps of {face} at which an interrupt was aimed"] += 1
            counts[f"steps of {face} interrupted"] += is_interrupted
            found = subject.facts()
            if found == after:
                continue
            assert (is_interrupted, found) == (True, before), f"{face}: {moment} is torn, {k}"
            subject.step()
            assert subject.facts() == after, f"{face}: {moment}, made again, has other bits"


def interrupted(function, seconds):
    """Call a function, and return whether a timer has interrupted it after so long."""
    try:
        signal.setitimer(signal.ITIMER_REAL, max(1e-6, seconds))
        function()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return False


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
from reliability.subjects import Arrays
subject = Arrays()
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
            try:
                with np.load(path, allow_pickle=False) as file:
                    state = dict(file)
                FACES["ArrayASGD"]().optimizer.load_state_dict(state)
            except Exception as error:
                raise AssertionError(f"a save that was killed left {error!r}") from error
            made = prepared("ArrayASGD", int(state["step"][0])).optimizer.state_dict()
            assert {name: x.tobytes() for name, x in state.items()} == {
                name: x.tobytes() for name, x in made.items()
            }, "a save that was killed left what no step had"
            counts["saves killed"] += 1


# One of them large enough for several threads, which a forked process has no more.
LARGE = [(1 << 18,), (3,), ()]
LONGEST = 30  # seconds that a step may take in another process
_trusts_threads = False


def _go_on(data, trusts_threads=False):
    """Make a step in whichever process this is; as bytes, tensors are not shared with it."""
    if trusts_threads:
        threads._is_forked = False
    subject = pickle.loads(data)
    subject.set_grads(9)
    subject.step()
    return subject.facts()


def other_processes(n, counts):
    for face, make in FACES.items():
        for way in ("fork", "spawn"):
            context = multiprocessing.get_context(way)
            for _ in range(n if way == "fork" else max(1, n // 10)):
                subject = make(LARGE)
                for k in range(5):
                    subject.set_grads(k)
                    subject.step()
                data = pickle.dumps(subject)
                with context.Pool(1) as pool:
                    going_on = pool.apply_async(_go_on, (data, _trusts_threads))
                    try:
                        found = going_on.get(LONGEST)
                    except multiprocessing.TimeoutError:
                        raise AssertionError(f"{face}: hangs after {way}") from None
                assert found == _go_on(data), f"{face}: other bits after {way}"
                counts[f"steps after {way}"] += 1


def run(campaign):
    random = campaign.random()
    with interruptible():
        for face in FACES:
            interrupted_steps(face, campaign.times(2000), random, campaign.counts)
    killed_saves(campaign.times(60), random, campaign.counts)
    with several_threads(2):
        other_processes(campaign.times(60), campaign.counts)


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

    def step(self, grads):
        self._scalars[:, 0] += 1
        original(self, grads)
        self._scalars[:, 0] -= 1

    asgd_fast.ArrayASGD.step = step
    try:
        yield
    finally:
        asgd_fast.ArrayASGD.step = original


CONTROLS = {
    "a step that counts before it is made": _counting_first,
    "a checkpoint that is written over the last one": lambda: _global("_save", OVER),
    "a forked process that waits for threads": lambda: _global("_trusts_threads", True),
}
