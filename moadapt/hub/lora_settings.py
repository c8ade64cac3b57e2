"""What a LoRA's configuration in peft's form says, of what counts when it is used."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from peft import LoraConfig

from moadapt.hub.config_values import ConfigValues
from moadapt.hub.patterns import Patterns

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
    given = ConfigValues(config)
    start = config.get("init_lora_weights", True)
    known = {option.name for option in fields(LoraConfig)} | _UNUSED
    unknown = sorted(set(config) - known)
    return LoRASettings(
        rank=given.count("r"),
        alpha=given.number("lora_alpha"),
        rank_stabilized=given.flag("use_rslora"),
        ranks={name: given.as_count(f"rank_pattern[{name!r}]", v) for name, v in given.mapping("rank_pattern").items()},
        alphas={
            name: given.as_number(f"alpha_pattern[{name!r}]", v) for name, v in given.mapping("alpha_pattern").items()
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
