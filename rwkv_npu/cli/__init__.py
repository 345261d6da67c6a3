"""The command line. Flags and dispatch only: each command imports its own machinery when it is run.

stdout is for results, stderr for everything else. What the user can cause is one line there: exit status 2 for
the command line itself, 1 for the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from rwkv_npu import __version__
from rwkv_npu.errors import RwkvNpuError

BACKENDS = ("auto", "numpy", "ort", "numba", "torch", "rknn-sim", "rknn", "rknn-matmul")
NPU_CORES = ("auto", "0", "1", "2", "0,1", "0,1,2")
NPU_CORES_HELP = "of the NPU: auto (default), 0, 1, 2, or several as 0,1,2"


class _Parser(argparse.ArgumentParser):
    """Complains in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # the help: `main` meets a closed pipe here, and not Python on its way out
        super().exit(status, message)


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="rwkv-npu", description="RWKV language models on the Rockchip NPU.")
    top.add_argument("--version", action="version", version=f"rwkv-npu {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _add_convert(commands)
    _add_generate(commands)
    _add_eval(commands)
    _add_info(commands)
    _add_tune(commands)
    _add_doctor(commands)
    _add_bench(commands)
    _add_toolkit(commands)
    return top


def _add_convert(commands: Any) -> None:
    p = commands.add_parser("convert", help="make a bundle of a checkpoint", description="Make a bundle.")
    p.add_argument("checkpoint", help=".pth, .safetensors, or a Hugging Face folder")
    p.add_argument("-o", "--out", metavar="DIR", help="the bundle (default: ./STEM.rwkv)")
    p.add_argument(
        "--target", default="rk3588", help="rk3588 (default), rk3576, rk3562, rk3566, rk3568, or none"
    )
    p.add_argument(
        "--precision",
        default="fp16",
        help="of the NPU's artifacts: fp16 (default), mixed (as much in int8 as --max-kl allows), w8a8, or bf16",
    )
    p.add_argument("--precision-map", metavar="FILE", help="JSON: what mixed has in int8, by name or pattern")
    p.add_argument(
        "--max-kl", type=float, default=0.005, metavar="X", help="for mixed, nats a token (default: 0.005)"
    )
    p.add_argument(
        "--remedies",
        default="all",
        help="against the error of int8: all (default), ranges, smoothing or none",
    )
    p.add_argument("--fusion", default="layer", help="layer (default, fewest calls) or projection")
    p.add_argument("--rows", default="auto", help="rows of the artifacts, such as 1,64 (default: auto)")
    p.add_argument("--cpu", default="int8", help="of the CPU's weights: int8 (default), int4, fp16 or fp32")
    p.add_argument("-j", "--jobs", type=int, metavar="N", help="builds at a time (default: as memory allows)")
    p.add_argument("--verify", action="store_true", help="compare every graph and artifact with NumPy")
    p.add_argument("--tokenizer", metavar="FILE", help="vocabulary to put into the bundle (or world, pile)")
    p.add_argument(
        "--toolkit", metavar="X.Y.Z", help="version of the compiler, for a board with an older runtime"
    )
    texts = "texts, or ids as .json or .npy, to find the ranges of numbers with (default: a text of ours)"
    p.add_argument("--calibrate", nargs="+", default=[], metavar="TEXT", help=texts)
    p.add_argument("--force", action="store_true", help="replace whatever is at the output")
    dry = "say what it would make in each precision: sizes, memory, estimated speed; nothing is compiled or written"
    p.add_argument("--dry-run", action="store_true", help=dry)
    p.add_argument("--json", action="store_true", help="with --dry-run: print it as JSON")


def _add_model(p: argparse.ArgumentParser) -> None:
    p.add_argument("-m", "--model", metavar="PATH", help="bundle or checkpoint (default: the demo model)")
    p.add_argument("--backend", default="auto", choices=BACKENDS, help="what multiplies (default: auto)")
    p.add_argument("--precision", help="of the weights, where the bundle has a choice")
    p.add_argument("--fusion", choices=("layer", "projection"), help="default: the bundle's")
    p.add_argument("--plan", metavar="PLAN", help="backends by use or group, such as prefill=rknn,decode=ort")
    p.add_argument("--npu-cores", default="auto", metavar="CORES", choices=NPU_CORES, help=NPU_CORES_HELP)
    p.add_argument("--tokenizer", metavar="FILE", help="vocabulary file (or world, pile)")
    p.add_argument("-t", "--threads", type=int, metavar="N", help="threads of the CPU's backends")


def _add_generate(commands: Any) -> None:
    p = commands.add_parser("generate", help="continue a prompt", description="Continue a prompt.")
    _add_model(p)
    p.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt; - reads stdin")
    p.add_argument("-f", "--file", metavar="FILE", help="read the prompt from a file, less its last newline")
    p.add_argument("--ids", action="store_true", help="prompt and output are token ids, not text")
    limit = "-1 goes on to the end of the text, 0 only reads the prompt into --state (default: 256)"
    p.add_argument("-n", "--max-tokens", type=int, default=256, metavar="N", help=limit)
    p.add_argument("--temp", type=float, default=1.0, metavar="T", help="0 is greedy (default: 1)")
    p.add_argument("--top-p", type=float, default=0.85, metavar="P", help="(default: 0.85)")
    p.add_argument("--top-k", type=int, default=0, metavar="K", help="0 is off (default)")
    p.add_argument("--min-p", type=float, default=0.0, metavar="P", help="0 is off (default)")
    p.add_argument("--presence-penalty", type=float, default=0.0, metavar="X", help="(default: 0)")
    p.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X", help="(default: 0)")
    p.add_argument("--penalty-decay", type=float, default=0.996, metavar="X", help="(default: 0.996)")
    p.add_argument("-s", "--seed", type=int, metavar="N", help="(default: another text each time)")
    p.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )
    p.add_argument(
        "--state", metavar="FILE", help="go on from this state if it exists, and save it at the end"
    )
    p.add_argument("--echo", action="store_true", help="print the prompt before its continuation")
    p.add_argument("-v", "--verbose", action="store_true", help="say more on stderr")


