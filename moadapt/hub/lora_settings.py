"""What a LoRA's configuration in peft's form says, of what counts when it is used.

Names of modules are patterns in it, some of them regular expressions of a stranger, so that each is matched under a
time limit.
"""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import regex
from peft import LoraConfig

_SECONDS = 0.2
"""Of the processor, for all patterns of an adapter together; honest ones take thousandths of it."""
_PLAIN_STARTS = {True, None, "gaussian", "orthogonal", "eva", "mica", False}
_REFUSED = {
    "alora_invocation_tokens": "it acts only behind a sequence of tokens that invokes it (aLoRA)",
    "arrow_config": "it is a router of peft's own (Arrow); compose its adapters by the router `arrow`",
    "use_bdlora": "its factors are block-diagonal over devices (BD-LoRA)",
    "use_qalora": "it pools its inputs by groups (QA-LoRA)",
    "kasa_config": "it scales its ranks by singular values of the base (KaSA)",
    "monteclora_config": "it draws its factors at random (MonteCLoRA)",
    "velora_config": "it projects what it keeps for the backward pass (VeLoRA)",
    "ensure_weight_tying": "it changes tied weights together, and here each module has its own change",
    "layer_replication": "its base has layers twice, which this one has not",
    "megatron_config": "it belongs to layers of Megatron, which no transformers model has",
    "target_parameters": "it changes stacked parameters of mixture-of-experts blocks, which are not read yet",
    "trainable_token_indices": "it replaces single rows of the token embedding, which are not read yet",
}
_UNUSED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config",
    "inference_mode", "loftq_config", "lora_ga_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
Start = Literal["plain", "pissa", "olora", "unknown"]


@dataclass
class Patterns:
    """Matches names by patterns of a stranger, all of them together in a limited time.

    Args:
        left: Seconds left.
    """

    left: float = _SECONDS

    def match(self, pattern: str, name: str) -> bool:
        """Tell whether a whole name matches a regular expression.

        Raises:
            ValueError: The expression is none, or takes too long.
        """
        began = time.process_time()
        try:
            if self.left <= 0:
                raise TimeoutError
            found = regex.fullmatch(pattern, name, timeout=self.left)
        except (regex.error, RecursionError) as error:
            raise ValueError(f"its pattern {pattern[:80]!r} is no regular expression: {error}") from error
        except TimeoutError as error:
            self.left = 0
            raise ValueError(f"its pattern {pattern[:80]!r} takes too long to match, as no honest one does") from error
        self.left -= time.process_time() - began
        return found is not None

    def find(self, patterns: Iterable[str], paths: Iterable[str]) -> str | None:
        """Return the first pattern that matches a path or its last names, as peft looks up ranks; None without any."""
        known = tuple(paths)
        return next((p for p in patterns for path in known if p == path or self.match(rf"(.*\.)?({p})", path)), None)


@dataclass(frozen=True)
class LoRASettings:
    """A LoRA's configuration.

    Args:
        rank: r where no pattern says otherwise; None where only the tensors tell.
        alpha: Numerator of the scale, likewise; None is the rank.
        rank_stabilized: Whether alpha is divided by the root of the rank.
        ranks: Ranks by pattern.
        alphas: Numerators by pattern.
        dropout: Share of inputs dropped in training.
        targets: Names of modules, a regular expression, or `all-linear`; None where only the tensors tell.
        excluded: Names of modules, or a regular expression.
        layers: Indices of the layers that targets count in; None for all.
        layers_pattern: Names of what holds the layers.
        start: Whether training began at zero, or what was taken off the base's weights before it.
        start_name: How the file calls that.
        saved: Names of modules that were trained whole.
        biases: Which biases of the base were trained.
        dora: Whether directions and magnitudes are apart.
        bias: Whether `lora_B` has a bias.
        refusals: Why a LoRA of this kind is not taken.
        notes: What else is worth knowing.
    """

    rank: int | None = None
    alpha: float | None = None
    rank_stabilized: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    targets: str | tuple[str, ...] | None = None
    excluded: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    start: Start = "plain"
    start_name: str = ""
    saved: tuple[str, ...] = ()
    biases: str = "none"
    dora: bool = False
    bias: bool = False
    refusals: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    patterns: Patterns = field(default_factory=Patterns, compare=False, repr=False)

    def rank_at(self, *paths: str) -> int | None:
        """Return r at a module by its paths, then and now; None where only the tensors tell."""
        found = self.patterns.find(self.ranks, paths)
        return self.rank if found is None else self.ranks[found]

    def scale_at(self, rank: int, *paths: str) -> float:
        """Return the factor s at a module whose rank is known, by its paths, then and now."""
        found = self.patterns.find(self.alphas, paths)
        alpha = self.alpha if found is None else self.alphas[found]
        alpha = rank if alpha is None else alpha
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def takes(self, *paths: str) -> bool:
        """Tell whether a module is among the targets, by any of its paths."""
        return self.targets is None or any(map(self._takes, paths))

    def _takes(self, path: str) -> bool:
        assert self.targets is not None, "asked before"
        if self._names(self.excluded, path):
            return False
        if self.targets == "all-linear":
            return True
        return self._names(self.targets, path) and (isinstance(self.targets, str) or self._in_layers(path))

    def saves(self, *paths: str) -> bool:
        """Tell whether a module, or one that it lies in, was trained whole."""
        return any(f".{name}." in f".{path}." for name in self.saved for path in paths)

    def _names(self, names: str | tuple[str, ...], path: str) -> bool:
        if isinstance(names, str):
            return self.patterns.match(names, path)
        return any(path == name or path.endswith("." + name) for name in names)

    def _in_layers(self, path: str) -> bool:
        if self.layers is None:
            return True
        parts = path.split(".")
        holders = [i for i in range(1, len(parts) - 1) if parts[i].isdecimal()]
        if self.layers_pattern:
            holders = [i for i in holders if self._names(self.layers_pattern, parts[i - 1])]
        else:
            holders = [i for i in holders if i > 1]
        return bool(holders) and int(parts[holders[0]]) in self.layers


