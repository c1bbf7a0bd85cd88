"""See all that only a GPU can show, in one command, by a deadline and without a network.

    python .ci/gpu.py [--seconds 520] [--out FOLDER]

Needs a Python 3.11 or newer with torch for CUDA, NumPy, Cython, setuptools and pytest, and the
wheels of gpu_wheels.py, which are installed into an environment of its own on top of that Python.
A step that fails or takes too long does not stop the next ones, which have the time that it leaves;
but without the package, and without any kernel, nothing else is tried: time on the machine is dear.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import venv
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

# What to look at where something is not found.
MACHINE = """
nvcc --version; gcc --version; command -v compute-sanitizer ncu
env | grep -E '^(CC|CUDA|LD_LIBRARY|NUMBA|PATH|PYTHON)'
ldconfig -p | grep -E 'libcuda|libnvvm|libnvrtc|libnvJitLink'
ls -d "$CUDA_HOME"/* "$CUDA_HOME"/nvvm/* "$CUDA_HOME"/lib*/libnv*
python -m pip list
"""

# The tests of a kernel's results. A process of its own has them: after an access to memory that is
# not its own, a process can use the card no more.
BITS = "bits or misaligned or subnormal or elements or thousand"

# A step for ncu, which counts between start and stop.
PROFILED = """
import torch
from asgd_fast import ASGD
param = torch.randn(10**8, device="cuda")
param.grad = torch.randn_like(param)
optimizer = ASGD([param], t0=-1.0)
for _ in range(3):
    optimizer.step()
torch.cuda.synchronize()
with torch.cuda.profiler.profile():
    optimizer.step()
    torch.cuda.synchronize()