def _add_eval(commands: Any) -> None:
    p = commands.add_parser(
        "eval",
        help="measure quality on a text",
        description="How well a model predicts a text, and with --against how far it is from a reference: the KL "
        "divergence of its predictions, by position in the context. The reference runs on the CPU, in fp32 arithmetic "
        "on weights that are not quantised, unless --against-backend or --against-precision say otherwise. For exact "
        "fp32 name the checkpoint: a bundle holds its weights in fp16, unless made with --cpu fp32.",
    )
    _add_model(p)
    what = (
        "UTF-8 text, or token ids (.json, .npy); - is stdin (default: one that the demo model has not seen)"
    )
    p.add_argument("--text", metavar="FILE", help=what)
    jsonl = 'measure last-word accuracy on these texts instead: {"text": ...} a line, as of LAMBADA'
    p.add_argument("--lambada", metavar="FILE", help=jsonl)
    p.add_argument(
        "--context", type=int, metavar="N", help="begin anew after every N tokens (default: never)"
    )
    p.add_argument("-n", "--max-tokens", type=int, metavar="N", help="read no more than so many tokens")
    same = "(default: the model itself, where one of the other two is given)"
    p.add_argument("--against", metavar="PATH", help=f"bundle or checkpoint to compare with {same}")
    p.add_argument("--against-backend", choices=BACKENDS, help="of the reference (default: numba or ort)")
    p.add_argument("--against-precision", metavar="P", help="of the reference (default: not quantised)")
    resume = "keep in this file what is done; if it exists, go on from there"
    p.add_argument("--resume", metavar="FILE", help=resume)
    p.add_argument("--json", action="store_true", help="print the figures as JSON")


