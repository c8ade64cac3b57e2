"""The end of a run one of whose processes is gone: soon, on all machines, and with the reason said.

The others would wait for it, with some backends for half an hour. A thread of each process looks after the others, also
while a collective or a kernel runs, and ends its process where one is gone. Nothing is saved then, as a checkpoint
needs all of them; the last one that was kept is what the run goes on from.
"""

import os
import sys
import threading
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from moadapt.training.peers import Peers

_PAUSE = 1.0
_PATIENCE = 45.0
_GRACE = 4.0  # seconds in which processes that end together may end one after the other


class WatchPeers(Callback):
    """Ends the process, with status 1 and at once, where another process of the run is gone."""

    def __init__(self) -> None:
        self._peers: Peers | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start to watch, where there are several processes that train; they have yet to load what they train."""
        if stage == "fit" and trainer.world_size > 1:
            default: Any = _get_default_store()
            store = PrefixStore("moadapt/peers", default.clone())  # a connection that no other thread waits on
            self._over.clear()
            self._peers = Peers(store, trainer.global_rank, trainer.world_size, _PATIENCE)
            self._thread = threading.Thread(target=self._watch, args=(self._peers,), daemon=True)
            self._thread.start()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop watching, all before one of them ends."""
        if self._thread is not None:
            self._close()
            trainer.strategy.barrier()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching; where a process could not be reached, say which is gone and end."""
        self._close()
        if self._peers is not None and _is_about_peers(exception):
            until = time.monotonic() + _GRACE
            while time.monotonic() < until:
                self._end_without(self._peers)
                time.sleep(_PAUSE / 10)

    def _close(self) -> None:
        self._over.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=_GRACE)

    def _watch(self, peers: Peers) -> None:
        since: float | None = None
        while not self._over.wait(_PAUSE):
            since = (since or time.monotonic()) if peers.gone() else None
            if since is not None and time.monotonic() - since > _GRACE:
                self._end_without(peers)
            try:
                told, silent = peers.told(), peers.silent()
            except RuntimeError as error:
                if not self._over.is_set():
                    _end(f"the processes of the run cannot reach each other: {error}")
                return
            if told is not None:
                _end(told)
            if silent:
                self._leave_word(peers, f"{_named(silent)} has not been heard of for {_PATIENCE:g} seconds")

    def _end_without(self, peers: Peers) -> None:
        """End, where processes of this machine are gone."""
        gone = peers.gone()
        if gone:
            self._leave_word(peers, f"{_named(gone)} is gone: killed, perhaps out of memory, or ended by its own error")

    def _leave_word(self, peers: Peers, what: str) -> None:
        try:
            peers.tell(what)
        except RuntimeError as error:  # the store was with the one that is gone
            what = f"{what} ({error})"
        _end(what)


def _is_about_peers(error: BaseException) -> bool:
    """Tell whether an error is what a collective raises that lost a process."""
    said = str(error).lower()
    known = any(word in said for word in ("gloo", "nccl", "connection reset", "connection closed", "broken pipe"))
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and known)


def _named(peers: list[Any]) -> str:
    return ", ".join(map(str, peers))


def _end(why: str) -> None:
    """Say why, and end without the ceremony that would wait for all processes."""
    print(
        f"\nThe run ends: {why}. The same command goes on from the last checkpoint that was kept", file=sys.stderr,
        flush=True,
    )  # fmt: skip
    sys.stdout.flush()
    os._exit(1)
