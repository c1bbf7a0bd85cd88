"""The kernels without a GPU: simulated, and compiled for all generations; and their files."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_gpu
import numpy as np
import pytest

from asgd_fast import _engines as update
from asgd_fast import asgd_
from asgd_fast.cuda import build, intrinsics
from asgd_fast.cuda.build import Kind

HERE = Path(__file__).parent

needs_compiler = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("numba_cuda", "nvidia")),
    reason="numba-cuda and its compiler are not installed; pip install '.[cuda]'",
)


def _run(*command, **environment):
    """Run Python as a process of its own, which must not fail."""
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    result = subprocess.run(
        [sys.executable, "-W", "error", *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.heavy
def test_the_simulated_kernels_have_the_bits_of_the_cpu():
    assert _run(str(HERE / "simulator.py"), NUMBA_ENABLE_CUDASIM="1") == "49 launches simulated\n"


KINDS = [
    *(Kind("update", *pair, False, 512) for pair in fake_gpu.PAIRS),
    *(Kind("update", *pair, True, 1536) for pair in fake_gpu.PAIRS),
    Kind("update", "float32", "float32", False, 4095),
    Kind("exchange", "bits16", "bits16", False, 512),
    Kind("exchange", "bits64", "bits64", False, 512),
    *(Kind("assign", *pair, False, 512) for pair in fake_gpu.PAIRS if pair[0] != pair[1]),
]
FLOAT32 = Kind("update", "float32", "float32", False, 512)
COMPILED = [
    *((kind, (9, 0)) for kind in KINDS),
    *((FLOAT32, cc) for cc in [(7, 5), (8, 0), (8, 9), (10, 0), (12, 0)]),
    *(
        (Kind("update", *pair, device_scalars, 512), cc)
        for cc in [(7, 5), (12, 0)]
        for *pair, device_scalars in [
            ("float32", "float32", True),
            ("bfloat16", "float32", True),
            ("bfloat16", "float64", False),
        ]
    ),
]


def _name(x):
    return "-".join(map(str, x))


@pytest.mark.heavy
@needs_compiler
@pytest.mark.parametrize(("kind", "compute_capability"), COMPILED, ids=_name)
def test_a_compiled_kernel_is_what_it_should_be(kind, compute_capability):
    ptx = build.ptx_of(kind, compute_capability)
    cubin, report = build.link(ptx, compute_capability)
    assert cubin.startswith(b"\x7fELF")

    # Whole accesses of 16 bytes, two of each array at a time but where registers would not last.
    n = {"update": 2, "exchange": 1, "assign": 1}[kind.job]
    for instruction in ("ld", "st"):
        vectors = re.findall(rf"{instruction}\.global\.v(?:4\.[bfu]32|2\.[bfu]64)", ptx)
        assert len(vectors) >= 2 * n
        assert len(vectors) == len(re.findall(rf"{instruction}\.global\.v", ptx))

    # Nothing in local memory, and no more registers than two blocks, or three, have.
    assert not re.search(r"(ld|st)\.local", ptx)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", report)
    assert set(spills) == {("0", "0", "0")}  # of the kernel, and of what it calls
    (registers,) = map(int, re.findall(r"Used (\d+) registers", report))
    is_light = kind.param == kind.average in ("float32", "float64") and not kind.device_scalars
    assert registers <= (40 if is_light else 64) or (
        compute_capability == (7, 5)  # has threads for two blocks at most
    )

    # The words are parameters: read from the constant bank, not copied.
    (size,) = map(int, re.findall(r"\.param .*\.b8 \w+\[(\d+)\]", ptx))
    assert size == 8 * kind.n_words

    # Each operation rounds where it stands; the power in eta is the library's.
    if not kind.device_scalars:
        assert not re.search(r"\b(add|sub|mul|fma)\.f(32|64)|\.(ftz|sat|approx)\b|call", ptx)
    else:
        # Who draws the last ticket has read what the others have read, and is known to its block.
        assert re.search(
            r"bar\.sync.*atom\.global\.acq_rel\.gpu\.inc\.u32.*(bar|barrier)\.\S*red",
            ptx,
            re.DOTALL,
        )
    if kind.job == "update":
        assert {"mul.rn", "fma.rn", "add.rn"} <= set(re.findall(r"\b\w+\.rn", ptx))

    is_double = "float64" in kind or kind.device_scalars
    assert is_double or ".f64" not in ptx


@needs_compiler
def test_two_numbers_are_rounded_to_bfloat16_in_their_order():
    """The instruction takes the upper one first; on the CPU there is none like it."""
    from numba import cuda, types

    ops = intrinsics.make("cuda", (9, 0))
    word, (load, _), (_, store) = ops.word, ops.memory("float32", 8), ops.memory("bfloat16", 8)

    def body(words):
        store(word(words, 1), 0, load(word(words, 0), 0))

    words = types.void(intrinsics.Words(2))
    ptx, _ = cuda.compile(body, words, device=False, abi="numba", cc=(9, 0))
    loads = re.findall(r"ld\.global\.v4\.f32\s*{(.*?)},\s*\[%rd\d+(?:\+(\d+))?\]", ptx)
    loaded = [
        register
        for registers, _ in sorted(loads, key=lambda load: int(load[1] or 0))
        for register in re.findall(r"%f\d+", registers)
    ]
    rounded = {
        pair: [low, high]
        for pair, high, low in re.findall(r"cvt\.rn\.bf16x2\.f32\s*(%r\d+), (%f\d+), (%f\d+)", ptx)
    }
    (stored,) = re.findall(r"st\.global\.v4\.[bu]32\s*\[\S+\],\s*{(.*?)}", ptx)
    assert len(loaded) == 8
    assert [x for pair in re.findall(r"%r\d+", stored) for x in rounded[pair]] == loaded


@needs_compiler
@pytest.mark.parametrize("setting", [{"NUMBA_CUDA_DEBUGINFO": "1"}, {"NUMBA_OPT": "0"}], ids=str)
def test_numbas_environment_changes_no_kernel(setting):
    """What is on disk is used by processes that have another one."""
    code = "from asgd_fast.cuda import build; print(build.ptx_of(build.Kind(*{}), (9, 0)))"
    kind = ("exchange", "bits32", "bits32", False, 512)
    assert _run("-c", code.format(kind), **setting) == _run("-c", code.format(kind))


@needs_compiler
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_launch_goes_through_the_bindings(tmp_path):
    """All but the device is as on a GPU: compiler, linker, and the interface of the driver."""
    command = ["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", HERE / "stub_driver.c"]
    subprocess.run(command, check=True)
    script = str(HERE / "through_bindings.py")
    folders = {"LD_LIBRARY_PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    assert _run(script, **folders) == "launched\n"


@needs_compiler
def test_nothing_is_compiled_twice(tmp_path):
    """Another process finds the kernel on disk, and imports no compiler for it."""
    code = """
