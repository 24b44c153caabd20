"""Attention on the CPU: the compiled library where there is one, else the layer's own PyTorch code."""
