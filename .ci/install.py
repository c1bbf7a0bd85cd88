"""Install what extras of pyproject.toml ask for, and not the package, which would be built again.

python .ci/install.py EXTRA ...
"""

import subprocess
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # before Python 3.11
    from pip._vendor import tomli as tomllib

project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
wanted = [requirement for extra in sys.argv[1:] for requirement in extras[extra]]
pip = [sys.executable, "-m", "pip", "install", "--quiet"]
sys.exit(subprocess.run([*pip, *wanted], check=False).returncode)
