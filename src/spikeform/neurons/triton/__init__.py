"""Fused kernels of neurons. Imported only where they run; they need triton."""
