"""Text to token ids and back: the World vocabulary, and any `tokenizer.json` (such as the Pile models').

This module knows no models. Ids index the V rows of a head; id 0 ends a text in both vocabularies. Ids are decoded to
bytes first, so that a stream can hold back an incomplete character.
"""

from __future__ import annotations

import ast
import codecs
import functools
import gzip
import hashlib
import importlib.resources
import os
import re
import subprocess
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_npu.errors import LONGEST, TokenizerError, first_line
from rwkv_npu.formats.files import os_reason

END_OF_TEXT = 0
WORLD, PILE = "world", "pile"
PILE_IDS = 50277
BUILTIN_BY_VOCAB_SIZE = {65536: WORLD, PILE_IDS: PILE}
_RESOURCES = {WORLD: "world_vocab.bin.gz", PILE: "20B_tokenizer.json.gz"}
_LARGEST_FILE = 64_000_000  # bytes; a checkpoint named by mistake is refused before it is read
_LARGEST_ID = (1 << 24) - 1
_WORLD_LINE = re.compile(r"(\d+) +((?:[bB]?['\"]).*['\"]) +(\d+)", re.ASCII)
_REPLACEMENT = "\ufffd".encode()
_UNCOUNTED = b" \t0123456789"


class StreamDecoder:
    """Turns ids into text one at a time, holding back bytes that may be the start of a character.

    The pieces joined, `finish()` last, equal `Tokenizer.decode` of all the ids.
    """

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character is incomplete."""
        return self._utf8.decode(self._bytes_of(token))

    def finish(self) -> str:
        """The bytes still held back, as U+FFFD, or "". The decoder can be used afresh afterwards."""
        rest = self._utf8.decode(b"", True)
        self._utf8.reset()
        return rest


class _WindowDecoder(StreamDecoder):
    """For vocabularies in which an id's text depends on its neighbours: decodes the last ids with and without it."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._shown = 0  # ids of the window whose text was given out

    def push(self, token: int) -> str:
        self._window.append(token)
        text = self._unshown()
        if not text or text.endswith("\ufffd"):
            return ""
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return text

    def finish(self) -> str:
        rest = self._unshown()
        self._window, self._shown = [], 0
        return rest

    def _unshown(self) -> str:
        return self._decode(self._window)[len(self._decode(self._window[: self._shown])) :]


