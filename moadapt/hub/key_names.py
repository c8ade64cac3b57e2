"""Names of tensors in files of LoRAs: whose trainers write what.

peft writes `base_model.model.PATH.lora_A.weight`, older files with the adapter's name within (`lora_A.default.weight`),
and files for servers without the prefix. kohya's trainers write `lora_te_PATH_WITH_UNDERSCORES.lora_down.weight` and
`.alpha`; diffusers' older ones `PATH.lora.down.weight` or `PATH.lora_linear_layer.down.weight`.
"""

import re
from dataclasses import dataclass

_PREFIXES = ("base_model.model.", "module.", "_orig_mod.", "_fsdp_wrapped_module.")
_LONGEST = 1000
_INFIX = r"(?:\.(?P<adapter>[^.]+))?"
_PARTS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (part, re.compile(rf"(?P<path>.+?)\.{name}"))
    for part, name in (
        ("A", rf"lora_A{_INFIX}\.weight"),
        ("B", rf"lora_B{_INFIX}\.weight"),
        ("B.bias", rf"lora_B{_INFIX}\.bias"),
        ("embedding_A", rf"lora_embedding_A{_INFIX}"),
        ("embedding_B", rf"lora_embedding_B{_INFIX}"),
        ("magnitude", rf"lora_magnitude_vector{_INFIX}(?:\.weight)?"),
        ("A", r"(?:lora_|lora\.|lora_linear_layer\.)down\.weight"),
        ("B", r"(?:lora_|lora\.|lora_linear_layer\.)up\.weight"),
        ("alpha", r"alpha"),
        ("weight", rf"(?:base_layer\.|modules_to_save{_INFIX}\.|original_module\.)?weight"),
        ("base.bias", rf"(?:base_layer\.|modules_to_save{_INFIX}\.|original_module\.)?bias"),
    )
)
_FOREIGN = (
    (re.compile(r"\.(hada_|lokr_|lora_mid|dora_scale|oft_|diff)"), "it is a LyCORIS tensor of no plain LoRA"),
    (re.compile(r"\.(lora_E|ranknum)"), "it belongs to AdaLoRA; ask for it converted to a LoRA"),
    (re.compile(r"\.token_adapter\."), "it replaces single rows of the token embedding, which are not read yet"),
    (re.compile(r"(^|\.)(prompt_encoder|prompt_embeddings)"), "it is a prompt and no layer; train the family `prefix`"),
    (
        re.compile(r"internal_xlora|arrow"),
        "it belongs to a router of peft's own; compose its adapters behind one of ours",
    ),
)


@dataclass(frozen=True)
class ParsedKey:
    """What a tensor's name says.

    Args:
        path: Of its module, as written.
        part: `A`, `B`, `B.bias`, `embedding_A`, `embedding_B`, `magnitude`, `alpha`; or `weight` or `base.bias` of the
            module itself.
        adapter: Name of the adapter within the name, if any.
    """

    path: str
    part: str
    adapter: str | None = None


def parse_key(key: str) -> ParsedKey:
    """Take a tensor's name apart.

    Args:
        key: The name in the file.

    Raises:
        ValueError: It is no name of a LoRA's tensor; the message says what it may be.
    """
    if len(key) > _LONGEST:
        raise ValueError(f"its name has {len(key)} characters, more than any module's")
    rest = key
    while any(rest.startswith(prefix) for prefix in _PREFIXES):
        rest = rest.removeprefix(next(prefix for prefix in _PREFIXES if rest.startswith(prefix)))
    for foreign, why in _FOREIGN:
        if foreign.search(rest):
            raise ValueError(why)
    for part, pattern in _PARTS:
        found = pattern.fullmatch(rest)
        if found is not None:
            adapter = found.groupdict().get("adapter")
            path = found["path"].replace("._orig_mod", "").replace("._fsdp_wrapped_module", "")
            return ParsedKey(path, part, adapter)
    raise ValueError("it is no tensor of a LoRA that is known")
