"""The acceptance run on a GPU: `python -m benchmarks.gpu_acceptance`."""
