"""Structured output: llguidance turns a JSON schema into masks over the vocabulary.

A thread computes the mask of the next token while the model reads the token before it.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from rwkv_npu.errors import BackendError, UsageError
from rwkv_npu.text.tokenizer import END_OF_TEXT, Tokenizer

LARGEST_SCHEMA = 64 << 10  # bytes
# Small models write white space without end where a schema allows it. JSON needs a line break and some indentation.
WHITE_SPACE = r"[ \n]{0,8}"
_ANY_JSON: Mapping[str, Any] = {"type": "object"}


class Vocabulary:
    """A tokenizer in llguidance's form: the bytes of each id. It is built for the first schema."""

    def __init__(self, tokenizer: Tokenizer, V: int):
        self._tokenizer, self.V = tokenizer, V
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, "rwkv-npu masks")
        self._wrapped: Any = None

    def grammar(self, schema: Mapping[str, Any] | None) -> Callable[[], SchemaGrammar]:
        """A factory of grammars for a JSON schema; None means any object. Raises UsageError if unsupported."""
        import llguidance

        text = json.dumps(_ANY_JSON if schema is None else schema)
        if len(text) > LARGEST_SCHEMA:
            raise UsageError(f"the schema has {len(text)} bytes, more than the limit of {LARGEST_SCHEMA}")
        try:
            compiled = llguidance.LLMatcher.grammar_from_json_schema(
                text, overrides={"whitespace_pattern": WHITE_SPACE}
            )
        except ValueError as error:
            raise UsageError(f"this schema is not supported: {str(error)[:200]}") from None
        trial = llguidance.LLMatcher(self._llguidance(), compiled, log_level=0)
        if trial.is_error():
            raise UsageError(f"this schema is not supported: {trial.get_error()[:200]}")
        return functools.partial(SchemaGrammar, self, trial.deep_copy)

    def calls(self, tools: Sequence[Mapping[str, Any]]) -> Callable[[], SchemaGrammar]:
        """A factory of grammars for a call of one of these functions: `{"name": ..., "arguments": {...}}`."""
        choices = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool["name"]},
                    "arguments": tool.get("parameters") or {"type": "object"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool in tools
        ]
        return self.grammar(choices[0] if len(choices) == 1 else {"anyOf": choices})

    def _llguidance(self) -> Any:
        with self._lock:
            if self._wrapped is None:
                import llguidance

                self._wrapped = llguidance.LLTokenizer(
                    llguidance.TokenizerWrapper(_Tokens(self._tokenizer, self.V))
                )
            return self._wrapped

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        return self._pool.submit(work)


class _Tokens:
    """A tokenizer with the attributes that llguidance's wrapper reads."""

    eos_token_id = END_OF_TEXT
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, V: int):
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(token) or b"" for token in range(V)]
        self.tokens[END_OF_TEXT] = b"<|end|>"
        self.special_token_ids = [END_OF_TEXT]

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


class SchemaGrammar:
    """Restricts an answer to a JSON schema (an `answers.Grammar`)."""

    def __init__(self, vocabulary: Vocabulary, matcher: Callable[[], Any]):
        self._vocabulary, self._matcher = vocabulary, matcher()
        self._next = vocabulary.submit(self._mask)

    def allowed(self) -> np.ndarray:
        mask: np.ndarray = self._next.result()
        return mask

    def push(self, token: int) -> bool:
        if token == END_OF_TEXT:
            return True
        if not self._matcher.consume_token(token):
            raise BackendError(f"the schema's grammar failed: {self._matcher.get_error()[:200]}")
        if self._matcher.is_stopped():
            return True
        self._next = self._vocabulary.submit(self._mask)
        return False

    def _mask(self) -> np.ndarray:
        """The mask of the next token: one bit a token, in uint32 words."""
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        return words[: -(-self._vocabulary.V // 32)].copy()
