"""Which tuners of the peft library can be hosted, and which cannot and why.

Every `PeftType` of the library stands in one of the two tables. All of this was found by trying: a hosted kind adds
`tuner(x) - base(x)` at linear layers, alone and in a mixture, passes gradients, is saved and comes back bit for bit,
and no row sees another.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING


@dataclass(frozen=True)
class Hosted:
    """What must be known of a kind of tuner that can be hosted.

    Args:
        what: What it trains, in a few words.
        defaults: Options that differ from peft's own defaults, mostly so that a fresh adapter changes
            nothing.
        start: Whether a fresh adapter changes nothing to the last bit, changes outputs by rounding only, or always
            changes them.
        mergeable: Whether it is an affine map of the layer's input.
        adds_bias: Whether it gives a bias to layers that have none.
        choices: Values that an option may have, where others of peft's take a part out of the base's own weights.
    """

    what: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    start: Literal["exact", "rounding", "never"] = "exact"
    mergeable: bool = True
    adds_bias: bool = False
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


HOSTED: dict[str, Hosted] = {
    "BEFT": Hosted("a bias", adds_bias=True),
    "BOFT": Hosted("a product of butterfly-shaped rotations of the weight"),
    "C3A": Hosted("block-circular convolutions", {"init_weights": True}),
    "DEFT": Hosted("a projection of the weight and what replaces it", start="rounding"),
    "DELORA": Hosted("normalised low-rank updates with a trained strength"),
    "FOURIERFT": Hosted("a few Fourier coefficients of the update", {"init_weights": True}),
    "GLORA": Hosted("scales and shifts of weight, input and bias", adds_bias=True),
    "GRALORA": Hosted("low-rank updates of blocks of the weight"),
    "HIRA": Hosted("a low-rank factor that multiplies the weight"),
    "HRA": Hosted("Householder reflections of the input", start="rounding"),
    "IA3": Hosted("a scale of outputs, or of inputs at its `feedforward_modules`", {"feedforward_modules": []}),
    "LOHA": Hosted("the elementwise product of two low-rank updates"),
    "LOKR": Hosted("a Kronecker product of small factors"),
    "LORA": Hosted(
        "low-rank updates; with `use_dora` direction and magnitude apart",
        adds_bias=True,
        choices={"init_lora_weights": (True, False, "gaussian", "orthogonal")},
    ),
    "MISS": Hosted("one small block shared by shards of the weight"),
    "OFT": Hosted("block-diagonal rotations of the input"),
    "PEANUT": Hosted("updates that a small network makes of the weight"),
    "PSOFT": Hosted("a rotation within the weight's main subspace"),
    "PVERA": Hosted("as VERA, its vectors drawn at random in training"),
    "RANDLORA": Hosted("scales of random factors shared by layers, of full rank together"),
    "ROAD": Hosted("rotations and scales of pairs of outputs"),
    "SHIRA": Hosted("a sparse update"),
    "SUPERTUNING": Hosted("a sparse update of the largest weights"),
    "TINYLORA": Hosted("a few numbers shared by layers, projected into the weight's main subspace"),
    "UNILORA": Hosted("one vector that all layers' factors are read from", start="never"),
    "VBLORA": Hosted("factors put together from a bank of vectors shared by layers", start="never"),
    "VERA": Hosted("scales of random factors shared by layers"),
    "WAVEFT": Hosted("a few wavelet coefficients of the update", {"init_weights": True}),
}  # fmt: skip

_PROMPT = "trains what stands before the prompt, not a layer; use the family `prefix`"
REFUSED: dict[str, str] = {
    "ADAMSS": "finds clusters of every weight anew, so that what one device or number type saved fits no other",
    "ADALORA": "needs a call after every step to move ranks between layers; use a rank allocator with LoRA",
    "ADAPTION_PROMPT": "replaces whole attention modules, not linear layers; use the family `prefix`",
    "CARTRIDGE": "trains a key-value cache, not a layer; use the family `prefix`",
    "CPT": _PROMPT,
    "FROD": "keeps a decomposition as large as the base, whose product takes the place of the base's own",
    "LILY": "mixes its factors by an average over the batch, so that rows see each other and tokens later ones",
    "LN_TUNING": "trains copies of norms, not linear layers; use the family `norm_tuning`",
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "OSF": "keeps a decomposition of every weight and projects gradients in hooks that a copy of the model loses",
    "POLY": "routes by task ids of its own; use a router",
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "SHADOW": "runs a second model beside whole blocks of the base",
    "TRAINABLE_TOKENS": "trains rows of the token embedding, not linear layers",
    "XLORA": "routes by itself, in a second pass of the base; use a router",
}

_OURS = {
    "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layer_replication", "layers_pattern", "layers_to_transform", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "revision", "target_modules", "target_parameters", "task_type",
    "trainable_token_indices",
}  # fmt: skip
_PLACEMENT = {"target_modules", "exclude_modules", "layers_pattern", "layers_to_transform", "target_parameters"}


def not_tried() -> tuple[str, ...]:
    """Return the kinds that the installed peft has and neither table knows."""
    return tuple(kind.value for kind in PeftType if kind.value not in HOSTED and kind.value not in REFUSED)


def accepted_options(kind: str) -> tuple[str, ...]:
    """Return the names of the options that a hosted kind takes, sorted."""
    names = {option.name for option in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]) if option.init}
    # what is left out is no JSON, or reads data, or belongs to a parallelism of its own
    return tuple(sorted(name for name in names - _OURS if not name.endswith("_config") and "alora" not in name))


def check_kind(kind: str) -> Hosted:
    """Return what is known of a kind.

    Raises:
        ValueError: It cannot be hosted, and the reason is said; or there is none of that name.
    """
    if kind in HOSTED:
        return HOSTED[kind]
    if kind in REFUSED:
        raise ValueError(f"peft's {kind} cannot be hosted: it {REFUSED[kind]}")
    if kind in not_tried():
        raise ValueError(f"peft's {kind} was not tried yet; kinds that can be hosted: {', '.join(HOSTED)}")
    near = difflib.get_close_matches(str(kind).upper(), HOSTED, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"peft has no tuner {kind!r}; {hint}Kinds that can be hosted: {', '.join(HOSTED)}")


def config(kind: str, options: Mapping[str, Any], modules: list[str]) -> PeftConfig:
    """Return peft's configuration of a tuner.

    Args:
        kind: Name of a hosted `PeftType`.
        options: What the user set.
        modules: Names of the modules that it adapts.

    Raises:
        ValueError: An option is unknown, is not for the user to set, or is refused by peft.
    """
    known, accepted = check_kind(kind), accepted_options(kind)
    wrong = sorted(set(options) - set(accepted))
    if wrong:
        hint = "; a placement says where an adapter sits" if _PLACEMENT & set(wrong) else ""
        raise ValueError(f"PeftTuner {kind} takes no {', '.join(wrong)}{hint}; it accepts {', '.join(accepted)}")
    for name, allowed in known.choices.items():
        if name in options and options[name] not in allowed:
            raise ValueError(
                f"PeftTuner {kind} got {name}={options[name]!r}, which changes the base's own weights, shared by all "
                f"adapters, or needs data; choose from {', '.join(map(repr, allowed))}"
            )
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](target_modules=modules, **{**known.defaults, **options})  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise ValueError(f"peft refuses these options of {kind}, {dict(options)}: {error}") from error


def as_json(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as they come back from a file.

    Raises:
        ValueError: A value is no JSON.
    """
    try:
        found: dict[str, Any] = json.loads(json.dumps(dict(options)))
    except TypeError as error:
        raise ValueError(f"options of a PeftTuner are saved as JSON, which {dict(options)} is not: {error}") from error
    return found
