"""The demo model's tools: the training forward against the recurrence, the vocabulary, resuming a run."""

import csv
import json
import random
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import demo_corpus  # noqa: E402
import demo_report  # noqa: E402
import train_demo  # noqa: E402
from demo_model import DemoModel, Size, chunked, stepwise  # noqa: E402
from demo_training import Progress, cut_tokens, epoch_batches, load_weights, official_weights, rate_at  # noqa: E402
from demo_vocab import Vocabulary, learn  # noqa: E402

TEXTS = [f"Return the {a} of the {b}.\n\nIf the {b} is empty, raise {a}Error." for a in "xyz" for b in "klmn"]
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
TINY = Size(96, embedding=128, layers=3, ffn=192, decay_rank=8, rate_rank=8, value_rank=4, gate_rank=16)


@pytest.fixture
def model() -> DemoModel:
    """In fp64 and away from its initial zeros, which would hide terms."""
    torch.manual_seed(1)
    model = DemoModel(TINY).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("length", [1, 31, 32, 75])
def test_chunked_forward_equals_the_recurrence(model: DemoModel, length: int) -> None:
    tokens = torch.randint(0, 96, (2, length + 5))
    start = [type(layer)(*(x.double() for x in layer)) for layer in model.new_state(2)]
    with torch.no_grad():
        _, state = model(tokens[:, :5], start, stepwise)  # so that neither begins from zeros
        at_once, after = model(tokens[:, 5:], state, chunked)
        one_by_one = []
        for t in range(5, length + 5):
            logits, state = model(tokens[:, t : t + 1], state, stepwise)
            one_by_one.append(logits)
    torch.testing.assert_close(at_once, torch.cat(one_by_one, dim=1), atol=1e-10, rtol=0)
    for ours, theirs in zip(after, state, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y, atol=1e-10, rtol=0)


def test_chunked_keeps_fp32_accuracy_at_the_fastest_decay() -> None:
    torch.manual_seed(2)
    r, k, v, kappa = (torch.randn(1, 64, 2, 16) for _ in range(4))
    kappa = torch.nn.functional.normalize(kappa, dim=-1)
    log_w = torch.full_like(r, -0.6065)
    a, state = torch.rand_like(r), torch.randn(1, 2, 16, 16)
    ours, theirs = (form(r, log_w, k, v, kappa, a, state)[0] for form in (chunked, stepwise))
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_weights_have_the_official_layout_and_come_back(tmp_path: Path) -> None:
    model = DemoModel(TINY)
    torch.save(official_weights(model), tmp_path / "m.pth")
    weights = torch.load(tmp_path / "m.pth", weights_only=True)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert weights["blocks.1.att.r_k"].shape == (2, 64)
    assert weights["blocks.1.att.x_r"].shape == weights["blocks.2.ffn.x_k"].shape == (1, 1, 128)
    assert weights["blocks.1.att.g1"].shape == (128, 16)
    assert weights["blocks.0.ffn.key.weight"].shape == (192, 128)
    assert "blocks.0.ln0.weight" in weights and "blocks.0.att.v0" not in weights
    assert load_weights(tmp_path / "m.pth").size == TINY


def test_vocabulary_is_well_formed_and_greedy(tmp_path: Path) -> None:
    vocabulary = learn([*TEXTS, "caf\u00e9 \u00fcber \u00e9t\u00e9 " * 4], learnt=40)
    vocabulary.write(tmp_path / "v.txt")
    lines = (tmp_path / "v.txt").read_text("utf-8").splitlines()
    assert [int(line.split(" ")[0]) for line in lines] == list(range(1, 297))
    assert vocabulary.tokens[:256] == [bytes([byte]) for byte in range(256)]
    assert len(set(vocabulary.tokens)) == 296
    again = Vocabulary.read(tmp_path / "v.txt")
    assert again.tokens == vocabulary.tokens
    text = TEXTS[0] + "\u00e9t\u00e9 \U0001f600\n"
    assert again.decode(again.encode(text)) == text
    assert Vocabulary([b"a", b"b", b"ab", b"abb"]).encode("abbab") == [4, 3]


def test_a_wrong_vocabulary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("1 'a' 1\n3 'b' 1\n")
    with pytest.raises(ValueError, match="v.txt:2"):
        Vocabulary.read(tmp_path / "v.txt")


def test_prose_is_cleaned() -> None:
    raw = """Return the number of items.

        The paragraph is broken by its margin, so that its lines are one
        line here.

            >>> len([1])
            1

        | a | table |
        """
    paragraph = "The paragraph is broken by its margin, so that its lines are one line here."
    wanted = f"Return the number of items.\n\n{paragraph}"
    assert demo_corpus.clean(raw) == wanted
    assert demo_corpus.is_prose(wanted)
    assert not demo_corpus.is_prose("x = {1: [2, 3], 4: (5, 6)}\ny = x[1][0] + x[4][1] * 10 ** 3")


