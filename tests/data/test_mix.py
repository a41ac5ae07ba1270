"""Mixing: exact shares, pure order, one held-out split for all sources."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fp8train.data import DataConfig, SourceConfig, build_dataset
from fp8train.data.build import source_names
from fp8train.data.dataset import PackedDataset
from fp8train.data.mix import MixedDataset, quotas
from fp8train.errors import DataError
from tests.data.corpora import make_dataset, make_documents


def make_mix(weights: list[float]) -> MixedDataset:
    datasets = [make_dataset(make_documents(40 + 20 * n, seed=n), seed=1 + n) for n in range(len(weights))]
    return MixedDataset(datasets, quotas(weights), [f"source {n}" for n in range(len(weights))], seed=1)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1.0], [1]),
        ([0.7, 0.3], [7, 3]),
        ([2, 1], [2, 1]),
        ([1 / 3, 1 / 3, 1 / 3], [1, 1, 1]),
        ([0.6, 0.25, 0.15], [12, 5, 3]),
        ([0.999, 0.001], [999, 1]),
    ],
)
def test_block_is_the_smallest_with_whole_shares(weights: list[float], expected: list[int]) -> None:
    assert quotas(weights) == expected


def test_shares_that_fit_no_block_get_the_nearest() -> None:
    weights = [np.pi, np.e, 1.0]
    counts = quotas(weights)
    assert sum(counts) == 10_000
    assert all(abs(count / 10_000 - w / sum(weights)) < 1e-4 for count, w in zip(counts, weights, strict=True))


def test_every_block_holds_the_exact_shares_in_another_order() -> None:
    mix = make_mix([0.7, 0.3])
    blocks = [[mix.locate(index)[0] for index in range(block * 10, block * 10 + 10)] for block in range(20)]
    assert all(Counter(block) == {0: 7, 1: 3} for block in blocks)
    assert len({tuple(block) for block in blocks}) > 5


def test_each_source_is_read_one_sample_after_the_other() -> None:
    mix = make_mix([0.5, 0.3, 0.2])
    for source in range(3):
        positions = [position for s, position in map(mix.locate, range(200)) if s == source]
        assert positions == list(range(len(positions)))


def test_sample_does_not_depend_on_what_was_read_before() -> None:
    mix = make_mix([0.7, 0.3])
    for index in [5, 500, 3, 77, 5]:  # at 500 one source is in its fifth epoch, the other in its second
        assert np.array_equal(mix.sample(index).tokens, make_mix([0.7, 0.3]).sample(index).tokens)


def test_names_of_sources_are_short_and_each_its_own() -> None:
    paths = ["x/code.txt", "x/a/*.jsonl", "y/a/*.jsonl", ["x/p.txt", "x/q.txt"]]
    entries = [SourceConfig(kind="text", path=path) for path in paths]
    entries += [SourceConfig(), SourceConfig(), SourceConfig(kind="hf", hf_name="someone/web")]
    assert source_names(entries) == [
        "code.txt", "x/a/*.jsonl", "y/a/*.jsonl", "x/p.txt, x/q.txt", "stdlib 1", "stdlib 2", "web",
    ]  # fmt: skip


def test_text_in_two_sources_lands_on_one_side_in_both(tmp_path: Path) -> None:
    """The small source needs a higher threshold than the large one, which holds out what they share, and no more."""
    lines = [f"document number {n:03d} of the shared text, which both hold\n" for n in range(100)]
    large, small = tmp_path / "large.txt", tmp_path / "small.txt"
    large.write_text("".join(lines))
    small.write_text("".join(lines[16:24]))
    entries = [SourceConfig(kind="text", path=str(path)) for path in (large, small)]
    config = DataConfig(kind="mix", mix=entries, holdout_fraction=0.05, eval_windows=10**6, document_mask=True)
    dataset = build_dataset(config, seq_len=8, seed=1)
    assert isinstance(dataset, MixedDataset)
    sides: dict[bool, set[int]] = {True: set(), False: set()}
    for part in dataset._datasets:
        for held in (True, False):
            chosen = part.splits[0].outside(part.corpus.hashes)  # type: ignore[attr-defined]
            sides[held] |= set(part.corpus.hashes[chosen == held].tolist())  # type: ignore[attr-defined]
    assert sides[True] and sides[False]
    assert not sides[True] & sides[False]
    first, second = (part.splits[0] for part in dataset._datasets)
    assert first.threshold < second.threshold, "one that the other's size does not raise"
    assert 0 < len(first.also) <= 8


def test_shards_and_bytes_mix_but_two_tokenizers_do_not(text_file: Path, bpe_file: Path, tmp_path: Path) -> None:
    from fp8train.prepare import PrepareConfig, prepare

    for name, tokenizer in [("bytes", "bytes"), ("bpe", str(bpe_file))]:
        data = DataConfig(kind="text", path=str(text_file), tokenizer=tokenizer)
        prepare(PrepareConfig(out=tmp_path / name, workers=1, data=data))
    text = SourceConfig(kind="text", path=str(text_file))
    shards = {name: SourceConfig(kind="tokens", path=str(tmp_path / name)) for name in ("bytes", "bpe")}
    mixed = build_dataset(DataConfig(kind="mix", mix=[text, shards["bpe"]]), seq_len=8, seed=1)
    assert mixed.tokenizer.vocab_size == 300
    with pytest.raises(DataError, match="another tokenizer"):
        build_dataset(DataConfig(kind="mix", mix=list(shards.values())), seq_len=8, seed=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build_dataset(DataConfig(kind="mix"), 8, 1), "data.mix: has no entries"),
        (lambda: quotas([1.0, 1e-6]), "entry 1 has 1e-06 of the weight"),
        (lambda: DataConfig(kind="mix", mix=[SourceConfig(kind="mix")]), "an entry has kind mix"),
        (lambda: DataConfig(kind="text", path="x", mix=[SourceConfig()]), "has 1 entries but data.kind is text"),
    ],
    ids=["empty", "tiny-weight", "nested", "not-a-mix"],
)
def test_bad_mix_is_one_line(make: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()  # type: ignore[operator]


def test_held_out_windows_follow_the_shares_as_the_description_says(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} {n} " + "x" * 60 for n in range(400)))
    entries = [SourceConfig(kind="text", path=str(tmp_path / f"{name}.txt"), document_bytes=100) for name in "ab"]
    entries[0].weight = 3.0
    mix = build_dataset(DataConfig(kind="mix", mix=entries, eval_windows=16), seq_len=32, seed=1)
    assert [part.partition("evaluation reads ")[2].split()[0] for part in mix.describe().split(" | ")] == ["12", "4"]
    assert [(part.name, part.share, len(part.samples)) for part in mix.held_out()] == [
        ("a.txt", 0.75, 12),
        ("b.txt", 0.25, 4),
    ]
    small = build_dataset(DataConfig(kind="text", path=str(tmp_path / "b.txt"), document_bytes=100), 32, seed=2)
    assert isinstance(small, PackedDataset)
    assert np.array_equal(mix.held_out()[1].samples[0].tokens, small.eval_samples()[0].tokens)
