"""Torch tensors of two CUDA devices whose memory is the host's, with the launches of `fake_gpu`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import warnings
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import fake_gpu
import pytest
import torch


@lru_cache
def _build():
    """Build and load the extension, in ten seconds.

    Each process makes its own: in a shared folder one that was killed leaves a lock, for which all
    others wait.
    """
    from torch.utils import cpp_extension

    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    ninja = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(),
        pytest.MonkeyPatch.context() as patch,
    ):
        warnings.simplefilter("ignore")  # of what the build does
        patch.setenv("PATH", ninja)
        cpp_extension.load(
            "asgd_fast_fake_cuda",
            [str(Path(__file__).parent / "fake_cuda.cpp")],
            extra_cflags=["-O0"],
            build_directory=folder,
            is_python_module=False,
        )


@contextmanager
def installed(monkeypatch):
    """Let torch have two devices, and yield their driver."""
    if torch.version.cuda is not None:
        pytest.skip("torch has real devices; see test_gpu.py")
    _build()
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    with fake_gpu.installed(monkeypatch) as driver:
        monkeypatch.setattr(
            torch.cuda, "is_current_stream_capturing", lambda: bool(driver.captured)
        )
        yield driver


def waits():
    """How often the host has waited for a device."""
    return torch.ops.fake_cuda.waits()
