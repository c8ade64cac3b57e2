"""Texts come back from tensors as they went in."""

import torch

from moadapt_tasks.metrics.packed_texts import pack_texts, unpack_texts

TEXTS = ["a dog", "", "caf\u00e9 \u65e5\u672c \U0001f600", "half a pair: \ud83d", ""]


def test_packed_texts_come_back() -> None:
    assert unpack_texts(*pack_texts(TEXTS)) == TEXTS


def test_packed_texts_join_by_joining_their_tensors() -> None:
    pairs = [pack_texts(TEXTS), pack_texts([]), pack_texts(["", "z"])]
    data, lengths = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    assert unpack_texts(data, lengths) == [*TEXTS, "", "z"]


def test_no_texts_pack_into_the_types_of_some() -> None:
    assert [part.dtype for part in pack_texts([])] == [part.dtype for part in pack_texts(["a"])]
    assert [part.numel() for part in pack_texts([])] == [0, 0]