import sys
from asgd_fast.cuda import build
kind = build.Kind("exchange", "bits32", "bits32", False, 512)
print(len(build.stored(kind, (9, 0)).cubin), "numba" in sys.modules)
"""
    environment = {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    first, numba = _run("-c", code, **environment).split()
    again, no_numba = _run("-c", code, **environment).split()
    assert int(first) > 1000
    assert first == again
    assert (numba, no_numba) == ("True", "False")


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """A compiler that counts, and a folder of its own."""
    made = []

    def compile_one(kind, compute_capability):
        made.append((kind, compute_capability))
        return build.Binary("entry", b"code %d" % len(made))

    monkeypatch.setattr(build, "compiled", compile_one)
    monkeypatch.setattr(build, "user_cache_path", lambda name: tmp_path / name)
    return made


def test_a_kernel_comes_from_disk(compiled, tmp_path):
    first = build.stored(FLOAT32, (9, 0))
    assert build.stored(FLOAT32, (9, 0)) == first == build.Binary("entry", b"code 1")
    assert len(compiled) == 1
    (path,) = (tmp_path / "asgd_fast" / "cuda").iterdir()
    assert path.suffix == ".cubin"


def test_kernels_differ_by_kind_and_device(compiled):
    build.stored(FLOAT32, (9, 0))
    build.stored(FLOAT32, (8, 0))
    build.stored(FLOAT32._replace(n_words=1536), (9, 0))
    build.stored(FLOAT32._replace(device_scalars=True), (9, 0))
    assert len(compiled) == 4


@pytest.mark.parametrize("package", ["numba-cuda", "nvidia-nvvm", "asgd_fast's own sources"])
def test_another_version_compiles_anew(compiled, monkeypatch, package):
    build.stored(FLOAT32, (9, 0))
    if package in build.PACKAGES:
        versions = {package: "99.0"}
        real = build.version
        monkeypatch.setattr(build, "version", lambda name: versions.get(name) or real(name))
    else:
        monkeypatch.setattr(build, "FILES", (*build.FILES, "launch.py"))
    build.stored(FLOAT32, (9, 0))
    assert len(compiled) == 2


def test_all_sources_of_a_kernel_count():
    """When one of them changes, what is on disk is made anew."""
    code = """
