"""Attention on codes as Triton kernels; imported only where one runs."""