class Tokenizer(ABC):
    """The interface of a vocabulary.

    name: "world", "pile", or the file's name. source: the builtin's name, or the Path it was read from.
    vocab_size: 1 + the largest id with a token; a head may have more rows than that.
    """

    eos_id = END_OF_TEXT
    special: frozenset[int] = (
        frozenset()
    )  # ids of tokens such as <|im_end|>, which end a text beside `eos_id`

    def __init__(self, name: str, source: str | Path, ids: Iterable[int]) -> None:
        self.name = name
        self.source = source
        self._ids = np.fromiter(ids, dtype=np.int64)
        self.vocab_size = 1 + int(self._ids.max())

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`; [] for "". TokenizerError where the vocabulary cannot write it."""

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that the model continues. As `encode`, except for the end of the text in some vocabularies."""
        return self.encode(text)

    @property
    @abstractmethod
    def digest(self) -> str:
        """A digest of the vocabulary: tokenizers with equal digests return equal ids."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes | None:
        """The bytes of one id, b"" for end-of-text; None when the vocabulary has no such id."""

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the ids; bytes that are not UTF-8, and ids without a token, become U+FFFD."""
        return b"".join(map(self._bytes_or_replacement, tokens)).decode("utf-8", "replace")

    def decoder(self) -> StreamDecoder:
        """A new incremental decoder."""
        return StreamDecoder(self._bytes_or_replacement)

    def has_text(self, vocab_size: int) -> np.ndarray:
        """(V,) bool over a head of `vocab_size` rows: the ids that may be sampled, end-of-text among them."""
        mask = np.zeros(vocab_size, dtype=bool)
        mask[self._ids[self._ids < vocab_size]] = True
        mask[self.eos_id] = True
        return mask

    def uncounted(self, token: int) -> bool:
        """True if repeats of this id are free in RWKV's frequency penalty: a space, a tab, a run of digits.

        Source: `PIPELINE.generate` in the rwkv package.
        """
        data = self.token_bytes(token)
        return data is not None and data in _UNCOUNTED

    def _bytes_or_replacement(self, token: int) -> bytes:
        data = self.token_bytes(token)
        return _REPLACEMENT if data is None else data


class WorldTokenizer(Tokenizer):
    """Greedy longest match over UTF-8 bytes, the tokenizer of the World models.

    `tokens` maps ids (1 and up) to their bytes. Source of the rule: `rwkv_tokenizer.py` in the rwkv package.
    """

    def __init__(self, tokens: Mapping[int, bytes], *, name: str, source: str | Path) -> None:
        super().__init__(name, source, tokens)
        self._tokens = {END_OF_TEXT: b"", **tokens}
        self._longest_match = _prefix_table(tokens)

    def encode(self, text: str) -> list[int]:
        return self.encode_bytes(_utf8(text))

    def encode_bytes(self, data: bytes | bytearray) -> list[int]:
        """Ids of any bytes, UTF-8 or not. TokenizerError if a small vocabulary lacks a byte."""
        lookup = self._longest_match.get
        data, size = bytes(data), len(data)
        tokens: list[int] = []
        start = 0
        while start < size:
            token, end, stop = 0, start, start + 1
            found = lookup(data[start:stop])
            while found is not None:
                if found:
                    token, end = found, stop
                if stop == size:
                    break
                stop += 1
                found = lookup(data[start:stop])
            if not token:
                raise TokenizerError(
                    f"{self.source}: no token begins at byte 0x{data[start]:02x} of the text"
                )
            tokens.append(token)
            start = end
        return tokens

    @property
    def digest(self) -> str:
        return _digest(repr(sorted(self._tokens.items())))

    def token_bytes(self, token: int) -> bytes | None:
        return self._tokens.get(token)


class PileTokenizer(Tokenizer):
    """Any `tokenizer.json`, run by the `tokenizers` package; `20B_tokenizer.json` is the Pile models'.

    Special tokens have no text, as in the rwkv package: decode of `<|endoftext|>` is "". The 20B vocabulary
    normalises text to Unicode's NFC, so text that is not in NFC comes back composed.
    """

    def __init__(self, json_text: str, *, name: str, source: str | Path) -> None:
        self._hf = _parse_tokenizer_json(json_text, str(source))
        self._hf.no_truncation()
        self._hf.no_padding()
        ids = self._hf.get_vocab().values()
        if not ids:
            raise TokenizerError(f"{source}: the vocabulary is empty")
        super().__init__(name, source, ids)
        added = self._hf.get_added_tokens_decoder().items()
        self.special = frozenset(token for token, added_token in added if added_token.special)
        self._byte_level = type(self._hf.decoder).__name__ == "ByteLevel"

    def encode(self, text: str) -> list[int]:
        _utf8(text)
        return list(self._hf.encode(text, add_special_tokens=False).ids)

    def encode_prompt(self, text: str) -> list[int]:
        """Blank lines at the end are fed newline by newline, as the Pile models were trained to continue them."""
        body = text[:-2] if text.endswith("\n\n") else text
        return self.encode(body) + self.encode("\n") * (len(text) - len(body))

    @property
    def digest(self) -> str:
        return _digest(self._hf.to_str())

    def token_bytes(self, token: int) -> bytes | None:
        piece = self._hf.id_to_token(token) if 0 <= token < self.vocab_size else None
        if piece is None:
            return None
        if token in self.special:
            return b""
        if not self._byte_level:
            return self._hf.decode([token]).encode()
        try:
            return bytes(map(_byte_alphabet().__getitem__, piece))
        except KeyError:  # an added token, such as a run of spaces, stands for itself
            return piece.encode()

    def decode(self, tokens: Iterable[int]) -> str:
        return super().decode(tokens) if self._byte_level else self._hf.decode(list(tokens))

    def decoder(self) -> StreamDecoder:
        return super().decoder() if self._byte_level else _WindowDecoder(self.decode)


@functools.cache
def builtin(name: str) -> Tokenizer:
    """The shipped tokenizer "world" or "pile"; one shared object each."""
    if name not in _RESOURCES:
        raise TokenizerError(f"no built-in tokenizer {name!r}: there are {', '.join(sorted(_RESOURCES))}")
    packed = importlib.resources.files("rwkv_npu").joinpath("data").joinpath(_RESOURCES[name]).read_bytes()
    data = gzip.decompress(packed)
    if name == WORLD:
        return WorldTokenizer(unpack_world_vocab(data), name=name, source=name)
    return PileTokenizer(data.decode(), name=name, source=name)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a vocabulary file, told apart by content: JSON (a `tokenizer.json`) or World lines.

    Errors: TokenizerError, one line naming the file, and the line of it that is wrong.
    """
    path = Path(path)
    text = _read_text(path)
    if text.lstrip().startswith("{"):
        if re.match(r'\s*\{\s*"\d+"\s*:', text):
            raise TokenizerError(f"{path}: a vocabulary in web-rwkv's JSON form: use world, or its .txt form")
        _try_tokenizer_json(text, str(path))
        return PileTokenizer(text, name=path.name, source=path)
    return WorldTokenizer(parse_world_vocab(text, str(path)), name=path.name, source=path)


def find_or_explain(*, vocab_size: int, beside: Path) -> tuple[Tokenizer | None, str]:
    """As `find_tokenizer`, but without errors: the tokenizer, or None and the reason."""
    try:
        found = find_tokenizer(vocab_size=vocab_size, beside=beside)
    except TokenizerError as error:
        return None, str(error)
    return found, "" if found else unknown_vocabulary(vocab_size)


def unknown_vocabulary(vocab_size: int) -> str:
    """The error message for a model without a known vocabulary. vocab_size: rows of its head."""
    pile = 0 <= vocab_size - PILE_IDS < 256  # 50277, or rounded up for fast products
    hint = "give tokenizer='pile' if it is a Pile model" if pile else "give tokenizer=FILE"
    return f"no vocabulary is known for this model of {vocab_size} tokens: {hint}, or ids"


def find_tokenizer(
    *, vocab_size: int, beside: Path | None = None, override: str | Path | None = None
) -> Tokenizer | None:
    """The tokenizer of a model whose head has `vocab_size` rows; None when nothing fits.

    In this order: `override` (a file, or a builtin's name); a file in the folder of the checkpoint `beside`
    (`*vocab*.txt` in World format, or `tokenizer.json`); the builtin for that head.
    Errors: TokenizerError when the override has more ids than the head has rows, or a file is damaged.
    """
    if override is not None:
        is_name = str(override) in _RESOURCES and not Path(override).exists()
        chosen = builtin(str(override)) if is_name else load_tokenizer(override)
        if chosen.vocab_size > vocab_size:
            ids = f"ids up to {chosen.vocab_size - 1}"
            raise TokenizerError(f"{override}: it has {ids}, but the model's head has {vocab_size} rows")
        return chosen
    found = _tokenizer_beside(beside, vocab_size) if beside is not None else None
    if found is None and vocab_size in BUILTIN_BY_VOCAB_SIZE:
        found = builtin(BUILTIN_BY_VOCAB_SIZE[vocab_size])
    return found


def _tokenizer_beside(checkpoint: Path, vocab_size: int) -> Tokenizer | None:
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    world = [load_tokenizer(path) for path in sorted(folder.glob("*vocab*.txt")) if _looks_like_world(path)]
    # Two files with the same vocabulary count once.
    fitting = list({one.digest: one for one in world if one.vocab_size <= vocab_size}.values())
    if len(fitting) > 1:
        names = ", ".join(tokenizer.name for tokenizer in fitting)
        raise TokenizerError(
            f"{folder}: more than one vocabulary fits the model ({names}): name the one to use"
        )
    if not fitting and (folder / "tokenizer.json").is_file():
        # All models use this file name: the file may be another model's. A head has one row for each id, padded to a
        # round number.
        other = load_tokenizer(folder / "tokenizer.json")
        fitting = [other] if 0 <= vocab_size - other.vocab_size < 1024 else []
    return fitting[0] if fitting else None


def _looks_like_world(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return _WORLD_LINE.fullmatch(file.readline(1024).strip()) is not None
    except (OSError, UnicodeDecodeError):
        return False


def parse_world_vocab(text: str, where: str) -> dict[int, bytes]:
    """{id: bytes} of a World-format text: lines `id repr bytelen`, repr a Python str or bytes literal.

    CRLF and blank lines are accepted. Errors: TokenizerError "where:line: what is wrong".
    """
    tokens: dict[int, bytes] = {}
    line_of: dict[bytes, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's own remarks about odd escapes in a literal
        for number, line in enumerate(text.split("\n"), 1):
            line = line.strip()
            if not line:
                continue
            try:
                token, data = _parse_world_line(line)
                if token == END_OF_TEXT or not data:  # padding: some files list the rows that have no token
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
        return inside.encode()  # most lines, and much faster than the parser
    try:
        value = ast.literal_eval(literal)
        return value if isinstance(value, bytes) else value.encode()
    except (ValueError, SyntaxError, TypeError, AttributeError, MemoryError, RecursionError):
        raise ValueError(f"not a Python string: {literal[:60]}") from None


def unpack_world_vocab(data: bytes) -> dict[int, bytes]:
    """{id: bytes} of the shipped form: count (4 bytes, little-endian), a length byte for each id, tokens."""
    count = int.from_bytes(data[:4], "little")
    start = 4 + count
    tokens: dict[int, bytes] = {}
    for token, length in enumerate(data[4:start], 1):
        tokens[token] = data[start : start + length]
        start += length
    return tokens


def _prefix_table(tokens: Mapping[int, bytes]) -> dict[bytes, int]:
    """A trie as a flat dict: the id of every token, and 0 for every prefix of a token that is not a token."""
    table = {data: token for token, data in tokens.items()}
    for data in tokens.values():
        end = len(data) - 1
        while end > 0 and data[:end] not in table:
            table[data[:end]] = 0
            end -= 1
    return table


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Character to byte in byte-level BPE: printable Latin-1 is itself, the rest count up from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


# Reads and uses a tokenizer.json within limits: parsing one can panic, or take gigabytes and minutes.
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
_TRIAL_MEMORY = 2 << 30  # bytes, and forty times the file


def _try_tokenizer_json(json_text: str, where: str) -> None:
    """Raises TokenizerError for a file that the `tokenizers` package cannot read, or not within the limits."""
    data = json_text.encode()
    command = [sys.executable, "-c", _TRIAL, str(_TRIAL_MEMORY + 40 * len(data)), str(_TRIAL_SECONDS)]
    # One thread: those of 64 cores would reserve more addresses than the limit allows.
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


def _parse_tokenizer_json(json_text: str, where: str) -> Any:
    try:
        from tokenizers import Tokenizer as HfTokenizer
    except ImportError:
        raise TokenizerError(f"{where}: needs the tokenizers package (pip install tokenizers)") from None
    try:
        return HfTokenizer.from_str(json_text)
    except Exception as error:  # the package raises nothing narrower
        raise TokenizerError(f"{where}: not a tokenizer.json: {first_line(error)}") from None


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise TokenizerError(f"{path}: too large for a vocabulary (over {_LARGEST_FILE / 1e6:.0f} MB)")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise TokenizerError(f"{path}: not a vocabulary: it is not UTF-8 text") from None
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: {os_reason(error)}") from None


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        char = ord(text[error.start])
        raise TokenizerError(f"the text has a lone surrogate, U+{char:04X}, at {error.start}") from None
