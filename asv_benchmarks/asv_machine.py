"""A plugin of asv that notes what this machine is, so that the first run asks no questions.

``ASGD_FAST_MACHINE`` in the environment adds a name for the machine, under which results that are
kept for long are recorded (``make bench-record``): many virtual machines share one host name.
"""

from __future__ import annotations

import os

from asv.machine import Machine, MachineCollection
from asv.util import UserError


def remember(name: str) -> None:
    """Note this machine under a name, unless there is one.

    Parameters
    ----------
    name : str
    """
    try:
        MachineCollection.load(name)
    except UserError:
        MachineCollection.save(name, {**Machine.get_defaults(), "machine": name})


def setup() -> None:
    """Note this machine; asv calls it when it loads the plugin."""
    remember(Machine.get_unique_machine_name())
    if "ASGD_FAST_MACHINE" in os.environ:
        remember(os.environ["ASGD_FAST_MACHINE"])
