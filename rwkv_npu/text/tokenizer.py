"""Text to token ids and back: the World vocabulary, and any `tokenizer.json` (such as the Pile models').

This module knows no models. A vocabulary maps ids to bytes. An id is a row of the model's head. Id 0 ends a text in
every vocabulary. Ids are decoded to bytes first, so that a stream can hold back an incomplete character.
"""

from __future__ import annotations

import codecs
import functools
import gzip
import hashlib
import importlib.resources
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from rwkv_npu.errors import TokenizerError
from rwkv_npu.text.vocabulary import (
    END_OF_TEXT,
    is_world,
    parse_tokenizer_json,
    parse_world_vocab,
    read_vocabulary,
    try_tokenizer_json,
    unpack_world_vocab,
)

WORLD, PILE = "world", "pile"
PILE_IDS = 50277
BUILTIN_BY_VOCAB_SIZE = {65536: WORLD, PILE_IDS: PILE}
_RESOURCES = {WORLD: "world_vocab.bin.gz", PILE: "20B_tokenizer.json.gz"}
_REPLACEMENT = "\ufffd".encode()
_UNCOUNTED = b" \t0123456789"


class StreamDecoder:
    """Decodes a stream of ids. Bytes that may be the start of a character are held back.

    All pieces of text, with that of `finish`, make up `Tokenizer.decode` of all ids.
    """

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Add an id. Returns the text that it completes, "" while a character is incomplete."""
        return self._utf8.decode(self._bytes_of(token))

    def finish(self) -> str:
        """End the stream. Returns bytes that were held back, as U+FFFD. Then the decoder can decode another stream."""
        rest = self._utf8.decode(b"", True)
        self._utf8.reset()
        return rest


class _WindowDecoder(StreamDecoder):
    """Decodes the last few ids together, for vocabularies in which the text of an id depends on the ids before it."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._shown = 0  # ids of the window whose text was returned

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
    """Encodes text with a vocabulary, and decodes ids.

    name: "world", "pile", or the file's name. source: the name of a builtin vocabulary, or the file's path.
    vocab_size: the largest id + 1. A head may have more rows.
    special: ids of tokens such as <|im_end|>, which end a text as `eos_id` does.
    """

    eos_id = END_OF_TEXT
    special: frozenset[int] = frozenset()

    def __init__(self, name: str, source: str | Path, ids: Iterable[int]) -> None:
        self.name = name
        self.source = source
        self._ids = np.fromiter(ids, dtype=np.int64)
        self.vocab_size = 1 + int(self._ids.max())

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text, [] for "". Raises TokenizerError if the vocabulary lacks a byte of it."""

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt. The Pile vocabulary encodes a blank line at its end in another way."""
        return self.encode(text)

    @property
    @abstractmethod
    def digest(self) -> str:
        """Digest of the vocabulary. Tokenizers with equal digests return equal ids."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes | None:
        """The bytes of an id, b"" for end-of-text. None if the vocabulary has no such id."""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of ids. Bytes that are not UTF-8, and unknown ids, become U+FFFD."""
        return b"".join(map(self._bytes_or_replacement, tokens)).decode("utf-8", "replace")

    def decoder(self) -> StreamDecoder:
        """A new incremental decoder."""
        return StreamDecoder(self._bytes_or_replacement)

    def has_text(self, vocab_size: int) -> np.ndarray:
        """(vocab_size,) bool. True for ids that may be sampled: those with text, and end-of-text."""
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
    """The tokenizer of the World models: at each byte of UTF-8 it takes the longest token that matches.

    tokens: the bytes of each id from 1 on. Source: `rwkv_tokenizer.py` in the rwkv package.
    """

    def __init__(self, tokens: Mapping[int, bytes], *, name: str, source: str | Path) -> None:
        super().__init__(name, source, tokens)
        self._tokens = {END_OF_TEXT: b"", **tokens}
        self._longest_match = _prefix_table(tokens)

    def encode(self, text: str) -> list[int]:
        return self.encode_bytes(_utf8(text))

    def encode_bytes(self, data: bytes | bytearray) -> list[int]:
        """Ids of any bytes, UTF-8 or not. Raises TokenizerError if the vocabulary lacks a byte."""
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
    """The tokenizer of a `tokenizer.json`, run by the `tokenizers` package. The Pile models use `20B_tokenizer.json`.

    Special tokens such as `<|endoftext|>` have no text, as in the rwkv package. The Pile vocabulary changes text to
    Unicode's NFC: letters and their accents come back as one character.
    """

    def __init__(self, json_text: str, *, name: str, source: str | Path) -> None:
        self._hf = parse_tokenizer_json(json_text, str(source))
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
        """Like `encode`, but a blank line at the end becomes two newline tokens, as in the training of Pile models."""
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
    """The builtin tokenizer "world" or "pile". All callers share one object."""
    if name not in _RESOURCES:
        raise TokenizerError(f"no built-in tokenizer {name!r}: there are {', '.join(sorted(_RESOURCES))}")
    packed = importlib.resources.files("rwkv_npu").joinpath("data").joinpath(_RESOURCES[name]).read_bytes()
    data = gzip.decompress(packed)
    if name == WORLD:
        return WorldTokenizer(unpack_world_vocab(data), name=name, source=name)
    return PileTokenizer(data.decode(), name=name, source=name)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a vocabulary file: a `tokenizer.json` or World format, recognised by its content.

    Raises TokenizerError with the file and the line that is wrong.
    """
    path = Path(path)
    text = read_vocabulary(path)
    if text.lstrip().startswith("{"):
        if re.match(r'\s*\{\s*"\d+"\s*:', text):
            raise TokenizerError(f"{path}: a vocabulary in web-rwkv's JSON form: use world, or its .txt form")
        try_tokenizer_json(text, str(path))
        return PileTokenizer(text, name=path.name, source=path)
    return WorldTokenizer(parse_world_vocab(text, str(path)), name=path.name, source=path)


def find_or_explain(*, vocab_size: int, beside: Path) -> tuple[Tokenizer | None, str]:
    """Like `find_tokenizer`, but never raises: returns the tokenizer, or None and the reason."""
    try:
        found = find_tokenizer(vocab_size=vocab_size, beside=beside)
    except TokenizerError as error:
        return None, str(error)
    return found, "" if found else unknown_vocabulary(vocab_size)


def unknown_vocabulary(vocab_size: int) -> str:
    """The error message for a model without a known vocabulary. vocab_size: rows of its head."""
    pile = 0 <= vocab_size - PILE_IDS < 256  # some models have more rows, up to a round number
    hint = "give tokenizer='pile' if it is a Pile model" if pile else "give tokenizer=FILE"
    return f"no vocabulary is known for this model of {vocab_size} tokens: {hint}, or ids"


def find_tokenizer(
    *, vocab_size: int, beside: Path | None = None, override: str | Path | None = None
) -> Tokenizer | None:
    """The tokenizer of a model whose head has `vocab_size` rows. None if no known vocabulary fits.

    `override`, a file or the name of a builtin vocabulary, comes first. Then comes a file in the folder of the
    checkpoint `beside`: `*vocab*.txt` in World format, or `tokenizer.json`. Last comes the builtin vocabulary of this
    size.

    Raises TokenizerError for a damaged file, and for an override with more ids than the head has rows.
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
    world = [load_tokenizer(path) for path in sorted(folder.glob("*vocab*.txt")) if is_world(path)]
    # Two files with the same vocabulary count once.
    fitting = list({one.digest: one for one in world if one.vocab_size <= vocab_size}.values())
    if len(fitting) > 1:
        names = ", ".join(tokenizer.name for tokenizer in fitting)
        raise TokenizerError(
            f"{folder}: more than one vocabulary fits the model ({names}): name the one to use"
        )
    if not fitting and (folder / "tokenizer.json").is_file():
        # All models use this file name, so the file may be another model's. It fits if the head has a row for each id,
        # and few more, up to a round number.
        other = load_tokenizer(folder / "tokenizer.json")
        fitting = [other] if 0 <= vocab_size - other.vocab_size < 1024 else []
    return fitting[0] if fitting else None


def _prefix_table(tokens: Mapping[int, bytes]) -> dict[bytes, int]:
    """Maps the bytes of each token to its id, and prefixes of tokens that are no tokens themselves to 0."""
    table = {data: token for token, data in tokens.items()}
    for data in tokens.values():
        end = len(data) - 1
        while end > 0 and data[:end] not in table:
            table[data[:end]] = 0
            end -= 1
    return table


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The byte of each character in byte-level BPE: printable Latin-1 as it is, the other bytes as U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        char = ord(text[error.start])
        raise TokenizerError(f"the text has a lone surrogate, U+{char:04X}, at {error.start}") from None
