"""Clip + step timed against torch. Not installed: run from the root of the repository.

`make bench` runs test_step.py; `python -m benchmarks.gpu_acceptance` is for a machine with a GPU;
`python -m benchmarks.compare A.json B.json ...` compares results. docs/performance.md has the method.
"""
