"""The tests, and the fuzz of arrays and of faulty libraries, under AddressSanitizer and UBSan."""

from __future__ import annotations

import re
from contextlib import contextmanager

from reliability import sanitizers
from reliability.common import must_report

# Those that work on the memory of the CPU; the others run Numba's simulator and compilers.
TESTS = [
    "asgd", "array_asgd", "array_averages_begin", "average_dtype", "average_every",
    "averaged_models", "averaged_parameters", "averages_asked_early", "averages_copied",
    "averages_of_arrays", "averaging", "batch_norm", "bits", "dlpack", "engine",
    "hyperparameter_types", "interrupts", "lr_schedule_current", "optim_bits", "optim_checkpoints",
    "optim_lazy", "optim_state", "optim_tensors", "own_keywords", "refused_checkpoints",
    "start_averaging", "train_eval", "wide",
]  # fmt: skip

LIE = """
import numpy as np, exporters
from asgd_fast import asgd_
param = exporters.Versioned(np.ones(1 << 16))
grad = np.ones((1 << 16) + 1)
class Longer(exporters.Versioned):
    def fill(self, tensor):
        buffers = super().fill(tensor)
        buffers[0][0] += 1
        return buffers
asgd_(Longer(np.ones(1 << 16)), grad, eta=0.1)
"""
BESIDE = """
import ctypes
from reliability import arrays
from reliability.common import Campaign
update = arrays.asgd_fast.asgd_
def reads_beside(params, grads, axs=None, **scalars):
    update(params, grads, axs, **scalars)
    if grads[0].flags.c_contiguous:
        ctypes.string_at(grads[0].ctypes.data + grads[0].nbytes, 16)
arrays.asgd_fast.asgd_ = reads_beside
arrays.run(Campaign(scale=0.01, is_control=True))
"""
OVERFLOW = "from asgd_fast._schedule import planted_overflow; planted_overflow(2**63 - 1)"

_planted = None


def run(campaign):
    sanitizers.imports_the_build("memory")
    if _planted is not None:
        program, report = _planted
        with must_report(report):
            sanitizers.run_under("memory", ["-c", program], 300)
        return
    fuzz = f"""
from reliability import arrays, capsules
from reliability.common import Campaign
for part, scale in (arrays, {0.1 * campaign.scale}), (capsules, {0.2 * campaign.scale}):
    campaign = Campaign({campaign.seed}, scale)
    part.run(campaign)
    for name, n in campaign.counts.items():
        print(name, n, sep="\\t")
"""
    for line in sanitizers.run_under("memory", ["-c", fuzz], 1800).splitlines():
        name, n = line.split("\t")
        campaign.counts[f"{name}, sanitized"] += int(n)
    # Below a full campaign, the first ones.
    tests = [f"tests/test_{name}.py" for name in TESTS[: campaign.times(len(TESTS))]]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not heavy and not gpu"]
    printed = sanitizers.run_under("memory", ["-m", "pytest", *options, *tests], 3000)
    campaign.counts["tests, sanitized"] += int(re.search(r"(\d+) passed", printed)[1])


@contextmanager
def _planting(program, report):
    global _planted
    _planted = program, report
    try:
        yield
    finally:
        _planted = None


CONTROLS = {
    "a library whose array is longer than its memory": lambda: _planting(
        LIE, "heap-buffer-overflow"
    ),
    "a read beside an array of the fuzz": lambda: _planting(BESIDE, "use-after-poison"),
    "an integer that overflows": lambda: _planting(OVERFLOW, "signed integer overflow"),
}