import sys
from pathlib import Path
from asgd_fast.cuda import build, kernels
ours = [module for name, module in sys.modules.items() if name.startswith("asgd_fast.cuda.")]
print(*(Path(module.__file__).name for module in ours))
"""
    sources = [name for name in _run("-c", code).split() if name.endswith(".py")]
    assert sorted(sources) == sorted(build.FILES)


@pytest.mark.parametrize(
    "damage",
    [
        lambda x: b"",
        lambda x: x[:-1],
        lambda x: x[:40] + b"?" + x[41:],
        lambda x: b"?" + x[1:],
        lambda x: hashlib.sha256(b"\xff\ncode").digest() + b"\xff\ncode",
    ],
    ids=["empty", "short", "changed", "another digest", "an entry that is no name"],
)
def test_a_damaged_file_is_made_anew(compiled, tmp_path, damage):
    build.stored(FLOAT32, (9, 0))
    (path,) = (tmp_path / "asgd_fast" / "cuda").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(RuntimeWarning, match=r"not taken from .*\.cubin: the file is damaged$"):
        assert build.stored(FLOAT32, (9, 0)).cubin == b"code 2"
    assert build.stored(FLOAT32, (9, 0)).cubin == b"code 2"


@pytest.fixture
def umask(request):
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022], indirect=True, ids=oct)
def test_only_the_user_may_write_to_the_folder(compiled, tmp_path, umask):
    assert build.stored(FLOAT32, (9, 0)) == build.stored(FLOAT32, (9, 0))
    folder = tmp_path / "asgd_fast" / "cuda"
    (path,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def _link(path):
    path.rename(path.with_suffix(".other"))
    path.symlink_to(path.with_suffix(".other"))


def _fifo(path):
    path.unlink()
    os.mkfifo(path)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.chmod(0o622),
        lambda path: path.chmod(0o620),
        pytest.param(lambda path: os.chown(path, 1234, -1), marks=needs_root),
        _link,
        _fifo,
    ],
    ids=["others write", "the group writes", "another user's", "link", "FIFO"],
)
def test_a_file_that_others_can_change_is_made_anew(compiled, tmp_path, change):
    build.stored(FLOAT32, (9, 0))
    (path,) = (tmp_path / "asgd_fast" / "cuda").iterdir()
    change(path)
    with pytest.warns(RuntimeWarning, match=rf"not taken from {re.escape(str(path))}: ") as warned:
        assert build.stored(FLOAT32, (9, 0)).cubin == b"code 2"
    assert len(warned) == 1
    assert "\n" not in str(warned[0].message)
    assert build.stored(FLOAT32, (9, 0)).cubin == b"code 2"


def test_a_folder_in_the_place_of_a_file_is_left_alone(compiled, tmp_path):
    build.stored(FLOAT32, (9, 0))
    (path,) = (tmp_path / "asgd_fast" / "cuda").iterdir()
    path.unlink()
    path.mkdir()
    for code in (b"code 2", b"code 3"):
        with pytest.warns(RuntimeWarning, match="Is a directory"):
            assert build.stored(FLOAT32, (9, 0)).cubin == code


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: folder.chmod(0o777),
        lambda folder: folder.chmod(0o770),
        pytest.param(lambda folder: os.chown(folder, 1234, -1), marks=needs_root),
    ],
    ids=["others write", "the group writes", "another user's"],
)
def test_a_folder_that_others_can_change_is_not_used(compiled, tmp_path, change):
    build.stored(FLOAT32, (9, 0))
    folder = tmp_path / "asgd_fast" / "cuda"
    change(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for code in (b"code 2", b"code 3"):
        with pytest.warns(RuntimeWarning, match=r"asgd_fast/cuda: others may write to it"):
            assert build.stored(FLOAT32, (9, 0)).cubin == code
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_cannot_be_written(compiled, tmp_path):
    (tmp_path / "asgd_fast").write_text("a file in the way")
    assert build.stored(FLOAT32, (9, 0)).cubin == b"code 1"
    assert build.stored(FLOAT32, (9, 0)).cubin == b"code 2"


def test_nothing_is_kept_where_there_is_no_home(compiled, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "user_cache_path", lambda name: Path("~", ".cache", name))
    monkeypatch.chdir(tmp_path)
    assert build.stored(FLOAT32, (9, 0)).cubin == b"code 1"
    assert build.stored(FLOAT32, (9, 0)).cubin == b"code 2"
    assert not (tmp_path / "~").exists()


def _without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    return "ModuleNotFoundError: .*numba"


def _without_numba_cuda(monkeypatch):
    from numba import cuda

    monkeypatch.setattr(cuda, "implementation", "Built-in", raising=False)
    return "ImportError: numba-cuda is not installed"


def _of_unfit_versions(monkeypatch):
    from numba import cuda

    monkeypatch.setattr(cuda, "implementation", "NVIDIA", raising=False)
    monkeypatch.setitem(sys.modules, "asgd_fast.cuda.intrinsics", SimpleNamespace())
    return "ImportError: cannot import name 'Words'"


@pytest.mark.parametrize("fault", [_without_numba, _without_numba_cuda, _of_unfit_versions])
def test_a_compiler_that_is_missing_is_named(monkeypatch, fault):
    reason = fault(monkeypatch)
    with pytest.raises(ImportError, match=rf"pip install '\.\[cuda\]' \({reason}"):
        build.ptx_of(FLOAT32, (9, 0))


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "asgd_fast.cuda.launch", raising=False)
    monkeypatch.delitem(sys.modules, "asgd_fast.cuda.build", raising=False)
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    monkeypatch.setattr(update, "_prepared", update._prepared.__wrapped__)
    with pytest.raises(ImportError, match=r"need the packages of the cuda extra; in a clone"):
        asgd_(*(fake_gpu.Array(np.ones(3)) for _ in range(2)), eta=0.1)


@needs_compiler
def test_a_library_that_the_compiler_misses_is_named(monkeypatch):
    from cuda.bindings import nvjitlink
    from numba import cuda

    def missing(*_, **__):
        raise RuntimeError("Failure finding libnvrtc.so.13")

    ptx = build.ptx_of(FLOAT32, (9, 0))
    monkeypatch.setattr(cuda, "compile", missing)
    advice = r"compute capability 9\.0: Failure finding libnvrtc.so.13; .*'numba-cuda\[cu13\]'"
    with pytest.raises(RuntimeError, match=f"Numba made no kernel for {advice}"):
        build.ptx_of(FLOAT32, (9, 0))
    monkeypatch.setattr(nvjitlink, "create", missing)
    with pytest.raises(RuntimeError, match=f"nvJitLink made no kernel for {advice}"):
        build.link(ptx, (9, 0))
    monkeypatch.setattr(cuda, "compile", None)
    with pytest.raises(RuntimeError, match="NUMBA_ENABLE_CUDASIM"):
        build.ptx_of(FLOAT32, (9, 0))


@needs_compiler
def test_a_gpu_that_the_linker_does_not_know():
    with pytest.raises(RuntimeError, match=r"no kernel for compute capability 6\.1: "):
        build.link(".version 8.0\n.target sm_61\n.address_size 64\n", (6, 1))
