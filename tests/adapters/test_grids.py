"""Sites whose input keeps height and width as axes of their own, as in SAM's vision towers."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, GotOcr2ForConditionalGeneration

from moadapt import Mixture, Placement, Routing, attach
from moadapt.adapters import Bottleneck, FamilySpec
from moadapt.registry import FAMILIES
from tests.conformance.canonical import EXPERTS, Given, routing_value
from tests.conformance.canonical import ROUTINGS as ASKED
from tests.core.zoo import TEXT
from tests.models import randomize

IMAGE, ROWS = 3, 3
ROUTINGS = ("task", "sequence_dense", "heads")


def base() -> Any:
    """A GotOcr2 with two blocks over three by three patches, in neither of which windows split the rows."""
    vision = {
        "hidden_size": 24, "mlp_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 12,
        "patch_size": 4, "output_channels": 8, "global_attn_indexes": [0, 1], "window_size": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "got_ocr2",
        vision_config=vision,
        text_config=AutoConfig.for_model("qwen2", **TEXT),
        image_token_id=IMAGE,
    )
    model = GotOcr2ForConditionalGeneration(config).eval()
    for parameter in model.parameters():  # its own spread is next to nothing
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def mixture_of(family: FamilySpec, routing: Routing) -> Mixture:
    mixture = attach(
        base(),
        shared=family,
        experts=dict.fromkeys(EXPERTS, family),
        router=Given(value=routing),
        placement=Placement(towers=("vision",), kinds=("attention", "mlp")),
    )
    randomize(mixture, scale=0.1)
    return mixture.eval()


def logits(mixture: Mixture, pixels: Tensor) -> Tensor:
    """Logits of one image a row."""
    ids = torch.tensor([[IMAGE, 7, 8]]).expand(len(pixels), -1)
    with torch.no_grad():
        found: Tensor = mixture(input_ids=ids, pixel_values=pixels).logits
    return found


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, id=f"{short}-{name}")
        for short, family in FAMILIES
        for name in ROUTINGS
        if "linear" in family.forms and ASKED[name] <= family.routes
    ],
)
def test_rows_of_grids_get_their_own_adapters(family: type[FamilySpec], name: str) -> None:
    routing, pixels = routing_value(name, rows=ROWS, tokens=1), torch.randn(ROWS, 3, 12, 12)
    mixture = mixture_of(family(), routing)
    together, alone = logits(mixture, pixels), []
    for row in range(ROWS):
        mixture.context.override = Routing(routing.dense()[[row]], len(EXPERTS))
        alone.append(logits(mixture, pixels[[row]]))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    with mixture.disabled():
        assert ((together - logits(mixture, pixels)).abs().amax(dim=(1, 2)) > 1e-3).all()


def test_a_sublayer_of_grids_takes_no_weights_by_row() -> None:
    mixture = mixture_of(Bottleneck(), routing_value("task", rows=ROWS, tokens=1))
    with pytest.raises(ValueError, match=r"attn gets input of shape \(3, 3, 3, 24\), but the routing .* has 3 rows"):
        logits(mixture, torch.randn(ROWS, 3, 12, 12))
