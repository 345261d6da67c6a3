"""Fine-tune the demo model: a LoRA of a short text, trained on the CPU in less than a minute.

    python tools/tune_demo.py text.txt rwkv-0.pth
    rwkv-npu convert rwkv_npu/data/demo/model.pth --adapter rwkv-0.pth --adapter-scale 2

The file has RWKV-PEFT's form: lora_A and lora_B of every large matrix, and no alpha.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_model import DemoModel
from demo_training import load_weights
from demo_vocab import Vocabulary
from torch import Tensor, nn
from torch.nn.utils import parametrize

DEMO = Path(__file__).resolve().parent.parent / "rwkv_npu" / "data" / "demo"
LEAVES = ("receptance", "key", "value", "output")


class Lora(nn.Module):
    """W -> W + scale * B A, with A (rank, in) and B (out, rank)."""

    def __init__(self, weight: Tensor, rank: int, scale: float):
        super().__init__()
        self.lora_A = nn.Parameter(torch.randn(rank, weight.shape[1]) / math.sqrt(weight.shape[1]))
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], rank))
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.lora_B @ self.lora_A)


def tune(model: DemoModel, ids: list[int], *, rank: int, scale: float, steps: int) -> dict[str, Tensor]:
    """Train a LoRA of `model`, in place, on `ids`. Returns the adapter's tensors."""
    torch.manual_seed(1)
    model.requires_grad_(False)
    adapters = {}
    for name, module in list(model.named_modules()):
        if name.startswith("blocks.") and name.endswith(LEAVES):
            adapters[name] = Lora(module.weight, rank, scale)
            parametrize.register_parametrization(module, "weight", adapters[name])
    trained = [parameter for adapter in adapters.values() for parameter in adapter.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    row = torch.tensor([ids])
    for step in range(steps):
        logits, _ = model(row[:, :-1])
        loss = F.cross_entropy(logits[0], row[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}: {loss.item():.3f} nats a token", file=sys.stderr)
    return {
        f"{name}.{part}": parameter.detach().clone()
        for name, adapter in adapters.items()
        for part, parameter in adapter.named_parameters()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("text", type=Path, help="a few sentences")
    parser.add_argument("out", type=Path, help="the adapter, such as rwkv-0.pth")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--scale", type=float, default=2.0, help="alpha / rank, which the file does not hold")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    ids = Vocabulary.read(DEMO / "vocab.txt").encode(args.text.read_text(encoding="utf-8"))[:256]
    model = load_weights(DEMO / "model.pth")
    torch.save(tune(model, ids, rank=args.rank, scale=args.scale, steps=args.steps), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
