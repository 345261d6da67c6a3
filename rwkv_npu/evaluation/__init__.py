"""Evaluation of a model's predictions: `text` for running text, also against a reference, and `lambada` for LAMBADA."""

from rwkv_npu.evaluation.lambada import Lambada, evaluate_lambada, read_lambada
from rwkv_npu.evaluation.likelihood import log_softmax
from rwkv_npu.evaluation.text import Evaluation, count_bytes, evaluate

__all__ = [
    "Evaluation",
    "Lambada",
    "count_bytes",
    "evaluate",
    "evaluate_lambada",
    "log_softmax",
    "read_lambada",
]
