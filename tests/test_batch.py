"""`rwkv-npu batch`: files of requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rwkv_npu.serve.batch import read_requests
from tests.tiny import Run

CHAT = {"messages": [{"role": "user", "content": "Return the file"}], "max_tokens": 6, "temperature": 0}


def write(path: Path, requests: list[Any]) -> Path:
    path.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in requests))
    return path


def request(name: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": {**CHAT, **body}}


def answers(path: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line["response"] for line in lines}


def test_a_batch_is_answered_and_goes_on(run: Run, tmp_path: Path) -> None:
    asked = write(tmp_path / "in.jsonl", [request("a"), request("b", n=2), request("c", max_tokens=0)])
    out = tmp_path / "out.jsonl"
    status, printed, _ = run("batch", asked, "-o", out, "--backend", "numpy")
    found = answers(out)
    assert status == 1 and printed == ""  # one of them could not be answered
    assert [found[name]["status_code"] for name in "abc"] == [200, 200, 400]
    assert len(found["b"]["body"]["choices"]) == 2 and "max_tokens" in found["c"]["body"]["error"]["message"]

    first = out.read_bytes()
    out.write_bytes(first + b'{"id": "batch_req_01", "custom_id": "cut sh')  # a kill in the middle of a line
    write(asked, [request("a"), request("d")])
    assert run("batch", asked, "-o", out, "--backend", "numpy")[0] == 0
    assert out.read_bytes().startswith(first) and set(answers(out)) == {"a", "b", "c", "d"}
    assert answers(out)["d"]["body"]["choices"] == found["a"]["body"]["choices"]
    status, _, said = run("batch", asked, "-o", out, "--backend", "numpy")
    assert status == 0 and "answered already" in said


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "in.jsonl:1 is not JSON"),
        (["[]"], "in.jsonl:1: a request is an object with a custom_id"),
        ([request("a"), request("a")], "custom_id 'a' is used twice"),
        ([{**request("a"), "url": "/v1/embeddings"}], "in.jsonl:1: its url must be one of"),
        ([{**request("a"), "body": None}], "in.jsonl:1: its body is missing"),
    ],
)
def test_bad_files(run: Run, tmp_path: Path, lines: list[Any], message: str) -> None:
    status, _, said = run("batch", write(tmp_path / "in.jsonl", lines), "-o", tmp_path / "out")
    assert status == 1 and message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        "precious\n",
        "precious",
        '{"precious": [1]}',
        '{"custom_id": "a"}\n{"precious": [1]}',
        pytest.param("[" * 100_000 + "\n", id="nested"),
    ],
)
def test_a_foreign_output_is_left_alone(run: Run, tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    out.write_text(text)
    status, _, said = run("batch", write(tmp_path / "in.jsonl", [request("a")]), "-o", out)
    assert status == 1 and "is not a file of answers" in said and out.read_text() == text


def test_a_name_that_utf8_lacks(run: Run, tmp_path: Path) -> None:
    asked, out = write(tmp_path / "in.jsonl", [request("\ud800", max_tokens=0)]), tmp_path / "out"
    run("batch", asked, "-o", out, "--backend", "numpy")
    assert answers(out)["\ud800"]["status_code"] == 400
    assert "answered already" in run("batch", asked, "-o", out)[2]


def test_a_folder_is_no_output(run: Run, tmp_path: Path) -> None:
    status, _, said = run("batch", write(tmp_path / "in.jsonl", [request("a")]), "-o", tmp_path)
    assert status == 1 and f"cannot read {tmp_path}: Is a directory" in said and said.count("\n") == 1


@pytest.mark.parametrize("rest", ['{"id', '{"id": "batch_req_', '{"id": "batch_req_01", "custom_id": "b"'])
def test_an_answer_cut_anywhere_is_removed(tmp_path: Path, rest: str) -> None:
    out = tmp_path / "out"
    out.write_text('{"custom_id": "a"}\n' + rest)
    todo = read_requests(write(tmp_path / "in.jsonl", [request("a"), request("b")]), out)
    assert [one["custom_id"] for one in todo] == ["b"] and out.read_text() == '{"custom_id": "a"}\n'
