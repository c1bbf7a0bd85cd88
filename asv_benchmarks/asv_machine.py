"""A plugin of asv, to which this machine is known, so that nothing asks for it.

The first run notes what it is, and ``asv compare`` takes its results, not those of other machines
that the repository keeps.

``ASGD_FAST_MACHINE`` in the environment adds a name for the machine, under which results that are
kept for long are recorded (``make bench-record``): many virtual machines share one host name.
"""

from __future__ import annotations

import json
import os
import platform
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
    """Return the processor's name and SIMD level: some virtual machines tell no more of the first.

    Returns
    -------
    str
    """
    name: str = Machine.get_defaults()["cpu"]
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii").split()
    except OSError:
        return name
    levels = {"avx512f": "avx512", "avx2": "avx2"}
    return ", ".join([name, *[level for flag, level in levels.items() if flag in flags][:1]])


def refuse_others(name: str) -> None:
    """Raise UserError if the folder of that name has results of another processor.

    Parameters
    ----------
    name : str
    """
    path = Path(__file__).parent / "results" / name / "machine.json"
    if path.exists():
        recorded = json.loads(path.read_text(encoding="utf-8"))["cpu"]
        if recorded != processor():
            raise UserError(
                f"{name}: its results are of {recorded!r}, and this is {processor()!r}; "
                "expected the name of another machine"
            )


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
    if "ASGD_FAST_MACHINE" in os.environ:
        refuse_others(os.environ["ASGD_FAST_MACHINE"])
        remember(os.environ["ASGD_FAST_MACHINE"])
    compare_this_machine()
