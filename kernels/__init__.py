"""Triton kernels, their launchers, and the eager PyTorch reference of each."""