def settings_of(config: Mapping[str, Any]) -> LoRASettings:
    """Read a configuration.

    Args:
        config: What `adapter_config.json` says.

    Raises:
        ValueError: A value is missing, or of another type or size than it can have.
    """
    given = _Given(config)
    start = config.get("init_lora_weights", True)
    known = {option.name for option in fields(LoraConfig)} | _UNUSED
    unknown = sorted(set(config) - known)
    return LoRASettings(
        rank=given.count("r"),
        alpha=given.number("lora_alpha"),
        rank_stabilized=given.flag("use_rslora"),
        ranks={name: given.a_count(f"rank_pattern[{name!r}]", v) for name, v in given.mapping("rank_pattern").items()},
        alphas={
            name: given.a_number(f"alpha_pattern[{name!r}]", v) for name, v in given.mapping("alpha_pattern").items()
        },
        dropout=given.share("lora_dropout"),
        targets=given.names("target_modules", pattern=True) or None,
        excluded=given.names("exclude_modules", pattern=True),
        layers=given.indices("layers_to_transform"),
        layers_pattern=_listed(given.names("layers_pattern", pattern=True)),
        start=_start(start),
        start_name=str(start),
        saved=_listed(given.names("modules_to_save")),
        biases=given.choice("bias", ("none", "all", "lora_only")),
        dora=given.flag("use_dora"),
        bias=given.flag("lora_bias"),
        refusals=tuple(f"{name}: {why}" for name, why in _REFUSED.items() if config.get(name)),
        notes=(f"its configuration has unknown settings, which are ignored: {', '.join(unknown)}",) if unknown else (),
    )


def _start(given: Any) -> Start:
    if isinstance(given, bool | str | None) and given in _PLAIN_STARTS:
        return "plain"
    return given if given in ("pissa", "olora") else "unknown"


def _listed(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


class _Given:
    """A configuration whose values are checked when they are asked for.

    Args:
        config: What the file says.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def count(self, name: str) -> int:
        return self.a_count(name, self._config.get(name, 8))

    def number(self, name: str) -> float:
        return self.a_number(name, self._config.get(name, 8))

    def flag(self, name: str) -> bool:
        value = self._config.get(name, False)
        return bool(self._checked(name, value, value is None or isinstance(value, bool), "true or false"))

    def share(self, name: str) -> float:
        value = self.a_number(name, self._config.get(name) or 0.0)
        return float(self._checked(name, value, 0 <= value <= 1, "a share between 0 and 1"))

    def choice(self, name: str, known: tuple[str, ...]) -> str:
        value = self._config.get(name, known[0])
        return str(self._checked(name, value, value in known, f"one of {', '.join(known)}"))

    def mapping(self, name: str) -> dict[str, Any]:
        value = self._config.get(name) or {}
        return dict(self._checked(name, value, isinstance(value, dict), "a mapping from names"))

    def names(self, name: str, *, pattern: bool = False) -> str | tuple[str, ...]:
        value = self._config.get(name) or ()
        if isinstance(value, str):
            return value if pattern else (value,)
        right = isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
        return tuple(self._checked(name, value, right, "a list of names"))

    def indices(self, name: str) -> tuple[int, ...] | None:
        value = self._config.get(name)
        if value is None or value == []:
            return None
        found = value if isinstance(value, list) else [value]
        return tuple(self._checked(name, found, all(type(each) is int for each in found), "a list of indices"))

    def a_count(self, name: str, value: Any) -> int:
        return int(self._checked(name, value, type(value) is int and 0 < value < 2**20, "a whole number above 0"))

    def a_number(self, name: str, value: Any) -> float:
        right = type(value) in (int, float) and abs(value) < 1e9
        return float(self._checked(name, value, right, "a finite number"))

    def _checked(self, name: str, value: Any, right: bool, wanted: str) -> Any:
        if not right:
            raise ValueError(f"adapter_config.json has {name}={str(value)[:80]}; it must be {wanted}")
        return value
