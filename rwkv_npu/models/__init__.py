"""The generations of RWKV: one file each, with the same public names.

    att_mix, att_in     the inputs of the attention projections, and the projections
    ffn_mix, ffn        the same for the channel mix
    prepare, time_mix   the recurrence, in fp32 on the host

`network.py` partitions the maths into groups and runs the forward pass.
"""

from __future__ import annotations

from types import ModuleType

from rwkv_npu.models import v4, v5, v6, v7

MODULES: dict[str, ModuleType] = {
    "4": v4,
    "5.0": v5,
    "5.1": v5,
    "5.2": v5,
    "6": v6,
    "7": v7,
    "7a": v7,
}
