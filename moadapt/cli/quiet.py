"""Third-party notices that tell a user nothing."""

import logging
import os
import warnings


def quiet() -> None:
    """Silence them; warnings and errors that matter still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for notice in (
        r"Found \d+ module\(s\) in eval mode",  # the frozen base, on purpose
        r"The number of training batches",
        r"You're resuming from a checkpoint that ended before",  # our loader knows its place
        r"It is recommended to use `self.log",  # all processes log the same, which counts the rows of all of them
        r"Couldn't infer the batch indices",  # a batch knows its rows itself
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        r"`is_gradient_checkpointing` is deprecated",
    ):
        warnings.filterwarnings("ignore", message=notice)
