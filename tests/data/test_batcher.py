"""Batches: one token stream for any ranks and micro-batches; targets and document mask."""

from __future__ import annotations

import pytest
import torch

from fp8train.data import MASKED_TARGET, Batcher, HeldOut
from fp8train.errors import DataError
from tests.data.corpora import make_dataset, make_documents

G = 12


@pytest.mark.parametrize(
    ("micro", "world_size"), [(12, 1), (1, 1), (4, 1), (1, 12), (2, 3), (3, 2), (6, 2)], ids=lambda value: str(value)
)
def test_step_holds_the_same_samples_for_any_split(micro: int, world_size: int) -> None:
    dataset = make_dataset(make_documents(80))
    whole = Batcher(dataset, G, G)
    parts = [Batcher(dataset, G, micro, rank, world_size) for rank in range(world_size)]
    for step in (0, 3, 40):
        (reference,) = whole.micro_batches(step)
        per_rank = [part.micro_batches(step) for part in parts]
        ordered = [batches[m] for m in range(G // (micro * world_size)) for batches in per_rank]
        assert [i for batch in ordered for i in batch.sample_ids] == list(range(step * G, (step + 1) * G))
        assert torch.equal(torch.cat([batch.tokens for batch in ordered]), reference.tokens)
        assert torch.equal(torch.cat([batch.targets for batch in ordered]), reference.targets)


def test_targets_are_the_next_tokens() -> None:
    (batch,) = Batcher(make_dataset(make_documents(80)), G, G).micro_batches(1)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert batch.document_ids is None
    assert (batch.targets >= 0).all()


def test_document_mask_hides_the_first_token_of_the_next_document_only() -> None:
    dataset = make_dataset(make_documents(80), document_mask=True)
    (batch,) = Batcher(dataset, G, G).micro_batches(1)
    for number, single in enumerate(Batcher(dataset, G, 1).micro_batches(1)):  # of one row, views would be contiguous
        assert torch.equal(single.tokens[0], batch.tokens[number])
        assert torch.equal(single.targets[0], batch.targets[number])
    assert batch.document_ids is not None
    assert (batch.tokens >= 0).all()
    after_separator = batch.tokens == dataset.tokenizer.separator
    assert after_separator.any()
    assert torch.equal(batch.targets == MASKED_TARGET, after_separator)
    assert torch.equal(batch.document_ids[:, 1:] != batch.document_ids[:, :-1], after_separator[:, :-1])


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_evaluation_windows_are_shared_out_without_loss(world_size: int) -> None:
    dataset = make_dataset(make_documents(300), eval_windows=13)
    samples = dataset.eval_samples()
    parts = [HeldOut(name=name, share=0.5, samples=part) for name, part in (("a", samples[:5]), ("b", samples[5:]))]
    found = [
        pair for rank in range(world_size) for pair in Batcher(dataset, 20, 2, rank, world_size).eval_batches(parts)
    ]
    assert [i for _, batch in found for i in batch.sample_ids] == list(range(13))
    together = torch.cat([batch.targets for _, batch in found])
    assert together.tolist() == [sample.tokens[1:].tolist() for sample in samples]
    assert all(source == (i >= 5) for source, batch in found for i in batch.sample_ids)


@pytest.mark.parametrize(
    ("micro", "world_size", "message"),
    [
        (
            5,
            1,
            "global batch of 12 samples is not divisible by 5 samples a micro-batch x 1 ranks = 5; nearest: 10 or 15",
        ),
        (3, 8, "not divisible by 3 samples a micro-batch x 8 ranks = 24; nearest: 24 samples"),
        (0, 1, "each needs at least 1"),
    ],
)
def test_batch_that_does_not_divide_is_refused(micro: int, world_size: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Batcher(make_dataset(make_documents(80)), G, micro, 0, world_size)
