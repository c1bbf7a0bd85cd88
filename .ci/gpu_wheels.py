"""Download what gpu.py may have to install where no network is, into build/gpu-wheels.

    python .ci/gpu_wheels.py

These are the wheels of the package's dependencies and of the extra "cuda", for Python 3.12 on
Linux, without the bindings and the compiler of CUDA's toolkit, which torch and Numba bring there.
They are packed more tightly, and without their tests, so that they are easier to carry.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZIP_LZMA, ZipFile

try:
    import tomllib
except ModuleNotFoundError:  # before Python 3.11
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / "build" / "gpu-wheels"
PLATFORMS = [f"--platform=manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17)]
ALREADY_THERE = ("cuda_bindings", "packaging")


def packed(path: Path) -> Path:
    """Compress the members of a wheel again, by LZMA."""
    smaller = path.with_suffix(".packed")
    with ZipFile(path) as old, ZipFile(smaller, "w") as new:
        for member in (x for x in old.infolist() if "/tests/" not in x.filename):
            content = old.read(member)
            member.compress_type = ZIP_LZMA
            new.writestr(member, content)
    return smaller.replace(path)


def main() -> None:
    """Download, pack, and print the sizes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["cuda"]]
    wanted = [re.sub(r"\[.*?\]", "", requirement) for requirement in wanted]
    shutil.rmtree(WHEELS, ignore_errors=True)
    target = ["--python-version=3.12", "--implementation=cp", *PLATFORMS, f"--dest={WHEELS}"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"]
    subprocess.run([*pip, *target, *wanted], check=True)
    (WHEELS / "requirements.txt").write_text("\n".join(wanted) + "\n")
    for path in sorted(WHEELS.glob("*.whl")):
        if path.name.startswith(ALREADY_THERE):
            path.unlink()
        else:
            print(f"{packed(path).stat().st_size / 2**20:6.2f} MiB  {path.name}", flush=True)


if __name__ == "__main__":
    main()
