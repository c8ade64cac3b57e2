"""Merges cut to a rank: the nearest change of that rank, told with what it leaves out."""

from pathlib import Path

import peft
import pytest
import torch

from moadapt.adapters.delta import Delta
from moadapt.merging.deltas import truncated
from moadapt.merging.statistics import adapters_of
from moadapt_routers import ByTask
from tests.merging.planted import TASKS, change_of, mixture_of, rows_of
from tests.models import llava_batch, tiny_llava


@pytest.mark.parametrize("kind", ["factors", "dense", "both", "stacked"])
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_the_nearest_change_of_a_rank_leaves_out_the_last_singular_values(kind: str, rank: int) -> None:
    torch.manual_seed(1)
    stack = (2,) if kind == "stacked" else ()
    down, up, dense = torch.randn(*stack, 5, 9), torch.randn(*stack, 5, 12), torch.randn(12, 9)
    none = torch.zeros(0, 9), torch.zeros(0, 12)
    delta = {
        "factors": Delta(down, up),
        "stacked": Delta(down, up),
        "dense": Delta(*none, dense),
        "both": Delta(down, up, dense),
    }[kind]
    bias = torch.randn(12)
    kept, (spectrum,) = truncated(Delta(delta.down, delta.up, delta.dense, bias), rank)
    values = torch.linalg.svdvals(delta.weight().double())
    dropped = float(values[..., rank:].square().sum())
    assert float((kept.weight() - delta.weight()).double().square().sum()) == pytest.approx(dropped, rel=1e-4, abs=1e-6)
    assert spectrum.dropped(rank) == pytest.approx(dropped, rel=1e-4, abs=1e-6)
    assert kept.down.shape[-2] <= rank
    assert kept.bias is bias


def test_a_gain_is_never_cut() -> None:
    gain = Delta(torch.zeros(0, 5), torch.zeros(0, 5), torch.randn(5))
    kept, spectra = truncated(gain, 1)
    assert kept.dense is gain.dense
    assert not spectra


@pytest.mark.parametrize("rank", [2 + 2 + 3 + 4, 30])
def test_cutting_to_all_ranks_there_are_changes_nothing(rank: int) -> None:
    mixture, batch = mixture_of(*TASKS, router=ByTask()), llava_batch()
    whole, _ = mixture.merge("cat")
    cut, report = mixture.merge("cat", rank=rank)
    torch.testing.assert_close(cut(**batch).logits, whole(**batch).logits, rtol=1e-4, atol=1e-4)
    assert report.curve[-1] == pytest.approx(0, abs=1e-4)


def test_the_curve_says_what_every_rank_would_leave_out() -> None:
    mixture = mixture_of(*TASKS, router=ByTask())
    _, report = mixture.merge("task", task="vqa", rank=2)
    changes = [change_of(at.blend(torch.tensor([1.0, 0, 0]))) for at in adapters_of(mixture)]
    values = [torch.linalg.svdvals(change) for change in changes]
    whole = sum(float(each.square().sum()) for each in values)
    for rank, error in enumerate(report.curve):
        dropped = sum(float(each[rank:].square().sum()) for each in values)
        assert error == pytest.approx((dropped / whole) ** 0.5, abs=1e-4)
    assert report.curve[0] == pytest.approx(1)
    assert not report.exact
    assert "was cut to rank 2" in report.why
    at, change = adapters_of(mixture)[0], values[0]
    expected = float(change[2:].norm() / change.norm())
    assert report.sites[at.site.path] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["ties", "dare", "regression"])
def test_an_export_of_some_rank_is_what_was_measured(method: str, tmp_path: Path) -> None:
    mixture, rows = mixture_of(*TASKS), rows_of(*TASKS)
    if method != "regression":
        with pytest.raises(ValueError, match="has a dense part, which a LoRA folder cannot hold"):
            mixture.export_peft(tmp_path / "lora", method=method, calibration=rows)
    plain, merged = mixture.merge(method, calibration=rows, rank=5)
    report = mixture.export_peft(tmp_path / "lora", method=method, calibration=rows, rank=5)
    assert report.sites == merged.sites
    assert report.output_kl == merged.output_kl
    loaded, batch = peft.PeftModel.from_pretrained(tiny_llava(), str(tmp_path / "lora")), llava_batch()
    assert loaded.peft_config["default"].r == 5
    torch.testing.assert_close(loaded(**batch).logits, plain(**batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [0, -3])
def test_a_rank_of_none_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank is {rank}; give at least 1, or None"):
        mixture_of(*TASKS).merge("uniform", rank=rank)
