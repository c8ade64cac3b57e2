import errno
import json
import os
import runpy
import signal
import sys
from pathlib import Path

import pytest

from moadapt import __version__
from moadapt.cli import main
from moadapt.cli.main import COMMANDS, TRAINING
from moadapt.cli.signals import interruptible


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in [*COMMANDS, *TRAINING])


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_an_unknown_command_is_answered_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fti"]) == 2
    assert "there is no such command" in (told := capsys.readouterr().err)
    assert "fit" in told


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("routers", "top_k"),
        ("families", "lora"),
        ("tasks", "vqa"),
        ("datasets", "digit_scenes"),
        ("metrics", "bleu"),
        ("codecs", "kosmos2"),
        ("views", "centre_crop"),
    ],
)
def test_list_shows_parts_by_short_name(kind: str, row: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", kind]) == 0
    told = capsys.readouterr().out
    assert kind in told
    assert row in told


def test_list_of_something_else_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "router"]) == 2
    assert "there are routers, families" in capsys.readouterr().err


def test_list_shows_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    told = capsys.readouterr().out
    assert all(kind in told for kind in ("routers", "families", "tasks", "merges", "bases", "datasets"))


def test_list_writes_defaults_short_and_tells_none_from_needed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["list", "ranks"]) == 0
    told = capsys.readouterr().out
    assert "budget=0.667, unit=ranks" in told
    assert "parameters=null" in told


def test_the_package_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["moadapt", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("moadapt.cli", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_pretrain_hands_folders_and_numbers_to_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = {}

    class Recorded:
        def folder(self) -> Path:
            return tmp_path / "default"

        def pretrain(self, out: Path, work: Path, **settings: float) -> None:
            called.update(out=out, work=work, settings=settings)

    monkeypatch.setattr("moadapt.registry.BASES.get", lambda name: {"recorded": Recorded}[name])
    given = ["pretrain", "recorded", "--out", str(tmp_path / "out"), "--set", "steps=3,rate=0.5"]
    assert main(given) == 0
    assert called == {
        "out": tmp_path / "out",
        "work": Path("runs/pretrain/recorded"),
        "settings": {"steps": 3, "rate": 0.5},
    }
    assert isinstance(called["settings"]["steps"], int)  # type: ignore[index]


def test_pretrain_refuses_a_setting_that_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "digit_scenes", "--out", "x", "--set", "steps=many"]) == 2
    assert "--set steps=many is no setting of a number" in capsys.readouterr().err


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_where_nothing_can_be_saved_ends_the_command_in_one_line(
    stop: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listening = signal.default_int_handler if stop == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(stop, listening)  # shells let their background jobs ignore SIGINT
    monkeypatch.setattr("moadapt.registry.BASES.get", lambda name: os.kill(os.getpid(), stop))
    try:
        assert main(["pretrain", "x"]) == 128 + stop
        assert signal.getsignal(stop) is listening
    finally:
        signal.signal(stop, before)
    assert capsys.readouterr().err.strip().startswith(f"stopped by {stop.name} before anything new was saved")


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_that_is_not_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        json.loads("no json")

    monkeypatch.setattr("moadapt.registry.BASES.get", fail)
    with pytest.raises(ValueError, match="Expecting value"):
        main(["pretrain", "x"])


def test_a_full_disk_is_told_in_one_line_and_other_errors_of_files_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def writing(command: str, arguments: list[str]) -> int:
        raise OSError(int(arguments[0]), os.strerror(int(arguments[0])), "metrics.csv")

    monkeypatch.setattr(sys.modules["moadapt.cli.main"], "_run", writing)
    assert main(["fit", str(errno.ENOSPC)]) == 1
    assert "No space left on device: 'metrics.csv'; free space and give" in capsys.readouterr().err
    with pytest.raises(PermissionError):
        main(["fit", str(errno.EACCES)])
