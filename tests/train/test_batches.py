"""The order of the rows and their way into micro-batches."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from train.data.batches import BatchSource, SampleOrder
from train.data.images import PathImage
from train.data.rows import BadRowError, Row
from vision_scan.errors import UserError

LENGTHS = [(7 * index) % 23 for index in range(30)]


class Echo:
    """An objective whose samples are row ids and whose batches are lists of them."""

    def __init__(self, bad: tuple[str, ...] = ()) -> None:
        self.bad = bad

    def sample(self, row: Row) -> str:
        if row.id in self.bad:
            raise BadRowError(f"row {row.id}: cut")
        return row.id

    def collate(self, samples: list[str]) -> list[str]:
        return samples


def source(order: SampleOrder, bad: tuple[str, ...] = (), **options: Any) -> BatchSource:
    rows = [Row(str(index), (PathImage(Path("x")),), (), None) for index in range(len(order.lengths))]
    return BatchSource(Echo(bad), rows, order, **options)


def test_every_epoch_has_every_row_once() -> None:
    order = SampleOrder(LENGTHS, batch_size=6, seed=1, length_group=5)
    for epoch in range(3):  # a group is an epoch here
        seen = Counter(row for step in range(5) for row in order.batch(5 * epoch + step))
        assert seen == Counter(range(30))


def test_epochs_join_without_a_seam() -> None:
    order = SampleOrder(LENGTHS, batch_size=8, seed=1, length_group=3)
    seen = Counter(row for step in range(30) for row in order.batch(step))
    assert set(seen.values()) == {8}


def test_order_is_a_function_of_seed_and_step() -> None:
    one, other = (SampleOrder(LENGTHS, 6, seed=1) for _ in range(2))
    forward = [one.batch(step) for step in range(40)]
    assert [other.batch(step) for step in reversed(range(40))] == forward[::-1]
    assert [SampleOrder(LENGTHS, 6, seed=2).batch(step) for step in range(40)] != forward
    assert forward[:5] != forward[5:10]


def test_rows_of_a_batch_are_of_similar_length() -> None:
    def padding(length_group: int) -> int:
        order = SampleOrder(LENGTHS, 6, seed=1, length_group=length_group)
        batches = [[LENGTHS[row] for row in order.batch(step)] for step in range(50)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(5) < 0.4 * padding(1)


def test_fewer_rows_than_a_batch() -> None:
    order = SampleOrder([1, 2, 3], batch_size=8, seed=0)
    assert all(len(order.batch(step)) == 8 for step in range(40))


@pytest.mark.parametrize(("micro", "world"), [(None, 1), (2, 1), (None, 2), (2, 3), (1, 4)])
def test_micro_batches_of_all_processes_are_the_batch(micro: int | None, world: int) -> None:
    order = SampleOrder(LENGTHS, batch_size=12, seed=3)
    parts = [
        source(order, micro_batch_size=micro, rank=rank, world_size=world)(5)
        for rank in range(world)
    ]
    sizes = {len(batch) for batches in parts for batch in batches}
    assert sizes == {micro or 12 // world}
    rows = [row for batches in parts for batch in batches for row in batch]
    assert sorted(rows) == sorted(map(str, order.batch(5)))


def test_batch_that_cannot_be_shared_out() -> None:
    order = SampleOrder(LENGTHS, batch_size=12, seed=3)
    with pytest.raises(UserError, match=r"train.batch_size=12 .*micro_batch_size=5 x 1 processes"):
        source(order, micro_batch_size=5)
    with pytest.raises(UserError, match=r"train.batch_size=12"):
        source(order, world_size=24)


def test_bad_row_stops_or_is_replaced_and_counted() -> None:
    order = SampleOrder(LENGTHS, batch_size=30, seed=3, length_group=1)  # all rows in every batch
    with pytest.raises(BadRowError, match="row 4: cut"):
        source(order, bad=("4", "5"))(0)
    tolerant = source(order, bad=("4", "5"), skip_bad=True)
    for step in range(3):
        (batch,) = tolerant(step)
        others = [str(row) for row in range(30) if row not in (4, 5)]
        assert Counter(batch) == Counter([*others, "6", "6"])
    assert tolerant.skipped == {"row 4: cut", "row 5: cut"}
    with pytest.raises(BadRowError, match="no row"):
        source(order, bad=tuple(map(str, range(30))), skip_bad=True)(0)
