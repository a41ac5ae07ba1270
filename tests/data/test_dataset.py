"""Datasets of stored text: order as a pure function of (seed, index), epochs, held-out windows, refusals."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from fp8train.data import Batcher, DataConfig, build_dataset, check_vocabulary
from fp8train.data.build import read_corpus
from fp8train.data.config import SourceConfig
from fp8train.data.tokenizers import build_tokenizer
from fp8train.errors import DataError
from tests.data.corpora import SEQ_LEN, make_dataset, make_documents


def test_sample_does_not_depend_on_what_was_read_before() -> None:
    dataset = make_dataset(make_documents(40))
    indices = [0, 5, 3 * dataset.samples_per_epoch, 1, 7 * dataset.samples_per_epoch + 2, 5, 0]
    for index in indices:
        fresh = make_dataset(make_documents(40)).sample(index)
        assert np.array_equal(dataset.sample(index).tokens, fresh.tokens)


def test_every_epoch_trains_on_the_same_documents_in_another_order() -> None:
    documents = make_documents(40)
    dataset = make_dataset(documents)
    counts = []
    orders = []
    for epoch in range(3):
        first = epoch * dataset.samples_per_epoch
        windows = [dataset.sample(first + n).tokens for n in range(dataset.samples_per_epoch)]
        orders.append(tuple(window.tobytes() for window in windows))
        counts.append(np.bincount(np.concatenate([window[1:] for window in windows]), minlength=257))
    assert len(set(orders)) == 3
    # an epoch drops less than a window at its end and one token at its start
    assert all(np.abs(count - counts[0]).sum() <= 2 * (SEQ_LEN + 1) for count in counts)


def test_windows_of_a_batch_come_from_different_places() -> None:
    """Neighbouring samples must not be neighbouring text: documents longer than a window would fill a whole batch."""
    dataset = make_dataset([bytes([65 + n]) * 400 for n in range(40)])
    assert len({int(dataset.sample(index).tokens[3]) for index in range(16)}) > 8


def test_seed_changes_the_order_but_not_the_held_out_windows() -> None:
    one, two = make_dataset(make_documents(60), seed=1), make_dataset(make_documents(60), seed=2)
    assert not np.array_equal(one.sample(0).tokens, two.sample(0).tokens)
    for a, b in zip(one.eval_samples(), two.eval_samples(), strict=True):
        assert np.array_equal(a.tokens, b.tokens)
    assert one.fingerprint == two.fingerprint


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.6])
def test_no_held_out_text_is_ever_trained_on(fraction: float) -> None:
    """Each document twice, of one byte value of its own: no value in the windows of two epochs may be one held out."""
    dataset = make_dataset([bytes([n]) * 24 for n in range(200)] * 2, fraction=fraction, eval_windows=10**6)
    trained = {token for index in range(2 * dataset.samples_per_epoch) for token in dataset.sample(index).tokens}
    held = {token for sample in dataset.eval_samples() for token in sample.tokens}
    assert len(held) > 2
    assert held & trained == {dataset.tokenizer.separator}


def test_held_out_windows_are_spread_and_at_most_what_there_is() -> None:
    everything, some = (
        [sample.tokens.tobytes() for sample in make_dataset(make_documents(200), eval_windows=wanted).eval_samples()]
        for wanted in (10**6, 4)
    )
    assert [everything.index(window) for window in some] == [n * len(everything) // 4 for n in range(4)]


def test_stdlib_sample_costs_far_less_than_a_training_step() -> None:
    dataset = build_dataset(DataConfig(), seq_len=256, seed=1)
    batcher = Batcher(dataset, 8, 8)
    batcher.micro_batches(0)
    seconds = []
    for step in range(50):
        started = time.perf_counter()
        batcher.micro_batches(step)
        seconds.append(time.perf_counter() - started)
    # 2048 tokens take 0.1 ms on an idle 2-core machine, the fastest of 50 even on a busy one; a CPU step takes 200
    assert min(seconds) < 1e-3


def test_stdlib_is_the_default_and_names_itself() -> None:
    dataset = build_dataset(DataConfig(), seq_len=64, seed=1)
    assert dataset.describe().startswith("stdlib: ")
    assert dataset.tokenizer.vocab_size == 257
    assert len(dataset.eval_samples()) == 64


@pytest.mark.parametrize(
    "change",
    [{"holdout_fraction": 0.2}, {"path": "other.txt"}, {"tokenizer": "bpe"}, {"seq_len": 32}],
    ids=["split", "corpus", "tokenizer", "seq_len"],
)
def test_fingerprint_changes_with(change: dict[str, object], text_file: Path, bpe_file: Path) -> None:
    def fingerprint(seq_len: int = 16, path: str = text_file.name, tokenizer: str = "bytes", **options: object) -> str:
        tokenizer = str(bpe_file) if tokenizer == "bpe" else tokenizer
        config = DataConfig(kind="text", path=str(text_file.parent / path), tokenizer=tokenizer, **options)
        return build_dataset(config, seq_len, 1).fingerprint

    (text_file.parent / "other.txt").write_text(text_file.read_text() + "more\n")
    assert fingerprint() == fingerprint()
    assert fingerprint() != fingerprint(**change)


@pytest.mark.parametrize(
    ("size", "seq_len", "fraction", "message"),
    [
        (100, 256, 0.05, r"got 10\d tokens .* needs at least 514: one window to train on and one"),
        (400, 256, 0.05, r"needs at least 514"),
        (40_000, 512, 0.05, r", 2 of them distinct; needs at least 1026"),
        (100, 256, 0.0, r"needs at least 257: one window "),
    ],
    ids=["tiny", "no-window-left-to-hold-out", "nothing-but-repeats", "nothing-held-out"],
)
def test_too_little_data_says_how_much_is_needed(
    size: int, seq_len: int, fraction: float, message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("abc\n" * (size // 4))
    config = DataConfig(kind="text", path=str(tmp_path / "a.txt"), holdout_fraction=fraction)
    with pytest.raises(DataError, match=message):
        build_dataset(config, seq_len, 1)


def test_nothing_but_empty_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="got 0 tokens"):
        read_corpus(SourceConfig(kind="jsonl", path=str(tmp_path / "a.jsonl")), build_tokenizer("bytes"), [])


def test_evaluation_without_held_out_text_is_refused(text_file: Path) -> None:
    dataset = build_dataset(DataConfig(kind="text", path=str(text_file), holdout_fraction=0.0), seq_len=64, seed=1)
    with pytest.raises(DataError, match="holdout_fraction"):
        dataset.eval_samples()


def test_token_beyond_the_vocabulary_is_refused() -> None:
    dataset = make_dataset(make_documents(20))
    check_vocabulary(dataset, 257)
    with pytest.raises(
        DataError, match="token id 256 is beyond the vocabulary of the model .256..*model.vocab_size=257"
    ):
        check_vocabulary(dataset, 256)
