"""The GPU kernels audited without a GPU: compiled for every target, read, counted, and their time modelled.

`python -m benchmarks.audit` writes docs/gpu-audit.md and fails where a limit of limits.py is broken.
"""
