"""The CUDA kernels of `plugins/`, loaded without a compiler; without them the torch references run."""
