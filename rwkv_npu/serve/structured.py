"""Structured answers: JSON schemas as masks over the vocabulary, by llguidance.

The mask of the next token is computed in a thread of its own while the model reads the token before.
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
# Small models go on with white space forever where they may: a line break and some indentation are enough for JSON.
WHITE_SPACE = r"[ \n]{0,8}"
_ANY_JSON: Mapping[str, Any] = {"type": "object"}


class Vocabulary:
    """A tokenizer as llguidance reads it: bytes of each id, made when the first schema comes."""

    def __init__(self, tokenizer: Tokenizer, V: int):
        self._tokenizer, self.V = tokenizer, V
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, "rwkv-npu masks")
        self._made: Any = None

    def grammar(self, schema: Mapping[str, Any] | None) -> Callable[[], SchemaGrammar]:
        """Makes grammars of a JSON schema; None is any object. Raises UsageError for one that cannot be served."""
        import llguidance

        text = json.dumps(_ANY_JSON if schema is None else schema)
        if len(text) > LARGEST_SCHEMA:
            raise UsageError(f"the schema has {len(text)} bytes: {LARGEST_SCHEMA} are the most")
        try:
            compiled = llguidance.LLMatcher.grammar_from_json_schema(
                text, overrides={"whitespace_pattern": WHITE_SPACE}
            )
        except ValueError as error:
            raise UsageError(f"this schema cannot be served: {str(error)[:200]}") from None
        trial = llguidance.LLMatcher(self._llguidance(), compiled, log_level=0)
        if trial.is_error():
            raise UsageError(f"this schema cannot be served: {trial.get_error()[:200]}")
        return functools.partial(SchemaGrammar, self, trial.deep_copy)

    def calls(self, tools: Sequence[Mapping[str, Any]]) -> Callable[[], SchemaGrammar]:
        """Makes grammars of a call to one of these functions: `{"name": ..., "arguments": {...}}`."""
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
            if self._made is None:
                import llguidance

                self._made = llguidance.LLTokenizer(
                    llguidance.TokenizerWrapper(_Tokens(self._tokenizer, self.V))
                )
            return self._made

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        return self._pool.submit(work)


class _Tokens:
    """What llguidance asks of a tokenizer."""

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
    """The tokens that an answer to a schema may go on with (`answers.Grammar`)."""

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
            raise BackendError(f"the schema's grammar has failed: {self._matcher.get_error()[:200]}")
        if self._matcher.is_stopped():
            return True
        self._next = self._vocabulary.submit(self._mask)
        return False

    def _mask(self) -> np.ndarray:
        """A bit a token, in words of 32."""
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        return words[: -(-self._vocabulary.V // 32)].copy()
