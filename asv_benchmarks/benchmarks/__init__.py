"""Benchmarks that asv runs on any commit, old ones included, to draw the project's speed over time.

Rules that all of them keep, since asv or its way of starting processes asks for them:

- Nothing is computed and ``asgd_fast`` is not imported while a module is imported. asv imports them
  in a server process from which it forks one process for each combination of params, and neither a
  pool of threads nor CUDA survives a fork; ``asgd_fast`` itself stays with one thread after one.
- No ``setup``: asv would run it before every single call and time these one by one. What a
  benchmark needs is made in its first call, which is not timed, and kept by `functools.lru_cache`.
  Only a benchmark that times single calls has a ``setup``, for what each call needs anew; it sets
  ``number = 1`` and ``warmup_time = 0``.
- What a commit, a machine or an installation lacks is skipped with its reason (`cases.skip`).
- ``version`` is raised when a workload changes, so that asv does not compare it with the old one.
"""

import sys
from pathlib import Path

# measure.py, models.py and plain.py, which the reports of ``make performance`` use too.
sys.path.append(str(Path(__file__).resolve().parents[1]))
