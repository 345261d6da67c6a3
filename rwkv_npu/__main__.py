"""`python -m rwkv_npu` is the command line."""

from rwkv_npu.cli import entry

entry()
