"""Rows: nothing lost, nothing trained twice, documents kept apart."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitnet_train.data.batches import TokenRow, collate, labels_of, positions_of
from bitnet_train.data.packing import PackedRows, PairRows, StreamRows, best_fit
from bitnet_train.labels import IGNORE_INDEX
from tests.support import items_of, pairs_of, span_of, store_of

DOCUMENTS = st.lists(st.lists(st.integers(10, 99), min_size=1, max_size=40), min_size=1, max_size=12)


def predicted(row: TokenRow) -> list[int]:
    return [label for label in labels_of(row).tolist() if label != IGNORE_INDEX]


@given(DOCUMENTS, st.integers(2, 17))
def test_a_stream_predicts_every_token_but_the_first_of_each_document_once(
    documents: list[list[int]], length: int
) -> None:
    rows = StreamRows([span_of(documents)], length, pad_id=0)
    got = [token for i in range(len(rows)) for token in predicted(rows[i])]
    assert got == [token for document in documents for token in document[1:]]


@given(st.lists(DOCUMENTS, min_size=1, max_size=4), st.integers(2, 17))
def test_a_stream_of_several_stores_is_that_of_their_documents_in_a_row(
    stores: list[list[list[int]]], length: int
) -> None:
    apart = StreamRows([span_of(documents) for documents in stores], length, pad_id=0)
    joined = StreamRows([span_of([document for documents in stores for document in documents])], length, pad_id=0)
    assert len(apart) == len(joined)
    for index in range(len(apart)):
        assert [field.tolist() for field in apart[index]] == [field.tolist() for field in joined[index]]


@given(DOCUMENTS, st.integers(40, 60))
def test_packed_conversations_are_whole_and_trained_once(conversations: list[list[int]], length: int) -> None:
    trained = [[i % 3 == 1 for i in range(len(c))] for c in conversations]
    rows = PackedRows(items_of(store_of(conversations, trained)), length, pad_id=0)
    got = sorted(token for i in range(len(rows)) for token in predicted(rows[i]))
    assert got == sorted(
        t for c, mask in zip(conversations, trained, strict=True) for t, m in zip(c, mask, strict=True) if m
    )
    assert max(len(rows[i].ids) for i in range(len(rows))) <= length + 1


@given(st.lists(st.integers(1, 100), min_size=1, max_size=200))
def test_best_fit_places_every_item_once_and_fills_no_bin_too_full(lengths: list[int]) -> None:
    bins = best_fit(np.array(lengths), 100)
    assert sorted(set(bins.tolist())) == list(range(bins.max() + 1))
    assert np.bincount(bins, lengths).max() <= 100


def test_best_fit_by_hand() -> None:
    assert best_fit(np.array([6, 5, 4, 5]), 10).tolist() == [0, 1, 0, 1]
    assert best_fit(np.array([7, 6, 3]), 10).tolist() == [0, 1, 0]  # the room of 3, not that of 4


def test_a_bin_larger_than_memory_takes_everything() -> None:
    assert best_fit(np.array([3, 1, 2]), 10**15).tolist() == [0, 0, 0]


def test_positions_restart_with_every_document() -> None:
    assert positions_of(np.array([0, 0, 0, 1, 1, 2])).tolist() == [0, 1, 2, 0, 1, 0]


def test_a_batch_by_hand() -> None:
    long = TokenRow(np.array([1, 5, 6, 1, 7]), np.array([0, 1, 1, 1, 1]), np.array([0, 0, 0, 1, 1]))
    short = TokenRow(np.array([1, 8]), np.array([0, 1]), np.array([0, 0]))
    batch = collate([long, short], pad_id=9)
    assert batch.input_ids.tolist() == [[1, 5, 6, 1], [1, 9, 9, 9]]
    assert batch.labels.tolist() == [[5, 6, IGNORE_INDEX, 7], [8] + [IGNORE_INDEX] * 3]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0], [0, 0, 0, 0]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1], [0, -1, -1, -1]]


def test_pairs_train_their_completions_and_carry_their_reference() -> None:
    rows = PairRows(pairs_of(([1, 2], [3], [6, 7]), ([1], [4, 5], [8])), pad_id=0)
    rows.reference_logps = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    batch = rows.collate([rows[1], rows[0]])
    assert batch.tokens.input_ids.tolist() == [[1, 4, 0], [1, 2, 0], [1, 0, 0], [1, 2, 6]]
    trained = [[label for label in row if label != IGNORE_INDEX] for row in batch.tokens.labels.tolist()]
    assert trained == [[4, 5], [3], [8], [6, 7]]
    assert batch.reference_logps.tolist() == [[-2.0, -1.0], [-4.0, -3.0]]


def test_the_fingerprint_of_pairs_sees_prompts_completions_and_their_border() -> None:
    pairs = [([1, 2], [3], [4]), ([1], [2, 3], [4]), ([1, 2], [4], [3]), ([1, 2], [3], [5])]
    fingerprints = [PairRows(pairs_of(pair), 0).fingerprint for pair in pairs]
    assert len(set(fingerprints)) == 4
    assert PairRows(pairs_of(pairs[0]), 0).fingerprint == fingerprints[0]