def _add_info(commands: Any) -> None:
    p = commands.add_parser("info", help="describe a bundle or checkpoint", description="Describe a model.")
    p.add_argument("path", nargs="?", help="bundle or checkpoint (default: the demo model)")
    p.add_argument("--json", action="store_true", help="print it as JSON")
    p.add_argument(
        "--check", action="store_true", help="read every byte of a bundle, every value of a checkpoint"
    )


def _add_tune(commands: Any) -> None:
    p = commands.add_parser(
        "tune",
        help="find the fastest backends for this machine",
        description="Measure a bundle on every backend that is here, and keep the fastest plan in the bundle.",
    )
    p.add_argument("-m", "--model", metavar="PATH", required=True, help="the bundle")
    p.add_argument("-t", "--threads", type=int, metavar="N", help="threads of the CPU's backends")
    p.add_argument("--npu-cores", default="auto", metavar="CORES", choices=NPU_CORES, help=NPU_CORES_HELP)
    p.add_argument("--json", action="store_true", help="print it as JSON")


def _add_doctor(commands: Any) -> None:
    p = commands.add_parser(
        "doctor",
        help="say what a board lacks, and how to mend it",
        description="Look at board, NPU, clocks and software. Nothing is changed.",
    )
    p.add_argument("-m", "--model", metavar="PATH", help="a bundle that has to fit the board")
    p.add_argument("--json", action="store_true", help="print it as JSON")


def _add_toolkit(commands: Any) -> None:
    p = commands.add_parser(
        "toolkit",
        help="install Rockchip's compiler",
        description="Rockchip's compiler in an environment of its own.",
    )
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_Parser)
    install = actions.add_parser("install", help="install it in the user's cache folder")
    install.add_argument(
        "--version", dest="toolkit_version", metavar="X.Y.Z", help="(default: the newest known)"
    )
    install.add_argument("--python", metavar="PATH", help="a Python 3.10 to 3.12 (default: looked for)")
    actions.add_parser("status", help="say what is installed")
    remove = actions.add_parser("remove", help="remove it")
    remove.add_argument("--version", dest="toolkit_version", metavar="X.Y.Z", help="(default: all)")


def _add_bench(commands: Any) -> None:
    p = commands.add_parser("bench", help="measure this machine, and compare it with the NPU")
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_Parser)
    _add_bench_matmul(actions)
    _add_bench_inference(actions)


def _add_bench_matmul(actions: Any) -> None:
    p = actions.add_parser(
        "matmul",
        help="time matrix products",
        description="Time C (M, N) = A (M, K) @ B (K, N), B constant, on everything that multiplies here. On a PC the "
        "rknn rows are estimates by Rockchip's compiler, and are marked so.",
    )
    what = "what to multiply (default: --sizes 128:4096:128)"
    p.add_argument("--sizes", metavar="LIST", help=f"{what}: M = K = N, such as 256,512 or FIRST:LAST:STEP")
    p.add_argument("--shapes", metavar="LIST", help="MxKxN, joined by commas")
    p.add_argument(
        "--model", metavar="MODEL", help="a bundle's projections, or an official size's, such as v7-1.5b"
    )
    p.add_argument(
        "--backends",
        metavar="LIST",
        help="of numpy, torch, ort, rknn (default: these), tinygrad (CPU and OpenCL), rknn-matmul",
    )
    p.add_argument(
        "--dtypes", metavar="LIST", help="of fp32, fp16, bf16, int8, int4 (default: each backend's own)"
    )
    p.add_argument(
        "-r",
        "--repeats",
        type=int,
        metavar="N",
        help="runs at least (default: 7, and until the spread is known)",
    )
    p.add_argument("-t", "--threads", type=int, metavar="N", help="(default: one a core)")
    _add_rows(p)
    p.add_argument("--fit", action="store_true", help="fit time against N with Minuit, and print the log")
    p.add_argument(
        "--plot", metavar="FILE", help="draw FILE-time, -roofline, -bars and -fit; FILE ends in .png or .svg"
    )
    p.add_argument("--bars", metavar="LIST", help="sizes in the bar chart (default: 512,1024,2048,4096)")


