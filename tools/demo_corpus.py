"""Collects the English prose that ships with CPython, as documents for training the demo model.

It finds and cleans the prose, and knows no tokens or models. It imports the standard library only, so that any CPython
can run it: `python3.13 tools/demo_corpus.py > python3.13.jsonl`.

Sources: `pydoc_data.topics` (the language reference), docstrings and block comments of the standard library (parsed,
never imported), and the docstrings of modules written in C (read from the modules). All of it is under the PSF licence,
version 2.
"""

import ast
import hashlib
import importlib
import inspect
import io
import json
import re
import sys
import sysconfig
import tokenize
import types
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

SKIPPED_FOLDERS = {"site-packages", "cjkencodings", "lib2to3", "__pycache__", "_bundled"}
# Used for training, but never held out: they are not documentation.
TESTS = re.compile(r"\w+:(test|[\w.]*(_test|tests?))\.")
SKIPPED_MODULES = re.compile(r"(_test|_xx|xx|_tkinter|readline|this$|antigravity)")
ITEM = re.compile(r"\s*([-*+o•@:]\s|\d+[.)]\s|\(?[a-z]\)\s|[\w.]+\s*(:|=|--)\s|@|:|def |class )")
CODE_LINE = re.compile(r"^\s*(?:\w[\w.]* = |def |class |import |from \w+ import|return\b.*\(|if .*:$)", re.M)
DOCUMENTED = (
    type,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.WrapperDescriptorType,
    types.ClassMethodDescriptorType,
)
MIN_LETTERS = 40  # of a document; a shorter one teaches little
LONG_PARAGRAPH = 60  # characters; two equal paragraphs of this length are a copy, not a coincidence
FILLED_LINE = 52  # characters; a line of this width was broken at the margin, so its paragraph goes on


class Document(NamedTuple):
    """A text. name: its place in CPython, which is the same in every version."""

    name: str
    text: str


def collect() -> Iterator[Document]:
    """Yield every document of the running Python, cleaned. Copies are included."""
    for name, raw in _raw_documents():
        text = clean(raw)
        if is_prose(text):
            yield Document(name, text)


def _raw_documents() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    topics = importlib.import_module("pydoc_data.topics").topics
    for topic in sorted(topics):
        yield f"topic:{topic}", topics[topic]
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and relative.parts[0] != "pydoc_data":
            module = ".".join(relative.with_suffix("").parts)
            yield from _docstrings(module, path.read_bytes())
            yield from _comments(module, path.read_bytes())
    for compiled in _compiled_modules():
        yield from _compiled_docstrings(compiled)


