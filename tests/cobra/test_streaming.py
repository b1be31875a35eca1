import pytest
import torch

from cobra.streaming import TextStreamer
from cobra.tokenizer import Tokenizer
from vision_scan.errors import UserError

TOKENIZER = Tokenizer.bytes()


def stream(*answers):
    """The pieces in which answers, each a list of ids, come out of one streamer."""
    pieces = []
    streamer = TextStreamer(TOKENIZER, pieces.append)
    for ids in answers:
        for index in ids:
            streamer.put(torch.tensor([index]))
        streamer.end()
    return pieces


def test_characters_come_out_whole():
    assert stream(TOKENIZER.encode("aé🐍\ufffd.")) == ["a", "é", "🐍", "\ufffd."]


def test_half_a_character_comes_out_at_the_end():
    assert stream([97, 0xC3], [98]) == ["a", "\ufffd", "b"]


@pytest.mark.parametrize("ids", [[0xFF, 97, 0xE2, 0x82, 98], [0x80] * 5, [0xF0, 0x9F, 0x90, 97, 0x8D]])
def test_broken_text_joins_to_the_whole(ids):
    assert "".join(stream(ids)) == TOKENIZER.decode(ids)


def test_special_tokens_write_nothing():
    assert stream([97, TOKENIZER.end_id, TOKENIZER.pad_id]) == ["a"]


def test_a_space_that_a_tokenizer_drops_at_the_start_is_kept_between_words():
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    backend = Backend(models.WordLevel({"▁hello": 0, "▁world": 1}, unk_token="▁hello"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    pieces = []
    streamer = TextStreamer(Tokenizer(backend), pieces.append)
    for index in (0, 1, 1):
        streamer.put(torch.tensor([index]))
    streamer.end()
    assert pieces == ["hello", " world", " world"]


def test_one_row_is_served():
    with pytest.raises(UserError, match="one row, got 3"):
        TextStreamer(TOKENIZER, print).put(torch.tensor([1, 2, 3]))
