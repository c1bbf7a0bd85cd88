"""The simulation of steps on many threads, by which the threshold of a thread more was chosen."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from asgd_fast.threads import BYTES_PER_THREAD

BENCHMARKS = Path(__file__).resolve().parents[1] / "asv_benchmarks"

pytestmark = pytest.mark.skipif(
    not BENCHMARKS.is_dir(), reason="asv_benchmarks/ is in the repository only"
)


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield import_module("threads_model")


def test_steps_of_few_threads_take_what_can_be_said_by_hand(model):
    alone = 512 * model.WORK
    assert model.step(512, 1, 70.0, 5.0) == alone
    assert model.step(512, 2, 0.0, 0.0) == pytest.approx(alone / 2)
    # The second comes when the first has done the shares of both; with 10 us to wake it.
    assert model.step(512, 2, 1000.0, 0.0) == 1000
    assert model.step(512, 2, 1000.0, 10.0) == 1010
    # Two chunks for each: the second does one, while the first does three.
    chunk = 2048 / 4 * model.WORK
    assert model.step(2048, 2, 2.5 * chunk, 0.0) == pytest.approx(3.5 * chunk)


def test_a_thread_stands_for_what_loses_least_at_most(model):
    cases = [(1.0, 0.1), *model.WAKING.values()]
    worst = {kib: max(model.loss(kib, *case) for case in cases) for kib in (96, 192, 384, 768)}
    assert min(worst, key=worst.get) << 10 == BYTES_PER_THREAD
