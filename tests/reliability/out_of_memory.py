"""Calls that find no memory: each allocation of a call fails in turn, in a process of its own.

What is found afterwards are the bits before the call or after it, and the call can be made again.
torch crashes in some places where Python finds no memory; a crash in code of ours is a finding.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager
from functools import partial

import asgd_fast
from reliability.common import BUILD, ROOT, python
from reliability.subjects import FACES, FEW_SHAPES, MOMENTS, prepared


def _evaluate(subject, _):
    with subject.optimizer.averaged_parameters():
        pass


# What a subject does that was prepared; the second argument is what it does it with.
CALLS = {
    "step": lambda subject, _: subject.step(),
    "averaged_parameters": _evaluate,
    "start_averaging": lambda subject, _: subject.optimizer.start_averaging(),
    "state_dict": lambda subject, _: subject.optimizer.state_dict(),
    "load_state_dict": lambda subject, given: subject.optimizer.load_state_dict(given),
    "add_param_group": lambda subject, given: subject.optimizer.add_param_group(given),
}
STEPS = [
    {},
    {"looks": True},
    {"average_dtype": "float64"},
    {"grows": True},
]  # options of `prepared`
# Of the calls besides steps, each so many-th allocation fails.
SPARSELY = 5


def _given(face, call, subject):
    if call == "load_state_dict":
        return prepared(face, 6, shapes=FEW_SHAPES).optimizer.state_dict()
    return subject.new_group() if call == "add_param_group" else None


def cases(calls):
    """Yield calls, each with the steps made before it and the options of its subject."""
    for call in calls:
        for steps in MOMENTS.values():
            for options in STEPS if call == "step" else STEPS[:1]:
                yield call, steps, options


class Outage:
    """The library that lets allocations fail, which was loaded before all others."""

    def __init__(self):
        library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        library.crashed_in.restype = ctypes.c_char_p
        assert library.watch() == 0
        # Each is looked up here: what ctypes does at the first call needs memory.
        self.fail_at, self.stop_failing = library.fail_at, library.stop_failing
        self.crashed_in = library.crashed_in
        self.fail_at(ctypes.c_long(-1))
        self.stop_failing()


def outcome(outage, n, face, call, steps, options):
    """Let allocation n of a call fail; return whether there were so many."""
    calm = prepared(face, steps, shapes=FEW_SHAPES, **options)
    before = calm.facts()
    CALLS[call](calm, _given(face, call, calm))
    after = calm.facts()
    subject = prepared(face, steps, shapes=FEW_SHAPES, **options)
    given = _given(face, call, subject)
    number, raised = ctypes.c_long(n), None
    make = CALLS[call]
    try:
        outage.fail_at(number)
    except MemoryError:  # of ctypes
        outage.stop_failing()
        return True
    try:
        make(subject, given)
    except BaseException as error:
        failed = outage.stop_failing()
        raised = error
    else:
        failed = outage.stop_failing()
    found = subject.facts()
    if raised is None:
        assert found == after, "torn without an error"
        return failed > 0
    # A RuntimeError is torch's, a SystemError of functions that lose what they raise, torch's too.
    is_of_memory = isinstance(raised, (MemoryError, RuntimeError, SystemError))
    assert is_of_memory or "memory" in str(raised), repr(raised)
    assert found in (before, after), f"torn: {raised!r}"
    if found == before:
        make(subject, given)
        assert subject.facts() == after, "another result afterwards"
    return True


def in_a_process(*arguments):
    """Call `outcome` in a process of its own, and return what it has.

    Returns
    -------
    more : bool
        Whether there were so many allocations.
    fault : str
        What was found, if anything.
    has_crashed : bool
        Whether torch has crashed.
    """
    outage, *what = arguments
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        status = 3
        try:
            status = 0 if outcome(*arguments) else 1
        except BaseException:
            os.write(writing, traceback.format_exc()[-3000:].encode())
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        printed = pipe.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status in (0, 1):
        return status == 0, "", False
    if status < 0:
        where = outage.crashed_in().decode()
        if "/torch/" in where:
            return True, "", True
        printed = f"a crash in {where or 'unknown code'}"
    return True, f"{what}: {printed}", False


def go_through(face, seed, scale, is_faulty=False, calls=tuple(CALLS)):
    """Print how many allocations have failed, by call, as JSON; fail for what is found."""
    warnings.simplefilter("ignore")
    if is_faulty:
        _plant_half_steps(face)
    outage = Outage()
    for call, steps, options in cases(calls):  # what is made once is made here
        subject = prepared(face, steps, shapes=FEW_SHAPES, **options)
        CALLS[call](subject, _given(face, call, subject))
    gc.collect()
    gc.freeze()
    gc.disable()
    counts = Counter()
    for call, steps, options in cases(calls):
        stride = max(1, round((1 if call == "step" else SPARSELY) / scale))
        n, more = seed % stride, True
        while more:
            more, fault, has_crashed = in_a_process(outage, n, face, call, steps, options)
            if fault:
                raise AssertionError(fault)
            counts[f"{face}.{call}"] += more
            if has_crashed:
                counts["torch"] += 1
            n += stride
    print(json.dumps(counts))


def _plant_half_steps(face):
    """Let each step change a hyperparameter before it has its memory, a planted fault."""
    kind = getattr(asgd_fast, face)
    original = kind.step

    def step(self, *grads):
        self.param_groups[0]["t0"] += 1
        original(self, *grads)
        self.param_groups[0]["t0"] -= 1

    kind.step = step


_faulty_face = None


def run(campaign):
    if sys.platform != "linux" or os.environ.get("LD_PRELOAD"):
        return
    for face in FACES:
        arguments = f"{face!r}, {campaign.seed}, {campaign.scale}, {face == _faulty_face}"
        printed = without_memory(
            f"from reliability import out_of_memory as part; part.go_through({arguments})"
        )
        for name, n in json.loads(printed.splitlines()[-1]).items():
            if name == "torch":
                campaign.counts["allocations after which torch crashed"] += n
            else:
                campaign.counts[f"allocations in {name} that failed"] += n


def without_memory(program):
    """Run a program whose `Outage` works, and return what it prints."""
    BUILD.mkdir(parents=True, exist_ok=True)
    library = BUILD / f"outage-{os.getpid()}.so"  # which others may be loading meanwhile
    source = ROOT / "tests" / "reliability" / "outage.c"
    flags = ["-O1", "-Wall", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["gcc", *flags, source, "-o", library], check=True)
    try:
        return python(program, timeout=2400, LD_PRELOAD=str(library), PYTHONMALLOC="malloc")
    finally:
        library.unlink()


@contextmanager
def _half_steps(face):
    global _faulty_face
    _faulty_face = face
    try:
        yield
    finally:
        _faulty_face = None


CONTROLS = {
    f"a step of {face} that changes its t0 before it has its memory": partial(_half_steps, face)
    for face in FACES
}
