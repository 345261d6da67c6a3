"""A vocabulary for the demo model, in the World file format: `id repr(token) bytelen` a line.

Ids count from 1. Byte b is id b + 1. Id 0 ends a text and is not in the file. Text is encoded by the longest match over
UTF-8 bytes. The tokens are learnt as byte-pair merges, which do not consider this way of encoding. So more are learnt
than needed, and those that the encoding uses least are dropped.
"""

import ast
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

LEARNT = 4090  # with 256 bytes and id 0 this leaves 5 of 4,352 rows unused; World models have such rows too
SURPLUS = 1.6  # merges learnt for each token kept
SPLIT = r" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]+|\n+ *|\s+"


class Vocabulary:
    """Encodes by the longest match over `tokens`. The first token has id 1."""

    def __init__(self, tokens: Sequence[bytes]):
        self.tokens = list(tokens)
        self._ids = {token: number for number, token in enumerate(self.tokens, start=1)}
        self._longest: dict[bytes, int] = {}  # by the first two bytes
        for token in self.tokens:
            self._longest[token[:2]] = max(self._longest.get(token[:2], 1), len(token))

    def __len__(self) -> int:
        """The number of ids, with id 0."""
        return len(self.tokens) + 1

    def encode(self, text: str | bytes) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        ids: list[int] = []
        at = 0
        while at < len(data):
            size = self._longest.get(data[at : at + 2], 1)
            while data[at : at + size] not in self._ids:
                size -= 1
            ids.append(self._ids[data[at : at + size]])
            at += size
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.tokens[number - 1] for number in ids if number).decode("utf-8", "replace")

    def write(self, path: Path) -> None:
        lines = []
        for number, token in enumerate(self.tokens, start=1):
            try:
                shown = repr(token.decode())
            except UnicodeDecodeError:
                shown = repr(token)
            lines.append(f"{number} {shown} {len(token)}\n")
        path.write_text("".join(lines), "utf-8", newline="\n")

    @classmethod
    def read(cls, path: Path) -> "Vocabulary":
        tokens = []
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            token = ast.literal_eval(line[line.index(" ") : line.rindex(" ")].strip())
            token = token.encode() if isinstance(token, str) else token
            if int(line[: line.index(" ")]) != number or len(token) != int(line[line.rindex(" ") :]):
                raise ValueError(f"{path}:{number}: wrong id or length")
            tokens.append(token)
        return cls(tokens)


def learn(texts: Sequence[str], learnt: int = LEARNT) -> Vocabulary:
    """Learn a vocabulary: all bytes, then `learnt` tokens, ordered by length and bytes like the World vocabulary."""
    bytewise = [bytes([byte]) for byte in range(256)]
    candidates = set(_merged_pieces(texts, int(learnt * SURPLUS)))
    while len(candidates) > learnt:
        uses = Counter(_greedy_pieces(texts, Vocabulary(bytewise + sorted(candidates))))
        # Drop a few at a time, because the encoding then uses other tokens more.
        surplus = min(len(candidates) - learnt, max(1, len(candidates) // 8))
        worth = {token: uses[token] * (len(token) - 1) for token in candidates}
        candidates -= set(sorted(candidates, key=lambda token: (worth[token], token))[:surplus])
    return Vocabulary(bytewise + sorted(candidates, key=lambda token: (len(token), token)))


def _merged_pieces(texts: Sequence[str], count: int) -> list[bytes]:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, as_bytes])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=count + 256, initial_alphabet=alphabet, max_token_length=24, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    to_byte = _byte_of_character()
    learnt = [bytes(to_byte[character] for character in piece) for piece in tokenizer.get_vocab()]
    return [piece for piece in learnt if len(piece) > 1]


def _byte_of_character() -> dict[str, int]:
    """The byte of each character in byte-level BPE. Printable Latin-1 is itself; other bytes are U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}


def _greedy_pieces(texts: Sequence[str], vocabulary: Vocabulary) -> Iterable[bytes]:
    for text in texts:
        for number in vocabulary.encode(text):
            yield vocabulary.tokens[number - 1]
