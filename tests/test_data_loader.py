"""The data order: a bijection per epoch, the same for any number of processes, resumable anywhere."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loader import build_loader, collate_blocks, permuted
from modeling_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM


class Numbers(torch.utils.data.Dataset):
    """Row i holds the number i: what comes out of a loader shows which rows it asked for."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"input_ids": torch.tensor([index, index])}


def rows_of(loader, batches=None):
    return [batch["input_ids"][:, 0].tolist() for batch in itertools.islice(loader, batches)]


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 3000), seed=st.integers(-(2**40), 2**40), epoch=st.integers(0, 2**20))
def test_every_epoch_is_a_bijection(length, seed, epoch):
    order = permuted(np.arange(epoch * length, (epoch + 1) * length), length, seed)
    assert np.array_equal(np.sort(order), np.arange(length))


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 2**45), seed=st.integers(0, 2**63), position=st.integers(0, 2**50))
def test_one_position_gives_what_the_array_gives_also_in_a_huge_corpus(length, seed, position):
    alone = permuted(position, length, seed)
    assert isinstance(alone, int)
    assert 0 <= alone < length
    assert permuted(np.array([position, position + 1]), length, seed)[0] == alone


def test_seeds_and_epochs_give_different_orders_that_look_random():
    length = 10_000
    orders = [permuted(np.arange(length), length, seed) for seed in range(4)]
    orders.append(permuted(np.arange(length, 2 * length), length, 0))
    for a, b in itertools.combinations(orders, 2):
        # Two random permutations agree in about one place; 12 or more happens once in 10^9 times.
        assert (a == b).sum() < 12
    for order in orders:
        # Neighbours and positions are uncorrelated: the standard deviation of a correlation is
        # 1/sqrt(length).
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / np.sqrt(length)
        assert abs(np.corrcoef(order, np.arange(length))[0, 1]) < 5 / np.sqrt(length)


def test_small_epochs_reach_every_order():
    """A weak key schedule would leave some of the 24 orders of four blocks out."""
    seen = {tuple(permuted(np.arange(4), 4, seed)) for seed in range(2000)}
    assert len(seen) == 24


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 200),
    batch=st.integers(1, 9),
    world_size=st.integers(1, 5),
    skipped_rounds=st.integers(0, 30),
    seed=st.integers(0, 1000),
)
def test_ranks_share_out_the_global_stream_and_resume_in_it(length, batch, world_size, skipped_rounds, seed):
    rounds = 12
    stream = permuted(np.arange((skipped_rounds + rounds) * world_size * batch), length, seed).reshape(
        -1, batch
    )
    for rank in range(world_size):
        loader = build_loader(
            Numbers(length),
            collate_blocks,
            micro_batch_size=batch,
            seed=seed,
            start_batch=skipped_rounds * world_size,
            rank=rank,
            world_size=world_size,
        )
        expected = stream[skipped_rounds * world_size + rank :: world_size][:rounds]
        assert rows_of(loader, rounds) == expected.tolist()


def test_each_epoch_uses_every_block_once_even_if_batches_do_not_divide_it():
    batches = rows_of(build_loader(Numbers(10), collate_blocks, micro_batch_size=3, seed=0), 10)
    rows = list(itertools.chain.from_iterable(batches))
    assert [sorted(rows[start : start + 10]) for start in (0, 10, 20)] == [list(range(10))] * 3


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 100), batch=st.integers(1, 9), world_size=st.integers(1, 5))
def test_an_ordered_pass_reads_everything_once_over_all_ranks(length, batch, world_size):
    loaders = [
        build_loader(
            Numbers(length), collate_blocks, micro_batch_size=batch, seed=None, rank=r, world_size=world_size
        )
        for r in range(world_size)
    ]
    per_rank = [rows_of(loader) for loader in loaders]
    assert [len(rows) for rows in per_rank] == [len(loader) for loader in loaders]
    batches = [rows for round_ in itertools.zip_longest(*per_rank) for rows in round_ if rows is not None]
    assert batches == [list(range(start, min(start + batch, length))) for start in range(0, length, batch)]


def test_impossible_slices_are_refused_with_all_problems_at_once():
    with pytest.raises(
        ValueError, match=r"empty.*micro_batch_size=0.*start_batch=3 is not a multiple of world_size=2"
    ):
        build_loader(Numbers(0), collate_blocks, micro_batch_size=0, seed=1, start_batch=3, world_size=2)
    with pytest.raises(ValueError, match="rank=2"):
        build_loader(Numbers(4), collate_blocks, micro_batch_size=1, seed=1, rank=2, world_size=2)
    with pytest.raises(ValueError, match="nothing to permute"):
        permuted(0, 0, 1)


def test_documents_of_a_row_are_told_apart_by_restarting_positions():
    """Each border costs one target: what follows an end token belongs to another document."""
    rows = [{"input_ids": torch.tensor(ids)} for ids in ([5, 6, 0, 7, 8, 9], [0, 0, 5, 6, 7, 0])]
    batch = collate_blocks(rows, end_id=0)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[5, 6, 0, -100, 8, 9], [0, -100, -100, 6, 7, 0]]
    assert torch.equal(batch["input_ids"], collate_blocks(rows)["input_ids"])


def test_a_masked_row_gives_each_document_the_loss_it_has_alone():
    model = GPTScratchForCausalLM(GPTScratchConfig.preset("tiny", vocab_size=16)).eval()
    first, second = [5, 6, 3, 0], [7, 8, 9, 2, 0]
    row = collate_blocks([{"input_ids": torch.tensor(first + second)}], end_id=0)
    alone = [collate_blocks([{"input_ids": torch.tensor(ids)}], end_id=0) for ids in (first, second)]
    together = model(**row, num_items_in_batch=1).loss
    apart = sum(model(**batch, num_items_in_batch=1).loss for batch in alone)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)  # float32, other products
