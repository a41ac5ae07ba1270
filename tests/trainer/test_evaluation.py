from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from fp8train.data import Batcher, DataConfig, SourceConfig, build_dataset
from fp8train.distributed import World
from fp8train.trainer.evaluation import EvalSet, Score, evaluate, score_text, source_losses
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


def mix_of_two(folder, share):
    """A source of which many windows are held out, and one of which only two are."""
    for name, lines, letters in (("large", 3000, "a"), ("small", 40, "abc")):
        text = "".join(f"{name} {n:05d} {letters * 9}\n" for n in range(lines))
        (folder / f"{name}.txt").write_text(text)
    entries = [
        SourceConfig(kind="text", path=str(folder / "large.txt"), document_bytes=64, weight=share),
        SourceConfig(kind="text", path=str(folder / "small.txt"), document_bytes=64, weight=1 - share),
    ]
    return build_dataset(DataConfig(kind="mix", mix=entries, eval_windows=40), seq_len=32, seed=1)


class ByteLoss(torch.nn.Module):
    """A target of byte b has a loss of b nats."""

    def forward(self, tokens, targets, document_ids):
        return targets.double().sum()


def test_a_mix_weighs_its_sources_by_their_shares_and_says_the_loss_of_each(tmp_path):
    """However few windows one of them can give."""
    dataset = mix_of_two(tmp_path, 0.25)
    large, small = dataset.held_out()
    assert len(small.samples) < 10 < 30 > len(large.samples), "the small one would have 30, the large one has 10"
    eval_set = EvalSet(Batcher(dataset, 4, 4), World())
    row = evaluate(ByteLoss(), eval_set, bf16=True, all_bf16=True)
    means = [np.mean([sample.tokens[1:] for sample in part.samples]) for part in (large, small)]
    assert source_losses(row) == source_losses(row, "_bf16") == {"large.txt": means[0], "small.txt": means[1]}
    assert row["eval_loss"] == row["eval_loss_bf16"] == pytest.approx(0.25 * means[0] + 0.75 * means[1], rel=1e-14)
    assert means[0] != means[1]
    separator = dataset.tokenizer.separator  # every other token is a byte
    filled = [np.mean([sample.tokens[1:] != separator for sample in part.samples]) for part in (large, small)]
    bytes_per_token = 0.25 * filled[0] + 0.75 * filled[1]
    assert row["bits_per_byte"] == pytest.approx(row["eval_loss"] / math.log(2) / bytes_per_token, rel=1e-14)
    assert f"(large.txt {means[0]:.4f}, small.txt {means[1]:.4f})" in score_text(row)


def test_the_share_of_a_source_is_part_of_the_eval_set_and_not_of_its_windows(tmp_path):
    quarter, more = (EvalSet(Batcher(mix_of_two(tmp_path, share), 4, 4), World()) for share in (0.25, 0.26))
    assert quarter.windows_hash == more.windows_hash and quarter.hash != more.hash


def test_one_source_has_no_losses_of_sources(tmp_path):
    config = tiny_config(tmp_path)
    eval_set = EvalSet(Batcher(build_dataset(config.data, config.seq_len, config.seed), 4, 4), World())
    assert source_losses(evaluate(ByteLoss(), eval_set, bf16=False, all_bf16=True)) == {}
    assert eval_set.hash == eval_set.windows_hash


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
