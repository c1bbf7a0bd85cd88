"""Several Python threads, each with arrays of its own, and all with one optimizer.

Their steps share the engine's threads.

ThreadSanitizer watches. The OpenMP runtime is gomp.c, whose waiting it understands.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager, nullcontext

from reliability import sanitizers
from reliability.common import BUILD, ROOT, must_report

PROGRAM = """
import threading
import numpy as np
import asgd_fast
from asgd_fast import threads

asgd_fast.set_num_threads(3)
assert "reliability" in threads.openmp_runtime()
n = (1 << 19) + {seed} % 9
kinds = [np.float32, np.float64, np.float16]

def arrays(kind):
    return [[np.ones(k, kind) for k in (n, 7, n // 2)] for _ in "pga"]

owned = [arrays(kinds[i % 3]) for i in range(4)]
if {shared}:
    owned[3] = owned[0]

def work(own):
    optimizer = asgd_fast.ArrayASGD(own[0], lr=0.1, t0=0)
    for k in range({n}):
        if {shared} or k % 2:
            asgd_fast.asgd_(*own, eta=0.1, mu=0.5)
        else:
            optimizer.step(own[1])
        asgd_fast.get_num_threads()

def together(work, arguments):
    running = [threading.Thread(target=work, args=(x,)) for x in arguments]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()

together(work, owned)

# One optimizer belongs to one thread at a time: the steps of the others are refused.
if {unguarded}:
    asgd_fast.ArrayASGD._is_stepping = property(lambda self: False, lambda self, value: None)
params, grads, _ = arrays(np.float64)
optimizer = asgd_fast.ArrayASGD(params, lr=0.1, t0=0)
made, refused = [], []

def contend(_):
    for _ in range({n}):
        try:
            optimizer.step(grads)
            made.append(1)
        except RuntimeError as error:
            refused.append(str(error))

together(contend, range(4))
assert len(made) + len(refused) == 4 * {n}
assert set(refused) <= {{"step: another thread is making a step of this optimizer"}}, refused
alone = asgd_fast.ArrayASGD([np.ones_like(x) for x in params], lr=0.1, t0=0)
for _ in made:
    alone.step(grads)
ours, wanted = optimizer.state_dict(), alone.state_dict()
assert all(ours[name].tobytes() == wanted[name].tobytes() for name in wanted)
assert all((x == y).all() for x, y in zip(params, alone.param_groups[0]["params"]))
print(len(refused))
"""
_shared = _unguarded = False


def run(campaign):
    sanitizers.imports_the_build("threads")
    runtime = BUILD / "gomp" / "libgomp.so.1"
    runtime.parent.mkdir(parents=True, exist_ok=True)
    source = ROOT / "tests" / "reliability" / "gomp.c"
    flags = ["-O1", "-g", "-Wall", "-Werror", "-fsanitize=thread", "-shared", "-fPIC"]
    subprocess.run(["gcc", *flags, source, "-o", runtime], check=True)
    path = os.pathsep.join(filter(None, [str(runtime.parent), os.environ.get("LD_LIBRARY_PATH")]))
    n = max(5, campaign.times(10))  # of fewer, none might meet
    program = PROGRAM.format(seed=campaign.seed, shared=_shared, unguarded=_unguarded, n=n)
    with must_report("data race") if _shared or _unguarded else nullcontext():
        printed = sanitizers.run_under("threads", ["-c", program], 900, LD_LIBRARY_PATH=path)
    campaign.counts["steps of four Python threads under ThreadSanitizer"] += 4 * n
    campaign.counts["steps of one optimizer by four Python threads"] += 4 * n
    campaign.counts["of them refused, as another one was being made"] += int(printed)


@contextmanager
def _sharing(what):
    globals()[what] = True
    try:
        yield
    finally:
        globals()[what] = False


CONTROLS = {
    "two threads that step the same arrays": lambda: _sharing("_shared"),
    "an optimizer that lets two threads step": lambda: _sharing("_unguarded"),
}