"""


class Step(NamedTuple):
    """What is done.

    Attributes
    ----------
    name : str
    weight : float
        By which steps share the time.
    log : str
        The file for its output.
    tail : int
        How many lines of its output are shown.
    command : list of str
        With {python}, {out} and {seconds}, which it has less its start, to be filled in.
    is_needed : bool
        Whether nothing else is tried without it.
    """

    name: str
    weight: float
    log: str
    tail: int
    command: list[str]
    is_needed: bool = False


def all_steps() -> list[Step]:
    """Return the steps, in order; the weights are about the seconds that they take at most."""
    python = "{python}"
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", "-W", "default", "--tb=short"]
    pytest += ["-o", "faulthandler_timeout=60"]  # tells where it hangs
    tests = [*pytest, "-v", "-m", "gpu", "tests/test_gpu.py", "-k"]
    few = [*pytest, "-q", "tests/test_gpu.py", "-k", "misaligned or has_the_bits_of_steps or skips"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--print-limit", "20", "--tool"]
    # So that what lies beyond a tensor is not another one's.
    uncached = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
    wheels = str(ROOT / "build" / "gpu-wheels")
    install = [python, "-m", "pip", "install", "--no-index", "--no-compile"]
    install += ["--find-links", wheels]
    build = [python, "setup.py", "-q", "build_ext", "--inplace", f"-j{os.cpu_count()}", "egg_info"]
    measure = ["asv_benchmarks/gpu.py", "--save", "{out}", "--seconds", "{seconds}"]
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy")
    ncu = ["ncu", "--clock-control", "none", "--profile-from-start", "off"]
    ncu += [x for name in sections for x in ("--section", name)]
    return [
        Step("card", 5, "setup.log", 20, ["nvidia-smi"]),
        Step("machine", 5, "setup.log", 0, ["sh", "-c", MACHINE]),
        Step("wheels", 80, "setup.log", 3, [*install, "-r", f"{wheels}/requirements.txt"]),
        Step("build", 160, "setup.log", 3, build, is_needed=True),
        Step("a kernel", 60, "setup.log", 5, [python, ".ci/gpu_kernels.py", "1"], is_needed=True),
        Step("kernels", 60, "setup.log", 5, [python, ".ci/gpu_kernels.py"]),
        Step("config", 30, "setup.log", 30, [python, "-m", "asgd_fast"]),
        Step("bits", 60, "tests.log", 12, [*tests, BITS]),
        Step("tests", 60, "tests.log", 12, [*tests, f"not ({BITS})"]),
        Step("figures", 220, "figures.log", 25, [python, *measure]),
        Step("memcheck", 50, "sanitizer.log", 4, [*uncached, *sanitizer, "memcheck", *few]),
        # Not racecheck, which sees shared memory alone, and the kernels have none.
        Step("synccheck", 40, "sanitizer.log", 4, [*sanitizer, "synccheck", *few]),
        Step("profile", 40, "profile.log", 0, [*ncu, python, "-c", PROFILED]),
    ]


def run_all(steps: list[Step], out: Path, seconds: float) -> bool:
    """Make the steps until the deadline, tell how each ended, and return whether all passed."""
    end = monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        environment = _environment(Path(folder))
        for i, step in enumerate(steps):
            start = monotonic()
            share = (end - start) * step.weight / sum(x.weight for x in steps[i:])
            values = {"python": f"{folder}/bin/python", "out": out, "seconds": max(share - 15, 0)}
            command = [x.format(**values) for x in step.command]
            with (out / step.log).open("a+", errors="replace") as log:
                log.write(f"\n--- {step.name}: {' '.join(command)}\n")
                log.flush()
                begin = log.tell()
                outcome = _outcome(command, share, log, environment)
                log.seek(begin)
                tail = log.read().splitlines()[-step.tail :] if step.tail else []
            if outcome != "passed":
                failed.append(step.name)
            took = f"{monotonic() - start:.0f} s of {share:.0f}"
            print(f"{step.name}: {outcome}, {took}, {step.log}", *tail, sep="\n    ", flush=True)
            if step.is_needed and outcome != "passed":
                print(f"without {step.name} nothing else is tried")
                break
    print("did not pass: " + ", ".join(failed) if failed else "all passed")
    return not failed


def _outcome(command: list[str], seconds: float, log, environment: dict[str, str]) -> str:
    """Run a command with all of its children, for so many seconds at most."""
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            process_group=0,
        )
    except OSError as error:
        return f"not run: {error}"
    try:
        status = process.wait(seconds)
        return "passed" if status == 0 else f"failed ({status})"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # pytest tells then what it has
        with suppress(subprocess.TimeoutExpired):
            process.wait(3)
        return "cut short"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a driver may not let it end
            process.wait(5)


def _environment(folder: Path) -> dict[str, str]:
    """Make a virtual environment that sees this Python's packages, and return its variables."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    outer = [x for x in sys.path if x.endswith(("site-packages", "dist-packages"))]
    # By addsitedir, so that files there which take part in imports, as numba-cuda's, do so here.
    (site / "outer.pth").write_text(
        "".join(f"import site; site.addsitedir({x!r})\n" for x in outer)
    )
    for libraries in (Path(x, "nvidia") for x in outer):
        if libraries.is_dir():  # of CUDA, which are sought in this folder alone
            (site / "nvidia").symlink_to(libraries)
            break
    found = dict(os.environ)
    tools = [folder / "bin", *Path("/opt/nvidia/nsight-compute").glob("*")]
    nvcc = Path(shutil.which("nvcc") or "/").resolve()  # of the toolkit, or a script elsewhere
    for toolkit in (Path(found.get("CUDA_HOME") or "/usr/local/cuda"), nvcc.parent.parent):
        if (toolkit / "nvvm").is_dir():
            found["CUDA_HOME"] = found["CUDA_PATH"] = str(toolkit)
            tools += [toolkit / "bin", toolkit / "compute-sanitizer"]
            _show_compiler(toolkit, folder / "nvvm")
            _put_before(found, "LD_LIBRARY_PATH", folder / "nvvm")
            break
    _put_before(found, "PATH", *tools)
    _put_before(found, "PYTHONPATH", ROOT)
    if not shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]):
        found |= {"CC": "gcc", "LDSHARED": "gcc -shared"}  # Python's own compiler is not here
    found["XDG_CACHE_HOME"] = str(folder / "cache")
    # Plugins of that Python's pytest may change what is printed, and the tests need none.
    return {**found, "PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def _show_compiler(toolkit: Path, folder: Path) -> None:
    """Let Numba find the compiler of a toolkit, which is not in the same place in each of them."""
    folder.mkdir()
    for pattern in ("nvvm/lib*", "lib*", "targets/*/lib"):
        for library in toolkit.glob(f"{pattern}/libnvvm.so.*"):
            if not (folder / library.name).exists():
                (folder / library.name).symlink_to(library)


def _put_before(environment: dict[str, str], name: str, *folders: Path) -> None:
    """Put folders before those of a variable."""
    parts = [*map(str, folders), environment.get(name, "")]
    environment[name] = os.pathsep.join(filter(None, parts))


def main() -> int:
    """Do what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=520, help="until the deadline")
    parser.add_argument(
        "--out", type=Path, help="a folder (default: the variable OUT, or build/gpu)"
    )
    arguments = parser.parse_args()
    out = arguments.out or Path(os.environ.get("OUT") or ROOT / "build" / "gpu")
    return 0 if run_all(all_steps(), out.resolve(), arguments.seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
