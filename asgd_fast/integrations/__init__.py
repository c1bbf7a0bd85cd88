"""Averages put to use by training frameworks: each module is imported by its name alone.

Nothing else of the package imports this, and no module here imports more than its framework.
"""
