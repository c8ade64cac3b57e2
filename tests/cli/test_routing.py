"""`moadapt route`: trained adapters behind a fitted router, from the command line alone."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import moadapt as library
from moadapt.adapters import LoRA
from moadapt.bases import load_base
from moadapt.cli import main
from moadapt_routers import Arrow, Constant, Prototypes, Softmax
from tests.models import randomize


@pytest.fixture
def file(tmp_path: Path, config: dict[str, Any]) -> str:
    """A file that `moadapt fit -c` takes."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return str(tmp_path / "config.yaml")


@pytest.fixture
def saved(tmp_path: Path, base: str) -> str:
    """A mixture of two trained adapters."""
    experts = {"small": LoRA(rank=2), "large": LoRA(rank=3)}
    mixture = library.attach(load_base(base)[0], experts=experts, router=Softmax())
    randomize(mixture)
    mixture.save(tmp_path / "mixture")
    return str(tmp_path / "mixture")


@pytest.fixture(autouse=True)
def _width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def rows_of(out: str) -> dict[str, list[str]]:
    """The cells of the table, by task."""
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]
    return {name: cells for name, *cells in lines}


@pytest.mark.parametrize(
    ("router", "expected"), [("prototypes", Prototypes()), ("{name: arrow, k: 1}", Arrow(k=1))], ids=["name", "fields"]
)
def test_a_router_is_fitted_judged_and_saved(
    file: str, saved: str, tmp_path: Path, base: str, router: str, expected: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "routed"
    assert main(["route", saved, "--data", file, "--router", router, "--fit", "--out", str(out)]) == 0
    table = rows_of(capsys.readouterr().out)
    assert list(table) == ["small", "large"]
    for rows, agreement, *losses in table.values():
        assert int(rows) > 0
        assert 0 <= float(agreement.rstrip("%")) <= 100
        oracle, predicted, worst, regret = map(float, losses)
        assert oracle <= worst
        assert regret == pytest.approx(predicted - oracle, abs=2e-3)
    loaded = library.load(out, load_base(base)[0])
    assert loaded.spec.router == expected
    assert all(router.fitted for router in loaded.routers)


def test_a_trained_router_is_judged_as_it_is(file: str, saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["route", saved, "--data", file]) == 0
    assert "Softmax on validation rows" in capsys.readouterr().out


def test_adapters_that_were_trained_apart_are_composed(
    file: str, tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("small", "large"):
        alone = library.attach(load_base(base)[0], experts={"mine": LoRA(rank=2)}, router=Constant())
        randomize(alone)
        alone.save(tmp_path / name)
    folders = f"{{small: {tmp_path / 'small'}, large: {tmp_path / 'large'}}}"
    assert main(["route", folders, "--data", file, "--router", "spectral", "--fit"]) == 0
    assert list(rows_of(capsys.readouterr().out)) == ["small", "large"]
    assert main(["route", folders, "--data", file]) == 2
    assert "have no router yet; give --router" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "route needs rows to judge by; give --data"),
        (["--data", "FILE", "--router", "prototypes"], "was not fitted to these adapters; call moadapt.fit_router"),
        (["--data", "FILE", "--fit"], "Softmax has nothing to fit; train it"),
        (["--data", "FILE", "--router", "prototype"], "did you mean prototypes?"),
        (["--data", "nothing"], "no data set is called 'nothing'"),
        (["--data", "FILE", "--fit", "--batches", "0"], "batches is 0; give at least 1"),
    ],
)
def test_what_cannot_be_routed_is_told(
    file: str, saved: str, given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["route", saved, *(file if each == "FILE" else each for each in given)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_file_without_data_is_refused(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none.yaml").write_text("model: {}\n")
    assert main(["route", saved, "--data", str(tmp_path / "none.yaml")]) == 2
    assert "has no section `data`" in capsys.readouterr().err
