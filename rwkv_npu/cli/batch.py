"""`rwkv-npu batch`: answer a file of requests in OpenAI's batch format. An interrupted run can be resumed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rwkv_npu.cli.common import add_model_flags, load_model
from rwkv_npu.cli.serve import model_name, model_template
from rwkv_npu.errors import UsageError


def add(commands: Any) -> None:
    p = commands.add_parser(
        "batch",
        help="answer a file of requests",
        description="Answer each line of a JSONL file, in OpenAI's batch format. Existing answers in --out are kept.",
    )
    add_model_flags(p)
    p.add_argument(
        "requests", help="JSONL file: custom_id, url (/v1/chat/completions or /v1/completions) and body"
    )
    p.add_argument("-o", "--out", required=True, metavar="FILE", help="file to append answers to, one a line")
    p.add_argument("--template", help="chat template (default: by the model)")
    p.add_argument(
        "--slots", type=int, default=8, metavar="N", help="answers in progress at a time (default: 8)"
    )
    p.add_argument("-v", "--verbose", action="store_true", help="print what was loaded, and why")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        import starlette  # noqa: F401
    except ImportError:
        raise UsageError("batch needs starlette: pip install '.[serve]' in the clone") from None
    from rwkv_npu.serve.batch import answer_all, read_requests
    from rwkv_npu.serve.service import Service

    out = Path(arguments.out)
    todo = read_requests(Path(arguments.requests), out)
    if not todo:
        print("every request is answered already", file=sys.stderr)
        return 0
    with load_model(arguments, verbose=arguments.verbose) as model:
        template = model_template(arguments.model, arguments.template, model.spec.V)
        service = Service(model, model_name(arguments.model), template, slots=arguments.slots, queue=1 << 30)
        try:
            failed = answer_all(service, todo, out)
        finally:
            service.close()
    return 1 if failed else 0
