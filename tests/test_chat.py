"""Chat templates, and the parser of answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_npu.cli.serve import model_template
from rwkv_npu.errors import UsageError
from rwkv_npu.text.chat import (
    TEMPLATES,
    AnswerParser,
    Message,
    Piece,
    Prompt,
    Template,
    choose_template,
    clean,
    history,
    overlap,
    render,
    template_named,
)
from rwkv_npu.text.own_template import own_template
from tests.tiny import Run, V, write_model

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
def test_an_answer_does_not_depend_on_its_pieces(parts: list[str], opened: str) -> None:
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


# -- a checkpoint's own template

TURNS = (
    "{% for m in messages %}{{ {'system': 'System', 'user': 'User', 'assistant': 'Assistant'}[m.role] }}: "
    "{{ m.content }}\n\n{% endfor %}"
)
OWN = {
    "plain": f"{TURNS}{{% if add_generation_prompt %}}Assistant:{{% endif %}}",
    "begin": "<|rwkv_tokenizer_end_of_text|>" + TURNS + "{% if add_generation_prompt %}Assistant:{% endif %}",
    "thinking": TURNS + "{% if add_generation_prompt %}Assistant: <think"
    "{% if not enable_thinking %}>\n</think{% endif %}{% endif %}",
    "control": "{% for m in messages %}\x16{{ m.role | capitalize }}: {{ m.content }}\x17{% endfor %}"
    "{% if add_generation_prompt %}\x16Assistant:{% endif %}",
}


def own(source: str) -> Template:
    return own_template(source, Path("model"), WORLD)


def test_an_own_template_renders_like_the_family_where_it_is_the_same() -> None:
    chat = [
        Message("system", "Be brief."),
        *HELLO,
        Message("assistant", "<think>\nhm</think>\n\nHi"),
        Message("user", "a\n\nb"),
    ]
    for name in ("plain", "begin"):
        template = own(OWN[name])
        assert render(template, chat) == render(WORLD, chat)
        assert history(template, chat) == history(WORLD, chat)
        assert template.stops == WORLD.stops and template.names["assistant"] == "Assistant"
        assert render(template, [*HELLO, Message("assistant", "Once")]).text.endswith("Assistant: Once")


def test_an_own_template_opens_a_thought() -> None:
    template = own(OWN["thinking"])
    assert render(template, HELLO).opened == "<think>\n</think"
    assert render(template, HELLO, think="free") == Prompt("User: Hello\n\nAssistant: <think", "<think")
    assert render(template, [Message("user", "Say <think")], think="free").text.count("<think") == 2
    assert render(own(OWN["plain"]), [Message("user", "Say <think")]).opened == ""


def test_an_own_template_has_its_own_ends() -> None:
    template = own(OWN["control"])
    assert render(template, HELLO).text == "\x16User: Hello\x17\x16Assistant:"
    assert template.stops == ("\x17", "\n\x16User:")
    tool = {"name": "f", "parameters": {"properties": {"x": {"type": "string"}}}}
    assert "- f(x?: string)" in render(template, HELLO, tools=[tool]).text  # it knows no tools itself
    listing = "{% if tools %}{{ tools[0].function.name }}!{% endif %}" + OWN["plain"]
    assert render(own(listing), HELLO, tools=[tool]).text.startswith("f!User:")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for %}", "does not compile"),
        ("hello", "cannot render"),
        ("{{ messages[0].content.__class__.__mro__ }}", "cannot render"),
        ("{{ raise_exception('no') }}", "cannot render"),
        ("x" * 70_000, "more than"),
    ],
)
def test_own_templates_that_are_refused(source: str, reason: str) -> None:
    with pytest.raises(UsageError, match=f"the chat template of model.*{reason}"):
        own(source)


def test_messages_that_an_own_template_refuses() -> None:
    with pytest.raises(UsageError, match="refuses these messages: .*tool"):
        strict = "{% if messages[0].role == 'tool' %}{{ raise_exception('no tool here') }}{% endif %}"
        render(own(strict + OWN["plain"]), [Message("tool", "42")])


def test_an_own_template_stays_with_the_model(run: Run, tmp_path: Path, out: Path) -> None:
    """A folder's template goes into the bundle, is used there, and is shown."""
    write_model(tmp_path / "m" / "model.pth")
    config = {"chat_template": [{"name": "default", "template": OWN["control"]}]}
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(config))
    assert run("convert", tmp_path / "m", "--out", out, "--target", "none")[0] == 0
    assert json.loads(run("info", out, "--json")[1])["chat_template"] == "own"
    assert "chat         template own" in run("info", tmp_path / "m")[1]
    assert "as they were written" in run("info", out, "--check")[2]
    template = model_template(str(out), None, V)
    assert render(template, HELLO).text == "\x16User: Hello\x17\x16Assistant:"
    assert model_template(str(out), "world", V) is WORLD
    (tmp_path / "mine.jinja").write_text(OWN["plain"])
    assert model_template(str(out), str(tmp_path / "mine.jinja"), V).stops == WORLD.stops
    (tmp_path / "m" / "tokenizer_config.json").write_text("{")
    assert "chat template or tokenizer_config.json cannot be read" in run("info", tmp_path / "m")[2]
