from __future__ import annotations

import json
import math

import numpy as np
import pytest

from fp8train.data import Batcher, DataConfig, build_dataset
from fp8train.distributed import World
from fp8train.trainer.evaluation import EvalSet, Score, score_text
from tests.tiny_run import tiny_config


def test_held_out_windows_are_all_that_is_read(tmp_path, monkeypatch):
    """Not a training batch: a stream would begin, and begin again at the first step."""
    config = tiny_config(tmp_path)
    dataset = build_dataset(config.data, config.seq_len, config.seed)
    monkeypatch.setattr(dataset, "sample", lambda index: 1 / 0)
    eval_set = EvalSet(Batcher(dataset, config.global_batch_samples, 4), World())
    assert eval_set.tokens == config.data.eval_windows * config.seq_len


class LongerWorld(World):
    """Another rank has five micro-batches more."""

    def all_max(self, value):
        return value + 5


def test_a_rank_with_fewer_windows_has_some_that_do_not_count(tmp_path):
    config = tiny_config(tmp_path)
    dataset = build_dataset(config.data, config.seq_len, config.seed)
    eval_set = EvalSet(Batcher(dataset, config.global_batch_samples, 4), LongerWorld())
    assert len(eval_set._idle) == 5 and eval_set._idle[0].tokens.shape == (1, config.seq_len)
    assert eval_set.tokens == config.data.eval_windows * config.seq_len


@pytest.mark.parametrize("mask", [False, True])
def test_bytes_are_those_of_the_targets_under_a_tokenizer_that_puts_a_space_before_texts(mask, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = ["</s>", "<unk>", "\u2581a", *(f"\u2581w{number}" for number in range(100))]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.save(str(tmp_path / "t.json"))
    texts = [" ".join(f"w{10 + (n * k) % 80}" for k in range(1, 5)) for n in range(600)]  # each word of 3 bytes
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": f"w{n % 90 + 10} {t}"}) for n, t in enumerate(texts))
    )
    config = DataConfig(kind="jsonl", path=str(tmp_path / "a.jsonl"), tokenizer=str(tmp_path / "t.json"))
    config.document_mask = mask
    dataset = build_dataset(config, 16, 1)
    eval_set = EvalSet(Batcher(dataset, 4, 4), World())
    counted = tokens = 0
    for sample in dataset.eval_samples():
        first = np.r_[True, np.diff(sample.document_ids) != 0]  # of a document: as far as the window shows
        first[0] = False
        for token, begins in zip(sample.tokens[1:], first[1:], strict=True):
            if token != 0:  # a word has its bytes, and a space before it, but where it begins a document
                counted += 0 if mask and begins else 3 if begins else 4
            tokens += not (mask and begins)
    # bytes_exact: the probe's words are not in this vocabulary, so that the ids do not say
    assert eval_set.tokens == tokens and eval_set.bytes == 0
    dataset.tokenizer.bytes_exact = True
    assert EvalSet(Batcher(dataset, 4, 4), World()).bytes == counted


def test_bits_per_byte_are_left_out_where_ids_do_not_say_how_many_bytes():
    assert math.isnan(Score(nats=1.0, tokens=3, bytes=0).bits_per_byte)
    row = {"eval_loss": 1.0, "bits_per_byte": math.nan, "eval_loss_bf16": 2.0, "bits_per_byte_bf16": math.nan}
    assert score_text(row) == "1.0000 nats; in BF16 2.0000 nats"
