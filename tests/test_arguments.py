"""Values of a wrong type, size or shape in the Python API: one clear error, and nothing runs."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rwkv_npu
from rwkv_npu.cli import diagnosis
from rwkv_npu.errors import BackendError, UsageError
from rwkv_npu.formats.bundle import open_bundle
from rwkv_npu.formats.state import State
from rwkv_npu.model import Model
from tests.tiny import Run, V, error_line, write_model

NOT_NUMBERS = (10**400, -(10**5000), float("nan"), "1", [1], True, 1j, np.array([1.0]))
SAMPLING = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "penalty_decay")


def refused(call: Callable[[], object], match: str) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        call()
    assert len(str(caught.value)) < 300 and str(caught.value).isprintable()


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=lambda value: f"{type(value).__name__}")
def test_numbers(model: Model, value: Any) -> None:
    counts = () if value is NOT_NUMBERS[0] else ("max_tokens", "top_k", "seed")
    for name in (*SAMPLING, *counts):
        refused(lambda name=name: model.generate([1], **{name: value}), "a number|a whole number")  # type: ignore[misc]


def test_whole_numbers_may_be_of_any_size(model: Model) -> None:
    step = next(iter(model.generate([1], top_k=10**400, seed=10**400, max_tokens=10**400)))
    assert 0 <= step.token < V


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prompt": 5}, "prompt must be"),
        ({"prompt": None}, "prompt must be"),
        ({"prompt": [10**30]}, "tokens holds 1000"),
        ({"stop": 5}, "stop must be"),
        ({"stop": ["a", 5]}, "a stop string must be a str, not 5"),
        ({"stop_ids": 5}, "stop_ids must be"),
        ({"stop_ids": [True]}, "stop_ids holds True"),
        ({"banned": [1.5]}, "banned holds 1.5"),
        ({"banned": [10**5000]}, "banned holds a int"),
        ({"state": 5}, "a state is needed, not a int"),
        ({"prompt": [], "state": {}}, "a state is needed, not a dict"),
    ],
)
def test_generate(model: Model, options: dict[str, Any], match: str) -> None:
    refused(lambda: model.generate(**{"prompt": [1], **options}), match)


def test_forward_batch_and_encode(model: Model) -> None:
    refused(lambda: model.forward_batch(5, [model.new_state()]), "list of sequences")  # type: ignore[arg-type]
    refused(lambda: model.forward_batch([[1]], None), "list of states")  # type: ignore[arg-type]
    refused(lambda: model.encode(b"a"), "text must be a str")  # type: ignore[arg-type]
    refused(lambda: model.encode_prompt(None), "text must be a str")  # type: ignore[arg-type]
    refused(lambda: model.load_state(5), "path must be a path")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"path": 5}, "path must be a path"),
        ({"path": b"model.pth"}, "path must be a path"),
        ({"backend": ["numpy"]}, "backend must be a str"),
        ({"precision": 8}, "precision must be a str"),
        ({"npu_cores": 0}, "npu_cores must be a str"),
        ({"plan": 5}, "plan must be a str or a dict"),
        ({"tokenizer": 5}, "tokenizer must be a path"),
        ({"threads": "2"}, "threads='2': it must be a whole number of at least 1"),
        ({"threads": float("nan")}, "threads=.*: it must be"),
        ({"threads": 2.5}, "threads=.*: it must be"),
    ],
)
def test_load(options: dict[str, Any], match: str) -> None:
    refused(lambda: rwkv_npu.load(**options), match)


def lacks_a_part(state: State) -> None:
    del state.parts["att.wkv"]


def is_of_fewer_layers(state: State) -> None:
    state.parts["att.wkv"] = state.parts["att.wkv"][:1]


def is_of_another_dtype(state: State) -> None:
    state.parts["ffn.shift"] = state.parts["ffn.shift"].astype(np.float64)


def is_of_another_order(state: State) -> None:
    state.parts["att.wkv"] = state.parts["att.wkv"].swapaxes(-1, -2)


def has_no_parts(state: State) -> None:
    state.parts = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "damage", [lacks_a_part, is_of_fewer_layers, is_of_another_dtype, is_of_another_order, has_no_parts]
)
def test_a_state_that_is_not_whole(model: Model, damage: Callable[[State], None], tmp_path: Path) -> None:
    state = model.forward([1, 2, 3])[1]
    damage(state)
    for call in (
        lambda: model.forward([1], state, inplace=True),
        lambda: model.forward_batch([[1]], [state], inplace=True),
        lambda: model.generate([], state),
        lambda: state.save(tmp_path / "state.st"),
    ):
        refused(call, "the state lacks|of a state must be float32")
    assert not list(tmp_path.iterdir())


def test_logits_of_a_state_that_are_those_of_another_model(model: Model) -> None:
    state = model.forward([1, 2, 3])[1]
    state.logits = np.zeros(3, np.float32)
    refused(lambda: model.generate([], state), "logits of a state")


def test_forward_names_logits_that_are_not_finite(model: Model) -> None:
    good, state = model.new_state(), model.new_state()
    state.parts["ffn.shift"][1, 3] = np.nan
    with pytest.raises(BackendError, match="logits hold NaN or infinity"):
        model.forward([1], state)
    with pytest.raises(BackendError, match="sequence 1: .*logits hold NaN or infinity"):
        model.forward_batch([[1], [2]], [good, state])
    with pytest.raises(BackendError, match="NaN or infinity"):
        model.generate([1], state)


@pytest.mark.parametrize("ids", [[10**19], [1, 2**63], [2**63, -1], [5, 10**400]])
def test_ids_of_any_size_are_named(model: Model, ids: list[int]) -> None:
    refused(lambda: model.forward(ids), f"ids of this model are 0 to {V - 1}|outside the model's vocabulary")


# The command line


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "-m", "", "-p", "a"),
        ("generate", "-p", "a", "--state", ""),
        ("convert", "", "--target", "none"),
        ("merge", "base.pth", "", "-o", "out.safetensors"),
        ("convert", "model.pth", "--calibrate", "a.txt", ""),
        ("serve", "--api-key", ""),
    ],
    ids=" ".join,
)
def test_empty_words_are_refused(command: tuple[str, ...], run: Run) -> None:
    status, printed, err = run(*command)
    assert (status, printed) == (2, "") and "is empty: give a value" in err and err.count("\n") == 1


def test_an_id_of_twenty_digits(run: Run, checkpoint: Path) -> None:
    line = error_line(run("generate", "-m", checkpoint, "--backend", "numpy", "--ids", "-p", "5 " + "9" * 20))
    assert "9" * 20 in line and f"0 to {V - 1}" in line


def test_printed_commands_can_be_pasted(run: Run, tmp_path: Path) -> None:
    model = tmp_path / "my models" / "it's mine.pth"
    write_model(model)
    out = tmp_path / "my bundles" / "a b.rwkv"
    out.parent.mkdir()
    status, _, err = run("convert", model, "--target", "none", "-o", out)
    assert status == 0
    command = next(line for line in err.splitlines() if line.startswith("next: ")).removeprefix("next: ")
    assert shlex.split(command)[:4] == ["rwkv-npu", "generate", "-m", str(out)]
    advice = [
        finding.mend for finding in diagnosis.examine(bundle=open_bundle(out)) if "convert" in finding.mend
    ]
    assert shlex.split(advice[-1])[1:5] == ["convert", "it's mine.pth", "-o", str(out)]
