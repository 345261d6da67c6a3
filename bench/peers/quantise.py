"""Quantises a GGUF file with llama.cpp's own quantiser, as `llama-quantize` does without options.

PYTHON bench/peers/quantise.py F16.gguf OUT.gguf Q8_0 THREADS        (in the environment of llama.cpp)
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(source: str, target: str, kind: str, threads: str) -> int:
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.nthread = int(threads)
    partial = Path(target + ".partial")
    if llama_cpp.llama_model_quantize(source.encode(), str(partial).encode(), parameters):
        raise SystemExit(f"llama.cpp did not quantise {source}")
    partial.replace(target)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
