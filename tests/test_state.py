"""State files: what is in them, that they continue a run exactly, and what is refused."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import rwkv_npu
from rwkv_npu.errors import StateError
from rwkv_npu.formats.state import State, load_untrusted_state
from rwkv_npu.model import Model
from rwkv_npu.models.spec import GENERATIONS, state_shapes
from tests.tiny import write_model
from tools.make_checkpoint import make_checkpoint

L, V, D, N = 2, 40, 32, 16
TOKENS = np.random.default_rng(5).integers(0, V, 40).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("state")
    for generation in GENERATIONS:
        write_model(folder / f"{generation}.pth", generation, vocabulary=False, D=D, L=L, V=V, N=N)
    return folder


def load(folder: Path, generation: str, **options: Any) -> Model:
    return rwkv_npu.load(folder / f"{generation}.pth", **{"backend": "numpy", **options})


@pytest.fixture(scope="module", params=GENERATIONS)
def model(request: pytest.FixtureRequest, folder: Path) -> Model:
    return load(folder, request.param)


@pytest.fixture(scope="module")
def v7(folder: Path) -> Model:
    return load(folder, "7")


def same(one: State, other: State) -> bool:
    assert one.parts.keys() == other.parts.keys()
    equal = all((one.parts[name] == part).all() for name, part in other.parts.items())
    assert one.logits is not None and other.logits is not None
    return equal and (one.logits == other.logits).all() and one.tokens_seen == other.tokens_seen


# -- round trips -----------------------------------------------------------------------------------------


def test_a_file_holds_all_of_a_state(model: Model, tmp_path: Path) -> None:
    _, state = model.forward(TOKENS)
    state.save(tmp_path / "s.safetensors")
    again = rwkv_npu.load_state(tmp_path / "s.safetensors", model)
    assert same(again, state)
    assert (again.spec, again.fingerprint, again.tokens_seen) == (model.spec, model.fingerprint, len(TOKENS))
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_names_shapes_and_metadata_of_the_file(model: Model, tmp_path: Path) -> None:
    """A format that others read: fp32, without a batch, [v,k]."""
    _, state = model.forward(TOKENS)
    state.save(tmp_path / "s.safetensors")
    if model.spec.generation == "4":
        shapes = {"att.shift": (D,), "att.a": (D,), "att.b": (D,), "att.q": (D,), "ffn.shift": (D,)}
    else:
        shapes = {"att.shift": (D,), "att.wkv": (D // N, N, N), "ffn.shift": (D,)}
    tensors = load_file(tmp_path / "s.safetensors")
    expected = {f"blocks.{i}.{name}": shape for i in range(L) for name, shape in shapes.items()}
    assert {name: tensor.shape for name, tensor in tensors.items()} == {**expected, "logits": (V,)}
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    with safe_open(tmp_path / "s.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    assert metadata["format"] == "rwkv_npu state 1"
    assert metadata["generation"] == model.spec.generation
    assert metadata["fingerprint"] == model.fingerprint
    assert metadata["tokens_seen"] == "40"
    assert json.loads(metadata["spec"])["D"] == D


def test_a_new_state_can_be_saved(model: Model, tmp_path: Path) -> None:
    model.new_state().save(tmp_path / "s.safetensors")
    again = model.load_state(tmp_path / "s.safetensors")
    assert again.logits is None and again.tokens_seen == 0
    assert (model.forward(TOKENS, again)[0] == model.forward(TOKENS)[0]).all()


def test_two_joined_runs_equal_one(model: Model, tmp_path: Path) -> None:
    # Cut where the chunks of one run are cut, so that both add up the same numbers in the same order.
    _, first = model.forward(TOKENS[:32])
    first.save(tmp_path / "s.safetensors")
    logits, state = model.forward(TOKENS[32:], model.load_state(tmp_path / "s.safetensors"))
    expected, whole = model.forward(TOKENS)
    assert np.abs(logits - expected).max() < 1e-5
    assert state.tokens_seen == whole.tokens_seen == len(TOKENS)
    for name, part in whole.parts.items():
        assert np.abs(state.parts[name] - part).max() < 1e-5 * max(1, np.abs(part).max())


def test_two_joined_generations_equal_one(model: Model, tmp_path: Path) -> None:
    """A saved state has read every token that was given out."""

    def generate(prompt: list[int], count: int, **options: Any) -> tuple[list[int], State]:
        steps = list(model.generate(prompt, max_tokens=count, temperature=0, **options))
        return [step.token for step in steps], steps[-1].state

    prompts = (TOKENS[at : at + 5] for at in range(30))
    prompt = next(prompt for prompt in prompts if 0 not in generate(prompt, 12)[0])  # 0 ends a text
    whole, _ = generate(prompt, 12)
    first, state = generate(prompt, 7)
    state.save(tmp_path / "s.safetensors")
    second, _ = generate([], 5, state=model.load_state(tmp_path / "s.safetensors"))
    assert first + second == whole and len(whole) == 12


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_state_moves_between_backends_and_fusions(generation: str, folder: Path, tmp_path: Path) -> None:
    with load(folder, generation, backend="ort", fusion="layer") as one:
        one.forward(TOKENS[:20])[1].save(tmp_path / "s.safetensors")
        expected, _ = one.forward(TOKENS)
    with load(folder, generation, backend="numpy", fusion="projection") as other:
        logits, _ = other.forward(TOKENS[20:], other.load_state(tmp_path / "s.safetensors"))
    assert np.abs(logits - expected).max() < 2e-5


def test_copies_are_apart(model: Model) -> None:
    _, state = model.forward(TOKENS[:3])
    copy = state.copy()
    model.forward(TOKENS[3:6], copy, inplace=True)
    assert state.tokens_seen == 3 and copy.tokens_seen == 6
    assert same(state, model.forward(TOKENS[:3])[1])


# -- files that are refused ------------------------------------------------------------------------------


@pytest.fixture
def saved(v7: Model, tmp_path: Path) -> Path:
    v7.forward(TOKENS)[1].save(tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


def change(path: Path, tensors: dict[str, np.ndarray | None] | None = None, **metadata: str) -> None:
    """Write the file anew with other tensors (None: without) and metadata."""
    with safe_open(path, framework="numpy") as file:
        changed = {**file.metadata(), **metadata}
    kept = {**load_file(path), **(tensors or {})}
    save_file({name: array for name, array in kept.items() if array is not None}, path, changed)


def assert_refused(path: Path, model: Model, *words: str) -> None:
    """In one line, that says which file."""
    with pytest.raises(StateError) as caught:
        model.load_state(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("content", [b"", b"x", b"\x00" * 100, b"PK\x03\x04" + b"\x00" * 60, b"some text"])
def test_a_file_that_is_not_safetensors_is_refused(content: bytes, v7: Model, tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(content)
    assert_refused(tmp_path / "s", v7, "is no state file")


def test_what_is_no_file(v7: Model, tmp_path: Path) -> None:
    assert_refused(tmp_path / "none", v7, "cannot read the state")
    assert_refused(tmp_path, v7, "cannot read the state")


def test_a_safetensors_file_that_is_no_state(v7: Model, tmp_path: Path) -> None:
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "s")
    assert_refused(tmp_path / "s", v7, "not a state file")
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "s", {"format": "pt"})
    assert_refused(tmp_path / "s", v7, "not a state file")


def test_a_format_of_the_future(saved: Path, v7: Model) -> None:
    change(saved, format="rwkv_npu state 2")
    assert_refused(saved, v7, "not a state file")


def test_a_changed_number(saved: Path, v7: Model) -> None:
    data = bytearray(saved.read_bytes())
    data[-1000] ^= 1
    saved.write_bytes(data)
    assert_refused(saved, v7, "is damaged", "checksum")


def test_a_file_of_version_0_1_has_no_checksum(saved: Path, v7: Model) -> None:
    change(saved, checksum="")
    assert same(v7.load_state(saved), v7.forward(TOKENS)[1])


def test_a_file_of_a_stranger(saved: Path, v7: Model, tmp_path: Path) -> None:
    """Only a state of this model is read: other weights, a tuned state and numbers without size are not."""
    assert same(load_untrusted_state(saved, v7.spec, v7.fingerprint), v7.forward(TOKENS)[1])
    with pytest.raises(StateError, match="other weights"):
        load_untrusted_state(saved, v7.spec, "0" * 32)
    tuned = tmp_path / "tuned.safetensors"
    save_file({"blocks.0.att.time_state": np.zeros((D // N, N, N), np.float32)}, tuned)
    with pytest.raises(StateError, match="is a tuned state"):
        load_untrusted_state(tuned, v7.spec, v7.fingerprint)
    state = v7.forward(TOKENS)[1]
    state.parts["att.shift"][0, 3] = np.inf
    state.save(saved)
    with pytest.raises(StateError, match="not finite"):
        load_untrusted_state(saved, v7.spec, v7.fingerprint)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.999])
def test_a_truncated_file(keep: float, saved: Path, v7: Model) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * keep)])
    assert_refused(saved, v7, "is no state file")


@pytest.mark.parametrize("other", ["4", "6", "7a"])
def test_a_state_of_another_generation(other: str, folder: Path, saved: Path) -> None:
    with load(folder, other) as model:
        assert_refused(saved, model, "RWKV-7,", f"RWKV-{other}")


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ({"D": 48}, "the model has float32 (48,)"),
        ({"N": 8}, "the model has float32 (4, 8, 8)"),
        ({"L": 1}, "more layers than the model's 1"),
        ({"L": 3}, "lacks blocks.2.att.shift"),
        ({"V": 41}, "the model has float32 (41,)"),
    ],
    ids=lambda value: str(value)[:9],
)
def test_a_state_of_another_size(size: dict[str, int], words: str, saved: Path, tmp_path: Path) -> None:
    sizes = {"D": D, "L": L, "V": V, "N": N, **size}
    write_model(tmp_path / "other.pth", "7", vocabulary=False, **sizes)
    with rwkv_npu.load(tmp_path / "other.pth", backend="numpy") as model:
        assert_refused(saved, model, words)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32])
@pytest.mark.parametrize("name", ["blocks.1.att.wkv", "logits"])
def test_another_dtype(name: str, dtype: type[np.generic], saved: Path, v7: Model) -> None:
    change(saved, {name: load_file(saved)[name].astype(dtype)})
    assert_refused(saved, v7, name, "float32")


def test_a_dtype_that_numpy_lacks(saved: Path, v7: Model) -> None:
    array = load_file(saved)["blocks.1.att.wkv"]
    change(saved, {"blocks.1.att.wkv": array.astype(ml_dtypes.bfloat16)})
    assert_refused(saved, v7)


@pytest.mark.parametrize("name", ["blocks.0.att.shift", "blocks.1.att.wkv", "blocks.1.ffn.shift"])
def test_a_missing_tensor(name: str, saved: Path, v7: Model) -> None:
    change(saved, {name: None})
    assert_refused(saved, v7, f"lacks {name}")


@pytest.mark.parametrize("count", ["", "-1", "1.5", "many", "²", "9" * 5000], ids=range(6))
def test_a_count_that_is_none(count: str, saved: Path, v7: Model) -> None:
    change(saved, tokens_seen=count)
    assert_refused(saved, v7, "tokens_seen")


def test_other_weights_warn(saved: Path, folder: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "other.pth", "7", vocabulary=False, D=D, L=L, V=V, N=N, seed=1)
    with rwkv_npu.load(tmp_path / "other.pth", backend="numpy") as model:
        with pytest.warns(UserWarning, match="was made with other weights"):
            state = rwkv_npu.load_state(saved, model)
        assert state.parts.keys() == state_shapes(model.spec).keys()
        model.forward([1], state)


# -- files that cannot be written ------------------------------------------------------------------------


def failing(kind: int) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(kind, "No space left on device")

    return fail


@pytest.mark.parametrize("where", ["os.fsync", "os.replace"])
def test_a_failed_write_leaves_the_old_file(
    where: str, saved: Path, v7: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()
    _, state = v7.forward(TOKENS[:3])
    with monkeypatch.context() as patched:
        patched.setattr(where, failing(errno.ENOSPC))
        with pytest.raises(StateError, match="cannot write the state to .*: No space left on device"):
            state.save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_an_interrupted_write_leaves_the_old_file(
    saved: Path, v7: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        v7.new_state().save(saved)
    assert saved.read_bytes() == before


@pytest.mark.parametrize(
    "name", ["no/such/folder/s", "file/s", "folder", "x" * 300], ids=lambda name: name[:9]
)
def test_a_place_that_cannot_be_written(name: str, v7: Model, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(StateError, match="cannot write the state to"):
        v7.new_state().save(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_tuned_state_is_where_a_model_starts(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "tuned.pth", generation="7", D=64, L=2, V=64, time_state=True)
    tensors = torch.load(tmp_path / "tuned.pth", weights_only=True)
    states = {name: tensors.pop(name) for name in list(tensors) if name.endswith("time_state")}
    torch.save(states, tmp_path / "state.pth")
    torch.save(tensors, tmp_path / "plain.pth")
    tuned, plain = (rwkv_npu.load(tmp_path / f"{name}.pth", backend="numpy") for name in ("tuned", "plain"))
    state = rwkv_npu.load_state(tmp_path / "state.pth", plain)
    np.testing.assert_array_equal(plain.forward([1, 2], state)[0], tuned.forward([1, 2])[0])
    assert np.abs(plain.forward([1, 2])[0] - tuned.forward([1, 2])[0]).max() > 1e-3
    states["blocks.1.att.time_state"] = states["blocks.1.att.time_state"][..., :5]
    torch.save(states, tmp_path / "cut.pth")
    assert_refused(tmp_path / "cut.pth", plain, "blocks.1.att.time_state", "(1, 64, 5)")
