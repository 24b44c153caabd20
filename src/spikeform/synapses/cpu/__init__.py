"""Products on the CPU: the compiled library, or PyTorch's own operations where it is not built."""
