"""Micro-batches: every sample once, little padding, and rows and weights that a naive loop also finds."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamda.batches import MicroBatch, collate, make_micro_batches
from streamda.config import TokenMask

LENGTHS = st.lists(st.integers(2, 400), min_size=1, max_size=80)
MAX_TOKENS = st.sampled_from([1, 64, 500, 1024, 8192])
CPU = torch.device("cpu")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(LENGTHS, MAX_TOKENS)
def test_every_sample_is_in_exactly_one_micro_batch(lengths: list[int], max_tokens: int) -> None:
    batches = make_micro_batches(lengths, max_tokens)
    assert sorted(index for batch in batches for index in batch.samples) == list(range(len(lengths)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(LENGTHS, MAX_TOKENS)
def test_micro_batches_are_within_their_size_and_a_twentieth_is_padding(lengths: list[int], max_tokens: int) -> None:
    batches = make_micro_batches(lengths, max_tokens)
    for batch in batches:
        members = [lengths[index] for index in batch.samples]
        assert batch.length == max(members)
        assert batch.num_rows == batch.length * len(members)
        assert batch.num_rows <= max_tokens or len(members) == 1
    rows = sum(batch.num_rows for batch in batches)
    assert 20 * (rows - sum(lengths)) <= rows


@settings(max_examples=100, deadline=None, derandomize=True)
@given(LENGTHS, MAX_TOKENS)
def test_longest_come_first_and_equal_ones_in_their_own_order(lengths: list[int], max_tokens: int) -> None:
    """So the largest working set comes first, and a resumed run meets the same batches."""
    order = [index for batch in make_micro_batches(lengths, max_tokens) for index in batch.samples]
    assert order == [index for index, _ in sorted(enumerate(lengths), key=lambda pair: -pair[1])]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 99), min_size=1, max_size=8), MAX_TOKENS)
def test_no_other_cut_into_as_many_micro_batches_has_fewer_rows(lengths: list[int], max_tokens: int) -> None:
    batches = make_micro_batches(lengths, max_tokens)
    ordered = sorted(lengths, reverse=True)
    for inner in itertools.combinations(range(1, len(lengths)), len(batches) - 1):
        parts = [ordered[start:stop] for start, stop in itertools.pairwise([0, *inner, len(lengths)])]
        if all(part[0] * len(part) <= max_tokens or len(part) == 1 for part in parts):
            assert sum(part[0] * len(part) for part in parts) >= sum(batch.num_rows for batch in batches)


def test_few_long_products_are_worth_a_little_padding() -> None:
    lengths = [100, 100, 104, 110, 133, 152, 161, 164, 186, 224, 224, 233, 248, 252, 288, 436]
    assert len(make_micro_batches(lengths, 1024)) == 6


def test_equal_lengths_fill_micro_batches_to_the_brim() -> None:
    batches = make_micro_batches([10] * 7, 30)
    assert batches == (MicroBatch((0, 1, 2), 10), MicroBatch((3, 4, 5), 10), MicroBatch((6,), 10))


def test_a_sample_above_the_size_stands_alone() -> None:
    assert make_micro_batches([5, 900, 5], 100) == (MicroBatch((1,), 900), MicroBatch((0, 2), 5))


def draw_samples(seed: int, count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Samples with labels at random places; the first one has none."""
    generator = random.Random(seed)
    ids, labels = [], []
    for index in range(count):
        length = generator.randint(1, 12)
        tokens = [generator.randint(0, 96) for _ in range(length)]
        shown = [token if index and generator.random() < 0.6 else -100 for token in tokens]
        ids.append(torch.tensor(tokens))
        labels.append(torch.tensor(shown))
    return ids, labels


@pytest.mark.parametrize("token_mask", ["attention", "labels"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 6))
def test_rows_and_weights_are_those_of_a_naive_loop(token_mask: TokenMask, seed: int, count: int) -> None:
    ids, labels = draw_samples(seed, count)
    batch = collate(ids, labels, token_mask, CPU)
    input_ids, targets = batch.input_ids(), batch.targets()
    length = max(len(sample) for sample in ids)
    moment_rows, label_rows, label_ids, weights = [], [], [], []
    for sample, (tokens, shown) in enumerate(zip(ids, labels, strict=True)):
        predicting = [place for place in range(len(tokens) - 1) if int(shown[place + 1]) != -100]
        for place in range(len(tokens)):
            row = sample * length + place
            assert input_ids.flatten()[row] == tokens[place]
            if token_mask == "attention" or place in predicting:
                moment_rows.append(row)
            if place in predicting:
                label_rows.append(row)
                label_ids.append(int(shown[place + 1]))
                weights.append(1 / len(predicting))
    assert input_ids.shape == batch.shape == (count, length)
    assert batch.num_rows == count * length
    assert batch.leaves_out_padding == (token_mask == "attention")
    if batch.moment_rows is None:
        assert moment_rows == list(range(count * length))
    else:
        assert batch.moment_rows.tolist() == moment_rows
        assert len(moment_rows) < count * length  # None is how "all rows" is said: it saves a copy per layer
    assert targets.rows.tolist() == label_rows
    assert targets.ids.tolist() == label_ids
    torch.testing.assert_close(targets.weights, torch.tensor(weights, dtype=torch.float32), rtol=1e-7, atol=0)


def test_the_weighted_losses_of_a_batch_are_the_mean_losses_of_its_samples() -> None:
    """Against torch's own cross entropy, sample by sample."""
    ids, labels = draw_samples(seed=3, count=5)
    batch = collate(ids, labels, "attention", CPU)
    targets = batch.targets()
    logits = torch.randn(*batch.shape, 97, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = logits.flatten(0, 1)[targets.rows]
    losses = torch.nn.functional.cross_entropy(rows, targets.ids, reduction="none")
    expected = 0.0
    for sample, shown in enumerate(labels):
        if bool((shown[1:] != -100).any()):
            expected += float(torch.nn.functional.cross_entropy(logits[sample, : len(shown) - 1], shown[1:]))
    assert expected > 10
    assert float((losses * targets.weights).sum()) == pytest.approx(expected, rel=1e-6)


def test_padding_is_token_zero_and_no_row_of_any_kind() -> None:
    ids, labels = [torch.tensor([5, 6, 7]), torch.tensor([8])], [torch.tensor([5, 6, 7]), torch.tensor([8])]
    batch = collate(ids, labels, "attention", CPU)
    targets = batch.targets()
    assert batch.input_ids().tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.moment_rows is not None
    assert batch.moment_rows.tolist() == [0, 1, 2, 3]
    assert targets.rows.tolist() == [0, 1]
    assert targets.ids.tolist() == [6, 7]
    assert targets.weights.tolist() == [0.5, 0.5]


def test_without_padding_only_samples_of_one_length_share_a_micro_batch() -> None:
    lengths = [7, 9, 7, 8, 9, 7]
    batches = make_micro_batches(lengths, 64, padded=False)
    assert [[lengths[sample] for sample in batch.samples] for batch in batches] == [[9, 9], [8], [7, 7, 7]]
    assert len(make_micro_batches(lengths, 64)) < 3
