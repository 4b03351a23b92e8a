"""Steps and tokens of a response: the cut is exact for byte-level and for other tokenizers, whatever the ids are."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from asyppo_megatron.demo.prepare import build_tokenizer
from asyppo_megatron.rewards.pieces import bytes_of_tokens, cut, split_steps
from asyppo_megatron.rollout.tokenizer import decode

TEXT = "Let x = 1.\n\nThen 2x = 2 — naïve, 数学 🤖!\n \n\nSo\tthe answer\nis 2.  \n\n\n"
CORPUS = [TEXT, "abc abc.\n\nabc, the then so answer is 数学数学 naïve naïve\n\n"] * 20


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE whose merges reach over line ends and over parts of characters, as Qwen's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.add_tokens([AddedToken("<think>", special=False), AddedToken("two words", special=False)])
    return fast


def metaspace():
    """SentencePiece-like: a space is part of the following token, bytes have tokens of their own."""
    words = ["▁Let", "▁so", "▁", "x", "=", "1", ".", "\n", "数"] + [f"<0x{b:02X}>" for b in range(256)]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_the_bytes_of_all_tokens_are_the_text(byte_level):
    for text in (TEXT, "<think>a</think> two words", "", "\x00\x7f é\u2028"):
        ids = byte_level(text, add_special_tokens=False)["input_ids"]
        assert b"".join(bytes_of_tokens(byte_level, ids)).decode() == text


def test_random_ids_add_up_to_what_the_verifiers_read(byte_level):
    rng = np.random.default_rng(0)
    size = len(byte_level)
    for _ in range(300):
        ids = rng.integers(0, size + 5, rng.integers(0, 30)).astype(np.int32)
        joined = b"".join(bytes_of_tokens(byte_level, ids.tolist()))
        assert joined.decode("utf-8", "replace") == decode(byte_level, ids)


def test_special_tokens_and_padding_add_nothing(byte_level):
    end = byte_level.eos_token_id
    assert bytes_of_tokens(byte_level, [end, len(byte_level) + 3]) == [b"", b""]


def test_a_step_ends_in_the_token_of_its_last_byte(byte_level):
    ids = byte_level(TEXT, add_special_tokens=False)["input_ids"]
    pieces = bytes_of_tokens(byte_level, [*ids, byte_level.eos_token_id])
    texts, ends = split_steps(pieces, r"\n\s*\n", 128)
    assert texts == ("Let x = 1.", "Then 2x = 2 — naïve, 数学 🤖!", "So\tthe answer\nis 2.")
    upto = [b"".join(pieces[: e + 1]) for e in ends]
    before = [b"".join(pieces[:e]) for e in ends]
    for text, with_token, without in zip(texts, upto, before, strict=True):
        end = TEXT.encode().index(text.encode()) + len(text.encode())
        assert len(without) < end <= len(with_token), "the token holds the step's last byte"
    assert len(pieces) - 1 not in ends, "the stop token belongs to no step"


def test_steps_by_hand():
    pieces = [b"a", b"b.\n\n", b"c", b"\n", b"\n", b"\xe6\x95", b"\xb0", b"", b"\n\nz", b""]
    assert split_steps(pieces, r"\n\n", 128) == (("ab.", "c", "数", "z"), (1, 2, 6, 8))
    assert split_steps(pieces, r"\n\n", 2) == (("ab.", "c\n\n数\n\nz"), (1, 8))
    assert split_steps(pieces, r"\n\n", 1) == (("ab.\n\nc\n\n数\n\nz",), (8,))
    assert split_steps([b"a;b;", b"c"], ";", 128) == (("a", "b", "c"), (0, 0, 1)), "two steps may share a token"
    assert split_steps([b" \n\n ", b"\n"], r"\n\s*\n", 128) == ((), ())
    assert split_steps([], r"\n\s*\n", 128) == ((), ())
    assert split_steps([b"\xff\xfe", b"\n\n\xe6", b"x"], r"\n\n", 128) == (("\ufffd\ufffd", "\ufffdx"), (0, 2))


def test_cuts_agree_with_a_search_byte_by_byte(byte_level):
    rng = np.random.default_rng(1)
    alphabet = ["a", "\n", "\n\n", " ", "é", "数", "🤖", ".", "x y"]
    for _ in range(200):
        text = "".join(rng.choice(alphabet, rng.integers(0, 25)))
        ids = byte_level(text, add_special_tokens=False)["input_ids"]
        pieces = bytes_of_tokens(byte_level, ids)
        texts, ends = split_steps(pieces, r"\n\n", 1000)
        expected = [p.strip() for p in text.split("\n\n") if p.strip()]
        assert list(texts) == expected
        at = 0
        for step, end in zip(texts, ends, strict=True):
            at = text.index(step, at) + len(step)
            last_byte = len(text[:at].encode())
            sizes = np.cumsum([len(p) for p in pieces])
            assert sizes[end] >= last_byte and (end == 0 or sizes[end - 1] < last_byte)


def test_other_tokenizers_are_decoded_in_windows():
    demo = build_tokenizer()
    ids = demo("7+5=2;#2$")["input_ids"]
    assert bytes_of_tokens(demo, ids) == [c.encode() for c in "7+5=2;#2"] + [b""]
    tokenizer = metaspace()
    ids = tokenizer.convert_tokens_to_ids(["▁Let", "▁", "x", "\n", "<0xE6>", "<0x95>", "<0xB0>", "数", "▁so", "."])
    pieces = bytes_of_tokens(tokenizer, ids)
    assert b"".join(pieces).decode() == tokenizer.decode(ids)
    assert pieces[4:7] == [b"", b"", "数".encode()], "a character counts for the token that completes it"
    assert split_steps(pieces, "\n", 10) == (("Let x", "数数 so."), (2, 9))


def test_every_token_can_be_a_piece():
    assert cut([b"a", b"", b"\xe6"], "token", "x", 1) == (("a", "", "\ufffd"), (0, 1, 2))


def test_hostile_responses_are_cut_quickly(byte_level):
    import time

    start = time.monotonic()
    for pieces in ([b"\n"] * 200_000, [b"\n\n", b"a"] * 100_000, [b" " * 1000] * 2000, [b"\n \t"] * 100_000):
        texts, ends = split_steps(pieces, r"\n\s*\n", 128)
        assert len(texts) == len(ends) <= 128
    assert time.monotonic() - start < 30
