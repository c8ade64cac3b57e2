"""The picture of ranks shows the rank of every site."""

import re
from pathlib import Path

import matplotlib as mpl
import pytest

from moadapt import Placement, attach
from moadapt.adapters import Bottleneck, LoRA
from moadapt.reporting.ranks import save_rank_picture
from tests.models import tiny_llava

TOWERS = Placement(towers=("vision", "connector", "language"))


def test_every_rank_stands_in_the_picture(tmp_path: Path) -> None:
    path = "model.language_model.layers.1.mlp.up_proj"
    mixture = attach(tiny_llava(), shared=LoRA(rank=7, ranks={path: 91}), placement=TOWERS)
    with mpl.rc_context({"svg.fonttype": "none"}):
        save_rank_picture(mixture.spec, mixture.anatomy, tmp_path / "ranks.svg")
    words = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "ranks.svg").read_text())
    assert words.count("91") == 1
    assert words.count("7") == len(mixture.sites) - 1
    assert {"mlp.up_proj", "self_attn.q_proj", "linear_1"} <= set(words)


def test_a_mixture_without_ranks_has_no_picture(tmp_path: Path) -> None:
    mixture = attach(tiny_llava(), shared=Bottleneck())
    with pytest.raises(ValueError, match="no adapter has ranks"):
        save_rank_picture(mixture.spec, mixture.anatomy, tmp_path / "ranks.png")
