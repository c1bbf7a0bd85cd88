"""The reliability campaign: `make reliability` runs it, docs/reliability.md has its figures.

Each part is a module with `run(campaign)`, which counts what it tried and raises AssertionError for
what it finds, and with `CONTROLS`: planted faults, each of which `run` must find.
"""
