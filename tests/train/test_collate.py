"""Samples to batches."""

import torch

import cobra
from train.data.collate import Sample, collate_conversations, pad_right


def test_pad_right_fills_short_rows() -> None:
    assert pad_right([[1, 2, 3], [4]], 9).tolist() == [[1, 2, 3], [4, 9, 9]]


def test_batch_has_right_padding_tiles_in_order_and_honest_counts() -> None:
    tiles = torch.rand(3, 3, 4, 4)
    batch = collate_conversations(
        [
            Sample("a", [5, 6, 7], [-100, 6, 7], tiles[:2]),
            Sample("b", [8], [8], None),
            Sample("c", [1, 2], [-100, 2], tiles[2:]),
        ],
        pad_id=0,
    )
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0], [1, 2, 0]]
    assert batch.inputs["labels"].tolist() == [[-100, 6, 7], [-100, -100, -100], [-100, 2, -100]]
    assert torch.equal(batch.inputs["pixel_values"], tiles)
    assert batch.num_supervised == batch.weight == 3  # the 8 opens its row: nothing precedes it
    assert batch.num_tokens == 6
    assert batch.ids == ("a", "b", "c")


def test_weight_is_the_count_of_the_models_loss() -> None:
    model = cobra.build("tiny")
    text = model.tokenizer.encode("what? this")
    labels = [-100] * 5 + text[5:]
    samples = [Sample("a", text, labels, None), Sample("b", text[:7], labels[:7], None)]
    batch = collate_conversations(samples, model.tokenizer.pad_id)
    _, count = model.loss(batch.inputs)
    assert batch.weight == count.item()
    assert batch.inputs["pixel_values"] is None
