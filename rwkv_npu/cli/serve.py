"""`rwkv-npu serve`: serve one model over HTTP, with the APIs of OpenAI and Ollama and a web page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_npu.cli.common import add_model_flags, load_model, size
from rwkv_npu.errors import UsageError

if TYPE_CHECKING:
    from rwkv_npu.serve.cache import Store
    from rwkv_npu.text.chat import Template


def add(commands: Any) -> None:
    p = commands.add_parser(
        "serve",
        help="serve chats over HTTP, to many clients",
        description="Serve one model over HTTP, with the APIs of OpenAI, Ollama and llama-server, and a page at /.",
    )
    add_model_flags(p)
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    p.add_argument("--port", type=int, default=8080, help="default: 8080; 0 picks a free one")
    p.add_argument("--api-key", metavar="KEY", help="key that clients must send; required beyond loopback")
    p.add_argument("--name", help="model name that clients see (default: the file's name)")
    p.add_argument(
        "--template",
        help="chat template: raven, world, g1, g1-20250922 or FILE.jinja (default: by the model)",
    )
    p.add_argument(
        "--slots", type=int, default=8, metavar="N", help="answers in progress at a time (default: 8)"
    )
    p.add_argument("--queue", type=int, default=64, metavar="N", help="requests that may wait (default: 64)")
    p.add_argument(
        "--cache", type=float, metavar="GB", help="memory for cached states (default: 1/8 of the machine's)"
    )
    p.add_argument("--cache-dir", metavar="DIR", help="folder that keeps cached states over restarts")
    p.add_argument(
        "--cache-dir-size", type=float, default=4.0, metavar="GB", help="limit of such a folder (default: 4)"
    )
    p.add_argument(
        "--state-store",
        metavar="WHERE",
        help="folder or redis://HOST that several servers share, so that each continues any conversation",
    )
    p.add_argument(
        "--neutral-sampling",
        action="store_true",
        help="apply temperature 1, top_p 1 and no penalties if a client sends them (default: the template's values)",
    )
    p.add_argument("-v", "--verbose", action="store_true", help="log each request")
    p.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UsageError("serve needs starlette and uvicorn: pip install '.[serve]' in the clone") from None
    from rwkv_npu.serve.run import listen, serve

    # Open the port before loading the model: if the port is taken, the command fails at once.
    if arguments.host not in ("127.0.0.1", "localhost", "::1") and not arguments.api_key:
        raise UsageError(f"--host {arguments.host} is open to other machines: set a key with --api-key KEY")
    socket = listen(arguments.host, arguments.port)
    host, port = socket.getsockname()[:2]
    from rwkv_npu.board.hardware import memory
    from rwkv_npu.serve.service import Service
    from rwkv_npu.serve.stores import RedisStates, StateFolder

    model = load_model(arguments, verbose=arguments.verbose)
    template = model_template(arguments.model, arguments.template, model.spec.V)
    budget = memory().get("MemTotal", 8 << 30) // 8
    if arguments.cache is not None:
        budget = int(arguments.cache * 1e9)
    stores: list[Store] = []
    for where in filter(None, (arguments.cache_dir, arguments.state_store)):
        if where.startswith(("redis://", "rediss://")):
            stores.append(RedisStates(where, model))
        else:
            stores.append(StateFolder(Path(where), int(arguments.cache_dir_size * 1e9), model))
    service = Service(
        model,
        arguments.name or model_name(arguments.model),
        template,
        slots=arguments.slots,
        queue=arguments.queue,
        cache_bytes=budget,
        stores=stores,
        neutral_sampling=arguments.neutral_sampling,
    )
    shown = f"[{host}]" if ":" in host else host
    print(
        f"{service.name}: {model.precision} weights, {model.describe()}, template {template.name}, "
        f"{service.scheduler.slots} slots, {size(budget)} for states",
        file=sys.stderr,
    )
    socket.listen()  # before the address is printed: its reader may connect at once
    print(f"http://{shown}:{port}", flush=True)
    serve(service, socket, key=arguments.api_key, verbose=arguments.verbose)
    model.close()
    return 0


def model_name(model: str | None) -> str:
    """The name of a model for clients: the name of its file or folder without the suffix."""
    return Path(model).name.removesuffix(".rwkv").removesuffix(".pth") if model else "demo"


def model_template(model: str | None, named: str | None, vocab_size: int) -> Template:
    """The chat template `named`: the name of a built-in one, or a .jinja file.

    None: the checkpoint's own template, else the built-in one that fits the names of the model and its checkpoint.
    """
    from rwkv_npu.formats.files import os_reason
    from rwkv_npu.formats.huggingface import chat_template
    from rwkv_npu.text.chat import template_named
    from rwkv_npu.text.own_template import own_template

    if named and not named.endswith(".jinja"):
        return template_named(named)
    where = Path(named or model or ".")
    try:
        if named:
            source: str | None = where.read_text(encoding="utf-8")
        else:
            source = chat_template(where) if model and where.is_dir() else None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the chat template {where}: {os_reason(error)}") from None
    family = model_family(model, vocab_size)
    return family if source is None else own_template(source, where, family)


def model_family(model: str | None, vocab_size: int) -> Template:
    """The built-in chat template that fits the names of a model and its checkpoint."""
    from rwkv_npu.formats.bundle import is_bundle, read_manifest
    from rwkv_npu.text.chat import choose_template

    names = model_name(model)
    if model and is_bundle(Path(model)):
        names += f" {read_manifest(Path(model)).checkpoint}"
    return choose_template(names, vocab_size)