def test_held_out_documents_share_no_paragraph_with_the_training_text() -> None:
    shared = "A paragraph that is long enough not to be the same by coincidence, in two documents."
    names = [f"doc:module.f{number}" for number in range(300)]
    documents = [demo_corpus.Document(name, f"Text of {name}.") for name in names]
    held_out_name = next(name for name in names if demo_corpus.is_held_out(name, 3.0))
    documents.append(
        demo_corpus.Document(
            "doc:other", f"{shared}\nAnd a second one, which is also long enough to be compared here."
        )
    )
    documents.append(
        demo_corpus.Document(
            held_out_name,
            f"{shared}\n" + "Only here, though it also is of a length that counts as a paragraph.",
        )
    )
    training, held_out = demo_corpus.split(documents)
    assert 0 < len(held_out) < 30 and len(training) + len(held_out) == 301
    assert not any(shared in text for text in held_out)
    assert not demo_corpus.is_held_out("doc:test.test_os.T", 100.0) and demo_corpus.is_held_out(
        "doc:os", 100.0
    )


def test_batches_begin_at_documents_and_repeat_with_the_seed() -> None:
    documents = [[number] * 20 for number in range(1, 40)]
    batches = list(epoch_batches(documents, 2, 32, "1"))
    assert all(batch.shape == (2, 33) for batch in batches)
    starts = [row for batch in batches for row in batch.tolist() if row[:20] == [row[0]] * 20]
    assert len(starts) == 2 * len(batches)
    assert torch.equal(torch.cat(batches), torch.cat(list(epoch_batches(documents, 2, 32, "1"))))


def test_cut_tokens_spell_the_same_text() -> None:
    vocabulary = learn(TEXTS, learnt=40)
    document = vocabulary.encode(TEXTS[0])
    chance = random.Random(1)
    assert cut_tokens(document, vocabulary, 0.0, chance) == document
    pieces = cut_tokens(document, vocabulary, 1.0, chance)
    assert len(pieces) > len(document) and vocabulary.decode(pieces) == TEXTS[0]
    after_space = vocabulary.encode("Return the ")
    assert any(
        cut_tokens(document, vocabulary, 0.5, chance)[: len(after_space)] == after_space for _ in range(99)
    )


def test_rate_rises_and_falls() -> None:
    rates = [rate_at(step / 100, 1.0) for step in range(101)]
    assert max(rates) == rates[2] == 1.0 and rates[0] == rates[-1] == 0.02


def test_ngram_is_a_distribution_and_learns() -> None:
    known = b"the cat sat on the mat " * 20
    total = sum(2 ** -demo_report.ngram_bits(known, b"the " + bytes([byte])) for byte in range(256))
    assert total == pytest.approx(2 ** -demo_report.ngram_bits(known, b"the "))
    assert demo_report.ngram_bits(known, known) < 0.5 * len(known)


def tiny_run(folder: Path, *extra: str) -> int:
    """`train_demo train` on a small corpus."""
    corpus = folder / "corpus.jsonl"
    lines = [json.dumps([f"doc:m.f{number}", text * 2]) for number, text in enumerate(TEXTS * 9)]
    unique = [line.replace("Return", f"Return {number}") for number, line in enumerate(lines)]
    corpus.write_text("\n".join(unique))
    small = "--batch 2 --context 32 --embedding 64 --layers 2 --learnt 30".split()
    fixed = ["--precision", "fp32", "--device", "cpu", "--threads", "1", "--corpus", str(corpus)]
    return train_demo.main(["train", "--out", str(folder / "run"), *small, *fixed, *extra])


def test_a_run_resumes_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tiny_run(tmp_path, "--steps", "2") == 0
    assert tiny_run(tmp_path, "--steps", "4") == 0
    assert tiny_run(tmp_path, "--steps", "4") == 0  # has nothing left to do
    run, data = tmp_path / "run", tmp_path / "data"
    with (run / "loss.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2", "4"]
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert Progress(**saved["progress"]).step == saved["progress"]["batch"] == 4
    monkeypatch.setattr(demo_report, "PROMPTS", ["Return the ", ""])
    arguments = ["--threads", "1", "--out", str(run), "--corpus", str(tmp_path / "corpus.jsonl")]
    assert train_demo.main(["report", *arguments, "--data", str(data)]) == 0
    assert {path.name for path in data.iterdir()} == {
        "model.pth",
        "vocab.txt",
        "heldout.txt",
        "loss.csv",
        "PROVENANCE.md",
    }
    provenance = (data / "PROVENANCE.md").read_text()
    assert "PSF-2.0" in provenance and str(tmp_path) not in provenance
    capsys.readouterr()
    assert train_demo.main(["sample", "--out", str(run), "--prompt", "Return", "-n", "3"]) == 0
    assert capsys.readouterr().out.startswith("Return")


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--out", str(tmp_path), "--corpus", str(tmp_path / "missing.jsonl")]
    assert train_demo.main(arguments) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert tiny_run(tmp_path, "--steps", "1") == 0
    assert tiny_run(tmp_path, "--steps", "2", "--embedding", "128") == 1
    assert "another size" in capsys.readouterr().err