def _add_bench_inference(actions: Any) -> None:
    p = actions.add_parser(
        "inference",
        help="time a model on every backend",
        description="Time prompts of 128 and 512 tokens, then 128 tokens written, on each backend in a process of its "
        "own. For a bundle with artifacts the RK3588's NPU and CPU are estimated beside it, and marked so.",
    )
    which = "bundle or checkpoint (default: the demo model); repeatable"
    p.add_argument("-m", "--model", action="append", metavar="PATH", help=which)
    p.add_argument("--backends", metavar="LIST", help="of numba, ort, torch, numpy (default: these)")
    p.add_argument(
        "-r", "--repeats", type=int, metavar="N", help="runs of each (default: 5, as far as --seconds go)"
    )
    limit = "of each stage; slow backends write fewer tokens (default: 30)"
    p.add_argument("--seconds", type=float, metavar="S", help=limit)
    p.add_argument("--fusion", choices=("layer", "projection"), help="default: the bundle's")
    p.add_argument("-t", "--threads", type=int, metavar="N", help="threads of the CPU's backends")
    p.add_argument(
        "--call-overhead-us",
        type=float,
        metavar="US",
        help="estimates: what a call to the NPU costs (default: 270)",
    )
    p.add_argument(
        "--host-factor",
        type=float,
        metavar="X",
        help="estimates: how much slower the board's CPU is (default: 4)",
    )
    p.add_argument("--profile", action="store_true", help="where a token goes, by group and by function")
    _add_rows(p)
    p.add_argument("--plot", metavar="FILE", help="draw the comparison; FILE ends in .png or .svg")


def _add_rows(p: argparse.ArgumentParser) -> None:
    """What becomes of the rows of a benchmark."""
    p.add_argument("-o", "--output", default="md", choices=("md", "json", "csv"), help="(default: md)")
    p.add_argument(
        "--resume",
        metavar="FILE",
        help="keep every row in this JSON file, and measure only what it does not hold",
    )
    p.add_argument(
        "--redo", action="store_true", help="with --resume: measure rows flagged busy or throttled again"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments = parser().parse_args(argv)
        module = {"eval": "evaluate"}.get(arguments.command, arguments.command)
        command = importlib.import_module(f"rwkv_npu.cli.{module}")
        status: int = command.run(arguments)
        sys.stdout.flush()
        return status
    except RwkvNpuError as error:
        print(f"rwkv-npu: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read our output has gone
        _give_up_stdout()
        return 0
    except OSError as error:
        if error.filename is not None:
            raise
        _give_up_stdout()  # it is the one file that commands write to without looking: a full disk, say
        print(f"rwkv-npu: error: cannot write the output: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rwkv-npu: interrupted", file=sys.stderr)
        return 130
    except MemoryError:
        print("rwkv-npu: error: not enough memory for this model on this machine", file=sys.stderr)
        return 1


def _give_up_stdout() -> None:
    """Python would complain once more when it closes stdout."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    print(f"rwkv-npu: warning: {message}", file=sys.stderr)


def entry() -> NoReturn:
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the shell: <&- >&-
            setattr(sys, name, open(os.devnull, mode))
    _keep_stdout()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # letters that the terminal's encoding lacks
    sys.exit(main())


def _keep_stdout() -> None:
    """Whatever C libraries print (Rockchip's print to stdout) goes to stderr: stdout is for what was asked for."""
    with contextlib.suppress(OSError, ValueError):  # closed by the shell
        ours = os.dup(sys.stdout.fileno())
        os.dup2(sys.stderr.fileno(), 1)
        buffering = 1 if os.isatty(ours) else -1
        sys.stdout = os.fdopen(ours, "w", buffering, encoding=sys.stdout.encoding)


if __name__ == "__main__":
    entry()
