"""The training run of the demo model: batches, optimiser, schedule, evaluation, and the run's folder.

The folder holds `vocab.txt`, `arguments.json`, `checkpoint.pt` (to continue), `best.pth` (official layout, bf16, the
best held-out loss so far) and `loss.csv`. Progress is measured by the clock: a run ends after --minutes of training,
without the time of evaluations.
"""

import argparse
import csv
import json
import math
import os
import platform
import random
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import demo_corpus
import torch
import torch.nn.functional as F
from demo_model import DemoModel, Size
from demo_vocab import Vocabulary, learn
from tqdm import tqdm

WARM_UP = 0.02  # of the whole run
LAST_RATE = 0.02  # of the highest learning rate
NEAR = 64  # tokens; a row skips at most so many to begin with the next document
EVAL_ROW = 1024
# layer 0 has no v1
RANKS = [("decay_rank", 0, "w1"), ("rate_rank", 0, "a1"), ("value_rank", 1, "v1"), ("gate_rank", 0, "g1")]
LOSS_FIELDS = ["step", "minutes", "epochs", "learning_rate", "train_nats_per_token", "held_out_bits_per_byte"]


class DemoError(Exception):
    """Bad input, shown as one line."""


@dataclass
class Progress:
    step: int = 0
    seconds: float = 0.0
    epoch: int = 0
    batch: int = 0  # of this epoch
    best: float = math.inf


def read_documents(paths: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Read training and held-out texts: from these files, or from the running Python if there are none."""
    try:
        documents = demo_corpus.read_jsonl(paths) if paths else list(demo_corpus.collect())
    except (OSError, ValueError, TypeError) as error:
        raise DemoError(f"cannot read the corpus: {error}") from error
    training, held_out = demo_corpus.split(documents)
    if not training or not held_out:
        raise DemoError("the corpus is too small: no training text or no held-out text")
    return training, held_out


def epoch_batches(documents: list[list[int]], batch: int, context: int, seed: str) -> Iterator[torch.Tensor]:
    """Yield batches (batch, context + 1) of ids, with the documents in a new order, each ended by id 0.

    Most rows begin with a document, like prompts. The others begin within a long document.
    """
    chance = random.Random(seed)
    stream: list[int] = []
    starts: list[int] = []
    for document in chance.sample(documents, len(documents)):
        starts.append(len(stream))
        stream += [*document, 0]
    rows, at, following = [], 0, 0
    while at + context + 1 <= len(stream):
        rows.append(stream[at : at + context + 1])
        at += context
        while following < len(starts) and starts[following] < at:
            following += 1
        if following < len(starts) and starts[following] - at <= NEAR:
            at = starts[following]
    chance.shuffle(rows)
    for first in range(0, len(rows) - batch + 1, batch):
        yield torch.tensor(rows[first : first + batch])


def cut_tokens(document: list[int], vocabulary: Vocabulary, part: float, chance: random.Random) -> list[int]:
    """Encode this part of the tokens in two pieces, like a prompt that ends within a token.

    Half of the cuts are after a leading space. Without them the model could not continue "Return the ".
    """
    pieces: list[int] = []
    for number in document:
        token = vocabulary.tokens[number - 1]
        if len(token) > 1 and chance.random() < part:
            at = 1 if token[:1] == b" " and chance.random() < 0.5 else chance.randrange(1, len(token))
            pieces += vocabulary.encode(token[:at]) + vocabulary.encode(token[at:])
        else:
            pieces.append(number)
    return pieces


def held_out_bits(model: DemoModel, documents: list[list[int]], size_in_bytes: int) -> float:
    """Bits per byte of the held-out texts, in rows of 1,024 tokens, each from an empty state.

    Bits for the ends of documents count, but the ends do not count as bytes.
    """
    stream = [0] + [number for document in documents for number in [*document, 0]]
    device = model.emb.weight.device
    rows = [stream[at : at + EVAL_ROW + 1] for at in range(0, len(stream) - 1, EVAL_ROW)]
    was_training = model.training
    model.eval()
    nats = 0.0
    with torch.no_grad():
        for group in (rows[:-1][at : at + 8] for at in range(0, len(rows) - 1, 8)):
            nats += _nats(model, torch.tensor(group, device=device)).item()
        nats += _nats(model, torch.tensor(rows[-1:], device=device)).item()
    model.train(was_training)
    return nats / math.log(2) / size_in_bytes


def _nats(model: DemoModel, rows: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
    logits, _ = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction=reduction)


def new_optimizer(model: DemoModel, rate: float, decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on the large matrices only. The state's decays have twice the learning rate."""
    groups: dict[str, list[torch.nn.Parameter]] = {"decayed": [], "plain": [], "fast": []}
    for name, parameter in model.named_parameters():
        large = name.endswith(".weight") and parameter.ndim == 2 and not name.startswith("emb")
        groups["fast" if name.endswith("att.w0") else "decayed" if large else "plain"].append(parameter)
    settings = {"decayed": (decay, 1.0), "plain": (0.0, 1.0), "fast": (0.0, 2.0)}
    return torch.optim.AdamW(
        [{"params": groups[g], "weight_decay": wd, "scale": scale} for g, (wd, scale) in settings.items()],
        lr=rate,
        betas=(0.9, 0.99),
        eps=1e-12,
        fused=True,
    )


def rate_at(progress: float, highest: float) -> float:
    """The learning rate at `progress` (0 .. 1): a linear warm-up, then a cosine."""
    if progress < WARM_UP:
        return highest * (0.02 + 0.98 * progress / WARM_UP)
    fraction = min(1.0, (progress - WARM_UP) / (1 - WARM_UP))
    return highest * (LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * fraction)) / 2)


