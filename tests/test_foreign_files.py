"""Files that other programs leave beside a model or in its place: ignored, or refused with advice."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import rwkv_npu
from rwkv_npu.errors import CheckpointError, TokenizerError, UsageError
from rwkv_npu.formats.checkpoint import open_checkpoint
from rwkv_npu.text.corpus import read_text
from tests.checkpoints import SMALL, refused, saved, small, weights
from tests.tiny import Run, error_line, write_model
from tools.make_checkpoint import make_checkpoint

# Vocabularies beside a model


@pytest.mark.parametrize("damage", ["two", "line"])
def test_ids_info_and_convert_need_no_vocabulary(run: Run, tmp_path: Path, damage: str) -> None:
    model = tmp_path / "model" / "model.pth"
    write_model(model)
    other = "1 'a' 1\n" if damage == "two" else "1 'a' 1\n2 'b' 7\n"
    (model.parent / "other_vocab.txt").write_text(other)
    assert run("info", model)[0] == 0
    assert run("generate", "-m", model, "--ids", "-p", "5 6", "-n", 2)[0] == 0
    out = tmp_path / "out.rwkv"
    status, _, said = run("convert", model, "--target", "none", "-o", out)
    assert status == 0 and "other_vocab.txt" in said and out.is_dir()
    assert "other_vocab.txt" in error_line(run("generate", "-m", model, "-p", "the", "-n", 2))
    assert (
        run("generate", "-m", model, "-p", "the", "-n", 2, "--tokenizer", model.parent / "vocab.txt")[0] == 0
    )


def test_padding_in_a_vocabulary_is_skipped(tmp_path: Path) -> None:
    write_model(tmp_path / "model.pth")
    with (tmp_path / "vocab.txt").open("a") as file:
        file.write("270 '' 0\n")
    model = rwkv_npu.load(tmp_path / "model.pth", backend="numpy")
    assert model.tokenizer is not None and model.encode("a")


def test_a_head_of_a_padded_pile_model_is_named(tmp_path: Path) -> None:
    write_model(tmp_path / "model.pth", vocabulary=False, D=32, V=50304)
    model = rwkv_npu.load(tmp_path / "model.pth", backend="numpy")
    with pytest.raises(TokenizerError, match="tokenizer='pile'"):
        model.encode("a")


# config.json


def fla(folder: Path, **config: Any) -> Path:
    make_checkpoint(folder, generation="7", hf=True, **SMALL)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("head_dim", 128),
        ("head_dim", 32),
        ("norm_eps", 1e-6),
        ("hidden_act", "gelu"),
        ("head_size_divisor", 4),
    ],
)
def test_other_maths_is_refused(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=key):
        open_checkpoint(fla(tmp_path / "hf", **{key: value}))


def test_the_usual_maths_is_read(tmp_path: Path) -> None:
    usual = {
        "head_dim": 64,
        "norm_eps": 1e-5,
        "hidden_act": "sqrelu",
        "head_size_divisor": 8,
        "norm_bias": True,
    }
    assert open_checkpoint(fla(tmp_path / "hf", **usual)).spec.generation == "7"


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        open_checkpoint(fla(tmp_path / "hf", tie_word_embeddings=True))


def test_a_foreign_config_beside_blinkdls_file_is_left_alone(tmp_path: Path) -> None:
    small(tmp_path / "model.pth", "7")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "norm_eps": 1e-6}')
    assert open_checkpoint(tmp_path).spec == open_checkpoint(tmp_path / "model.pth").spec


# Files that are no models


@pytest.mark.parametrize(
    "name", ["._model.pth", ".DS_Store", ".hidden.safetensors", "b.pth.part", "b.pth.crdownload"]
)
def test_a_folder_is_read_without_what_is_no_model(tmp_path: Path, name: str) -> None:
    small(tmp_path / "model.pth", "7")
    (tmp_path / name).write_bytes(b"\0" * 100)
    assert open_checkpoint(tmp_path).spec.generation == "7"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.pth", b"<!DOCTYPE html><html>", "a web page"),
        ("model.pth", b"\n<html lang=en>", "a web page"),
        ("model.pth.part", b"PK", "not finished"),
        ("model.safetensors.incomplete", b"PK", "not finished"),
        ("._model.pth", b"\0\5\x16\7", "macOS keeps of model.pth"),
        ("model-00001-of-00003.safetensors", b"x" * 100, "shard 1 of 3"),
        ("adapter.json", b'{"a": 1, "b": 2}', "a JSON file"),
    ],
)
def test_a_file_that_is_no_model_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, said)


def test_shards_without_their_index_are_named(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(b"x" * 100)
    refused(tmp_path, "2 shards and no index: download its model.safetensors.index.json")


def test_an_unfinished_download_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.pth.part").write_bytes(b"x")
    refused(tmp_path, "model.pth.part, a download that is not finished")


def test_a_shard_name_of_any_length_is_refused(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x" * 300}}))
    refused(index, "is missing")


def test_a_training_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {"state_dict": weights(tmp_path, "7")}
    assert open_checkpoint(saved(tmp_path / "last.ckpt", whole)).spec.generation == "7"  # weights alone
    lightning = types.ModuleType("pytorch_lightning")
    exec("class Callback: pass", vars(lightning))
    lightning.Callback.__module__ = "pytorch_lightning"
    monkeypatch.setitem(sys.modules, "pytorch_lightning", lightning)
    path = saved(tmp_path / "last.ckpt", {**whole, "callbacks": lightning.Callback()})
    refused(path, "a training checkpoint .*state_dict")


def test_stray_tensors_of_a_further_layer_are_named_as_such(tmp_path: Path) -> None:
    stored = weights(tmp_path, "7")
    stored["blocks.2.ln1.weight"] = stored["blocks.1.ln1.weight"]
    refused(saved(tmp_path / "m.pth", stored), "has only blocks.2.ln1.weight of layer 2")
    save_file({k: v.clone() for k, v in stored.items()}, tmp_path / "m.safetensors")
    refused(tmp_path / "m.safetensors", "left over from a larger model")


# Texts


def test_a_text_is_read_without_mark_and_carriage_returns(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffone\r\ntwo\r\n".encode())
    with pytest.warns(UserWarning, match="byte order mark and carriage returns"):
        assert read_text(str(path)) == "one\ntwo\n"
    assert read_text(str(path), raw=True) == "\ufeffone\r\ntwo\r\n"
    path.write_bytes("a\ufeffb\rc\n".encode())
    assert read_text(str(path)) == "a\ufeffb\rc\n"


@pytest.mark.filterwarnings("default")
def test_a_prompt_from_windows(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    texts = {"plain.txt": b"the \nturn", "windows.txt": b"\xef\xbb\xbfthe \r\nturn"}
    for name, data in texts.items():
        (tmp_path / name).write_bytes(data)
    arguments = ("generate", "-m", checkpoint, "-n", 5, "--temp", 0, "--echo", "-f")
    plain, windows = (run(*arguments, tmp_path / name) for name in texts)
    assert plain[:2] == windows[:2] and "carriage returns" in windows[2] and "--raw" in windows[2]
    raw = run(*arguments, tmp_path / "windows.txt", "--raw")
    assert raw[0] == 0 and "\r" in raw[1] and "carriage returns" not in raw[2]


# Platforms


def alone(code: str, *words: object, **environment: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_cpu_backends_run_where_linux_is_missing(checkpoint: Path) -> None:
    """Hides what macOS and Windows lack. Nothing more is claimed for them."""
    code = """
    import os, sys
    for name in ("sched_getaffinity", "sched_setaffinity", "O_NONBLOCK", "O_NOFOLLOW", "O_DIRECTORY"):
        delattr(os, name)
    for name in ("fcntl", "resource", "pwd", "grp"):
        sys.modules[name] = None
    import rwkv_npu, rwkv_npu.cli
    for backend in ("numpy", "ort", "torch"):
        with rwkv_npu.load(sys.argv[1], backend=backend) as model:
            print(len(model.forward([1, 2, 3])[0]))
    sys.exit(rwkv_npu.cli.main(["info", sys.argv[1]]))
    """
    assert "RWKV-7" in alone(code, checkpoint)


def test_locks_and_the_npu_say_what_they_need() -> None:
    code = """
    import sys
    sys.modules["fcntl"] = sys.modules["resource"] = None
    from pathlib import Path
    from rwkv_npu.board.npu import LOCK
    from rwkv_npu.errors import RwkvNpuError
    from rwkv_npu.formats.files import locked
    for attempt in (LOCK.acquire, lambda: locked(Path(".")).__enter__()):
        try:
            attempt()
        except RwkvNpuError as error:
            print(error)
    from rwkv_npu.cli import main
    sys.stderr = sys.stdout
    main(["doctor"])
    """
    lines = alone(code).splitlines()
    assert len(lines) == 3 and all("Linux" in line for line in lines)


def test_commands_run_for_a_user_without_a_home(checkpoint: Path, tmp_path: Path) -> None:
    code = """
    import os, pwd, sys
    def missing(uid):
        raise KeyError(uid)
    pwd.getpwuid = missing
    for name in ("HOME", "RWKV_NPU_CACHE", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)
    os.environ["TMPDIR"] = sys.argv[2]
    from rwkv_npu.cli import main
    model, out = sys.argv[1], sys.argv[2] + "/out.rwkv"
    for command in (
        ["generate", "-m", model, "-p", "the", "-n", "2", "--backend", "numpy"],
        ["convert", model, "--target", "none", "-o", out],
        ["toolkit", "status"],
        ["doctor"],
        ["chat", "-m", model, "--backend", "numpy"],
        ["eval", "-m", model, "--text", __import__("shlex").__file__, "--backend", "numpy"],
    ):
        print(command[0], main(command), flush=True)
    """
    text = alone(code, checkpoint, tmp_path)
    for expected in ("generate 0", "convert 0", "toolkit 1", "doctor 0", "chat 0", "eval 0"):
        assert expected in text


# Ends of a text


def greedy(model: rwkv_npu.Model, **options: Any) -> list[int]:
    return [step.token for step in model.generate([5, 6], temperature=0, max_tokens=8, **options)]


def test_other_tokens_end_a_text_or_are_banned(run: Run, checkpoint: Path) -> None:
    model = rwkv_npu.load(checkpoint, backend="numpy")
    ids = greedy(model)
    end = ids[3]
    stopped = list(model.generate([5, 6], temperature=0, max_tokens=8, stop_ids=[end]))
    assert [step.token for step in stopped] == ids[: ids.index(end) + 1]
    assert stopped[-1].finish_reason == "stop"
    assert stopped[-1].text in ("", "\ufffd")  # at most the half of a character that came before
    other = greedy(model, banned=[ids[0]])
    assert ids[0] not in other and other != ids
    for options in (
        {"stop_ids": [10**6]},
        {"banned": [-1]},
        {"banned": ["a"]},
        {"banned": range(model.spec.V)},
    ):
        with pytest.raises(UsageError):
            greedy(model, **options)
    arguments = ("generate", "-m", checkpoint, "--ids", "-p", "5 6", "--temp", 0, "-n", 8)
    status, text, _ = run(*arguments, "--stop-id", end, "--ban", 0)
    assert status == 0 and text.split() == [str(token) for token in ids[: ids.index(end) + 1]]


def test_the_end_that_config_json_names_is_kept_in_a_bundle(run: Run, tmp_path: Path) -> None:
    folder = fla(tmp_path / "hf", eos_token_id=[3, 2])
    assert rwkv_npu.load(folder, backend="numpy").stop_ids == {2, 3}
    assert run("convert", folder, "--target", "none", "-o", tmp_path / "out.rwkv")[0] == 0
    assert rwkv_npu.load(tmp_path / "out.rwkv", backend="numpy").stop_ids == {2, 3}
    for wrong in ("2", 10**6, [1.5]):
        with pytest.raises(CheckpointError, match="eos_token_id"):
            open_checkpoint(fla(tmp_path / "wrong", eos_token_id=wrong))
