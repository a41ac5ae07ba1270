"""Packing and order: windows of a stream of documents, and permutations that no library version changes."""

from __future__ import annotations

import numpy as np
import pytest

from fp8train.data.packing import PackedDocuments, permutation
from tests.data.corpora import make_corpus, make_documents


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_permutation_holds_every_number_once(count: int) -> None:
    assert sorted(permutation(count, 1, 2)) == list(range(count))


def test_permutation_depends_on_every_part_of_the_key() -> None:
    orders = [tuple(permutation(50, *key)) for key in [(1, 0, 1), (2, 0, 1), (1, 1, 1), (1, 0, 2), (0, 1, 1)]]
    assert len(set(orders)) == len(orders)


def test_permutation_is_pinned() -> None:
    """A resumed run must see the order that it began with, whatever the numpy or Python version."""
    assert permutation(10, 1, 0, 2).tolist() == [5, 4, 1, 6, 9, 8, 2, 0, 7, 3]


def test_permutation_is_uniform() -> None:
    """Each number is equally often in each place: chi-squared, 81 degrees of freedom, within 5 standard deviations."""
    counts = np.zeros((10, 10))
    for seed in range(2000):
        counts[np.arange(10), permutation(10, seed, 0)] += 1
    chi_squared = ((counts - 200) ** 2 / 200).sum()
    assert abs(chi_squared - 81) < 5 * np.sqrt(2 * 81)


@pytest.mark.parametrize(("position", "count"), [(0, 5), (3, 40), (17, 200), (100, 1)])
def test_window_is_the_slice_of_the_documents_laid_end_to_end(position: int, count: int) -> None:
    documents = make_documents(12)
    order = np.asarray([5, 2, 11, 0, 7, 1, 3])
    laid = [(byte, document) for document in order for byte in [*documents[document], 256]][position : position + count]
    sample = PackedDocuments(make_corpus(documents), order).read(position, count)
    assert sample.tokens.tolist() == [token for token, _ in laid]
    changes = np.flatnonzero(np.diff([document for _, document in laid])) + 1
    assert sample.document_ids[0] == 0
    assert np.array_equal(np.flatnonzero(np.diff(sample.document_ids)) + 1, changes)


def test_every_token_but_the_first_is_a_target_once() -> None:
    documents = make_documents(9)
    stream = PackedDocuments(make_corpus(documents), np.arange(9))
    seq_len = 11
    targets = [stream.read(n * seq_len, seq_len + 1).tokens[1:] for n in range(stream.windows(seq_len))]
    laid = np.asarray([token for document in documents for token in [*document, 256]])
    joined = np.concatenate(targets)
    assert np.array_equal(joined, laid[1 : 1 + len(joined)])
    assert len(laid) - 1 - len(joined) < seq_len
