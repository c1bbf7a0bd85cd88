"""How many threads a step uses, and whose."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from threadpoolctl import threadpool_limits

import asgd_fast
from asgd_fast import threads


@pytest.fixture(autouse=True)
def restored():
    n = torch.get_num_threads()
    yield
    torch.set_num_threads(n)
    threads._told = None


def started(program, **environment):
    """Run a program in a process of its own, without the variables that are None."""
    environment = {**os.environ, **environment}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={name: value for name, value in environment.items() if value is not None},
    )
    assert result.returncode == 0, result.stderr
    return result


def run(program, **environment):
    """Run a program in a process of its own, and return the words that it prints."""
    return started(program, **environment).stdout.split()


def test_the_number_is_torchs_until_it_is_set():
    for n in (1, 3):
        torch.set_num_threads(n)
        assert asgd_fast.get_num_threads() == n
    asgd_fast.set_num_threads(5)
    assert asgd_fast.get_num_threads() == 5
    assert torch.get_num_threads() == 3


def test_what_is_said_later_holds():
    torch.set_num_threads(4)
    asgd_fast.set_num_threads(2)
    with threadpool_limits(1):
        assert asgd_fast.get_num_threads() == 1
    assert asgd_fast.get_num_threads() == 2
    torch.set_num_threads(3)
    assert asgd_fast.get_num_threads() == 3
    asgd_fast.set_num_threads(7)
    assert asgd_fast.get_num_threads() == 7


@pytest.mark.parametrize(
    ("n", "error", "message"),
    [
        (0, ValueError, "^n: got 0; expected at least 1$"),
        (-2, ValueError, "^n: got -2; expected at least 1$"),
        (1.5, TypeError, "^n: expected an integer, got float$"),
        ("2", TypeError, "^n: expected an integer, got str$"),
        (None, TypeError, "^n: expected an integer, got NoneType$"),
    ],
)
def test_a_wrong_number_is_refused(n, error, message):
    before = asgd_fast.get_num_threads()
    with pytest.raises(error, match=message):
        asgd_fast.set_num_threads(n)
    assert asgd_fast.get_num_threads() == before


@pytest.mark.parametrize("n", [1, 3])
def test_the_environment_without_torch(n):
    program = """
        import asgd_fast, sys
        print(asgd_fast.get_num_threads(), "torch" in sys.modules)
        asgd_fast.set_num_threads(2)
        print(asgd_fast.get_num_threads())
    """
    assert run(program, OMP_NUM_THREADS=str(n)) == [str(n), "False", "2"]


def test_small_steps_look_for_no_threads():
    program = """
        import numpy as np, sys
        from asgd_fast import asgd_
        asgd_(np.ones(1000), np.ones(1000), eta=0.1)
        print("threadpoolctl" in sys.modules)
        asgd_(np.ones(1 << 20), np.ones(1 << 20), eta=0.1)
        print("threadpoolctl" in sys.modules)
    """
    assert run(program) == ["False", "True"]


LARGE_STEP = """
    import numpy as np
    from asgd_fast import asgd_
    asgd_(np.ones(1 << 20), np.ones(1 << 20), eta=0.1)
"""
USE_TORCH = """
    import torch
    torch.ones(1 << 20).add_(1)
"""
REPORT = """
    import os
    from threadpoolctl import threadpool_info
    from asgd_fast import threads
    runtimes = [x["filepath"] for x in threadpool_info() if x["user_api"] == "openmp"]
    print(len(runtimes), os.path.realpath(threads.openmp_runtime()) in
          [os.path.realpath(x) for x in runtimes])
