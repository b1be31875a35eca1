"""Text to token ids and back: a Hugging Face `tokenizer.json`, a BPE of our own, or bytes."""

import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vision_scan.errors import UserError

if TYPE_CHECKING:
    import tokenizers

PAD, IMAGE, USER, ASSISTANT, END = "<pad>", "<image>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIALS = (PAD, IMAGE, USER, ASSISTANT, END)

# Words with their leading space, digits one by one, runs of other signs, white space.
_WORDS = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    """A `tokenizers.Tokenizer` with the special tokens of Cobra, and user text kept apart from them.

    Use `bytes`, `from_file` or `train` to make one.

    Attributes:
        vocab_size: the number of ids, special tokens included (the largest id plus one).
        pad_id, image_id, end_id: ids of `<pad>`, `<image>` and `<|end|>`.
        added: those of the special tokens of Cobra, with their ids, that the given tokenizer did not have.
        given_size: the number of ids without them (the largest id plus one).
    """

    def __init__(self, backend: "tokenizers.Tokenizer") -> None:
        from tokenizers import AddedToken

        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # text is text; encode() finds the specials itself
        lacking = [name for name in SPECIALS if backend.token_to_id(name) is None]
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
        self._backend = backend
        self._specials = {
            token.content: index
            for index, token in backend.get_added_tokens_decoder().items()
            if token.special
        }
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._special_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocab.values())
        self.pad_id, self.image_id, self.end_id = map(self.id_of, (PAD, IMAGE, END))
        self.added = {name: vocab[name] for name in lacking}
        self.given_size = 1 + max((index for name, index in vocab.items() if name not in lacking), default=-1)
        if len(set(vocab.values())) < len(vocab):  # new ids are counted from the number of tokens
            raise UserError(
                "the tokenizer's ids have gaps, so that special tokens would share theirs with others; "
                f"it must have {', '.join(SPECIALS)} itself"
            )

    @classmethod
    def bytes(cls) -> "Tokenizer":
        """One token per UTF-8 byte, the byte's value as its id; the specials follow from 256 on."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        vocab = {_byte_letters()[value]: value for value in range(256)}
        backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        return cls(backend)

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Reads any Hugging Face `tokenizer.json`; special tokens that it lacks are added at the end.

        Raises:
            UserError: if the file is missing or not a tokenizer.
        """
        from tokenizers import Tokenizer

        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; give a Hugging Face tokenizer.json")
        try:
            backend = Tokenizer.from_file(str(path))
        except Exception as error:  # the only class that the library raises
            raise UserError(f"{path}: not a Hugging Face tokenizer.json ({error})") from error
        try:
            return cls(backend)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learns a byte-level BPE, the same one from the same texts every time.

        Every text can be encoded, digits stay single tokens. Fewer tokens than asked for come out if
        the texts hold no more pairs to merge.

        Args:
            texts: the training text in pieces.
            vocab_size: the number of ids wanted, specials included; at least 261.
        """
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

        smallest = 256 + len(SPECIALS)
        if vocab_size < smallest:
            raise UserError(f"vocab_size={vocab_size}: bytes and specials alone need {smallest}")
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIALS),
            initial_alphabet=list(_byte_letters()),
            show_progress=False,
        )
        backend.train_from_iterator(map(_well_formed, texts), trainer)
        return cls(backend)

    def save(self, path: str | Path) -> None:
        """Writes the `tokenizer.json` that `from_file` reads."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The text of that file."""
        return self._backend.to_str(pretty=True)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of `text`; nothing is added at either end.

        Args:
            text: any string; a lone surrogate, which no encoding can hold, becomes "?".
            allow_special: whether the strings of special tokens become these tokens. By default they
                are ordinary text, so that nobody can end a turn by typing `<|end|>`.
        """
        if not allow_special:
            return self._backend.encode(_well_formed(text), add_special_tokens=False).ids
        ids: list[int] = []
        for piece in self._special_pattern.split(text):
            ids += [self._specials[piece]] if piece in self._specials else self.encode(piece)
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; ids without a token give nothing, broken UTF-8 gives U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def id_of(self, token: str) -> int:
        """The id of one token, given by its exact string.

        Raises:
            UserError: if the vocabulary has no such token.
        """
        index = self._backend.token_to_id(token)
        if index is None:
            raise UserError(
                f"the tokenizer has no token {token!r}; its special tokens: {', '.join(self._specials)}"
            )
        return index


def _well_formed(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


@functools.cache
def _byte_letters() -> tuple[str, ...]:
    """The printable letter that stands for each byte value in byte-level vocabularies.

    Source: the byte-to-unicode table of GPT-2 (openai/gpt-2, src/encoder.py, MIT): printable Latin-1
    bytes stand for themselves, the others follow from U+0100 on in order of their value.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return tuple(chr(value if value in printable else next(others)) for value in range(256))
