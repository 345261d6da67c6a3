"""Chat templates, and the parser of answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_npu.errors import UsageError
from rwkv_npu.text.chat import (
    TEMPLATES,
    AnswerParser,
    Message,
    Piece,
    choose_template,
    clean,
    overlap,
    render,
    template_named,
)

WORLD, G1, NEW = (TEMPLATES[name] for name in ("world", "g1", "g1-20250922"))
HELLO = [Message("user", "Hello")]


# -- prompts


@pytest.mark.parametrize(
    ("name", "vocab_size", "template"),
    [
        ("RWKV-x060-World-1B6-v2.1-20240328-ctx4096", 65536, "world"),
        ("rwkv7-g1-0.1b-20250307-ctx4096.pth", 65536, "g1"),
        ("rwkv7-g1a-0.4b-20250905-ctx4096.pth", 65536, "g1"),
        ("rwkv7-g1a3-1.5b-20251015-ctx8192.pth", 65536, "g1-20250922"),
        ("rwkv7-g0b-13.3b-20251031", 65536, "g1-20250922"),
        ("RWKV-4-Raven-1B5-v12", 50277, "raven"),
        ("my-finetune.rwkv", 65536, "world"),
        ("bigg1model", 65536, "world"),
        ("demo", 1024, "world"),
    ],
)
def test_a_template_is_chosen_by_name_and_vocabulary(name: str, vocab_size: int, template: str) -> None:
    assert choose_template(name, vocab_size).name == template


def test_a_template_that_is_not_there() -> None:
    with pytest.raises(
        UsageError, match="no chat template 'llama': use one of raven, world, g1, g1-20250922"
    ):
        template_named("llama")


def test_the_published_forms() -> None:
    chat = [Message("system", "Be brief."), *HELLO, Message("assistant", "Hi!"), Message("user", "Bye")]
    text = "System: Be brief.\n\nUser: Hello\n\nAssistant: Hi!\n\nUser: Bye\n\nAssistant:"
    assert render(WORLD, chat).text == text  # no space after the colon
    assert render(TEMPLATES["raven"], HELLO).text == "Bob: Hello\n\nAlice:"
    assert render(G1, HELLO).text == "User: Hello\n\nAssistant: <think>\n</think"
    assert render(G1, HELLO, think="free").text == "User: Hello\n\nAssistant: <think"
    assert render(NEW, HELLO, think="high").text == "User: Hello (think a lot)\n\nAssistant: <think"
    assert render(NEW, HELLO, think="low").opened == " <think"


def test_messages_are_cleaned_and_code_keeps_its_indentation() -> None:
    code = "def f():\r\n\r\n    return 1\n   \n\n\n# end  "
    assert clean(code) == "def f():\n    return 1\n# end"
    thought = [*HELLO, Message("assistant", "<think>\nhm\n\n</think>\n\nHi"), Message("user", "?")]
    assert "Assistant: Hi\n\nUser: ?" in render(NEW, thought).text


def test_the_last_answer_can_be_continued() -> None:
    prompt = render(WORLD, [*HELLO, Message("assistant", "Once upon")])
    assert prompt.text == "User: Hello\n\nAssistant: Once upon" and prompt.opened == " Once upon"


def test_tools_are_described_as_the_models_were_trained() -> None:
    tool = {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["location"],
        },
    }
    called = Message("assistant", "", ({"name": "get_weather", "arguments": {"location": "Oslo"}},))
    result = Message("tool", '{"t": 3}')
    prompt = render(NEW, [*HELLO, called, result], tools=[tool], call=True)
    assert prompt.text == (
        'System: Tools:\n- get_weather(location: string, unit?: "celsius" | "fahrenheit")\n'
        "Return only a JSON function call.\n\nUser: Hello\n\n"
        'Assistant: ```json\n{"name": "get_weather", "arguments": {"location": "Oslo"}}\n```\n\n'
        'User: Function output:\n{"t": 3}\n\nAssistant: ```json\n'
    )


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(UsageError, match="role 'developerx'.*system, user, assistant, tool"):
        render(WORLD, [Message("developerx", "x")])


# -- answers


def parsed(text: str, **options: object) -> tuple[str, str, bool]:
    """(thought, content, whether it stopped) of a whole answer."""
    parser = AnswerParser(**{"stops": WORLD.stops, **options})  # type: ignore[arg-type]
    pieces = [*parser.push(text), *parser.finish()]
    return *(joined(pieces, thought) for thought in (True, False)), parser.stopped  # type: ignore[return-value]


def joined(pieces: list[Piece], thought: bool) -> str:
    return "".join(piece.text for piece in pieces if piece.thought is thought)


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        (" Hi there.\n\nUser: more", {}, ("", "Hi there.", True)),
        ("\n\n\n Hi", {}, ("", "Hi", False)),  # not before the first visible character
        (" Hi\nUser: I am you", {}, ("", "Hi", True)),
        (" a\nb", {}, ("", "a\nb", False)),
        (">so\n\nhm</think>\n\nHi\n\nx", {"opened": " <think"}, ("so\n\nhm", "Hi", True)),
        (">\nHi\n\n", {"opened": " <think>\n</think"}, ("\n", "Hi", True)),
        (" <think>a</think> Hi", {}, ("a", "Hi", False)),
        (" <thin ice", {}, ("", "<thin ice", False)),
        (" x:\n```\na\n\nb\n```\nend\n\nno", {}, ("", "x:\n```\na\n\nb\n```\nend", True)),
        (" a ``` b\n\nc", {}, ("", "a ``` b", True)),  # no fence: not at the start of a line
        ('{"a": "\n\n"}', {"raw": True}, ("", '{"a": "\n\n"}', False)),
        (" abcSTOPdef", {"always": ("STOP",)}, ("", "abc", True)),
        ("```\nSTOP", {"always": ("STOP",)}, ("", "```\n", True)),
        ('{"name"}\n\n```\n\nz', {"opened": " ```json\n"}, ("", '{"name"}\n\n```', True)),
        ("half a stop\n", {}, ("", "half a stop\n", False)),
    ],
)
def test_answers(text: str, options: dict[str, object], expected: tuple[str, str, bool]) -> None:
    assert parsed(text, **options) == expected


PARTS = st.sampled_from(
    ["a", " ", "\n", "\n\n", "```", "`", "<think>", "</think>", "<", "User:", "\nUser:", ">", "STOP", "é"]
)


@given(st.lists(PARTS, max_size=30), st.sampled_from(["", " <think", " ```json\n", " <think>\n</think"]))
def test_an_answer_does_not_depend_on_how_it_comes(parts: list[str], opened: str) -> None:
    text = "".join(parts)
    options = {"opened": opened, "always": ("STOP",)}
    letters = AnswerParser(stops=WORLD.stops, **options)  # type: ignore[arg-type]
    pieces = [piece for letter in text for piece in letters.push(letter)]
    pieces += letters.finish()
    alone = joined(pieces, True), joined(pieces, False), letters.stopped
    assert alone == parsed(text, **options)


def test_the_part_of_a_stop_string_at_the_end() -> None:
    assert (
        overlap("abc\n", ("\n\n", "\nUser:")),
        overlap("x\nUse", ("\n\n", "\nUser:")),
        overlap("x", ()),
    ) == (1, 4, 0)
