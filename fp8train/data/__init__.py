"""Training data: sources, tokenizers, packing, held-out split, token shards, batches."""

from __future__ import annotations

from fp8train.data.batcher import MASKED_TARGET, Batch, Batcher
from fp8train.data.build import build_dataset
from fp8train.data.config import DataConfig, SourceConfig
from fp8train.data.dataset import Dataset, check_vocabulary
from fp8train.data.packing import Sample
from fp8train.data.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer, build_tokenizer

__all__ = [
    "MASKED_TARGET",
    "Batch",
    "Batcher",
    "ByteTokenizer",
    "DataConfig",
    "Dataset",
    "FileTokenizer",
    "Sample",
    "SourceConfig",
    "Tokenizer",
    "build_dataset",
    "build_tokenizer",
    "check_vocabulary",
]