def _docstrings(module: str, source: bytes) -> Iterator[tuple[str, str]]:
    def visit(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield f"doc:{name}", text
        for child in ast.iter_child_nodes(node):
            yield from visit(child, f"{name}.{child.name}" if hasattr(child, "name") else name)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old files
            yield from visit(ast.parse(source), module)
    except SyntaxError:
        return


def _comments(module: str, source: bytes) -> Iterator[tuple[str, str]]:
    """Yield blocks of at least two comment lines."""
    run: list[str] = []
    following = -1
    try:
        for token in tokenize.tokenize(io.BytesIO(source).readline):
            if token.type != tokenize.COMMENT or token.line[: token.start[1]].strip():
                continue
            if token.start[0] != following:
                if len(run) > 1:
                    yield f"comment:{module}:{run[0][:40]}", "\n".join(run)
                run = []
            run.append(token.string.lstrip("#!:"))
            following = token.start[0] + 1
    except (SyntaxError, tokenize.TokenError):
        return
    if len(run) > 1:
        yield f"comment:{module}:{run[0][:40]}", "\n".join(run)


def _compiled_modules() -> Iterator[types.ModuleType]:
    names = set(sys.builtin_module_names)
    for library in (Path(path) / "lib-dynload" for path in [sysconfig.get_path("platstdlib")]):
        names |= {path.name.split(".")[0] for path in library.glob("*.so")}
    for name in sorted(names):
        if not SKIPPED_MODULES.match(name):
            try:
                yield importlib.import_module(name)
            except ImportError:
                continue


def _compiled_docstrings(module: types.ModuleType) -> Iterator[tuple[str, str]]:
    pending: list[tuple[str, object]] = [(module.__name__, module)]
    while pending:
        name, thing = pending.pop()
        text = getattr(thing, "__doc__", None)
        if isinstance(text, str):
            yield f"doc:{name}", text
        members = vars(thing) if isinstance(thing, type | types.ModuleType) else {}
        for key, value in sorted(members.items()):
            home = getattr(value, "__module__", name)
            if isinstance(value, DOCUMENTED) and home in (module.__name__, name):
                pending.append((f"{name}.{key}", value))


def clean(raw: str) -> str:
    """Remove indentation, doctests, tables and rules, and put each paragraph on one line."""
    lines = [re.sub(r"(?<=\S)\s{2,}", " ", line).rstrip() for line in inspect.cleandoc(raw).split("\n")]
    kept: list[str] = []
    in_doctest = False
    for line in lines:
        in_doctest = bool(line) and (in_doctest or line.lstrip().startswith((">>>", "$ ")))
        if in_doctest or re.search(r"[-=~*+_^#.]{4,}|\|.*\||^\s*[|+]|[^\x00-\x7f]", line):
            continue
        if kept and line and _continues(kept[-1], line):
            kept[-1] += " " + line.lstrip()
        elif line or (kept and kept[-1]):
            kept.append(line)
    kept = [re.sub(r"^ +", lambda spaces: "  " * min(3, -(-len(spaces[0]) // 4)), line) for line in kept]
    return "\n".join(kept).strip()


def _continues(above: str, line: str) -> bool:
    """True if `line` continues the paragraph whose last line is `above`."""

    def indent(text: str) -> int:
        return len(text) - len(text.lstrip())

    if not above or ITEM.match(line):
        return False
    width = len(above) if len(above) < 80 else 80  # joined lines are long already
    starts_item = re.match(r"\s*([-*+o•]|\d+[.)])\s", above) is not None
    hanging = starts_item and indent(line) > indent(above)
    return width >= FILLED_LINE and (indent(above) == indent(line) or hanging)


def is_prose(text: str) -> bool:
    letters = sum(character.isalpha() for character in text)
    spaces = text.count(" ")
    ordinary = letters + spaces + sum(text.count(mark) for mark in ".,\n'")
    code_lines = len(CODE_LINE.findall(text))
    return (
        letters >= MIN_LETTERS
        and spaces * 14 >= len(text)
        and ordinary >= 0.87 * len(text)
        and code_lines * 6 <= text.count("\n") + 1
    )


def is_held_out(name: str, percent: float) -> bool:
    """Decide by a hash of the name, so that all versions of a document are on the same side."""
    drawn = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return drawn < percent / 100 and not TESTS.match(name)


def paragraphs(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if len(line.strip()) >= LONG_PARAGRAPH]


def split(documents: Iterable[Document], percent: float = 3.0) -> tuple[list[str], list[str]]:
    """Split documents into training texts and held-out texts, without copies. Of several versions the first one counts.

    A document is a copy if half of its long paragraphs were seen before. A held-out document that shares a long
    paragraph with the training texts is dropped.
    """
    training: list[str] = []
    candidates: list[str] = []
    seen: set[str] = set()
    for name, text in documents:
        parts = paragraphs(text) or [text]
        if sum(part in seen for part in parts) * 2 >= len(parts):
            continue
        seen.update(parts)
        (candidates if is_held_out(name, percent) else training).append(text)
    trained = {part for text in training for part in paragraphs(text)}
    return training, [text for text in candidates if trained.isdisjoint(paragraphs(text))]


def read_jsonl(paths: Iterable[Path]) -> list[Document]:
    return [Document(*json.loads(line)) for path in paths for line in path.read_text("utf-8").splitlines()]


def main() -> int:
    for document in collect():
        sys.stdout.write(json.dumps(list(document)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
