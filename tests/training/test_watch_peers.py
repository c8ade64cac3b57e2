"""A process that is gone is seen by the others, which end and say so."""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from moadapt.training.peers import Peers, _started
from moadapt.training.watch_peers import WatchPeers, _is_about_peers


def sight(store: HashStore, rank: int, **who: str) -> Peers:
    """What a process sees, of others that are given by what they say of themselves."""
    for name, said in who.items():
        store.set(f"who/{name[1:]}", said)
    return Peers(store, rank, 1 + len(who), patience=0.05)


@pytest.mark.parametrize("waited", [False, True])
def test_a_process_of_this_machine_is_gone_when_the_machine_says_so(waited: bool) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        peers = sight(HashStore(), 0, _1=f"here {other.pid} {_started(other.pid)}")
        assert peers.gone() == []
        other.kill()
        while not peers.gone():
            time.sleep(0.01)
        if waited:  # and so there is not even a zombie
            other.wait()
        assert [str(peer) for peer in peers.gone()] == [f"process 1 (pid {other.pid} on here)"]
        assert peers.silent() == []  # only other machines are listened to


@pytest.mark.parametrize(("rank", "listens"), [(0, [1, 2]), (2, [0])])
def test_a_process_of_another_machine_is_gone_when_its_beat_stops(rank: int, listens: list[int]) -> None:
    store, others = HashStore(), [other for other in range(3) if other != rank]
    # its number is one of this machine, too, but of another process
    peers = sight(store, rank, **{f"_{other}": f"there {os.getpid()} 1" for other in others})
    for beat in range(3):
        for other in others:
            store.set(f"beat/{other}", str(beat))
        assert peers.silent() == []
        time.sleep(0.03)
    time.sleep(0.05)
    assert [peer.rank for peer in peers.silent()] == listens
    assert peers.gone() == []
    assert store.get(f"beat/{rank}") == b"4"


def test_word_reaches_all() -> None:
    store = HashStore()
    first = sight(store, 0, _1="there 1 ")
    assert first.told() is None
    first.tell("so it is")
    assert sight(store, 1, _0="there 1 ").told() == "so it is"


@pytest.mark.parametrize(
    ("error", "about"),
    [
        (torch.distributed.DistBackendError("NCCL watchdog"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("connection reset"), False),
    ],
)
def test_only_errors_of_collectives_are_about_peers(error: Exception, about: bool) -> None:
    assert _is_about_peers(error) == about


def process(rank: int, folder: Path, how: str) -> None:
    """One of two processes, the second of which is killed: while the first is busy alone, or waits for it."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=(folder / "port").read_text())
    sys.stderr = (folder / f"{rank}.txt").open("w")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    trainer: Any = SimpleNamespace(
        world_size=2, global_rank=rank, strategy=SimpleNamespace(barrier=torch.distributed.barrier)
    )
    watch = WatchPeers()
    watch.setup(trainer, None, "fit")  # type: ignore[arg-type]
    torch.distributed.barrier()
    if how == "end":
        time.sleep(3 * rank)
        watch.on_fit_end(trainer, None)  # type: ignore[arg-type]
        os._exit(0)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "busy":
        time.sleep(60)
    try:
        torch.distributed.barrier()
    except RuntimeError as error:
        watch.on_exception(trainer, None, error)  # type: ignore[arg-type]
    os._exit(7)


def ended(folder: Path, how: str) -> list[int | None]:
    """Start both and return how they ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=process, args=(rank, folder, how)) for rank in (0, 1)]
    for each in both:
        each.start()
    for each in both:
        each.join(timeout=50)
    return [each.exitcode for each in both]


@pytest.mark.parametrize("how", ["waiting", "busy"])
def test_the_others_end_and_say_who_is_gone(tmp_path: Path, how: str) -> None:
    assert ended(tmp_path, how) == [1, -signal.SIGKILL]
    said = (tmp_path / "0.txt").read_text()
    assert re.search(
        r"The run ends: process 1 \(pid \d+ on .*\) is gone: killed, .* The same command goes on from", said
    )


def test_a_run_that_comes_to_its_end_is_no_alarm(tmp_path: Path) -> None:
    assert ended(tmp_path, "end") == [0, 0]
    assert "The run ends" not in (tmp_path / "0.txt").read_text() + (tmp_path / "1.txt").read_text()
