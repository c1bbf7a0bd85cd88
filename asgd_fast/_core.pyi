from typing import TypedDict

from asgd_fast._table import Table

class _Build(TypedDict):
    compiler: str
    cython: str
    flags: str
    openmp: bool

BUILD: _Build

def simd_levels() -> list[str]: ...
def simd_level() -> str: ...
def use_simd_level(level: str) -> None: ...
def update(table: Table) -> None: ...
def copy(table: Table) -> None: ...
