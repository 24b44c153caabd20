"""Fused kernels of synapses. Imported only where they run; they need triton."""
