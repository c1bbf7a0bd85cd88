"""The example of fully_shard under torchrun: a worker is killed, and the others go on with it anew.

The oracle is torch's ASGD in one process, and the run that nobody kills.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.testing import assert_close

EXAMPLE = Path(__file__).parent.parent / "examples" / "fsdp.py"
SECONDS = 90  # within which each run must have ended
STEPS = 120


def torchrun(n, folder, *options):
    """What the example prints on n processes."""
    program = [*("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}")]
    program += ["--max-restarts=1", str(EXAMPLE), f"--folder={folder}", f"--steps={STEPS}"]
    running = subprocess.Popen(
        [sys.executable, *program, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )
    try:
        printed, _ = running.communicate(timeout=SECONDS)
    finally:
        if running.poll() is None:
            running.terminate()  # upon which torchrun ends the workers, which have other sessions
            try:
                running.communicate(timeout=40)
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 0, printed
    return printed


def train_to_the_end(folder):
    """What each process does that nobody kills, with one thread as torchrun has it."""
    torch.set_num_threads(1)
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "0"
    runpy.run_path(str(EXAMPLE))["train"](folder, STEPS, None)


def averages(folder):
    return torch.load(folder / "averages.pt", weights_only=True)


def trained_by_torch():
    """The averages of the same network, trained in one process by torch's ASGD."""
    example = runpy.run_path(str(EXAMPLE))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(example["FEATURES"], 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.ASGD(model.parameters(), lr=0.1, lambd=0.0, t0=example["EVERY"])
    for step in range(STEPS):
        x, y = example["examples"](step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return {name: optimizer.state[param]["ax"] for name, param in model.named_parameters()}


@pytest.mark.heavy
def test_the_example_goes_on_after_a_kill(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    on_ranks(2, tmp_path, partial(train_to_the_end, whole))
    assert_close(averages(whole), trained_by_torch())
    printed = torchrun(2, killed, "--kill-at=70")
    for step in (0, 50):
        assert f"from step {step} on, with 2 processes" in printed
    assert averages(killed).keys() == averages(whole).keys()
    for name, average in averages(killed).items():
        assert torch.equal(average, averages(whole)[name])
    assert [path.name for path in killed.glob("step-*")] == ["step-000100"]
    assert "from step 100 on, with 1 processes" in torchrun(1, killed)
    assert_close(averages(killed), averages(whole))
