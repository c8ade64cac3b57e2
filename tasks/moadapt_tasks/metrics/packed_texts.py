"""Texts as tensors, so that processes can gather them."""

import torch
from torch import Tensor


def pack_texts(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Encode texts as bytes.

    Args:
        texts: N texts.

    Returns:
        All bytes one after another (uint8), and the number of bytes of each text `(N,)` (int64).
    """
    # A model can generate half of a surrogate pair, which strict UTF-8 refuses.
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    joined = bytearray(b"".join(encoded))
    data = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
    return data.clone(), torch.tensor([len(text) for text in encoded], dtype=torch.long)


def unpack_texts(data: Tensor, lengths: Tensor) -> list[str]:
    """Decode what `pack_texts` encoded; concatenated data and lengths give the concatenated texts."""
    joined = data.cpu().numpy().tobytes()
    texts, start = [], 0
    for length in lengths.tolist():
        texts.append(joined[start : start + length].decode("utf-8", "surrogatepass"))
        start += length
    return texts
