"""`moadapt fit`, `validate`, `test`, `predict`: Lightning's command line over mixtures and mixed tasks."""

from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import Namespace, set_loader
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from moadapt.cli.callbacks import SaveMixture, ShowScores, WritePredictions, progress_bars
from moadapt.cli.layers import config_files, layered
from moadapt.cli.parser_messages import tidied
from moadapt.cli.short_names import check_keys, resolve, resolve_arguments
from moadapt.registry import name_files
from moadapt.training import KeepLast, LogDeltas, LogGradients, MixedTasks, MixtureModule, Optimization, SkipBadSteps
from moadapt.training.conflict_log import LogConflicts
from moadapt.training.kept import LAST, fault, newest
from moadapt.training.overlap_log import LogOverlaps
from moadapt.training.routing_log import LogRouting
from moadapt.training.watch_peers import WatchPeers
from moadapt.whole_files import write_whole

COMMANDS = ("fit", "validate", "test", "predict")
_MODE = "short_names"
_FREE = ("data.num_workers", "data.eval_batch_size", "model.gradient_checkpointing", "model.compile")
"""Settings of model and data that change how a run computes, but not what it trains."""
_TRAINS = tuple(
    f"trainer.{name}"
    for name in ("accumulate_grad_batches", "precision", "gradient_clip_val", "gradient_clip_algorithm")
)
"""Settings of the trainer that change what a run trains."""
_LINKED = {"model": ("seed",), "data": ("base", "seed")}


