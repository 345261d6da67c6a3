"""Matrices in fewer bits: packed for the CPU, and in int8 as the NPU has it."""
