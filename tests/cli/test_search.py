"""`moadapt search`: what it finds, writes and refuses, and that a fit takes it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional

import moadapt as package
from moadapt.bases import load_base
from moadapt.cli.quiet import quiet
from moadapt.cli.search import Search
from moadapt.cli.trainer import Interface
from moadapt.ranks.allocator import ranks_of
from moadapt.training.batch import IGNORED
from tests.cli.conftest import Moadapt

BATCHES = 3


@pytest.fixture
def config(config: dict[str, Any]) -> dict[str, Any]:
    """One router that gives every task its own expert, so that gradients are plain to see."""
    config["model"]["router"] = "by_task"
    config["model"]["placement"] = "all"
    return config


def found_in(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "search" / "placement.json").read_text())
    return found


def kept_in(found: dict[str, Any]) -> dict[str, set[str]]:
    return {name: {path for path, own in sites.items() if own["kept"]} for name, sites in found["adapters"].items()}


@pytest.mark.parametrize("mode", ["gates", "probe"])
def test_a_fit_takes_the_sites_that_a_search_keeps(moadapt: Moadapt, tmp_path: Path, base: str, mode: str) -> None:
    run = tmp_path / "run"
    given = ["--search.price", "0", "--search.learning_rate", "0.5"] if mode == "gates" else ["--search.batches", "1"]
    assert moadapt("search", "--search.mode", mode, "--search.budget", "0.4", *given) == 0
    found = found_in(run)
    spent = [own["parameters"] for sites in found["adapters"].values() for own in sites.values() if own["kept"]]
    every = [own["parameters"] for sites in found["adapters"].values() for own in sites.values()]
    assert found["budget"] == int(0.4 * sum(every))
    assert 0 < sum(spent) == found["spent"] <= found["budget"]
    assert {f.name for f in (run / "search").iterdir()} >= {"placement.json", "placement.yaml", "ranks.png"}
    assert (run / "search" / "last.ckpt").exists() == (mode == "gates")
    assert not (run / "last.ckpt").exists()
    assert moadapt("fit", "-c", str(run / "search" / "placement.yaml"), "--trainer.max_steps", "1") == 0
    mixture = package.load(run / "mixture", load_base(base)[0])
    ranks = ranks_of(mixture.spec, mixture.anatomy)
    own = {"shared": 8, "small": 2, "large": 8}
    assert {name: {site.path: rank for site, rank in sites.items() if rank} for name, sites in ranks.items()} == {
        name: dict.fromkeys(kept, own[name]) for name, kept in kept_in(found).items()
    }


def test_gates_go_on_where_they_were_and_end_the_same(moadapt: Moadapt, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert moadapt("search") == 0
    first = found_in(run)
    assert torch.load(run / "search" / "last.ckpt", weights_only=True)["global_step"] == 3
    (run / "search" / "placement.json").unlink()
    assert moadapt("search") == 0
    assert found_in(run) == first


def test_scores_of_the_probe_are_norms_of_gradients(config: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    quiet()
    made = Search(["fit", "-c", str(file), "--search.mode", "probe", "--search.batches", str(BATCHES)])
    mixture, expected = made.model.mixture, {}
    for task in ("small", "large"):
        mixture.zero_grad()
        for batch in made.datamodule.first_batches(BATCHES):
            own = torch.tensor([name == task for name in batch.task_names])
            labels = batch.labels.masked_fill(~own[:, None], IGNORED)
            logits = mixture(**batch.inputs, task=batch.task_names, prompt_mask=batch.prompt_mask).logits
            functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").backward()
        for site, bank in mixture.banks():
            for name in bank.names:
                part = "shared" if name == "shared" else "expert"
                first = 2 * (name == "large")  # `small` has the first two rows of the experts' stacks
                rows = slice(first, first + (2 if name == "small" else 8))
                sides = [getattr(bank, f"{part}_{side}").grad[rows] for side in ("down", "up")]
                expected[name, site.path, task] = float(torch.cat([side.flatten() for side in sides]).norm())
    found = found_in(tmp_path / "run")
    scores = {
        (name, path, task): score
        for name, sites in found["adapters"].items()
        for path, own in sites.items()
        for task, score in own["tasks"].items()
    }
    assert scores == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert all(scores["small", path, "large"] == 0 for path in found["adapters"]["small"])
    assert min(scores["small", path, "small"] for path in found["adapters"]["small"]) > 0
    means = {(n, p): own["score"] for n, sites in found["adapters"].items() for p, own in sites.items()}
    assert means == pytest.approx({(n, p): (scores[n, p, "small"] + scores[n, p, "large"]) / 2 for n, p in means})
    ratio = {key: means[key] / found["adapters"][key[0]][key[1]]["parameters"] for key in means}
    kept = {(name, path) for name, paths in kept_in(found).items() for path in paths}
    best = max(ratio, key=lambda key: ratio[key])
    assert best in kept
    left = found["budget"] - found["spent"]
    assert all(found["adapters"][n][p]["parameters"] > left for n, p in ratio.keys() - kept)


def test_a_search_takes_the_place_of_ranks_and_leaves_other_adapters_alone(
    config: dict[str, Any], moadapt: Moadapt, tmp_path: Path
) -> None:
    config["model"]["ranks"] = "depth_schedule"
    config["model"]["experts"]["small"] = {"class_path": "bottleneck", "init_args": {"width": 3}}
    assert moadapt("search", "--search.mode", "probe") == 0
    found = found_in(tmp_path / "run")
    assert set(found["adapters"]) == {"shared", "large"}
    files = [str(tmp_path / "config.yaml"), str(tmp_path / "run" / "search" / "placement.yaml")]

    class Parsed(Interface):
        def _run_subcommand(self, subcommand: str) -> None:
            pass

    model = Parsed(["fit", "-c", files[0], "-c", files[1]]).model
    assert model.ranks is None
    assert model.experts["small"].width == 3
    shut = {path for path, own in found["adapters"]["shared"].items() if not own["kept"]}
    assert model.shared.ranks == dict.fromkeys(shut, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--search.budget", "3"], "a budget of 3 is 3 parameters, but the cheapest site takes"),
        (["--search.mode", "probe", "--search.budget", "3"], "a budget of 3 is 3 parameters, but the cheapest site"),
        (["--search.price", "1e9", "--search.learning_rate", "9"], "lower the price (--search.price)"),
        (["--search.budget", "0"], "budget and learning_rate are above 0"),
        (["--search.mode", "probe", "--search.batches", "0"], "search.batches is 0; give at least 1"),
    ],
    ids=["gates, budget", "probe, budget", "price", "no budget", "no batches"],
)
def test_a_search_that_finds_nothing_says_why(
    moadapt: Moadapt, capsys: pytest.CaptureFixture[str], tmp_path: Path, given: list[str], message: str
) -> None:
    assert moadapt("search", *given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "search" / "placement.json").exists()


@pytest.mark.parametrize("mode", ["gates", "probe"])
def test_a_mixture_without_loras_is_refused(
    moadapt: Moadapt, config: dict[str, Any], capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    config["model"] |= {"shared": "bottleneck", "experts": None, "router": None}
    assert moadapt("search", "--search.mode", mode) == 2
    assert "LoRAs that train and start at zero; this mixture has none" in capsys.readouterr().err


def test_a_budget_without_room_for_any_expert_is_refused(
    moadapt: Moadapt, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config["model"]["shared"] = {"class_path": "lora", "init_args": {"rank": 1}}
    budget = ["--search.mode", "probe", "--search.budget", "40"]
    assert moadapt("search", *budget) == 2
    told = capsys.readouterr().err
    assert "no expert sits anywhere" in told
    assert "a larger --search.budget" in told


def test_gates_that_had_no_time_to_shut_are_refused(
    moadapt: Moadapt, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    early = {"monitor": "loss", "stopping_threshold": 1e9, "check_on_train_epoch_end": True}
    config["trainer"]["callbacks"] = [{"class_path": "EarlyStopping", "init_args": early}]
    assert moadapt("search") == 2
    assert "ended after 2 of 3 steps, before gates were opened or shut" in capsys.readouterr().err
