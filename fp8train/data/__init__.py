"""Training data: sources, tokenizers, packing, held-out split, token shards, batches.

What needs torch (Batcher) is loaded when first used: workers of `fp8train prepare` start much faster without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fp8train.data.build import build_dataset
from fp8train.data.config import MASKED_TARGET, DataConfig, SourceConfig
from fp8train.data.dataset import Dataset, HeldOut, check_vocabulary
from fp8train.data.model_tokenizer import check_model_tokenizer, covers, with_model_tokenizer
from fp8train.data.tokenizers import Tokenizer

if TYPE_CHECKING:
    from fp8train.data.batcher import Batch, Batcher

__all__ = [
    "MASKED_TARGET",
    "Batch",
    "Batcher",
    "DataConfig",
    "Dataset",
    "HeldOut",
    "SourceConfig",
    "Tokenizer",
    "build_dataset",
    "check_model_tokenizer",
    "check_vocabulary",
    "covers",
    "with_model_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in ("Batch", "Batcher"):
        raise AttributeError(f"module 'fp8train.data' has no attribute {name!r}")
    from fp8train.data import batcher

    value = globals()[name] = getattr(batcher, name)
    return value