"""


@pytest.mark.parametrize("program", [LARGE_STEP + USE_TORCH, USE_TORCH + LARGE_STEP, LARGE_STEP])
def test_there_is_one_openmp_runtime(program):
    assert run(program + REPORT) == ["1", "True"]


def test_it_is_the_one_that_torch_uses():
    """Also when another was loaded first, and used."""
    program = """
        import ctypes, shutil, sys, tempfile
        from asgd_fast import threads
        first = threads.openmp_runtime()
        folder = tempfile.mkdtemp()
        other = shutil.copy(first, folder + "/libgomp-other.so")
        ctypes.CDLL(other)
        threads._found.cache_clear()
        print(threads.openmp_runtime() in (first, other))
        import torch
        torch.set_num_threads(3)
        print(asgd_fast.get_num_threads())
        torchs = ctypes.CDLL(torch.__file__.replace("__init__.py", "lib/libtorch_cpu.so"))
        address = ctypes.cast(torchs.GOMP_parallel, ctypes.c_void_p).value
        ours = ctypes.CDLL(threads.openmp_runtime())
        print(ctypes.cast(ours.GOMP_parallel, ctypes.c_void_p).value == address)
        shutil.rmtree(folder)
    """.replace("import ctypes", "import asgd_fast, ctypes", 1)
    assert run(program) == ["True", "3", "True"]


def test_one_that_is_loaded_already_is_taken():
    program = """
        import ctypes, os, shutil, subprocess, sys, tempfile
        find = "from asgd_fast import threads; print(threads.openmp_runtime())"
        system = subprocess.run(
            [sys.executable, "-c", find], capture_output=True, text=True, check=True
        ).stdout.strip()
        folder = tempfile.mkdtemp()
        other = shutil.copy(system, folder + "/libgomp-other.so")
        data = open(other, "rb").read().replace(b"libgomp.so.1", b"libgomp.so.9")
        open(other, "wb").write(data)
        ctypes.CDLL(other)
        from asgd_fast import threads
        print(os.path.samefile(threads.openmp_runtime(), other))
        shutil.rmtree(folder)
    """
    assert run(program) == ["True"]


@pytest.mark.parametrize("program", [LARGE_STEP, USE_TORCH + LARGE_STEP], ids=["numpy", "torch"])
def test_a_forked_child_does_not_hang(program):
    program += """
    import os, asgd_fast
    asgd_fast.set_num_threads(3)
    asgd_(np.ones(1 << 20), np.ones(1 << 20), eta=0.1)
    child = os.fork()
    if not child:
        param = np.ones(1 << 20)
        asgd_(param, np.ones(1 << 20), eta=0.5, lambd=0.0)
        os._exit(0 if (param == 0.5).all() and asgd_fast.get_num_threads() == 1 else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), asgd_fast.get_num_threads())
    """
    assert run(program) == ["0", "3"]


@pytest.mark.parametrize("lazy", [True, False])
def test_a_forked_child_makes_its_averages(lazy):
    """By torch's operations, which would wait for the threads of the parent."""
    program = f"""
        import os, signal
        import numpy as np
        import torch
        from asgd_fast import ASGD
        torch.set_num_threads(3)
        torch.ones(5_000_000) + 1
        w = torch.nn.Parameter(torch.from_numpy(np.zeros(2_000_000, np.float32)))
        w.grad = torch.from_numpy(np.ones(2_000_000, np.float32))
        optimizer = ASGD([w], lr=0.5, lambd=0.0, t0=1, lazy_average={lazy})
        if {lazy}:
            optimizer.step()
        child = os.fork()
        if not child:
            signal.alarm(20)
            for _ in range(4 - {lazy}):
                optimizer.step()
            ax = optimizer.state[w]["ax"].numpy()
            os._exit(0 if (ax == -1.75).all() and torch.get_num_threads() == 3 else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert run(program) == ["0"]


def test_without_a_runtime_one_thread_does_it_all():
    program = """
        import asgd_fast
        from asgd_fast import threads
        threads.FUNCTIONS = ("no_such_function",)
        print(asgd_fast.get_num_threads(), threads.openmp_runtime())
        asgd_fast.set_num_threads(2)
        print(asgd_fast.get_num_threads())
        import numpy as np
        param = np.ones(1 << 20)
        asgd_fast.asgd_(param, np.ones(1 << 20), eta=0.5, lambd=0.0)
        print((param == 0.5).all())
    """
    assert run(program) == ["1", "not", "found", "1", "True"]


@pytest.mark.parametrize("stub", ["", "stub.__file__ = None", "stub.__file__ = 'torch.py'"])
def test_a_stub_of_torch_lends_no_threads(tmp_path, stub):
    """Nor is a library of the current directory opened in its place."""
    program = f"""
        import os, sys, types
        import numpy as np
        import asgd_fast
        from asgd_fast import threads
        os.makedirs("lib")
        open("lib/libtorch_cpu.so", "w").write("what is opened says that it is no library")
        stub = sys.modules["torch"] = types.ModuleType("torch")
        stub.get_num_threads = lambda: 2
        {stub}
        opened = []
        sys.addaudithook(lambda event, x: event == "ctypes.dlopen" and opened.append(str(x[0])))
        param = np.ones(1 << 20)
        asgd_fast.asgd_(param, np.ones(1 << 20), eta=0.5, lambd=0.0)
        print((param == 0.5).all(), [x for x in opened if "torch" in x])
    """
    result = started(f"import os; os.chdir({str(tmp_path)!r})\n" + textwrap.dedent(program))
    assert result.stdout == "True []\n"


@pytest.mark.parametrize("stub", ["types.ModuleType", "unittest.mock.MagicMock"])
def test_a_stub_of_torch_with_its_core_is_no_hindrance(stub):
    program = f"""
        import sys, types, unittest.mock
        import numpy as np
        import asgd_fast
        sys.modules.update({{name: {stub}(name) for name in ("torch", "torch._C")}})
        param = np.ones(3)
        asgd_fast.asgd_(param, np.ones(3), eta=0.5, lambd=0.0)
        print(param.tolist())
    """
    assert started(textwrap.dedent(program)).stdout == "[0.5, 0.5, 0.5]\n"


@pytest.mark.parametrize(("given", "seen"), [(None, "PASSIVE"), ("active", "ACTIVE")])
def test_threads_of_a_runtime_that_is_new_sleep_between_steps(given, seen):
    """Unless the user says otherwise; the environment is as before afterwards."""
    program = """
        import os
        from asgd_fast import threads
        threads.get_num_threads()
        print(os.environ.get("OMP_WAIT_POLICY"))
    """
    told = dict.fromkeys(threads.WAITING) | {"OMP_WAIT_POLICY": given, "OMP_DISPLAY_ENV": "true"}
    result = started(program, **told)
    assert result.stdout.split() == [str(given)]
    assert f"OMP_WAIT_POLICY = '{seen}'" in result.stderr


def test_fewer_threads_than_asked_for_do_all_the_work():
    program = """
        import numpy as np, asgd_fast
        asgd_fast.set_num_threads(6)
        param = np.ones(1 << 22)
        asgd_fast.asgd_(param, np.ones(1 << 22), eta=0.5, lambd=0.0)
        print(asgd_fast.get_num_threads(), (param == 0.5).all())
    """
    assert run(program, OMP_THREAD_LIMIT="2") == ["6", "True"]
