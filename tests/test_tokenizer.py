"""Tokenizers against the rwkv and tokenizers packages, round trips, streams, and files that are wrong."""

from __future__ import annotations

import gzip
import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_npu.errors import TokenizerError
from rwkv_npu.text import tokenizer as tokenizer_module
from rwkv_npu.text.tokenizer import (
    PileTokenizer,
    Tokenizer,
    WorldTokenizer,
    builtin,
    find_tokenizer,
    load_tokenizer,
)
from rwkv_npu.text.vocabulary import parse_world_vocab

DATA = Path(tokenizer_module.__file__).parent.parent / "data"
SCRIPTS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? It's 3.14159 or 2,718,281! ",
    "Быстрая коричневая лиса перепрыгивает через ленивую собаку. Съешь ещё этих мягких булок. ",
    "敏捷的棕色狐狸跳过了懒狗。人工智能语言模型，在芯片上运行。",
    "素早い茶色の狐がのろまな犬を飛び越える。カタカナとひらがな。",
    "다람쥐 헌 쳇바퀴에 타고파. 빠른 갈색 여우가 게으른 개를 뛰어넘는다. ",
    "الثعلب البني السريع يقفز فوق الكلب الكسول. ",
    "השועל החום המהיר קופץ מעל הכלב העצלן. ",
    "तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है। ",
    "สุนัขจิ้งจอกสีน้ำตาลกระโดดข้ามสุนัขขี้เกียจ ",
    "Příliš žluťoučký kůň úpěl ďábelské ódy. Zażółć gęślą jaźń. Ünïcödé naïve façade. ",
    "🦊🐕‍🦺👩‍👩‍👧‍👦🏳️‍🌈🇨🇳 ✨ 👍🏽 ",
    "def f(x: int) -> int:\n    return {k: v ** 2 for k, v in enumerate(x)}[0]  # TODO\n\n",
    "for (size_t i = 0; i < n; ++i) { sum += a[i]->value * 0x1F; }\r\n",
    '{"key": [1, 2.5e-3, null], "text": "\\u00e9\\n"}\n<div class="a">&amp;</div>\n',
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β = ¬(¬α ∨ β), ∫₀^∞ e^{-x²}dx = √π/2 ",
    "User: hello\n\nAssistant: <think>\n</think>\nHi!\n\n",
]


