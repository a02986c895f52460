"""A pretend GPU: runs the whole CUDA path, except torch's own kernels, on the CPU. See README.md."""
