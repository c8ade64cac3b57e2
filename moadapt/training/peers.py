"""The processes of a run, as one of them sees the others: who is gone, and who has not been heard of.

A process of the same machine is gone when the machine says so. One of another machine is taken for gone when its beat,
a number that it counts up in the store of the process group, has not moved for a while.
"""

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.distributed_c10d import Store


@dataclass(frozen=True)
class Peer:
    """One process.

    Args:
        rank: Its index.
        host: Name of its machine.
        pid: Its number there.
        started: When it started, in the machine's ticks, so that its number cannot be taken for another's.
    """

    rank: int
    host: str
    pid: int
    started: str | None

    def __str__(self) -> str:
        """Say which it is."""
        return f"process {self.rank} (pid {self.pid} on {self.host})"

    @property
    def lives_here(self) -> bool:
        """Whether it runs on this machine."""
        return self.started is not None and _started(self.pid) == self.started


class Peers:
    """All processes but this one. A thread may use it, with a connection of its own to the store.

    Args:
        store: Of the process group; no name in it is another's.
        rank: Index of this process.
        count: How many there are.
        patience: Seconds after which a process of another machine that is not heard of is taken for gone.
    """

    def __init__(self, store: Store, rank: int, count: int, patience: float) -> None:
        self._store, self._rank, self._patience = store, rank, patience
        own = Peer(rank, socket.gethostname(), os.getpid(), _started(os.getpid()))
        store.set(f"who/{rank}", f"{own.host} {own.pid} {own.started or ''}")
        self._others = [self._read(other) for other in range(count) if other != rank]
        self._here = {peer for peer in self._others if peer.lives_here}
        self._beat = 0
        self._heard = {peer: (b"", time.monotonic()) for peer in self._others}

    def gone(self) -> list[Peer]:
        """Return those of this machine that are not there any more."""
        return [peer for peer in self._others if peer in self._here and not peer.lives_here]

    def silent(self) -> list[Peer]:
        """Count this process's beat up, and return those of other machines that have not been heard of.

        All listen to the first process, which listens to all.

        Raises:
            RuntimeError: The store does not answer.
        """
        self._beat += 1
        self._store.set(f"beat/{self._rank}", str(self._beat))
        listened = [p for p in self._others if p not in self._here and (self._rank == 0 or p.rank == 0)]
        for peer in listened:
            key = f"beat/{peer.rank}"
            beat = self._store.get(key) if self._store.check([key]) else b""
            if beat != self._heard[peer][0]:
                self._heard[peer] = beat, time.monotonic()
        return [peer for peer in listened if time.monotonic() - self._heard[peer][1] > self._patience]

    def tell(self, what: str) -> None:
        """Leave word for all.

        Args:
            what: To be said.
        """
        self._store.set("word", what)

    def told(self) -> str | None:
        """Return what one of them left word of."""
        return self._store.get("word").decode() if self._store.check(["word"]) else None

    def _read(self, rank: int) -> Peer:
        host, pid, started = self._store.get(f"who/{rank}").decode().split(" ")  # waits for it
        return Peer(rank, host, int(pid), started or None)


def _started(pid: int) -> str | None:
    """Return when a process of this machine started; None where there is none, or no telling."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # a dead one whose parent has not looked yet is dead
