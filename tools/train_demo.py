"""Train the shipped demo model: a small RWKV-7 on the prose that ships with CPython.

    for python in python3.13 python3.12; do $python tools/demo_corpus.py > $python.jsonl; done
    python tools/train_demo.py train --out run --corpus python3.13.jsonl python3.12.jsonl --minutes 60
    python tools/train_demo.py sample --out run --prompt "Return the "
    python tools/train_demo.py report --out run --data rwkv_npu/data/demo

`train` continues the run in --out if there is one. The schedule follows the clock: training ends after --minutes on any
machine. `report` writes the shipped files, and compares the model with baselines.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import demo_report
import torch
from demo_training import DemoError, Run, load_weights, read_documents
from demo_vocab import Vocabulary


def _report(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    training, held_out = read_documents(args.corpus)
    demo_report.write(args.out, args.data, training, held_out)


def _train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    Run(args).train()


def _sample(args: argparse.Namespace) -> None:
    model, vocabulary = load_weights(args.out / "best.pth"), Vocabulary.read(args.out / "vocab.txt")
    settings = {"count": args.max_tokens, "temperature": args.temp, "top_p": args.top_p, "seed": args.seed}
    print(demo_report.sample(model, vocabulary, args.prompt, **settings))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = top.add_subparsers(required=True, metavar="train|sample|report")
    train = commands.add_parser("train", help="train, or go on training, in a folder")
    train.set_defaults(command=_train)
    report = commands.add_parser("report", help="write the shipped files, with baselines")
    report.set_defaults(command=_report)
    report.add_argument("--data", type=Path, default=Path("rwkv_npu/data/demo"))
    shown = commands.add_parser("sample", help="continue a prompt")
    shown.set_defaults(command=_sample)
    for command in (train, report, shown):
        command.add_argument("--out", type=Path, required=True, help="folder of the run")
        command.add_argument("--seed", type=int, default=7)
        command.add_argument("--threads", type=int, default=2)
    for command in (train, report):
        corpus_help = "files of demo_corpus.py, newest first; without them the running Python's prose"
        command.add_argument("--corpus", type=Path, nargs="*", default=[], help=corpus_help)
    train.add_argument("--minutes", type=float, default=60)
    train.add_argument("--steps", type=int, default=0, help="end after so many steps instead of --minutes")
    train.add_argument("--save-minutes", type=float, default=3)
    train.add_argument("--batch", type=int, default=16)
    train.add_argument("--context", type=int, default=256)
    train.add_argument("--embedding", type=int, default=192)
    train.add_argument("--layers", type=int, default=4)
    train.add_argument("--learnt", type=int, default=4090, help="tokens beside the 256 bytes")
    train.add_argument("--rate", type=float, default=2e-3)
    train.add_argument("--weight-decay", type=float, default=0.1)
    train.add_argument("--dropout", type=float, default=0.1)
    train.add_argument("--cut", type=float, default=0.03, help="part of the tokens to encode in two pieces")
    train.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="of the large products")
    train.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    shown.add_argument("--prompt", default="Return the ")
    shown.add_argument("-n", "--max-tokens", type=int, default=80)
    shown.add_argument("--temp", type=float, default=0.8)
    shown.add_argument("--top-p", type=float, default=0.85)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        args.command(args)
    except DemoError as error:
        print(f"train_demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("train_demo: interrupted; run it again to go on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