def mixed_text(size: int, seed: int = 0) -> str:
    """At least `size` bytes of UTF-8: scripts, code, emoji, random Unicode, runs of blanks and of marks."""
    rng = random.Random(seed)
    pieces: list[str] = []
    written = 0
    while written < size:
        kind = rng.random()
        if kind < 0.6:
            words = rng.choice(SCRIPTS)
            start = rng.randrange(len(words))
            piece = words[start:] + words[:start]
        elif kind < 0.75:
            planes = [(0x20, 0x7F), (0x80, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
            low, high = rng.choice(planes)
            piece = "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 40)))
        elif kind < 0.9:
            piece = rng.choice([" ", "\n", "\t", "\r\n", "-", "=", "0", "\u3000", "."]) * rng.randrange(
                1, 200
            )
        else:
            piece = f"{rng.random()} {rng.randrange(10**9):x} {rng.choice('abc')}_{rng.randrange(100)} "
        pieces.append(piece)
        written += len(piece.encode())
    return "".join(pieces)


@pytest.fixture(scope="module")
def world() -> WorldTokenizer:
    tokenizer = builtin("world")
    assert isinstance(tokenizer, WorldTokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def pile() -> Tokenizer:
    return builtin("pile")


@pytest.fixture(scope="module", params=["world", "pile"])
def either(request: pytest.FixtureRequest) -> Tokenizer:
    return builtin(request.param)


@pytest.fixture(scope="module")
def package_vocab() -> Path:
    package = pytest.importorskip("rwkv")
    return Path(package.__file__).parent / "rwkv_vocab_v20230424.txt"


# World against the rwkv package


def test_world_ids_equal_the_package_on_a_megabyte(world: WorldTokenizer, package_vocab: Path) -> None:
    reference = pytest.importorskip("rwkv.rwkv_tokenizer").TRIE_TOKENIZER(str(package_vocab))
    text = mixed_text(1_000_000)
    ids = world.encode(text)
    assert ids == reference.encode(text)
    assert world.decode(ids) == text
    rng = random.Random(1)
    every_token = [world.token_bytes(i) or b"?" for i in range(1, 65530)]
    rng.shuffle(every_token)
    data = b"".join(every_token) + rng.randbytes(100_000)
    ids = world.encode_bytes(data)
    assert ids == reference.encodeBytes(data)
    assert len(set(ids)) > 50_000


def test_shipped_world_vocabulary_is_the_packages_file(world: WorldTokenizer, package_vocab: Path) -> None:
    from_text = load_tokenizer(package_vocab)
    assert from_text.vocab_size == world.vocab_size == 65530
    assert all(from_text.token_bytes(i) == world.token_bytes(i) for i in range(65536))
    assert world.token_bytes(0) == b"" and world.token_bytes(66) == b"A" and world.token_bytes(65530) is None
    assert (from_text.name, from_text.source) == (package_vocab.name, package_vocab)


@settings(deadline=None)
@given(text=st.text())
def test_world_round_trip_of_text(text: str, world: WorldTokenizer) -> None:
    assert world.decode(world.encode(text)) == text


@settings(deadline=None)
@given(data=st.binary())
def test_world_round_trip_of_bytes(data: bytes, world: WorldTokenizer) -> None:
    ids = world.encode_bytes(data)
    assert b"".join(world.token_bytes(i) or b"?" for i in ids) == data
    assert world.decode(ids) == data.decode("utf-8", "replace")


@settings(deadline=None)
@given(ids=st.lists(st.integers(1, 65529)))
def test_world_decodes_any_ids(ids: list[int], world: WorldTokenizer) -> None:
    data = b"".join(world.token_bytes(i) or b"?" for i in ids)
    assert world.decode(ids) == data.decode("utf-8", "replace")


def test_world_matches_the_longest_token(world: WorldTokenizer) -> None:
    assert world.encode(" " * 129) == [65529, 33]
    assert world.encode("") == []
    assert world.encode_bytes(bytearray(b"\xff")) == [256]


# Pile against the tokenizers package


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The shipped 20B file, as the tokenizers package alone reads it."""
    import gzip
    import importlib.resources

    import tokenizers

    packed = importlib.resources.files("rwkv_npu") / "data" / "20B_tokenizer.json.gz"
    return tokenizers.Tokenizer.from_str(gzip.decompress(packed.read_bytes()).decode())


def test_pile_ids_and_text_equal_the_tokenizers_package(pile: Tokenizer, hugging_face: Any) -> None:
    text = mixed_text(200_000) + "<|endoftext|>after"
    ids = pile.encode(text)
    assert ids == hugging_face.encode(text).ids
    assert pile.decode(ids) == hugging_face.decode(ids)
    assert 0 in ids and pile.decode([0]) == ""


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 50276)))
def test_pile_decodes_any_ids_as_the_tokenizers_package(
    ids: list[int], pile: Tokenizer, hugging_face: Any
) -> None:
    assert pile.decode(ids) == hugging_face.decode(ids)


# Characters that this Python knows, since the two may follow different versions of Unicode.
assigned = st.characters(exclude_categories=("Cs", "Cn"))


@settings(deadline=None)
@given(text=st.text(assigned).filter(lambda text: "<|" not in text))
def test_pile_round_trip_is_the_composed_text(text: str, pile: Tokenizer) -> None:
    assert unicodedata.normalize("NFC", pile.decode(pile.encode(text))) == unicodedata.normalize("NFC", text)


def test_pile_known_ids(pile: Tokenizer) -> None:
    assert pile.encode("\n\nHello world") == [187, 187, 12092, 1533]
    assert pile.token_bytes(50276) == b"  " and pile.token_bytes(1) == b""
    assert pile.token_bytes(50277) is None and pile.token_bytes(-1) is None


# Both


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.decoder()
    return [*map(decoder.push, ids), decoder.finish()]


def test_a_stream_equals_the_whole_and_never_shows_half_a_character(either: Tokenizer) -> None:
    text = mixed_text(20_000).replace("\ufffd", "")
    ids = either.encode(text)
    pieces = streamed(either, ids)
    assert "".join(pieces) == either.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert any(piece == "" for piece in pieces[:-1])


def test_a_stream_that_ends_anywhere_equals_decode(either: Tokenizer) -> None:
    ids = either.encode("".join(SCRIPTS))
    for end in range(len(ids) + 1):
        assert "".join(streamed(either, ids[:end])) == either.decode(ids[:end])


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 65600)))
def test_a_stream_of_any_ids_equals_the_whole(ids: list[int], either: Tokenizer) -> None:
    assert "".join(streamed(either, ids)) == either.decode(ids)


def test_a_stream_holds_back_an_emoji(world: WorldTokenizer) -> None:
    ids = world.encode_bytes("🦊".encode())
    assert len(ids) > 1
    assert streamed(world, ids) == [""] * (len(ids) - 1) + ["🦊", ""]
    assert streamed(world, ids[:-1])[-1] == "\ufffd"


def test_a_decoder_is_fresh_after_finish(either: Tokenizer) -> None:
    decoder = either.decoder()
    decoder.push(either.encode("🦊")[0])
    decoder.finish()
    assert "".join(map(decoder.push, either.encode("ok"))) + decoder.finish() == "ok"


def test_ids_without_a_token_become_the_replacement_character(either: Tokenizer) -> None:
    ids = [either.encode("a")[0], 65535, either.encode("b")[0]]
    assert either.decode(ids) == "a\ufffdb"
    assert streamed(either, ids) == ["a", "\ufffd", "b", ""]


def test_ids_that_may_be_sampled(world: WorldTokenizer, pile: Tokenizer) -> None:
    mask = world.has_text(65536)
    assert mask.dtype == bool and mask.shape == (65536,)
    assert np.flatnonzero(~mask).tolist() == list(range(65530, 65536))
    assert pile.has_text(50277).all()
    assert np.flatnonzero(~pile.has_text(50304)).tolist() == list(range(50277, 50304))
    assert world.has_text(300).all()
    assert world.eos_id == pile.eos_id == 0


def test_spaces_and_digits_are_not_counted(either: Tokenizer) -> None:
    for text, expected in [(" ", True), ("\t", True), ("7", True), ("a", False), ("\n", False)]:
        (token,) = either.encode(text)
        assert either.uncounted(token) is expected
    assert either.uncounted(0) and not either.uncounted(65535)


def test_numpy_ids(either: Tokenizer) -> None:
    ids = np.array(either.encode("héllo wörld"))
    assert either.decode(ids) == "héllo wörld"
    assert "".join(streamed(either, list(ids))) == "héllo wörld"


def test_lone_surrogates_are_an_error(either: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"lone surrogate, U\+D83D, at 2"):
        either.encode("ab\ud83d")


def test_builtins_are_shared_and_named(either: Tokenizer) -> None:
    assert builtin(either.name) is either
    assert either.source == either.name
    with pytest.raises(TokenizerError, match="no built-in tokenizer 'gpt2': there are pile, world"):
        builtin("gpt2")


def test_the_same_ids_have_the_same_digest(either: Tokenizer, tmp_path: Path) -> None:
    """Wherever a vocabulary was read from; and one token more is another."""
    assert len({builtin(name).digest for name in ("world", "pile")}) == 2
    if isinstance(either, WorldTokenizer):
        tokens = {i: data for i in range(1, either.vocab_size) if (data := either.token_bytes(i))}
        (tmp_path / "file").write_text(world_text(tokens), encoding="utf-8")
        other = WorldTokenizer({**tokens, either.vocab_size: b"a token more"}, name="x", source="x")
    else:
        text = gzip.decompress((DATA / "20B_tokenizer.json.gz").read_bytes()).decode()
        (tmp_path / "file").write_text(text, encoding="utf-8")
        other = PileTokenizer(text.replace('"NFC"', '"NFD"'), name="x", source="x")
    assert load_tokenizer(tmp_path / "file").digest == either.digest != other.digest


# A tokenizer.json whose text depends on its neighbours


def spelled_with_neighbours(folder: Path) -> Path:
    """A small SentencePiece-like tokenizer.json: word pieces, and bytes for what they lack."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<unk>", "▁", "▁the", "▁fox", "s", "▁a"] + [f"<0x{byte:02X}>" for byte in range(256)]
    model = tokenizers.models.BPE(
        vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True, unk_token="<unk>"
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_a_stream_of_any_tokenizer_json(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(spelled_with_neighbours(tmp_path))
    fox = [6 + byte for byte in "🦊".encode()]
    ids = [2, 3, 4, *fox, 5, *fox[:2]]
    assert tokenizer.decode(ids[:3]) == "the foxs"
    pieces = streamed(tokenizer, ids)
    assert pieces[:3] == ["the", " fox", "s"] and pieces[3:8] == ["", "", "", "🦊", " a"]
    for end in range(len(ids) + 1):
        assert "".join(streamed(tokenizer, ids[:end])) == tokenizer.decode(ids[:end])
    assert tokenizer.token_bytes(3) == b"fox" and tokenizer.vocab_size == 262


# Files


def world_text(tokens: dict[int, bytes], end: str = "\n") -> str:
    lines = []
    for token, data in tokens.items():
        try:
            literal = repr(data.decode())
        except UnicodeDecodeError:
            literal = repr(data)
        lines.append(f"{token} {literal} {len(data)}{end}")
    return "".join(lines)


SMALL = {1 + byte: bytes([byte]) for byte in range(256)} | {300: "ab'\"\\ \u2028é".encode(), 301: b"ab"}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n"])
def test_world_text_is_read_back(tmp_path: Path, end: str, start: str) -> None:
    path = tmp_path / "any.txt"
    path.write_bytes((start + world_text(SMALL, end)).encode())
    tokenizer = load_tokenizer(path)
    assert {i: tokenizer.token_bytes(i) for i in SMALL} == SMALL
    assert tokenizer.encode("abab'\"\\ \u2028é") == [301, 300]
    assert tokenizer.vocab_size == 302 and not tokenizer.has_text(400)[257:300].any()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nonsense", "expected `id 'token' length`, found 'nonsense'"),
        ("5 'a'", "expected"),
        ("x 'a' 1", "expected"),
        ("-5 'a' 1", "expected"),
        ("5 a 1", "expected"),
        ("5 'a' one", "expected"),
        ("99999999999 'a' 1", "id 99999999999 is outside"),
        ("5 '' 1", "id 5 has 0 bytes, but the line says 1"),
        ("5 'é' 1", "id 5 has 2 bytes, but the line says 1"),
        ("5 b'\\xff' 2", "id 5 has 1 bytes, but the line says 2"),
        ("5 'a\" 1", "not a Python string"),
        ("5 'a' + 'b' 2", "not a Python string"),
        ("5 'a', 'b' 2", "not a Python string"),
        ("5 '\\x' 1", "not a Python string"),
        ("5 '\\ud800' 3", "not a Python string"),
        ("5 b'é' 2", "not a Python string"),
        ("2 'z' 1", "id 2 was given before"),
        ("5 'B' 1", "the token of line 2 was given before"),
    ],
)
def test_bad_world_lines_name_the_line(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "bad_vocab.txt"
    path.write_text(f"1 'A' 1\n2 'B' 1\n{line}\n7 'C' 1\n", encoding="utf-8")
    with pytest.raises(TokenizerError, match=rf"bad_vocab\.txt:3: .*{reason}") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no vocabulary lines"),
        (b"\n \n", "no vocabulary lines"),
        (b"PK\x03\x04\xff\xfe", "not UTF-8 text"),
        (b"{", "not a usable tokenizer.json: "),
        (b"{}", "not a usable tokenizer.json: "),
        (b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "the vocabulary is empty"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=reason) as caught:
        load_tokenizer(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="missing.txt: No such file"):
        load_tokenizer(tmp_path / "missing.txt")
    with pytest.raises(TokenizerError, match="Is a directory"):
        load_tokenizer(tmp_path)
    huge = tmp_path / "model.pth"
    with huge.open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(TokenizerError, match="too large for a vocabulary"):
        load_tokenizer(huge)


def test_a_small_vocabulary_may_lack_bytes() -> None:
    tokenizer = WorldTokenizer(parse_world_vocab("1 'ab' 2\n2 'abcd' 4", "x"), name="x", source="x")
    assert tokenizer.encode("ababcd") == [1, 2]
    for text in ["abc", "ba"]:
        with pytest.raises(TokenizerError, match="no token begins at byte 0x6[23] of the text"):
            tokenizer.encode(text)


# Which tokenizer


def test_the_head_decides_when_no_file_lies_beside(tmp_path: Path) -> None:
    assert find_tokenizer(vocab_size=65536) is builtin("world")
    assert find_tokenizer(vocab_size=50277, beside=tmp_path / "model.pth") is builtin("pile")
    assert find_tokenizer(vocab_size=1000, beside=tmp_path) is None


def test_a_file_beside_the_checkpoint_comes_first(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n")  # another model's
    (tmp_path / "my_vocab.txt").write_text(world_text(SMALL), encoding="utf-8")
    for beside in [tmp_path, tmp_path / "model.pth"]:
        found = find_tokenizer(vocab_size=65536, beside=beside)
        assert found is not None and found.source == tmp_path / "my_vocab.txt"
    assert find_tokenizer(vocab_size=301, beside=tmp_path) is None  # id 301 has no row
    (tmp_path / "other_vocab.txt").write_text(world_text(SMALL), encoding="utf-8")
    assert find_tokenizer(vocab_size=65536, beside=tmp_path) is not None  # the same one twice
    (tmp_path / "other_vocab.txt").write_text("1 'a' 1\n", encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"more than one .*\(my_vocab.txt, other_vocab.txt\)"):
        find_tokenizer(vocab_size=65536, beside=tmp_path)


def test_a_damaged_file_beside_the_checkpoint_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "my_vocab.txt").write_text("1 'a' 1\n2 'b' 2\n")
    with pytest.raises(TokenizerError, match="my_vocab.txt:2: "):
        find_tokenizer(vocab_size=65536, beside=tmp_path)


def test_a_tokenizer_json_beside_must_fit_the_head(tmp_path: Path) -> None:
    path = spelled_with_neighbours(tmp_path)
    found = find_tokenizer(vocab_size=320, beside=tmp_path)
    assert found is not None and found.source == path
    assert find_tokenizer(vocab_size=65536, beside=tmp_path) is builtin("world")  # another model's file
    assert find_tokenizer(vocab_size=200, beside=tmp_path) is None


def test_the_override_wins(tmp_path: Path) -> None:
    (tmp_path / "my_vocab.txt").write_text(world_text(SMALL), encoding="utf-8")
    chosen = tmp_path / "chosen"
    chosen.write_text(world_text({1: b"x"}), encoding="utf-8")
    found = find_tokenizer(vocab_size=65536, beside=tmp_path, override=chosen)
    assert found is not None and found.source == chosen
    assert find_tokenizer(vocab_size=65536, beside=tmp_path, override="pile") is builtin("pile")
    with pytest.raises(TokenizerError, match="ids up to 301, but the model's head has 100 rows"):
        find_tokenizer(vocab_size=100, override=tmp_path / "my_vocab.txt")
    with pytest.raises(TokenizerError, match="No such file"):
        find_tokenizer(vocab_size=65536, override=tmp_path / "missing")


def tokenizer_json(**changes: Any) -> str:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    whole |= {"pre_tokenizer": None, "post_processor": None, "decoder": None, "model": model}
    return json.dumps({**whole, **changes})


@pytest.mark.parametrize(
    "text",
    [
        tokenizer_json(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}),
        tokenizer_json(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        tokenizer_json(model={"type": "BPE", "vocab": {"a": 2**40}, "merges": []}),
        "{" * 10000,
        '{"a": 1}',
    ],
)
def test_a_tokenizer_json_that_breaks_the_library_is_refused(tmp_path: Path, text: str) -> None:
    """Some end in a panic, which is no Exception: the file is tried in a process of its own."""
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(TokenizerError, match="not a usable tokenizer.json") as raised:
        load_tokenizer(path)
    assert len(str(raised.value)) < 500


def test_a_tokenizer_json_that_needs_too_much_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rwkv_npu.text.vocabulary._TRIAL_MEMORY", 1 << 20)
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer_json())
    with pytest.raises(TokenizerError, match="reading it takes more than|not a usable"):
        load_tokenizer(path)


def test_lines_without_a_token_are_skipped() -> None:
    """Padding of the head: some files list it."""
    assert parse_world_vocab("0 '<|endoftext|>' 13\n1 'A' 1\n2 '' 0\n3 b'' 0\n4 'B' 1\n", "x") == {
        1: b"A",
        4: b"B",
    }


def test_a_blank_line_at_the_end_of_a_pile_prompt_becomes_two_newlines(pile: Tokenizer) -> None:
    newline, blank = pile.encode("\n"), pile.encode("\n\n")
    assert len(newline) == len(blank) == 1 and newline != blank
    assert pile.encode_prompt("A:\n\n") == [*pile.encode("A:"), *newline, *newline]
    assert pile.encode_prompt("A\n\nB") == pile.encode("A\n\nB")


def test_the_json_form_of_web_rwkv_is_named(tmp_path: Path) -> None:
    (tmp_path / "rwkv_vocab_v20230424.json").write_text('{"1": "a", "2": [128]}')
    with pytest.raises(TokenizerError, match="web-rwkv"):
        load_tokenizer(tmp_path / "rwkv_vocab_v20230424.json")
