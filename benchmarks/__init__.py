"""Benchmarks of this project, one a module, run by `llmi bench NAME`.

A module has `OVERRIDES` of the config that it starts from, and `run`, which takes the config and returns numbers.
"""
