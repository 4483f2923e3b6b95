"""Triton kernels, one file an op; they write into outputs that the op has allocated.

Importing a kernel's file imports Triton; `_tiles`, which picks configurations, and `_limits` do
not. Nothing here is imported before a call needs it.
"""
