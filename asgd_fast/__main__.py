"""``python -m asgd_fast``: print what this installation is, ``--json`` for machines.

``--version`` prints the version alone.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version

from asgd_fast.config import show_config


def main() -> None:
    """Print the configuration as text or JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m asgd_fast",
        description="Show the versions, build and processor use of asgd_fast.",
    )
    parser.add_argument("--version", action="store_true", help="print the version alone")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    if arguments.version:
        print(f"asgd_fast {version('asgd_fast')}")
    elif arguments.json:
        print(json.dumps(show_config("dicts"), indent=2))
    else:
        show_config()


if __name__ == "__main__":
    main()
