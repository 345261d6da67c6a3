"""The public API of a model: load it, run it on ids, generate text."""

from __future__ import annotations

import importlib.resources
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from rwkv_npu.arguments import check_ids, check_number, check_path, check_text, shown
from rwkv_npu.backends import BACKENDS, MADE_PRECISIONS
from rwkv_npu.errors import BackendError, TokenizerError, UsageError
from rwkv_npu.formats.bundle import Bundle, is_bundle, open_bundle
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.formats.hub import resolve
from rwkv_npu.formats.state import State
from rwkv_npu.formats.state import load_state as _load_state
from rwkv_npu.models.spec import Spec, check_fusion
from rwkv_npu.runtime.engine import Engine
from rwkv_npu.runtime.loading import CPU_BACKEND, Options, measured_plan, open_automatically, open_engine
from rwkv_npu.runtime.placement import Plan, parse
from rwkv_npu.runtime.weights import BundleSource, CheckpointSource, ModelSource
from rwkv_npu.text import generation, sampling
from rwkv_npu.text.tokenizer import (
    END_OF_TEXT,
    Tokenizer,
    builtin,
    find_or_explain,
    find_tokenizer,
    unknown_vocabulary,
)


class Model:
    """A loaded model. Make one with `rwkv_npu.load`.

    spec: generation and dimensions. tokenizer: None if the vocabulary is unknown; the model then reads ids only.
    source: the weights. reason: why these backends were chosen.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        source: ModelSource,
        reason: str = "",
        no_text: str = "",
        stop_ids: Iterable[int] = (),
    ):
        self.engine, self.tokenizer, self.source, self.reason = engine, tokenizer, source, reason
        self._no_text = no_text or unknown_vocabulary(engine.spec.V)
        self.stop_ids = frozenset(stop_ids) | (tokenizer.special if tokenizer else frozenset())
        usable = None if tokenizer is None else tokenizer.has_text(engine.spec.V)
        self._banned = None if usable is None else ~usable

    @property
    def spec(self) -> Spec:
        return self.engine.spec

    @property
    def fingerprint(self) -> str:
        return self.engine.fingerprint

    @property
    def precision(self) -> str:
        """Precision of the weights, such as fp16, or fp16/int8 if the backends have different ones."""
        return "/".join(dict.fromkeys(str(self.source.precision_on(name)) for name in self.engine.backends))

    def new_state(self) -> State:
        """The state before the first token: zeros, or the state that the checkpoint was tuned with."""
        return self.engine.new_state()

    def forward(
        self,
        tokens: Sequence[int] | np.ndarray,
        state: State | None = None,
        all_logits: bool = False,
        *,
        inplace: bool = False,
        progress: Callable[[int], object] | None = None,
    ) -> tuple[np.ndarray, State]:
        """Read T tokens after `state` (None: the initial state).

        Returns the logits after the last token (V,), or with `all_logits` after each token (T, V), and the new state.
        inplace: update `state` itself. progress: called with the number of tokens of each chunk.
        Raises UsageError for no tokens, ids outside the vocabulary, or a state of another model; BackendError for
        logits that are not finite.
        """
        logits, after = self.engine.forward(tokens, state, all_logits, inplace=inplace, progress=progress)
        _check_finite(logits)
        return logits, after

    def forward_batch(
        self,
        tokens: Sequence[Sequence[int] | np.ndarray] | np.ndarray,
        states: Sequence[State],
        all_logits: bool = False,
        *,
        inplace: bool = False,
    ) -> tuple[np.ndarray | list[np.ndarray], list[State]]:
        """Read B sequences of any lengths (at least one token each) together, in as few forwards as possible.

        Returns the logits after the last token of each sequence, (B, V) float32, or with `all_logits` a list of
        (T_i, V) after each token, and the B new states.
        inplace: updates `states` themselves, without copies. Sequences may join and leave from call to call.
        Raises UsageError as `forward`, and for a state that is given twice or a number of states other than B;
        BackendError for logits that are not finite, with the number of the sequence.
        """
        logits, after = self.engine.forward_batch(tokens, states, all_logits, inplace=inplace)
        for number, of_one in enumerate(logits):
            _check_finite(of_one, f"sequence {number}: ")
        return logits, after

    def generate(
        self,
        prompt: str | Sequence[int],
        state: State | None = None,
        stop: str | Sequence[str] = (),
        max_tokens: int | None = 256,
        temperature: float = 1.0,
        top_p: float = 0.85,
        top_k: int = 0,
        min_p: float = 0.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        penalty_decay: float = 0.996,
        seed: int | None = None,
        *,
        stop_ids: Iterable[int] = (),
        banned: Iterable[int] = (),
        progress: Callable[[int], object] | None = None,
    ) -> Iterator[generation.Step]:
        """Continue `prompt` (text or ids) after `state`. Yields a `Step` for each token, as soon as it is sampled.

        The text ends after `max_tokens` (None: no limit), at a stop string, or at one of these tokens: 0, a special
        token of the vocabulary, config.json's eos_token_id, `stop_ids`. Closing the generator stops it too.
        banned: ids that are never sampled. `state` stays unchanged; `step.state` is the state after a step.
        Raises UsageError for values out of range and for an empty prompt without a state, TokenizerError for text if
        the model has no tokenizer.
        """
        options = sampling.SamplingOptions(
            temperature, top_p, top_k, min_p, presence_penalty, frequency_penalty, penalty_decay
        )
        if max_tokens is not None:
            check_number("max_tokens", max_tokens, 1, whole=True)
        if state is not None:
            self.engine.check_state(state)
        uncounted = self.tokenizer.uncounted if self.tokenizer else None
        mask = self._banned_with(check_ids("banned", banned, self.spec.V))
        sampler = sampling.Sampler(options, seed=seed, banned=mask, uncounted=uncounted)
        if not isinstance(stop, Iterable):
            raise UsageError(f"stop must be a str or several, not {shown(stop)}")
        stream = generation.TextStream(self.tokenizer, (stop,) if isinstance(stop, str) else tuple(stop))
        ends = {END_OF_TEXT, *self.stop_ids, *check_ids("stop_ids", stop_ids, self.spec.V)}
        if not isinstance(prompt, Sequence | np.ndarray):
            raise UsageError(f"prompt must be a str or a sequence of ids, not {shown(prompt)}")
        ids = self.encode_prompt(prompt) if isinstance(prompt, str) else prompt
        if len(ids):
            logits, current = self.forward(ids, state, progress=progress)
        elif state is not None and state.logits is not None:
            logits, current = state.logits, state.copy()
        else:
            raise UsageError("the prompt is empty and there is no state to continue: give one of them")
        return generation.steps(
            self.engine, stream, logits, current, sampler, max_tokens=max_tokens, stop_ids=ends
        )

    def _banned_with(self, ids: list[int]) -> np.ndarray | None:
        """(V,) bool: True for `ids` and for ids without text. Raises UsageError if every id is banned."""
        if not ids:
            return self._banned
        mask = np.zeros(self.spec.V, bool) if self._banned is None else self._banned.copy()
        mask[ids] = True
        if mask.all():
            raise UsageError("every token is banned: there is nothing to sample")
        return mask

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Raises TokenizerError if the model has no tokenizer."""
        check_text("text", text)
        return self._require_tokenizer().encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text to continue. For a Pile model, blank lines at its end become single newlines."""
        check_text("text", text)
        return self._require_tokenizer().encode_prompt(text)

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError(self._no_text)
        return self.tokenizer

    def load_state(self, path: str | os.PathLike[str], layout: str | None = None) -> State:
        """Read a state file or a tuned state. layout: see `load`.

        Raises StateError if it is of another generation or shape, CheckpointError for a damaged `.pth`.
        """
        check_path("path", path)
        return _load_state(path, self.spec, self.fingerprint, layout)

    def describe(self) -> str:
        """Backends and fusion as text."""
        return self.engine.describe()

    def __repr__(self) -> str:
        spec = self.spec
        return f"Model(RWKV-{spec.generation}, {spec.parameters / 1e6:.1f} M parameters, {self.describe()})"

    def close(self) -> None:
        """Close the backends and free their memory. The model cannot be used afterwards."""
        self.engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    backend: str = "auto",
    precision: str | None = None,
    fusion: str | None = None,
    plan: str | Mapping[str, str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    npu_cores: str = "auto",
    layout: str | None = None,
) -> Model:
    """Load a bundle, a checkpoint file or folder, or (None) the demo model that ships with the package.

    path: also `hf:OWNER/NAME/FILE`, a file of the Hugging Face Hub, downloaded if the cache does not have it.
    backend: numba, numpy, ort, torch, rknn-sim, rknn, rknn-matmul, or auto. auto takes the plan that `rwkv-npu tune`
        measured on this machine. Without one it takes numba, or ort if numba is not installed, and rknn for prompts if
        the NPU, its runtime and artifacts are present and pass their self-test.
    precision: of the weights, if a bundle has several. A checkpoint runs in fp32. rknn-matmul makes fp16 (its default)
        and w8a8 of any weights.
    fusion: layer or projection. None: the bundle's.
    plan: backends by use, group or both, as {"prefill": NAME, "head:decode": NAME} or "prefill=NAME,decode=NAME".
    tokenizer: a vocabulary file (World format or tokenizer.json), "world" or "pile". None: found beside the
        model, or by the size of its head.
    threads: of numba, ort and torch, at most one a core. None: one for each large core; torch chooses its own number.
        NumPy obeys OPENBLAS_NUM_THREADS. ONNX Runtime has one pool for the process, made at the first load: other
        sessions in the process must set `SessionOptions.use_per_session_threads = False`.
    npu_cores: of rknn and rknn-matmul: auto, 0, 1, 2, "0,1" or "0,1,2".
    layout: of a checkpoint that can be read in two ways, "blinkdl" or "web-rwkv" (RWKV-5's `.st` files). None: derived
        from the tensors; an ambiguous checkpoint is refused.
    Raises RwkvNpuError (CheckpointError, BundleError, BackendError, ...) with one line that says what to do.
    """
    for name, value in (("backend", backend), ("npu_cores", npu_cores), ("precision", precision)):
        if value is not None:
            check_text(name, value)
    for name, given in (("path", path), ("tokenizer", tokenizer)):
        if given is not None:
            check_path(name, given)
    if not isinstance(plan, str | Mapping | None):
        raise UsageError(f"plan must be a str or a dict, not {shown(plan)}")
    if fusion is not None:
        check_fusion(fusion)
    if threads is not None:
        check_number("threads", threads, 1, whole=True)
        threads = min(threads, os.cpu_count() or 1)  # more threads than cores only wait for each other
    where = demo_model() if path is None else Path(resolve(os.fspath(path)))
    measured: Plan | None = None
    no_text = ""
    stop_ids: Sequence[int]
    if is_bundle(where):
        bundle = open_bundle(where)
        manifest = bundle.manifest
        present = {*manifest.cpu_precisions, *manifest.int8, *(a.precision for a in manifest.artifacts)}
        if backend == "auto" and plan is None and precision is None:
            measured = measured_plan(bundle)
            measured = measured if measured and fusion in (None, measured.fusion) else None
        source: ModelSource = BundleSource(bundle, measured.fusion if measured else fusion, precision)
        vocabulary = _bundle_tokenizer(bundle, tokenizer)
        stop_ids = manifest.stop_ids
    else:
        present = {"fp32"}
        checkpoint = open_checkpoint(where, layout)
        for note in checkpoint.notes:
            warnings.warn(note, stacklevel=2)
        source = CheckpointSource(checkpoint, fusion, precision)
        stop_ids = checkpoint.stop_ids
        if tokenizer is None:
            vocabulary, no_text = find_or_explain(vocab_size=source.spec.V, beside=where)
        else:
            vocabulary = find_tokenizer(vocab_size=source.spec.V, override=_text(tokenizer))
    options = Options(threads, npu_cores)
    if backend == "auto" and plan is None:
        _check_precision(precision, present)
        engine, reason = open_automatically(source, options, measured)
    else:
        parsed = parse(plan, CPU_BACKEND if backend == "auto" else backend, BACKENDS, source.program.groups)
        _check_precision(precision, present.union(*(MADE_PRECISIONS.get(name, ()) for name in parsed.names)))
        engine, reason = open_engine(source, parsed, options), "as asked"
    return Model(engine, vocabulary, source, reason, no_text, stop_ids)


def load_state(path: str | os.PathLike[str], model: Model) -> State:
    """Read a state file for `model`. Raises StateError if it is of another generation or shape."""
    return model.load_state(path)


def demo_model() -> Path:
    """Path of the trained model in the package."""
    return Path(str(importlib.resources.files("rwkv_npu") / "data" / "demo" / "model.pth"))


def _check_finite(logits: np.ndarray, where: str = "") -> None:
    if not np.isfinite(logits).all():
        raise BackendError(
            f"{where}the model's logits hold NaN or infinity: its weights, its state or its precision are at fault"
        )


def _check_precision(precision: str | None, present: set[str]) -> None:
    if precision is not None and precision not in present:
        raise UsageError(f"this model has no {precision} weights: it has {', '.join(sorted(present))}")


def _text(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else os.fspath(path)


def _bundle_tokenizer(bundle: Bundle, override: str | os.PathLike[str] | None) -> Tokenizer | None:
    if override is not None:
        return find_tokenizer(vocab_size=bundle.spec.V, override=_text(override))
    name = bundle.manifest.tokenizer
    if name is None:
        return None
    if name.startswith("builtin:"):
        return builtin(name.removeprefix("builtin:"))
    return find_tokenizer(vocab_size=bundle.spec.V, override=bundle.path / name)
