"""CUDA kernels for generation; imported only when a GPU runs them."""
