"""Triton kernels, one file per operation. Imported only when the backend is used: Triton may be absent."""
