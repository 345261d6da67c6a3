"""Read vocabulary files: World format (`.txt`), its packed form in this package, and `tokenizer.json`.

Files come from anywhere. Damaged, huge and malicious ones are refused with an error of one line.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from rwkv_npu.errors import LONGEST, TokenizerError, first_line
from rwkv_npu.formats.files import os_reason

END_OF_TEXT = 0

_LARGEST_FILE = 64_000_000  # bytes; a checkpoint named by mistake is refused before it is read
_LARGEST_ID = (1 << 24) - 1
_WORLD_LINE = re.compile(r"(\d+) +((?:[bB]?['\"]).*['\"]) +(\d+)", re.ASCII)


def read_vocabulary(path: Path) -> str:
    """The text of a vocabulary file. Raises TokenizerError."""
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise TokenizerError(f"{path}: too large for a vocabulary (over {_LARGEST_FILE / 1e6:.0f} MB)")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise TokenizerError(f"{path}: not a vocabulary: it is not UTF-8 text") from None
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: {os_reason(error)}") from None


# -- World format ----------------------------------------------------------------------------------------


def is_world(path: Path) -> bool:
    """True if the first line of a file is in World format."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            return _WORLD_LINE.fullmatch(file.readline(1024).strip()) is not None
    except (OSError, UnicodeDecodeError):
        return False


def parse_world_vocab(text: str, where: str) -> dict[int, bytes]:
    """Parse World format: each line holds an id, its token as a Python literal, and the token's length in bytes.

    Returns the bytes of each id. Carriage returns and blank lines are accepted. Raises TokenizerError with the line.
    """
    tokens: dict[int, bytes] = {}
    line_of: dict[bytes, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of unknown escapes in a literal
        for number, line in enumerate(text.split("\n"), 1):
            line = line.strip()
            if not line:
                continue
            try:
                token, data = _parse_world_line(line)
                if token == END_OF_TEXT or not data:  # some files list ids without a token, as padding
                    continue
                if token in tokens or data in line_of:
                    what = f"id {token}" if token in tokens else f"the token of line {line_of[data]}"
                    raise ValueError(f"{what} was given before")
            except ValueError as error:
                raise TokenizerError(f"{where}:{number}: {error}") from None
            tokens[token] = data
            line_of[data] = number
    if not tokens:
        raise TokenizerError(f"{where}: no vocabulary lines (`id 'token' length`) in it")
    return tokens


def _parse_world_line(line: str) -> tuple[int, bytes]:
    match = _WORLD_LINE.fullmatch(line)
    if match is None:
        raise ValueError(f"expected `id 'token' length`, found {line[:60]!r}")
    token, literal, length = int(match[1]), match[2], int(match[3])
    if token > _LARGEST_ID:
        raise ValueError(f"id {token} is outside 1..{_LARGEST_ID} (0 is end-of-text)")
    data = _literal_bytes(literal)
    if len(data) != length:
        raise ValueError(f"id {token} has {len(data)} bytes, but the line says {length}")
    return token, data


def _literal_bytes(literal: str) -> bytes:
    quote, inside = literal[0], literal[1:-1]
    if quote in "'\"" and literal[-1] == quote and "\\" not in inside and quote not in inside:
        return inside.encode()  # most lines; this is much faster than the parser
    try:
        value = ast.literal_eval(literal)
        return value if isinstance(value, bytes) else value.encode()
    except (ValueError, SyntaxError, TypeError, AttributeError, MemoryError, RecursionError):
        raise ValueError(f"not a Python string: {literal[:60]}") from None


def unpack_world_vocab(data: bytes) -> dict[int, bytes]:
    """Unpack the World vocabulary of the package. It holds the number of ids (4 bytes, little-endian), their lengths,
    and their bytes.
    """
    count = int.from_bytes(data[:4], "little")
    start = 4 + count
    tokens: dict[int, bytes] = {}
    for token, length in enumerate(data[4:start], 1):
        tokens[token] = data[start : start + length]
        start += length
    return tokens


# -- tokenizer.json --------------------------------------------------------------------------------------

# This program tries a tokenizer.json in a process of its own, within limits. A bad file can make the `tokenizers`
# package panic, or take gigabytes and minutes.
_TRIAL = """
import sys
memory, seconds = map(int, sys.argv[1:])
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except ImportError:  # Windows has no limits
    pass
import tokenizers
try:
    tokenizer = tokenizers.Tokenizer.from_str(sys.stdin.buffer.read().decode())
    ids = tokenizer.encode("A few words,\\n\\n 12 \\u00fc \\u4e2d", add_special_tokens=False).ids
    tokenizer.decode(ids), tokenizer.get_vocab(), tokenizer.to_str()
except BaseException as error:
    print(error)
    sys.exit(1)
"""
_TRIAL_SECONDS = 20
_TRIAL_MEMORY = 2 << 30  # bytes, plus forty times the size of the file


def try_tokenizer_json(json_text: str, where: str) -> None:
    """Try a file in a process with limits of time and memory. Raises TokenizerError if it cannot be used."""
    data = json_text.encode()
    command = [sys.executable, "-c", _TRIAL, str(_TRIAL_MEMORY + 40 * len(data)), str(_TRIAL_SECONDS)]
    # One thread: on 64 cores, the stacks and heaps of all threads would exceed the limit of address space.
    alone = {
        **os.environ,
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MALLOC_ARENA_MAX": "2",
    }
    limit = 10 * _TRIAL_SECONDS
    try:
        trial = subprocess.run(command, input=data, capture_output=True, timeout=limit, env=alone)
    except subprocess.TimeoutExpired:
        raise TokenizerError(f"{where}: not a usable tokenizer.json: reading it does not end") from None
    if trial.returncode == 0:
        return
    reason = " ".join(trial.stdout.decode(errors="replace").split())[:LONGEST]
    reason = (
        reason or f"reading it takes more than {_TRIAL_SECONDS} s or {_TRIAL_MEMORY / 1e9:.1f} GB, or fails"
    )
    raise TokenizerError(f"{where}: not a usable tokenizer.json: {reason}")


def parse_tokenizer_json(json_text: str, where: str) -> Any:
    try:
        from tokenizers import Tokenizer as HfTokenizer
    except ImportError:
        raise TokenizerError(f"{where}: needs the tokenizers package (pip install tokenizers)") from None
    try:
        return HfTokenizer.from_str(json_text)
    except Exception as error:  # the package raises nothing narrower
        raise TokenizerError(f"{where}: not a tokenizer.json: {first_line(error)}") from None
