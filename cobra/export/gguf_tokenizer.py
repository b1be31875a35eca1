"""A byte-level BPE in a GGUF file, where llama.cpp cuts texts into words as it does."""

import json
from collections.abc import Mapping
from typing import Any

from cobra.tokenizer import Tokenizer

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]}
# llama.cpp's name of a way to cut texts into words -> `pre_tokenizer` of a tokenizer.json.
SPLITTINGS: dict[str, Mapping[str, Any]] = {"gpt-2": _BYTE_LEVEL, "smollm": _DIGITS}
# llama.cpp does not normalize. NFC, which GPT-NeoX asks for, leaves what keyboards and most files give as it is.
_NORMALIZERS = (None, {"type": "NFC"})
# llama.cpp needs a merge to load a vocabulary. Neither side is a letter for a byte, so that this one never happens.
_NO_MERGE = "\u2400 \u2400"
_UNKNOWN = ("byte_fallback", "ignore_merges", "dropout", "continuing_subword_prefix", "end_of_word_suffix")


def splitting(tokenizer: Tokenizer) -> str | None:
    """llama.cpp's name for how a tokenizer cuts texts into words; None: it has none, or works in another way."""
    data = json.loads(tokenizer.to_json())
    model = data["model"]
    if model["type"] != "BPE" or any(model.get(name) for name in _UNKNOWN):
        return None
    if data.get("normalizer") not in _NORMALIZERS:
        return None
    given = _without_offsets(data["pre_tokenizer"])
    if not model["merges"] and given == {**_BYTE_LEVEL, "use_regex": False}:
        return "gpt-2"  # single bytes, wherever texts are cut
    return next((name for name, known in SPLITTINGS.items() if known == given), None)


def _without_offsets(node: Any) -> Any:
    """`trim_offsets` changes no token."""
    if isinstance(node, dict):
        return {name: _without_offsets(value) for name, value in node.items() if name != "trim_offsets"}
    return [_without_offsets(each) for each in node] if isinstance(node, list) else node


def add_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Adds the keys `tokenizer.ggml.*` of a tokenizer that has a `splitting`.

    Args:
        writer: gguf's.
        vocab_size: rows of the embeddings; those behind the last token are marked as unused.
    """
    import gguf

    data = json.loads(tokenizer.to_json())
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    kinds = [gguf.TokenType.UNUSED] * vocab_size
    for text, index in data["model"]["vocab"].items():
        tokens[index], kinds[index] = text, gguf.TokenType.NORMAL
    for token in data["added_tokens"]:
        index = token["id"]
        kinds[index] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        tokens[index] = token["content"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]
    writer.add_token_merges(merges or [_NO_MERGE])
    writer.add_add_bos_token(False)
    # No token begins a text here; llama.cpp would take the one with id 11 for such.
    writer.add_bos_token_id(tokenizer.end_id)
    writer.add_eos_token_id(tokenizer.end_id)
    writer.add_pad_token_id(tokenizer.pad_id)
