"""Shows the library's messages with flags in place of Python arguments.

The library writes an argument as Python does: `precision='w8a8'`, `force=True`, `tokenizer=FILE`, or `max_kl=` without
a value. On the command line these read `--precision w8a8`, `--force`, `--tokenizer FILE` and `--max-kl`.
"""

from __future__ import annotations

import re

_NAMED_ALIKE = (
    "adapter adapter_blocks adapter_init adapter_scale backend calibrate context cpu force frequency_penalty fusion "
    "host initial_state jobs layout max_kl max_tokens min_p npu_cores out penalty_decay plan port precision "
    "precision_map presence_penalty python raw remedies resume rows seed state state_store target threads template "
    "tokenizer toolkit top_k top_p verify"
)
FLAGS = {name: f"--{name.replace('_', '-')}" for name in _NAMED_ALIKE.split()} | {"temperature": "--temp"}

# NAME=VALUE, where the name is no part of a longer word or of a path. The value is quoted, or it ends before a space or
# punctuation.
_ARGUMENT = re.compile(rf"(?<![\w./-])({'|'.join(FLAGS)})=('[^']*'|\"[^\"]*\"|[^\s,;:()]*[^\s,;:().])?")
_NEEDS_NO_QUOTES = re.compile(r"[\w.,:/+*=-]+")


def as_flags(message: str) -> str:
    """Replace the Python arguments in a message by flags."""

    def flag(match: re.Match[str]) -> str:
        name, value = match[1], match[2] or ""
        if value in ("", "True"):
            return FLAGS[name]
        bare = value[1:-1]
        if value[0] in "'\"" and _NEEDS_NO_QUOTES.fullmatch(bare):
            value = bare
        return f"{FLAGS[name]} {value}"

    return _ARGUMENT.sub(flag, message)
