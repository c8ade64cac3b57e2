"""Captions of our own with references, and two processes that compute a metric together."""

import pickle
import runpy
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing
from torchmetrics import Metric

Values = dict[str, float]
OnTwoProcesses = Callable[[Metric, list[Any], list[Any], int], list[Values]]

PATIENCE = 300  # seconds, of which importing torch on a busy machine takes most


@pytest.fixture(scope="session")
def captions() -> tuple[list[str], list[list[str]]]:
    """Seven predicted captions and one to three references of each, with trouble for tokenisers in them."""
    preds = [
        "A brown dog runs across the green field.",
        "two men don't look at the camera",
        "A red bus on the street, a red bus!",
        "the man's 3.5 inch knife (on a table)",
        "plate with food",
        "",
        "A black-and-white photo of the U.S. flag.",
    ]
    references = [
        ["A dog is running across a field.", "The brown dog runs on grass", "Dog outside."],
        ["Two men aren't looking at the camera.", "Men who do not look at us"],
        ["A red double-decker bus drives down the street."],
        ["A man's knife of 3.5 inches lies on the table", 'There is a "knife" (on a table).'],
        ["A plate with food on it.", "A white plate with some food and a fork", "Food on a plate"],
        ["An empty room.", "A room"],
        ["A black-and-white photo of a U.S. flag", "The flag of the U.S. in 1 1/2 colors"],
    ]
    return preds, references


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Connection]]:
    """Start two processes that know each other and wait for jobs."""
    context = torch.multiprocessing.get_context("spawn")
    meeting = str(tmp_path_factory.mktemp("processes") / "meeting")
    worker = str(Path(__file__).with_name("two_process_worker.py"))
    links, processes = [], []
    for rank in range(2):
        link, theirs = context.Pipe()
        given = {"link": theirs, "rank": rank, "meeting": meeting}
        process = context.Process(
            target=runpy.run_path, args=(worker,), kwargs={"init_globals": given, "run_name": "__metric_worker__"}
        )
        process.start()
        links.append(link)
        processes.append(process)
    yield links
    for link, process in zip(links, processes, strict=True):
        if process.is_alive():
            link.send_bytes(pickle.dumps(None))
        process.join(PATIENCE)


@pytest.fixture
def on_two_processes(workers: list[Connection]) -> OnTwoProcesses:
    """Return a function that computes a metric with the rows before a cut on one process and the rest on another."""

    def batches(preds: list[Any], targets: list[Any]) -> list[tuple[list[Any], list[Any]]]:
        return [(preds[start : start + 2], targets[start : start + 2]) for start in range(0, len(preds), 2)]

    def compute(metric: Metric, preds: list[Any], targets: list[Any], cut: int) -> list[Values]:
        # As bytes, since `send` would give both processes the metric's tensors in one shared memory.
        workers[0].send_bytes(pickle.dumps((metric, batches(preds[:cut], targets[:cut]))))
        workers[1].send_bytes(pickle.dumps((metric, batches(preds[cut:], targets[cut:]))))
        for link in workers:
            assert link.poll(PATIENCE), f"no answer from process {workers.index(link)} in {PATIENCE} s"
        return [value for link in workers for value in link.recv()]

    return compute
