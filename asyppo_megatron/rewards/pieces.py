"""A response cut into steps or tokens, each with the token that ends it.

The cut is exact: every token stands for a known run of bytes, the bytes of all tokens are the response's text, and a
step ends in the token that holds the last byte of its content. A character whose bytes are spread over several tokens
(byte-level BPE) ends in the last of them; white space that separates two steps belongs to neither.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

_REPLACEMENT = "\ufffd"


def cut(
    token_bytes: Sequence[bytes], per: str, separator: str, max_steps: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Texts and ends of a response's pieces, see `split_steps`; with `per` "token" every token is one."""
    if per == "token":
        return tuple(b.decode("utf-8", "replace") for b in token_bytes), tuple(range(len(token_bytes)))
    return split_steps(token_bytes, separator, max_steps)


def split_steps(
    token_bytes: Sequence[bytes], separator: str, max_steps: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Steps of a response.

    Args:
        token_bytes: of each token of the response, b"" for special tokens.
        separator: regular expression of what lies between two steps.
        max_steps: the last of so many steps takes the rest.

    Returns:
        texts: of the steps that are not blank, without what separates them; undecodable bytes replaced.
        ends: index of the token that holds the last byte of each, ascending; two short steps may share one.
    """
    data = b"".join(token_bytes)
    # One character a byte where the bytes are no UTF-8, so that offsets of characters lead back to bytes.
    text = data.decode("utf-8", "surrogateescape")
    spans = _spans(text, separator, max_steps)
    if not spans:
        return (), ()
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    undecodable = (codes >= 0xDC80) & (codes <= 0xDCFF)  # one byte each
    widths = 1 + ((codes >= 0x80) & ~undecodable) + ((codes >= 0x800) & ~undecodable) + (codes >= 0x10000)
    byte_ends = np.cumsum(widths)
    token_ends = np.cumsum([len(b) for b in token_bytes])
    last_bytes = byte_ends[[end - 1 for _, end in spans]] - 1
    ends = np.searchsorted(token_ends, last_bytes, side="right")
    texts = [text[start:end].encode("utf-8", "surrogateescape").decode("utf-8", "replace") for start, end in spans]
    return tuple(texts), tuple(int(e) for e in ends)


def _spans(text: str, separator: str, max_steps: int) -> list[tuple[int, int]]:
    """(first, last + 1) character of every step, white space at both ends left out."""
    cuts = [(m.start(), m.end()) for m in re.finditer(separator, text)]
    spans = []
    start = 0
    for first, last in [*cuts, (len(text), len(text))]:
        if len(spans) == max_steps - 1:
            first = last = len(text)
        content = text[start:first]
        if content.strip():
            left = start + len(content) - len(content.lstrip())
            spans.append((left, left + len(content.strip())))
        start = last
        if start >= len(text):
            break
    return spans


def bytes_of_tokens(tokenizer: Any, tokens: Sequence[int]) -> list[bytes]:
    """What each token adds to the text of a response, b"" for special tokens and ids without an entry.

    Byte-level BPE (Qwen, Llama 3) is looked up token by token. Every other tokenizer is decoded in growing windows: a
    character counts for the token that completes it.

    Raises:
        ValueError: the windows do not add up to the decoded text.
    """
    if type(tokenizer.backend_tokenizer.decoder).__name__ == "ByteLevel":
        return _byte_level(tokenizer, tokens)
    return _windows(tokenizer, tokens)


def _byte_level(tokenizer: Any, tokens: Sequence[int]) -> list[bytes]:
    special = set(tokenizer.all_special_ids)
    special |= {i for i, added in tokenizer.added_tokens_decoder.items() if added.special}
    found = []
    for number, token in zip(tokens, tokenizer.convert_ids_to_tokens(list(tokens)), strict=True):
        if token is None or number in special:
            found.append(b"")
        elif all(c in _BYTE_OF for c in token):
            found.append(bytes(_BYTE_OF[c] for c in token))
        else:  # an added token stands for itself
            found.append(token.encode())
    return found


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable ones stand for themselves, the others for what follows 255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _windows(tokenizer: Any, tokens: Sequence[int]) -> list[bytes]:
    def decode(first: int, last: int) -> str:
        return tokenizer.decode(list(tokens[first:last]), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    found: list[bytes] = []
    context = read = 0
    for end in range(1, len(tokens) + 1):
        before, now = decode(context, read), decode(context, end)
        if now.endswith(_REPLACEMENT) and end < len(tokens):  # a character that the next token may complete
            found.append(b"")
            continue
        found.append(now[len(before) :].encode())
        context, read = read, end
    if b"".join(found).decode() != decode(0, len(tokens)):
        raise ValueError("tokens: their texts do not add up to the response's text with this tokenizer")
    return found
