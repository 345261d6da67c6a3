"""Quantised matrices: int8 and int4 packed for the CPU, and int8 as the NPU computes it."""
