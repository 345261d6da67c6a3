"""README, CONTRIBUTING and docs/: their commands and Python run, their links lead somewhere.

A fenced block names its language: `sh`, `python`, `json` or `text`. Blocks of sh and python run in a new folder with a
checkpoint model.pth, in their order, the Python of a page after its commands. A second word says why a block does not
run here; its `rwkv-npu` commands are parsed all the same.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from rwkv_npu.cli import parser
from rwkv_npu.model import demo_model

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"sh", "python", "json", "text"}
SKIPPED = {
    "board": "needs a board with an NPU",
    "compiler": "needs Rockchip's compiler",
    "emulator": "needs the emulated board",
    "network": "downloads packages",
    "setup": "makes an environment",
    "slow": "takes minutes",
}


class Block(NamedTuple):
    language: str
    skipped: str
    line: int
    code: str


def blocks(page: Path) -> list[Block]:
    found, opened = [], None
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip().startswith("```"):
            continue
        if opened is None:
            opened = (number, line.strip().removeprefix("```").split())
            continue
        begin, words = opened
        code = "\n".join(lines[begin : number - 1])
        found.append(Block(words[0] if words else "", words[1] if len(words) > 1 else "", begin, code))
        opened = None
    assert opened is None, f"{page.name}: a block is not closed"
    return found


def name(page: Path) -> str:
    return page.name


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_say_what_they_are(page: Path) -> None:
    for block in blocks(page):
        place = f"{page.name}:{block.line}"
        assert block.language in LANGUAGES, f"{place}: a block begins with ``` and one of {LANGUAGES}"
        assert block.skipped in {"", *SKIPPED}, f"{place}: {block.skipped} is none of {set(SKIPPED)}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_and_python_run(page: Path, tmp_path: Path) -> None:
    running = [block for block in blocks(page) if block.language in ("sh", "python") and not block.skipped]
    if not running:
        pytest.skip("no block of this page runs on a PC")
    shutil.copy(demo_model(), tmp_path / "model.pth")
    shutil.copy(demo_model().with_name("vocab.txt"), tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "rwkv-npu").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m rwkv_npu "$@"\n')
    (programs / "rwkv-npu").chmod(stat.S_IRWXU)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }

    def run(command: list[str], place: str) -> None:
        result = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, f"{place}: {result.stderr[-2000:]}"

    for block in running:
        if block.language == "sh":
            run(["bash", "-euo", "pipefail", "-c", block.code], f"{page.name}:{block.line}")
    python = "\n".join(block.code for block in running if block.language == "python")
    if python:
        run([sys.executable, "-W", "error", "-c", python], f"{page.name}: its Python")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_parse(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of them, those of blocks that do not run here too."""
    for block in blocks(page):
        for line in block.code.splitlines() if block.language == "sh" else ():
            words = shlex.split(line, comments=True)
            if "rwkv-npu" not in words:
                continue
            arguments = words[words.index("rwkv-npu") + 1 :]
            end = next((at for at, word in enumerate(arguments) if word in ("|", ">", "&", "&&", ";")), None)
            try:
                parser().parse_args(arguments[:end])
            except SystemExit as exit_:
                assert not exit_.code, f"{page.name}:{block.line}: {line}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_architecture_names_files_that_exist() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+(?:/\w+)*/\w+\.py)`", text))
    missing = {
        path for path in named if not any((ROOT / where / path).is_file() for where in ("rwkv_npu", "."))
    }
    assert len(named) > 10 and missing == {"models/v8.py", "kernels/v8.py"}  # the generation to be added


def test_the_file_map_names_every_folder() -> None:
    (tree,) = [block.code for block in blocks(ROOT / "README.md") if block.code.startswith("rwkv_npu/")]
    named = set(re.findall(r"^  (\w+)(?:/|\.py)", tree, re.M))
    folders = {
        path.name for path in (ROOT / "rwkv_npu").iterdir() if path.is_dir() and path.name != "__pycache__"
    }
    assert folders <= named
    assert {name for name in named if not (ROOT / "rwkv_npu" / name).is_dir()} <= {"model"}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 140
