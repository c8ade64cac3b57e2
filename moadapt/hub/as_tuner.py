"""A foreign DoRA as one of peft's own tuners, hosted: its change depends on the base's weight and is no plain LoRA."""

import re
from collections import Counter
from collections.abc import Mapping

from torch import Tensor, nn

from moadapt.adapters.peft_tuner import PeftTuner
from moadapt.hub.as_lora import placement_at
from moadapt.hub.lora_factors import factors_at
from moadapt.hub.lora_settings import LoRASettings
from moadapt.hub.pieces import Pieces
from moadapt.sites import Site

_PARTS = {"A": "lora_A.default.weight", "B": "lora_B.default.weight", "B.bias": "lora_B.default.bias",
    "magnitude": "lora_magnitude_vector.default.weight"}  # fmt: skip


def as_dora(pieces: Mapping[Site, Pieces], settings: LoRASettings) -> tuple[PeftTuner, dict[str, Tensor]]:
    """Return the spec and the tensors of a DoRA.

    Args:
        pieces: What the file has by site, each checked to be whole.
        settings: What the configuration says.
    """
    ranks = {site.path: own.shape("A")[0] for site, own in pieces.items()}
    scales = {path: settings.scale_at(ranks[path], path, own.written) for path, own in _by_path(pieces).items()}
    most = Counter(ranks.values()).most_common(1)[0][0]
    options = {
        "r": most,
        "lora_alpha": 1,
        "use_dora": True,
        "lora_bias": settings.bias,
        "lora_dropout": settings.dropout,
        "rank_pattern": {re.escape(path): rank for path, rank in ranks.items() if rank != most},
        "alpha_pattern": {re.escape(path): scale * ranks[path] for path, scale in scales.items()},
    }
    tensors = {
        f"{site.path}/{_PARTS[part]}": own.read(part).contiguous()
        for site, own in pieces.items()
        for part in own.tensors
    }
    return PeftTuner(kind="LORA", options=options, placement=placement_at(ranks)), tensors


def check_dora(site: Site, own: Pieces, module: nn.Module, settings: LoRASettings) -> None:
    """Refuse what a DoRA cannot have at a site, or lacks there.

    Args:
        site: Where.
        own: What the file has.
        module: The base's module there.
        settings: What the configuration says.

    Raises:
        ValueError: Something is missing, too much, or of another shape.
    """
    if site.form != "linear":
        raise ValueError(f"a DoRA at a module of form {site.form!r} is not taken, only at linear layers")
    needed = {"A", "B", "magnitude"} | ({"B.bias"} if settings.bias else set())
    if own.tensors.keys() != needed:
        raise ValueError(f"a DoRA has {', '.join(sorted(needed))} there, but the file {', '.join(sorted(own.tensors))}")
    if not settings.takes(own.path, own.written):
        raise ValueError("its configuration does not target this module, so that peft would leave it out silently")
    factors_at(site, module, own, settings)
    own.read("magnitude", (site.out_features,))


def _by_path(pieces: Mapping[Site, Pieces]) -> dict[str, Pieces]:
    return {site.path: own for site, own in pieces.items()}
