"""Read a chat or completion request: model, sampling options, messages, tools and grammar.

The names of the fields are OpenAI's. The other APIs share most of them, and read the rest in their own modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.requests import Request

from rwkv_npu.formats.state import State
from rwkv_npu.serve.answers import Grammar, Options
from rwkv_npu.serve.fields import FieldError, Fields
from rwkv_npu.serve.service import Service
from rwkv_npu.serve.structured import Vocabulary
from rwkv_npu.serve.web import NotFoundError
from rwkv_npu.text.chat import Message
from rwkv_npu.text.sampling import SamplingOptions

EFFORTS = {"none": "off", "minimal": "off", "low": "low", "medium": "medium", "high": "high"}
MAX_TOOLS = 64
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def presets(service: Service) -> dict[str, Mapping[str, float]]:
    """Sampling defaults by model name: `NAME`, `NAME:think`, `NAME:math`, and so on."""
    template = service.template
    sampling = {service.name: template.sampling}
    if template.thinks:
        sampling[f"{service.name}:think"] = template.sampling
    return sampling | {f"{service.name}:{name}": values for name, values in template.presets.items()}


def known_model(service: Service, name: str) -> str:
    """Return the model name; "" stands for the only model. Raises NotFoundError for another model."""
    if name and name not in presets(service):
        raise NotFoundError("model", f"this server has the model {service.name!r}, not {name[:80]!r}")
    return name or service.name


def sampling(service: Service, fields: Fields, name: str) -> SamplingOptions:
    """The sampling options of a request, with the model's defaults for absent fields.

    Some clients always send OpenAI's neutral values, with which an RWKV model rambles. A request with exactly these
    values gets the defaults, unless the server runs with --neutral-sampling.
    """
    defaults = {**service.template.sampling, **presets(service)[name]}
    given = {key: fields.get(key) for key in NEUTRAL if fields.has(key)}
    if given == NEUTRAL and not service.neutral_sampling:
        fields = Fields({})
    built_in = SamplingOptions()

    def number(key: str, low: float, high: float) -> float:
        return fields.number(key, defaults.get(key, getattr(built_in, key)), low, high)

    return SamplingOptions(
        temperature=number("temperature", 0.0, 10.0),
        top_p=number("top_p", 0.0, 1.0),
        top_k=fields.integer("top_k", 0, 0, 1 << 20) or 0,
        min_p=number("min_p", 0.0, 1.0),
        presence_penalty=number("presence_penalty", -10.0, 10.0),
        frequency_penalty=number("frequency_penalty", -10.0, 10.0),
        penalty_decay=number("penalty_decay", 0.0, 1.0),
    )


def options(service: Service, fields: Fields, name: str, default_tokens: int) -> Options:
    """The options of an answer: sampling, length, seed, logit bias and thinking budget."""
    limits = service.limits
    key = "max_completion_tokens" if fields.has("max_completion_tokens") else "max_tokens"
    max_tokens = fields.integer(key, default_tokens, 1, 1 << 31)
    assert max_tokens is not None
    return Options(
        sampling(service, fields, name),
        seed=fields.integer("seed", None, 0, 2**63),
        max_tokens=min(max_tokens, limits.max_tokens),
        bias=fields.bias("logit_bias", service.model.spec.V),
        think_budget=fields.integer("reasoning_budget", None, 0, 1 << 31),
    )


def messages_of(fields: Fields) -> list[Message]:
    """The messages of a chat. Raises FieldError if a message is not text."""
    messages = []
    for item in fields.objects("messages"):
        role = item.choice("role", "", ("system", "developer", "user", "assistant", "tool", "function"))
        role = {"developer": "system", "function": "tool"}.get(role, role)
        calls = []
        for call in item.objects("tool_calls"):
            function = call.object("function")
            arguments = function.get("arguments") or {}
            if isinstance(arguments, str):  # OpenAI sends a JSON string, Ollama an object
                arguments = Fields.parse(arguments.encode())._body
            calls.append({"name": function.text("name"), "arguments": arguments})
        messages.append(Message(role, content_of(item), tuple(calls)))
    if not messages:
        raise FieldError("messages", "it must be a list of at least one message")
    return messages


def content_of(message: Fields) -> str:
    """The text of a message: a string, or a list of text parts."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return message.text("content")
    parts = []
    for part in message.objects("content"):
        if part.text("type", "") not in ("text", "input_text", "output_text"):
            raise part.error("type", "this model reads text only")
        parts.append(part.text("text"))
    return "\n".join(parts)


def state_of(request: Request, fields: Fields) -> State | None:
    """The named state of the field `state`, or None."""
    return request.app.state.named.find(fields.text("state")) if fields.has("state") else None


def tools_of(fields: Fields) -> list[Mapping[str, Any]]:
    """The functions that a request offers."""
    tools: list[Mapping[str, Any]] = []
    for tool in fields.objects("tools"):
        if tool.text("type", "function") != "function":
            raise tool.error("type", "only functions are supported")
        function = tool.object("function")
        name = function.text("name", "")
        if not name or len(name) > 64:
            raise function.error("name", "it must have 1 to 64 characters")
        parameters = function.object("parameters")._body
        tools.append(
            {"name": name, "description": function.text("description", ""), "parameters": dict(parameters)}
        )
    if len(tools) > MAX_TOOLS:
        raise FieldError("tools", f"at most {MAX_TOOLS} functions are supported")
    return tools


def chosen_tools(fields: Fields, tools: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], bool]:
    """Apply `tool_choice`. Returns (tools to offer to the model, True if it must call one)."""
    choice = fields.get("tool_choice")
    if choice in (None, "auto"):
        return list(tools), False
    if choice == "none":
        return [], False
    if choice == "required":
        wanted = list(tools)
    elif isinstance(choice, Mapping):
        name = fields.object("tool_choice").object("function").text("name", "")
        wanted = [tool for tool in tools if tool["name"] == name]
    else:
        raise FieldError("tool_choice", "it must be none, auto, required, or a function's name")
    if not wanted:
        raise FieldError("tool_choice", "`tools` has no such function")
    return wanted, True


def response_grammar(fields: Fields, vocabulary: Vocabulary) -> Callable[[], Grammar] | None:
    """A factory of grammars for the field `response_format`, or None for plain text."""
    wanted = fields.object("response_format")
    kind = wanted.choice("type", "text", ("text", "json_object", "json_schema"))
    if kind == "text":
        return None
    if kind == "json_object":
        return vocabulary.grammar(None)
    schema = wanted.object("json_schema").get("schema")
    if not isinstance(schema, Mapping):
        raise FieldError("response_format.json_schema.schema", "it must be a JSON schema")
    return vocabulary.grammar(schema)
