"""A plugin of asv, to which this machine is known, so that nothing asks for it.

The first run notes what it is, and ``asv compare`` takes its results, not those of other machines
that the repository keeps.

Results that are kept for long are recorded under a name made of the processor (``make
bench-record``), since many virtual machines share one host name. Run as a program, this file prints
it.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from functools import wraps
from pathlib import Path
from typing import Any

from asv.commands.compare import Compare
from asv.machine import Machine, MachineCollection
from asv.util import UserError


def remember(name: str) -> None:
    """Note this machine under a name, unless there is one.

    Without the version of its kernel and the odd bytes of its memory: after an update it would be
    another machine, with a line of its own.

    Parameters
    ----------
    name : str
    """
    try:
        MachineCollection.load(name)
    except UserError:
        found = {**Machine.get_defaults(), "machine": name, "os": platform.system()}
        found["cpu"] = processor()
        if found["ram"].isdecimal():
            found["ram"] = f"{round(int(found['ram']) / 2**30)} GiB"
        MachineCollection.save(name, found)


def processor() -> str:
    """Return the processor's name, family, model, stepping and SIMD level, as far as they are told.

    On virtual machines very different processors are called "AMD EPYC".

    Returns
    -------
    str
    """
    name: str = Machine.get_defaults()["cpu"]
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii")
    except OSError:
        return name
    found = dict(re.findall(r"^(.*?)\t*: (.*)$", text, re.MULTILINE))
    family = [found[fact] for fact in ("cpu family", "model", "stepping") if fact in found]
    if family:
        name = f"{name} {'/'.join(family)}"
    levels = {"avx512f": "avx512", "avx2": "avx2"}
    flags = text.split()
    return ", ".join([name, *[level for flag, level in levels.items() if flag in flags][:1]])


def lasting_name() -> str:
    """Return the name of the folder of results that are kept: the processor's, and its cores.

    Another processor is another machine, with lines of its own.

    Returns
    -------
    str
    """
    words = re.findall(r"[a-z0-9]+", processor().lower())
    return "-".join([*words, Machine.get_defaults()["num_cpu"], "cores"])


def prefer_this_interpreter() -> None:
    """Let asv find the interpreter that runs it, whatever is first on PATH."""
    folder = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])


def compare_this_machine() -> None:
    """Make this machine's results those that ``asv compare`` takes, if there are any.

    Where there are those of several machines, it asks for ``--machine`` otherwise.
    """
    compare = Compare.run

    @wraps(compare)
    def run(conf: Any, *arguments: Any, machine: str | None = None, **options: Any) -> Any:
        own = MachineCollection.load(Machine.get_unique_machine_name())["machine"]
        if machine is None and Path(conf.results_dir, own).is_dir():
            machine = own
        return compare(conf, *arguments, machine=machine, **options)

    Compare.run = run


def setup() -> None:
    """Do all of that; asv calls it when it loads the plugin."""
    remember(Machine.get_unique_machine_name())
    remember(lasting_name())
    prefer_this_interpreter()
    compare_this_machine()


if __name__ == "__main__":
    print(lasting_name())