class Interface(LightningCLI):
    """Parses a configuration with short names, and runs one of Lightning's commands on it."""

    def __init__(self, arguments: list[str]) -> None:
        self._given = arguments
        set_loader(_MODE, load_config, (yaml.YAMLError,))
        mode = {"parser_mode": _MODE, "exit_on_error": False}
        super().__init__(
            MixtureModule,
            MixedTasks,
            args=resolve_arguments(layered(arguments, load_config)),
            parser_kwargs={**mode, **{command: dict(mode) for command in COMMANDS}},
            trainer_defaults={"default_root_dir": "runs/fit", "gradient_clip_val": 1.0, "num_sanity_val_steps": 0},
            seed_everything_default=0,
            save_config_callback=_SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what every command takes besides trainer, model and data."""
        parser.add_argument(
            "--resume",
            type=bool | Literal["auto"],
            default="auto",
            help="auto: go on from the last whole checkpoint in trainer.default_root_dir, or start if there is none; "
            "true: go on, or fail; false: start over.",
        )
        parser.add_argument("--keep_every", type=int, default=200, help="Steps between two checkpoints, see --keep.")
        parser.add_argument(
            "--keep", type=int, default=2, help="Checkpoints to keep: last.ckpt, last-1.ckpt before it, and so on."
        )
        parser.add_argument(
            "--max_bad_steps",
            type=int,
            default=20,
            help="How many steps may be skipped, as loss or gradient are not finite; one more ends the run.",
        )
        parser.add_argument(
            "--conflicts_every",
            type=int,
            default=0,
            help="Steps between two measurements of how tasks oppose each other in the shared adapter; 0 is never.",
        )
        parser.link_arguments("model.base", "data.base")
        for key in ("model.seed", "data.seed"):
            parser.link_arguments("seed_everything", key, compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse what the command line was given.

        Raises:
            ValueError: It cannot be parsed.
        """
        try:
            self.config = parser.parse_args(args)  # type: ignore[arg-type]
        except ArgumentError as error:
            raise ValueError(tidied(str(error), config_files(self._given)[0])) from error

    def instantiate_classes(self) -> None:
        """Make trainer, model and data.

        Raises:
            ValueError: They refuse a setting.
        """
        with _refusals_told():
            super().instantiate_classes()

    def _set_seed(self) -> None:
        with _refusals_told():
            super()._set_seed()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add loggers, progress bar and callbacks where the user has not chosen any."""
        given = self._get(self.config_init, "trainer")
        root = Path(given["default_root_dir"])
        if root.exists() and not root.is_dir():
            raise ValueError(f"trainer.default_root_dir is {root}, a file; give a folder, which is made if need be")
        chosen = given["callbacks"] or []
        if given["logger"] is None:
            kwargs["logger"] = [TensorBoardLogger(root, name="tensorboard", version=""), CSVLogger(root, name="csv")]
        if given["enable_checkpointing"] is None:
            kwargs["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in chosen)
        bars = progress_bars() if given["enable_progress_bar"] is None else []
        kwargs["enable_progress_bar"] = (
            bool(bars) if given["enable_progress_bar"] is None else given["enable_progress_bar"]
        )
        kwargs["enable_model_summary"] = bool(given["enable_model_summary"])
        kwargs["callbacks"] = [*chosen, *bars, *self._own_callbacks(root)]
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Go on where the last run of this configuration stopped."""
        given, root = self.config_init["fit"], Path(self.trainer.default_root_dir)
        if given["ckpt_path"] is None and given["resume"] is not False:
            given["ckpt_path"] = newest(root)
            if given["ckpt_path"] is not None:
                self._refuse_other_settings(given["ckpt_path"])
            elif given["resume"] is True:
                raise ValueError(f"--resume true goes on with a run, and {root} holds no {LAST}; leave it out to start")
        else:
            given["ckpt_path"] = _checkpoint(given["ckpt_path"], root / LAST)
        given["weights_only"] = True

    def before_validate(self) -> None:
        """Take the trained adapters."""
        self._take_last()

    def before_test(self) -> None:
        """Take the trained adapters."""
        self._take_last()

    def before_predict(self) -> None:
        """Take the trained adapters, and write rows to a file instead of keeping them."""
        self._take_last()
        self.config_init["predict"]["return_predictions"] = False

    def _own_callbacks(self, root: Path) -> list[Callback]:
        if self.subcommand == "fit":
            every, kept = self._get(self.config_init, "conflicts_every"), self._kept_callbacks(root)
            opposed = [LogConflicts(root, every)] if every else []  # first, as its passes are none that others log
            logs = [*opposed, ShowScores(), LogGradients(), LogDeltas(), LogOverlaps(root), LogRouting(root)]
            return [*logs, *kept, SaveMixture(root / "mixture")]
        return [WritePredictions(root)] if self.subcommand == "predict" else []

    def _kept_callbacks(self, root: Path) -> list[Callback]:
        """Return what keeps a run alive; bad steps are counted before a checkpoint tells how many there were."""
        every, keep, limit = (self._get(self.config_init, key) for key in ("keep_every", "keep", "max_bad_steps"))
        return [SkipBadSteps(root / "bad_steps", limit), KeepLast(root, every, keep), WatchPeers()]

    def _take_last(self) -> None:
        assert self.subcommand is not None, "a command was given"
        given = self.config_init[self.subcommand]
        last = Path(self.trainer.default_root_dir) / LAST
        if given["ckpt_path"] is None and not last.is_file():
            raise ValueError(f"{last} does not exist; train first with `moadapt fit`, or give --ckpt_path")
        given["ckpt_path"] = _checkpoint(given["ckpt_path"] or last, last)
        given["weights_only"] = True

    def _refuse_other_settings(self, last: Path) -> None:
        """Refuse to go on with a run that was started with other settings, if they change what is trained."""
        stored = last.with_name(_SaveConfig.file)
        before = yaml.safe_load(stored.read_text()) if stored.is_file() else {}
        now = yaml.safe_load(written(self._parser("fit"), self.config["fit"]))
        changed = [
            f"{key} was {old!r} and is {new!r}"
            for section in ("seed_everything", "model", "data", "trainer")
            for key, old, new in _differences(section, before.get(section), now.get(section))
            if section in before and (key in _TRAINS if section == "trainer" else key not in _FREE)
        ]
        if changed:
            raise ValueError(
                f"{last} belongs to a run with other settings: {'; '.join(changed[:5])}. Give another "
                "trainer.default_root_dir, or --resume false to start over there"
            )


class _SaveConfig(SaveConfigCallback):
    """Writes the whole configuration beside the checkpoint when training starts."""

    file = "config.yaml"

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it, whole or not at all."""
        if stage != "fit":
            return
        file = Path(trainer.default_root_dir) / self.file
        write_whole(file, written(self.parser, self.config).encode())


def load_config(text: str) -> Any:
    """Read YAML, put dotted paths in the place of short names, and check the keys of its sections.

    Args:
        text: A file's content, or a value of the command line.

    Raises:
        ValueError: A name or a key is unknown; the accepted ones are listed.
    """
    config = yaml.safe_load(text)
    if isinstance(config, dict):
        for section, part in (("trainer", Trainer), ("model", MixtureModule), ("data", MixedTasks)):
            if isinstance(config.get(section), list | int | float):
                raise ValueError(f"{section} is {config[section]!r}; give its settings, each as KEY: VALUE")
            if isinstance(config.get(section), dict):
                check_keys(section, config[section], part, without=_LINKED.get(section, ()))
        model = config.get("model")
        if isinstance(model, dict) and isinstance(model.get("optimization"), dict):
            check_keys("model.optimization", model["optimization"], Optimization)
    return resolve(config)


@contextmanager
def _refusals_told() -> Iterator[None]:
    """Raise what libraries say against settings as an error of ours, whose message the user sees without traceback."""
    try:
        yield
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except ValueError as error:
        raise ValueError(tidied(str(error))) from error


def _checkpoint(path: str | Path | None, last: Path) -> str | Path | None:
    """Return a checkpoint that can be read; `last` is the run's own, where Lightning would go on without any."""
    path = last if path == "last" else path
    if path is None:
        return None
    if not Path(path).is_file():
        raise ValueError(f"ckpt_path is {path}, which is no file; give a checkpoint, such as the {LAST} of a run")
    why = fault(Path(path))
    if why is not None:
        raise ValueError(f"{path} is broken: {why}. Give another checkpoint, such as the one before it, last-1.ckpt")
    return path


def written(parser: LightningArgumentParser, config: Namespace) -> str:
    """Return a configuration as YAML that another process can read, what was linked included."""
    return name_files(parser.dump(config, skip_link_targets=False, format="yaml"))


def _differences(key: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """Return the leaves in which two configurations differ."""
    if isinstance(old, dict | Namespace) and isinstance(new, dict | Namespace):
        keys = dict.fromkeys([*old, *new])
        return [found for k in keys for found in _differences(f"{key}.{k}", old.get(k), new.get(k))]
    return [] if old == new else [(key, old, new)]
