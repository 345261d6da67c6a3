"""`eval --lm-eval`: EleutherAI's harness runs two tasks of local files, offline, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_npu.errors import UsageError
from rwkv_npu.evaluation import harness
from rwkv_npu.model import Model
from tests.tiny import PROMPT, Run, continuation, error_line

QUESTIONS = [
    {"question": "the turning", "choices": ["the and ", "über", "re"], "answer": 0},
    {"question": "über", "choices": ["turn", "turning the ", "€uro"], "answer": 2},
    {"question": "and", "choices": ["the ", "ing ", "re turn"], "answer": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
output_type: {kind}
validation_split: validation
doc_to_text: "{{{{question}}}}"
{rest}
"""
CHOICES = 'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\nmetric_list: [{metric: acc}]'
EXACT = (
    'doc_to_target: "{{target}}"\nmetric_list: [{metric: exact_match}]\n'
    "generation_kwargs: {until: [zzzz], do_sample: false, max_gen_toks: 12}"
)


def log_p(model: Model, text: str, answer: str) -> float:
    context = model.encode(text)
    ids = model.encode(text + answer)
    rows, _ = model.forward(ids[:-1], all_logits=True)
    rows = rows.astype(np.float64)[len(context) - 1 :]
    rows -= np.log(np.exp(rows).sum(1, keepdims=True))
    return float(sum(row[token] for row, token in zip(rows, ids[len(context) :], strict=True)))


def test_two_tasks_of_local_files(checkpoint: Path, model: Model, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval")
    data = tmp_path / "data.json"
    answers: list[dict[str, Any]] = [
        {**one, "target": continuation(model, str(one["question"]))} for one in QUESTIONS
    ]
    answers[2]["target"] = "something else"
    data.write_text("\n".join(map(json.dumps, answers)))
    for name, kind, rest in (("choose", "multiple_choice", CHOICES), ("write", "generate_until", EXACT)):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=data, kind=kind, rest=rest))
    command = ["eval", "-m", checkpoint, "--backend", "numpy", "--lm-eval", "choose,write"]
    flags = ["--include_path", tmp_path, "--output_path", tmp_path / "out"]
    result = subprocess.run(
        [sys.executable, "-m", "rwkv_npu", *map(str, command + flags)],
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "hf"),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (found,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(found.read_text())["results"]
    likeliest = [
        int(np.argmax([log_p(model, str(one["question"]), " " + choice) for choice in one["choices"]]))  # type: ignore[attr-defined]
        for one in QUESTIONS
    ]
    right = [best == one["answer"] for best, one in zip(likeliest, QUESTIONS, strict=True)]
    assert results["choose"]["acc,none"] == pytest.approx(np.mean(right))
    assert results["write"]["exact_match,none"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_scores_are_those_of_the_whole_text(
    model: Model, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(harness, "CHUNK", chunk)
    scorer = harness.Scorer(model)
    for answer in (" turn", "and the re", " über"):
        whole, context = model.encode(PROMPT + answer), model.encode(PROMPT)
        found, _ = scorer.score(context, whole[len(context) :])
        assert found == pytest.approx(log_p(model, PROMPT, answer), abs=1e-4)
    best = int(model.forward(context)[0].argmax())
    assert scorer.score(context, [best])[1] and not scorer.score(context, [(best + 1) % 200])[1]
    assert scorer.score(context, []) == (0.0, True)


def test_it_says_what_it_needs(
    model: Model, run: Run, monkeypatch: pytest.MonkeyPatch, wordless: Path
) -> None:
    for words in ([], ["--limit", "3"]):
        with pytest.raises(UsageError, match="needs tasks, separated by commas"):
            harness.run(model, words)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match="pip install lm-eval"):
        harness.run(model, ["piqa"])
    assert "--tokenizer" in error_line(run("eval", "-m", wordless, "--backend", "numpy", "--lm-eval", "piqa"))
