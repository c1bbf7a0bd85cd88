"""Several Python threads, each with arrays of its own, whose steps share the engine's threads.

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

running = [threading.Thread(target=work, args=(own,)) for own in owned]
for thread in running:
    thread.start()
for thread in running:
    thread.join()
"""
_shared = False


def run(campaign):
    sanitizers.imports_the_build("threads")
    runtime = BUILD / "gomp" / "libgomp.so.1"
    runtime.parent.mkdir(parents=True, exist_ok=True)
    source = ROOT / "tests" / "reliability" / "gomp.c"
    flags = ["-O1", "-g", "-Wall", "-Werror", "-fsanitize=thread", "-shared", "-fPIC"]
    subprocess.run(["gcc", *flags, source, "-o", runtime], check=True)
    path = os.pathsep.join(filter(None, [str(runtime.parent), os.environ.get("LD_LIBRARY_PATH")]))
    n = campaign.times(10)
    program = PROGRAM.format(seed=campaign.seed, shared=_shared, n=n)
    with must_report("data race") if _shared else nullcontext():
        sanitizers.run_under("threads", ["-c", program], 900, LD_LIBRARY_PATH=path)
    campaign.counts["steps of four Python threads under ThreadSanitizer"] += 4 * n


@contextmanager
def _sharing():
    global _shared
    _shared = True
    try:
        yield
    finally:
        _shared = False


CONTROLS = {"two threads that step the same arrays": _sharing}
