import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cobra.tokenizer import SPECIALS, Tokenizer
from vision_scan.errors import UserError

TEXTS = [
    "How many digits are there? 3",
    "Which digit is left of the 7? 4",
    "Is it red? yes, it is",
] * 5

BYTES = Tokenizer.bytes()
TRAINED = Tokenizer.train(TEXTS, 300)


@pytest.fixture(params=["bytes", "trained"])
def tokenizer(request):
    return {"bytes": BYTES, "trained": TRAINED}[request.param]


def test_bytes_ids_are_the_bytes():
    assert BYTES.encode("aé\n") == list("aé\n".encode())
    assert BYTES.vocab_size == 256 + len(SPECIALS)
    assert [BYTES.id_of(name) for name in SPECIALS] == [256, 257, 258, 259, 260]
    assert (BYTES.pad_id, BYTES.image_id, BYTES.end_id) == (256, 257, 260)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
@pytest.mark.parametrize("tokenizer", [BYTES, TRAINED], ids=["bytes", "trained"])
def test_decode_inverts_encode(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert not set(ids) & {tokenizer.id_of(name) for name in SPECIALS}


def test_every_byte_can_be_encoded(tokenizer):
    text = bytes(range(256)).decode("latin-1")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("special", SPECIALS)
def test_special_strings_in_text_are_text(tokenizer, special):
    text = f"a{special}b"
    assert tokenizer.id_of(special) not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    allowed = tokenizer.encode(text, allow_special=True)
    assert allowed == [
        *tokenizer.encode("a"),
        tokenizer.id_of(special),
        *tokenizer.encode("b"),
    ]
    assert tokenizer.decode(allowed) == "ab"
    assert tokenizer.decode(allowed, skip_special=False) == text


def test_lone_surrogates_do_no_harm(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"
    assert Tokenizer.train(["a\ud800b"], 261)


def test_decode_tolerates_ids_without_token(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("ok"), 99999]) == "ok"


def test_train_is_deterministic_and_compresses():
    again = Tokenizer.train(TEXTS, 300)
    text = "Which digit is left of the 7?"
    assert again.encode(text) == TRAINED.encode(text)
    assert TRAINED.vocab_size == 300
    assert len(TRAINED.encode(text)) < len(text) / 2


def test_train_keeps_digits_single():
    tokenizer = Tokenizer.train(["12 12 12 12"] * 50, 300)
    assert [tokenizer.decode([index]) for index in tokenizer.encode("12 12")] == [
        "1",
        "2",
        " 1",
        "2",
    ]


def test_train_refuses_a_vocabulary_below_the_bytes():
    with pytest.raises(UserError, match="261"):
        Tokenizer.train(TEXTS, 260)


def test_save_and_from_file_round_trip(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.from_file(tmp_path / "tokenizer.json")
    text = "Which digit <image> is left of the 7? é\n<|end|>"
    assert loaded.vocab_size == tokenizer.vocab_size
    for allow_special in (False, True):
        assert loaded.encode(text, allow_special) == tokenizer.encode(text, allow_special)


def test_from_file_adapts_a_foreign_tokenizer(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, processors

    backend = Backend(models.WordLevel({"hello": 0, "world": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "<|endoftext|>"])
    backend.add_tokens(["<|end|>"])  # there, but not as a special token
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    backend.enable_truncation(1)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "foreign.json"))

    tokenizer = Tokenizer.from_file(tmp_path / "foreign.json")
    assert tokenizer.encode("hello world") == [0, 1]
    assert tokenizer.end_id == 5
    assert tokenizer.vocab_size == 3 + 3 + 4
    assert tokenizer.encode("hello<|endoftext|><image>", allow_special=True) == [
        0,
        4,
        tokenizer.image_id,
    ]


@pytest.mark.parametrize("content", [None, "", "{}", json.dumps({"model": "x"}), "\x00"])
def test_from_file_names_a_bad_file(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer.from_file(path)


def test_id_of_names_an_unknown_token(tokenizer):
    with pytest.raises(UserError, match=r"<\|system\|>"):
        tokenizer.id_of("<|system|>")


def foreign(vocab: dict[str, int], specials=()):
    from tokenizers import AddedToken, Tokenizer, models

    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return backend


def test_special_tokens_that_were_added_are_told():
    assert Tokenizer(foreign({"a": 0, "b": 1})).added == dict(zip(SPECIALS, range(2, 7), strict=True))
    some = Tokenizer(foreign({"a": 0, "<pad>": 1}, ["<|end|>", "<s>"]))
    assert some.added == {"<image>": 4, "<|user|>": 5, "<|assistant|>": 6}
    assert (some.pad_id, some.end_id, some.given_size, some.vocab_size) == (1, 2, 4, 7)
    assert BYTES.added.keys() == set(SPECIALS) and not TRAINED.added


def test_ids_with_gaps_that_special_tokens_would_fall_into_are_refused(tmp_path):
    foreign({"a": 0, "b": 1, "c": 6}).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer\.json: the tokenizer's ids have gaps") as caught:
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert "\n" not in str(caught.value)
    wide = Tokenizer(foreign({"a": 0, "b": 1, "c": 99}))
    assert (wide.vocab_size, wide.given_size, wide.pad_id) == (100, 100, 3)