def replace_file(path: Path, content: Any) -> None:
    """`torch.save`, atomically."""
    partial = path.with_name(path.name + ".partial")
    torch.save(content, partial)
    os.replace(partial, path)


class Run:
    """A training run in a folder: vocabulary, model, optimiser, progress and the loss table."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.out: Path = args.out
        self.out.mkdir(parents=True, exist_ok=True)
        training, held_out = read_documents(args.corpus)
        vocabulary_file = self.out / "vocab.txt"
        if not vocabulary_file.exists():
            learn(training, args.learnt).write(vocabulary_file)
        self.vocabulary = Vocabulary.read(vocabulary_file)
        self.training = [self.vocabulary.encode(text) for text in training]
        self.held_out = [self.vocabulary.encode(text) for text in held_out]
        self.held_out_bytes = sum(len(text.encode()) for text in held_out)
        self.tokens_per_epoch = sum(len(document) + 1 for document in self.training)
        if self.tokens_per_epoch < args.batch * (args.context + 1) * 2:
            raise DemoError("the corpus is too small for one batch; lower --batch or --context")
        torch.manual_seed(args.seed)
        rows = -(-len(self.vocabulary) // 64) * 64
        size = Size(rows, embedding=args.embedding, layers=args.layers, ffn=4 * args.embedding)
        self.model = DemoModel(size, args.dropout).to(args.device).train()
        self.model.multiply_in_bf16(args.precision == "bf16")
        self.optimizer = new_optimizer(self.model, args.rate, args.weight_decay)
        self.progress = Progress()
        self._resume()
        self._record_arguments()

    def _record_arguments(self) -> None:
        """Record the arguments of this start for the report, without folders of this machine."""
        path = self.out / "arguments.json"
        asked = {k: v for k, v in vars(self.args).items() if k not in ("command", "out", "corpus")}
        asked["corpus"] = [path.name for path in self.args.corpus] or "the running Python"
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        starts = json.loads(path.read_text("utf-8")) if path.exists() and self.progress.step else []
        starts.append({"step": self.progress.step, "arguments": asked, "versions": versions})
        path.write_text(json.dumps(starts, indent=1) + "\n", "utf-8")

    def _resume(self) -> None:
        path = self.out / "checkpoint.pt"
        if not path.exists():
            with (self.out / "loss.csv").open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(LOSS_FIELDS)
            return
        saved = torch.load(path, map_location=self.args.device, weights_only=True)
        if saved["size"] != asdict(self.model.size):
            raise DemoError(f"{path} is of another size of model: choose another --out")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.progress = Progress(**saved["progress"])
        torch.manual_seed(self.args.seed + self.progress.step)

    def fraction(self) -> float:
        if self.args.steps:
            return self.progress.step / self.args.steps
        return self.progress.seconds / (60 * self.args.minutes)

    def train(self) -> None:
        at, last = self.progress, time.monotonic()
        losses: list[float] = []
        bar = tqdm(total=1.0, initial=self.fraction(), disable=None, unit_scale=True, desc="train")
        saved_at = at.seconds
        while self.fraction() < 1:
            seed = f"{self.args.seed}-{at.epoch}"
            chance = random.Random(f"cut-{seed}")
            cut = [cut_tokens(d, self.vocabulary, self.args.cut, chance) for d in self.training]
            batches = epoch_batches(cut, self.args.batch, self.args.context, seed)
            for number, rows in enumerate(batches):
                if number < at.batch:
                    continue
                losses.append(self._step(rows.to(self.args.device)))
                at.step, at.batch = at.step + 1, number + 1
                at.seconds, last = at.seconds + time.monotonic() - last, time.monotonic()
                bar.n = min(1.0, self.fraction())
                bar.set_postfix(loss=f"{losses[-1]:.3f}", step=at.step)
                if at.seconds - saved_at > 60 * self.args.save_minutes:
                    self.record(losses)
                    saved_at, last = at.seconds, time.monotonic()  # evaluation is not training time
                if self.fraction() >= 1:
                    break
            else:
                at.epoch, at.batch = at.epoch + 1, 0
        bar.close()
        if losses:
            self.record(losses)

    def _step(self, rows: torch.Tensor) -> float:
        rate = rate_at(self.fraction(), self.args.rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        loss = _nats(self.model, rows, "mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        value = loss.item()
        if not math.isfinite(value):
            raise DemoError(f"the loss is {value} at step {self.progress.step}: lower --rate")
        return value

    def record(self, losses: list[float]) -> None:
        """Evaluate, save, and add a line to the table. Empties `losses`."""
        at = self.progress
        bits = held_out_bits(self.model, self.held_out, self.held_out_bytes)
        mean = sum(losses) / max(1, len(losses))
        losses.clear()
        epochs = at.epoch + at.batch * self.args.batch * self.args.context / self.tokens_per_epoch
        rate = self.optimizer.param_groups[0]["lr"]
        minutes = f"{at.seconds / 60:.2f}"
        row = [at.step, minutes, f"{epochs:.2f}", f"{rate:.3g}", f"{mean:.4f}", f"{bits:.4f}"]
        with (self.out / "loss.csv").open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)
        tqdm.write(" ".join(f"{k}={v}" for k, v in zip(LOSS_FIELDS, row, strict=True)), file=sys.stderr)
        if bits < at.best:
            at.best = bits
            replace_file(self.out / "best.pth", official_weights(self.model))
        saved = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        replace_file(
            self.out / "checkpoint.pt", saved | {"progress": asdict(at), "size": asdict(self.model.size)}
        )


def official_weights(model: DemoModel) -> "OrderedDict[str, torch.Tensor]":
    """Plain bf16 tensors under the official names."""
    weights = model.state_dict()
    return OrderedDict((name, weights[name].detach().to("cpu", torch.bfloat16).clone()) for name in weights)


def load_weights(path: Path) -> DemoModel:
    """Load a model in fp32 from a file in the official layout. The shapes give its sizes."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DemoError(f"cannot read {path}: {error.strerror}") from error
    ranks = {
        field: weights[f"blocks.{layer}.att.{matrix}"].shape[1]
        for field, layer, matrix in RANKS
        if f"blocks.{layer}.att.{matrix}" in weights
    }
    vocabulary, width = weights["emb.weight"].shape
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    ffn = weights["blocks.0.ffn.key.weight"].shape[0]
    model = DemoModel(Size(vocabulary, embedding=width, layers=layers, ffn=ffn, **ranks))
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.eval()
