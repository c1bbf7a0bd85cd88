"""Builds the Cython modules, with compiler flags that are tried before they are used.

A flag for speed that the compiler does not know costs speed, never the build: without the flags of
a SIMD level that level is left out, and ``_core`` runs the best one that is both built and
supported by the processor. Without a flag for exactness there is no build. The description on a
package index is README.md with links to the repository. Everything else about the package stands in
pyproject.toml.
"""

from __future__ import annotations

import os
import re
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

if TYPE_CHECKING:
    from collections.abc import Sequence

# A placeholder, to be filled in here, in CITATION.cff and in both asv.conf.json.
REPOSITORY = "https://example.org/asgd_fast"

# Line tracing for `make coverage`: slow loops, so never in a build that people use.
TRACE = bool(os.environ.get("ASGD_FAST_TRACE"))

# The bits of the result are part of the contract (docs/numerics.md), so the compiler may neither
# contract a product and a sum into one rounding, nor reorder sums, whatever CFLAGS says.
EXACT = {"msvc": ["/fp:precise"], "unix": ["-ffp-contract=off", "-fno-fast-math"]}
OPTIMISE = {"msvc": ["/O2"], "unix": ["-O3", "-fno-math-errno", "-fno-trapping-math"]}

# Compilers answer -ffast-math, -Ofast or -funsafe-math-optimizations in CFLAGS by linking code that
# makes subnormal numbers 0 in the whole process, from the import on. Each of these takes one back.
LINK = {"msvc": [], "unix": ["-O3", "-fno-fast-math", "-fno-unsafe-math-optimizations"]}

# The loops are compiled once for each level; a level without flags here is built everywhere.
LEVELS: dict[str, dict[str, list[str]]] = {
    "baseline": {"msvc": [], "unix": []},
    "avx2": {"msvc": ["/arch:AVX2"], "unix": ["-mavx2", "-mfma", "-mf16c"]},
    "avx512": {
        "msvc": ["/arch:AVX512"],
        "unix": [
            "-mavx2",
            "-mfma",
            "-mf16c",
            "-mavx512f",
            "-mavx512vl",
            "-mavx512dq",
            "-mavx512bw",
        ],
    },
}


class ProbingBuildExt(build_ext):
    """A build_ext that adds the flags the compiler accepts and drops the levels it cannot build."""

    strict = False

    def build_extensions(self) -> None:
        """Settle each extension's flags, then build those that can be built."""
        kind = "msvc" if self.compiler.compiler_type == "msvc" else "unix"
        # Where the user's own CFLAGS warn, a warning says nothing about the flag that is tried.
        self.strict = kind == "unix" and self.accepts(["-Werror"])
        if not self.accepts(EXACT[kind]):
            raise CompileError(
                f"the compiler does not build an empty program with {' '.join(EXACT[kind])}, "
                "without which results would have other bits; its message stands above"
            )
        common = [flag for flag in OPTIMISE[kind] if self.accepts([flag])] + EXACT[kind]

        buildable = []
        for ext in self.extensions:
            level = ext.name.partition("._cpu.")[2]
            flags = LEVELS[level][kind] if level else []
            if flags and not self.accepts(flags):
                self.announce(f"{ext.name}: left out, the compiler lacks {' '.join(flags)}", 2)
                continue
            ext.extra_compile_args += common + flags
            ext.extra_link_args += LINK[kind]
            buildable.append(ext)
            if ext.name == "asgd_fast._core":
                ext.define_macros += [
                    ("ASGD_FAST_CYTHON", f'"{version("cython")}"'),
                    ("ASGD_FAST_FLAGS", f'"{" ".join(common)}"'),
                ]
        self.extensions = buildable
        super().build_extensions()

    def accepts(self, flags: Sequence[str]) -> bool:
        """Whether a program compiles with `flags`, and without a warning if strict."""
        strict = ["-Werror"] if self.strict else []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "probe.c")
            path.write_text("int main(void) { return 0; }\n")
            try:
                self.compiler.compile(
                    [str(path)], output_dir=folder, extra_postargs=[*strict, *flags]
                )
            except CompileError:
                return False
        return True


def description() -> str:
    """Return README.md with absolute links: pictures as files, pages as the host shows them."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    link = r"(!?)\[((?:[^][]|\[[^]]*\])*)\]\((?![a-z]+:|#)([^)]+)\)"

    def absolute(found: re.Match[str]) -> str:
        is_picture, label, path = found.groups()
        kind = "raw" if is_picture else "blob"
        return f"{is_picture}[{label}]({REPOSITORY}/{kind}/HEAD/{path})"

    return re.sub(link, absolute, text)


names = [
    "_schedule",
    "_rows/dlpack",
    "_rows/describe",
    "_rows/overlap",
    "_rows/rows",
    "_torch/memory",
    "_torch/parts",
    "_torch/record",
    "_torch/gather",
    "_torch/exchange",
    "_core",
    *(f"_cpu/{level}" for level in LEVELS),
    "cuda/launches",
    "cuda/scalars",
]
extensions = [
    Extension(
        f"asgd_fast.{name.replace('/', '.')}",
        [f"asgd_fast/{name}.pyx"],
        depends=[f"asgd_fast/_cpu/{file}" for file in ("loops.pxi", "simd.h")]
        if name.startswith("_cpu")
        else [],
        include_dirs=[numpy.get_include()],
        define_macros=[
            ("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"),
            *([("CYTHON_TRACE_NOGIL", "1")] if TRACE else []),
        ],
    )
    for name in names
]

setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    project_urls={
        "Repository": REPOSITORY,
        "Documentation": f"{REPOSITORY}/blob/HEAD/README.md",
        "Changelog": f"{REPOSITORY}/blob/HEAD/CHANGELOG.md",
        "Issues": f"{REPOSITORY}/issues",
    },
    ext_modules=cythonize(
        extensions,
        compiler_directives={
            "language_level": "3",
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "embedsignature": True,
            "linetrace": TRACE,
        },
    ),
    cmdclass={"build_ext": ProbingBuildExt},
)
