"""More than two hundred folders of adapters that are broken or meant to harm, made from a sound one."""

import json
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
INDEX = TENSORS + ".index.json"
Make = Callable[[Path, random.Random], None]


class Marker:
    """Leaves a file when it is unpickled, as foreign code would do worse."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def header(found: dict[str, Any]) -> bytes:
    """A safetensors header."""
    text = json.dumps(found).encode()
    return struct.pack("<Q", len(text)) + text


def with_header(change: Callable[[dict[str, Any]], Any]) -> Make:
    """Change the header of a file and leave its numbers."""

    def make(folder: Path, _: random.Random) -> None:
        whole = (folder / TENSORS).read_bytes()
        length = struct.unpack("<Q", whole[:8])[0]
        found = json.loads(whole[8 : 8 + length])
        change(found)
        (folder / TENSORS).write_bytes(header(found) + whole[8 + length :])

    return make


def first(found: dict[str, Any]) -> dict[str, Any]:
    """The entry of the first tensor."""
    return next(entry for name, entry in found.items() if name != "__metadata__")


def with_bytes(change: Callable[[bytes, random.Random], bytes], name: str = TENSORS) -> Make:
    def make(folder: Path, chance: random.Random) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes(), chance))

    return make


def with_tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Make:
    def make(folder: Path, _: random.Random) -> None:
        found = change({key: t.clone() for key, t in load_file(folder / TENSORS).items()})
        (folder / TENSORS).write_bytes(save({key: t.contiguous() for key, t in found.items()}))

    return make


def with_config(**values: Any) -> Make:
    def make(folder: Path, _: random.Random) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **values}))

    return make


def with_text(text: str | bytes, name: str = CONFIG) -> Make:
    def make(folder: Path, _: random.Random) -> None:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return make


def pickled(value: Callable[[Path], Any], **how: Any) -> Make:
    """Put a pickled file in the place of the safetensors one."""

    def make(folder: Path, _: random.Random) -> None:
        torch.save(value(folder), folder / PICKLED, **how)
        (folder / TENSORS).unlink()

    return make


def repacked(change: Callable[[str, bytes], bytes], **how: Any) -> Make:
    """Pack the entries of a pickled file anew."""

    def make(folder: Path, _: random.Random) -> None:
        torch.save(load_file(folder / TENSORS), folder / PICKLED)
        (folder / TENSORS).unlink()
        with zipfile.ZipFile(folder / PICKLED) as old:
            entries = [(info.filename, old.read(info)) for info in old.infolist()]
        with zipfile.ZipFile(folder / PICKLED, "w", **how) as new:
            for name, data in entries:
                new.writestr(name, change(name, data))

    return make


def replaced_pickle(made: Callable[[Path], bytes]) -> Make:
    def make(folder: Path, chance: random.Random) -> None:
        code = made(folder)
        repacked(lambda name, data: code if name.endswith("data.pkl") else data)(folder, chance)

    return make


def link(name: str, target: Callable[[Path], Path | str]) -> Make:
    def make(folder: Path, _: random.Random) -> None:
        aim = target(folder)
        if isinstance(aim, Path):
            aim.write_bytes((folder / name).read_bytes())
        (folder / name).unlink()
        (folder / name).symlink_to(aim)

    return make


def divided(index: Callable[[dict[str, str]], Any], move: bool = True) -> Make:
    """Divide the tensors into two files, and write an index of them."""

    def make(folder: Path, _: random.Random) -> None:
        found = load_file(folder / TENSORS)
        places = {key: f"part-{number % 2}.safetensors" for number, key in enumerate(found)}
        for part in set(places.values()) if move else ():
            (folder / part).write_bytes(save({key: t for key, t in found.items() if places[key] == part}))
        (folder / TENSORS).unlink()
        (folder / INDEX).write_text(json.dumps(index(places)))

    return make


def huge_file(name: str, size: int = 2**33) -> Make:
    """A file of holes, that has this size and takes no room."""

    def make(folder: Path, _: random.Random) -> None:
        with (folder / name).open("wb") as opened:
            opened.truncate(size)

    return make


def both(*makes: Make) -> Make:
    def make(folder: Path, chance: random.Random) -> None:
        for one in makes:
            one(folder, chance)

    return make


def without(name: str) -> Make:
    return lambda folder, _: (folder / name).unlink()


def _as_folder(folder: Path, _: random.Random) -> None:
    (folder / TENSORS).unlink()
    (folder / TENSORS).mkdir()


def _pipe(folder: Path, _: random.Random) -> None:
    (folder / TENSORS).unlink()
    os.mkfifo(folder / TENSORS)


def _flip(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :]


def _noise(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data) // 2)
    length = chance.randrange(1, 64)
    return data[:start] + chance.randbytes(length) + data[start + length :]


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def _twice(folder: Path, _: random.Random) -> None:
    """Name a tensor twice in the header, with the same bytes."""
    whole = (folder / TENSORS).read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    text = whole[8 : 8 + length].decode().rstrip()
    found = json.loads(text)
    key = next(name for name in found if name != "__metadata__")
    text = text[:-1] + f", {json.dumps(key)}: {json.dumps(found[key])}" + "}"
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text.encode() + whole[8 + length :])


def _expanded(folder: Path) -> dict[str, Any]:
    """A tensor whose shape claims far more than what is stored."""
    found: dict[str, Any] = load_file(folder / TENSORS)
    key = next(iter(found))
    return {**found, key: torch.zeros(1).expand(4, 10**11)}


def _deep(open_: str, close: str, count: int = 200_000) -> str:
    return open_ * count + close * count


def _keys(count: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda found: {**found, **{f"base_model.model.x{i}.lora_A.weight": torch.ones(1, 1) for i in range(count)}}


def _renamed(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda found: {name if i == 0 else key: t for i, (key, t) in enumerate(found.items())}


def _first(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda found: {key: change(t) if i == 0 else t for i, (key, t) in enumerate(found.items())}


def _legacy(folder: Path) -> bytes:
    return pickle.dumps({"a": Marker(folder / "run")})


def _bytearray(_: Path) -> bytes:
    return b"\x80\x02cbuiltins\nbytearray\n" + b"\x8a\x08" + (10**12).to_bytes(8, "little") + b"\x85R."


def _calls(module: str, name: str) -> Callable[[Path], bytes]:
    return lambda folder: f"\x80\x02c{module}\n{name}\n(V{folder / 'run'}\ntR.".encode("latin-1")


NAMED: dict[str, Make] = {
    # configuration
    "config missing": without(CONFIG),
    "config empty": with_text(""),
    "config no mapping": with_text("[1, 2]"),
    "config cut": with_bytes(lambda data, _: data[:50], CONFIG),
    "config of bytes": with_text(b"\xff\xfe\x00\x01" * 20),
    "config deep": with_text(_deep("[", "]")),
    "config deep mapping": with_text('{"r": ' + _deep('{"a":', "}") + "}"),
    "config long": with_text('{"r": "' + "a" * 2**21 + '"}'),
    "config of holes": huge_file(CONFIG),
    "config huge number": with_text('{"peft_type": "LORA", "r": 1' + "0" * 5000 + "}"),
    "config infinite alpha": with_config(lora_alpha=float("inf")),
    "config huge alpha": with_config(lora_alpha=10**300),
    "config huge rank": with_config(r=10**12),
    "config rank as text": with_config(r="4"),
    "config rank true": with_config(r=True),
    "config rank fraction": with_config(r=4.0),
    "config rank negative": with_config(r=-4),
    "config patterns as list": with_config(rank_pattern=[1]),
    "config pattern of text": with_config(alpha_pattern={"q_proj": "8"}),
    "config slow pattern": with_config(rank_pattern={r"(?:(?:\w|\w)|\.|\w)*(?=\d\d).*": 3}),
    "config slow target": with_config(target_modules=r"((?:.(?=.?)|..(?=.?))+)+\d\d\d"),
    "config slow exclusion": with_config(exclude_modules=r"(?:(?=(.+))\w|.|..)+\d\d"),
    "config broken target": with_config(target_modules="(?P<a>"),
    "config long target": with_config(target_modules="(" * 5000 + ")" * 5000),
    "config targets of numbers": with_config(target_modules=[1, 2]),
    "config no targets": with_config(target_modules=["nothing"]),
    "config layers of text": with_config(layers_to_transform=["a"]),
    "config other layers": with_config(layers_to_transform=[7]),
    "config kind": with_config(peft_type="LORA; rm"),
    "config kind of list": with_config(peft_type=["LORA"]),
    "config adalora": with_config(peft_type="ADALORA"),
    "config xlora": with_config(peft_type="XLORA"),
    "config code": with_config(
        auto_mapping={"base_model_class": "x", "parent_library": "os"}, init_lora_weights="__import__('os')"
    ),
    "config corda": with_config(init_lora_weights="corda"),
    "config start of list": with_config(init_lora_weights=[1]),
    "config dora": with_config(use_dora=True),
    "config dora as text": with_config(use_dora="yes"),
    "config bias": with_config(bias=["all"]),
    "config lora_bias": with_config(lora_bias=True),
    "config saved of numbers": with_config(modules_to_save=[3]),
    "config saved factors": with_config(modules_to_save=["q_proj"]),
    "config replication": with_config(layer_replication=[[0, 4], [2, 5]]),
    "config parameters": with_config(target_parameters=["a"]),
    "config alora": with_config(alora_invocation_tokens=[1]),
    "config dropout": with_config(lora_dropout="0.1"),
    "config dropout negative": with_config(lora_dropout=-1),
    # safetensors
    "tensors missing": without(TENSORS),
    "tensors empty": with_text(b"", TENSORS),
    "tensors of eight bytes": with_text(b"\x00" * 8, TENSORS),
    "tensors of text": with_text("<html>not found</html>" * 40, TENSORS),
    "tensors of git lfs": with_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", TENSORS),
    "tensors of holes": huge_file(TENSORS),
    "tensors a folder": _as_folder,
    "tensors a pipe": _pipe,
    "header huge": with_bytes(lambda data, _: struct.pack("<Q", 2**62) + data[8:]),
    "header all ones": with_bytes(lambda data, _: b"\xff" * 8 + data[8:]),
    "header beyond the file": with_bytes(lambda data, _: struct.pack("<Q", len(data)) + data[8:]),
    "header short": with_bytes(lambda data, _: struct.pack("<Q", 20) + data[8:]),
    "header zero": with_bytes(lambda data, _: struct.pack("<Q", 0) + data[8:]),
    "header deep": with_text(struct.pack("<Q", 400_000) + _deep("[", "]").encode(), TENSORS),
    "header of a list": with_text(struct.pack("<Q", 2) + b"[]", TENSORS),
    "header of nothing": with_text(struct.pack("<Q", 2) + b"{}", TENSORS),
    "header no utf-8": with_text(struct.pack("<Q", 4) + b"\xff\xff\xff\xff", TENSORS),
    "header twice": _twice,
    "offset negative": with_header(lambda found: first(found).update(data_offsets=[-4, 60])),
    "offset reversed": with_header(lambda found: first(found).update(data_offsets=[512, 0])),
    "offset beyond": with_header(lambda found: first(found).update(data_offsets=[0, 2**50])),
    "offset of text": with_header(lambda found: first(found).update(data_offsets=["0", "4"])),
    "offset overlapping": with_header(
        lambda found: [e.update(data_offsets=[0, 512]) for n, e in found.items() if n != "__metadata__"]
    ),
    "shape huge": with_header(lambda found: first(found).update(shape=[2**40, 2**40])),
    "shape wrapping": with_header(lambda found: first(found).update(shape=[2**63, 2**63])),
    "shape negative": with_header(lambda found: first(found).update(shape=[-4, 32])),
    "shape of text": with_header(lambda found: first(found).update(shape="4, 32")),
    "shape missing": with_header(lambda found: first(found).pop("shape")),
    "shape turned": with_header(lambda found: first(found).update(shape=first(found)["shape"][::-1])),
    "shape flat": with_header(lambda found: first(found).update(shape=[4 * 32])),
    "type unknown": with_header(lambda found: first(found).update(dtype="F128")),
    "type half as wide": with_header(lambda found: first(found).update(dtype="BF16")),
    "type integers": with_header(lambda found: first(found).update(dtype="I32")),
    "type unsigned": with_header(lambda found: first(found).update(dtype="U32")),
    "metadata of a list": with_header(lambda found: found.update(__metadata__=[1])),
    "metadata deep base": with_header(
        lambda found: found.update(__metadata__={"moadapt_base": _deep("[", "]", 50_000)})
    ),
    "metadata other base": with_header(
        lambda found: found.update(__metadata__={"moadapt_base": '{"class": "GPT2LMHeadModel"}'})
    ),
    "metadata base of a list": with_header(lambda found: found.update(__metadata__={"moadapt_base": "[1]"})),
    # tensors
    "nan": with_tensors(_first(lambda t: t * float("nan"))),
    "infinite": with_tensors(_first(lambda t: t / 0)),
    "no tensors": with_tensors(lambda found: {}),
    "many tensors": with_tensors(_keys(2_000)),
    "half missing": with_tensors(lambda found: dict(list(found.items())[1:])),
    "only downs": with_tensors(lambda found: {key: t for key, t in found.items() if "lora_A" in key}),
    "only ups": with_tensors(lambda found: {key: t for key, t in found.items() if "lora_B" in key}),
    "empty tensor": with_tensors(_first(lambda t: t[:0])),
    "scalar": with_tensors(_first(lambda t: t.sum())),
    "flat": with_tensors(_first(lambda t: t.flatten())),
    "three axes": with_tensors(_first(lambda t: t[None])),
    "too narrow": with_tensors(_first(lambda t: t[:, 1:])),
    "booleans": with_tensors(_first(lambda t: t > 0)),
    "complex": with_tensors(_first(lambda t: t.to(torch.complex64))),
    "eight bits": with_tensors(_first(lambda t: t.to(torch.float8_e4m3fn))),
    "name empty": with_tensors(_renamed("")),
    "name long": with_tensors(_renamed("a." * 100_000 + "lora_A.weight")),
    "name of a path": with_tensors(_renamed("../../etc/passwd.lora_A.weight")),
    "name of dunder": with_tensors(_renamed("__class__.__init__.lora_A.weight")),
    "name of a hook": with_tensors(_renamed("model.forward.lora_A.weight")),
    "name with a null": with_tensors(_renamed("model\x00.lora_A.weight")),
    "name of dots": with_tensors(_renamed("." * 900 + "lora_A.weight")),
    "name of many parts": with_tensors(_renamed("lora_A." * 130 + "weight")),
    "name of kohya": with_tensors(_renamed("lora_te_" + "_" * 800 + ".lora_down.weight")),
    "base trained": with_tensors(lambda found: {**found, "base_model.model.lm_head.weight": torch.ones(67, 32)}),
    "base resized": with_tensors(lambda found: {**found, "base_model.model.lm_head.weight": torch.ones(99, 32)}),
    "alpha of many": with_tensors(lambda found: {**found, "model.layers.0.self_attn.q_proj.alpha": torch.ones(9)}),
    "alpha infinite": with_tensors(
        lambda found: {**found, "model.layers.0.self_attn.q_proj.alpha": torch.tensor(float("inf"))}
    ),
    "alpha alone": with_tensors(lambda found: {**found, "model.layers.0.mlp.up_proj.alpha": torch.tensor(1.0)}),
    # pickles
    "pickle runs code": pickled(lambda folder: {"a": Marker(folder / "run")}),
    "pickle of the old form runs code": both(
        without(TENSORS), lambda folder, _: (folder / PICKLED).write_bytes(_legacy(folder))
    ),
    "pickle of the old form": pickled(lambda folder: load_file(folder / TENSORS), _use_new_zipfile_serialization=False),
    "pickle of another protocol": pickled(lambda folder: load_file(folder / TENSORS), pickle_protocol=4),
    "pickle of a list": pickled(lambda folder: [1, 2]),
    "pickle of text": pickled(lambda folder: {"a": "b"}),
    "pickle of numbers as names": pickled(lambda folder: {1: torch.ones(1)}),
    "pickle of nested tensors": pickled(lambda folder: {"state_dict": load_file(folder / TENSORS)}),
    "pickle of a module": pickled(lambda folder: torch.nn.Linear(2, 2)),
    "pickle of a sparse tensor": pickled(lambda folder: {"a": torch.eye(3).to_sparse()}),
    "pickle of an expanded tensor": pickled(_expanded),
    "pickle calls mkdir": replaced_pickle(_calls("os", "mkdir")),
    "pickle calls eval": replaced_pickle(_calls("builtins", "eval")),
    "pickle calls posix": replaced_pickle(_calls("posix", "mkdir")),
    "pickle calls within torch": replaced_pickle(_calls("torch.serialization", "load")),
    "pickle takes memory": replaced_pickle(_bytearray),
    "pickle empty": replaced_pickle(lambda folder: b""),
    "pickle of noise": replaced_pickle(lambda folder: b"\x93\x01" * 100),
    "pickle endless": replaced_pickle(lambda folder: b"(" * 2**20 + b"("),
    "pickle compressed": repacked(lambda name, data: data, compression=zipfile.ZIP_DEFLATED),
    "pickle a bomb": repacked(
        lambda name, data: data + b"\x00" * 2**25 if name.endswith("/0") else data, compression=zipfile.ZIP_DEFLATED
    ),
    "pickle twice": repacked(lambda name, data: data),
    "storages missing": repacked(lambda name, data: b"" if "/data/" in name else data),
    "storages short": repacked(lambda name, data: data[: len(data) // 2] if "/data/" in name else data),
    "archive cut": both(
        pickled(lambda folder: load_file(folder / TENSORS)), with_bytes(lambda data, _: data[:-100], PICKLED)
    ),
    "archive empty": both(without(TENSORS), with_text(b"PK\x05\x06" + b"\x00" * 18, PICKLED)),
    "archive of holes": both(without(TENSORS), huge_file(PICKLED)),
    "ordered pickle": pickled(lambda folder: OrderedDict(load_file(folder / TENSORS))),
    # links and parts
    "link out": link(TENSORS, lambda folder: folder.parent / "elsewhere.safetensors"),
    "link of the config out": link(CONFIG, lambda folder: folder.parent / "elsewhere.json"),
    "link to nothing": link(TENSORS, lambda folder: "nowhere"),
    "link to itself": link(TENSORS, lambda folder: TENSORS),
    "link to a device": link(TENSORS, lambda folder: "/dev/zero"),
    "link of the config to a device": link(CONFIG, lambda folder: "/dev/zero"),
    "link to a folder": link(TENSORS, lambda folder: ".."),
    "link within": link(TENSORS, lambda folder: folder / "same.safetensors"),
    "parts": divided(lambda places: {"weight_map": places}),
    "parts elsewhere": divided(lambda places: {"weight_map": dict.fromkeys(places, "../part-0.safetensors")}),
    "parts absolute": divided(lambda places: {"weight_map": dict.fromkeys(places, "/etc/passwd")}),
    "parts missing": divided(lambda places: {"weight_map": places}, move=False),
    "parts of numbers": divided(lambda places: {"weight_map": dict.fromkeys(places, 1)}),
    "parts of dots": divided(lambda places: {"weight_map": dict.fromkeys(places, "..")}),
    "parts of nothing": divided(lambda places: {"weight_map": {}}),
    "parts of a list": divided(lambda places: {"weight_map": list(places)}),
    "parts without map": divided(lambda places: {}),
    "parts of the index": divided(lambda places: {"weight_map": dict.fromkeys(places, INDEX)}),
    "parts with too many": divided(lambda places: {"weight_map": {**places, "more": "part-0.safetensors"}}),
    "parts with too few": divided(lambda places: {"weight_map": dict(list(places.items())[1:])}),
}
"""By what is wrong; a few are sound in an unusual way."""
SOUND = frozenset({"link within", "parts", "ordered pickle", "pickle twice"})
"""Those that must be read rightly."""


def cases() -> Iterator[tuple[str, Make]]:
    """Give the named ones, then bytes that were changed at random."""
    yield from NAMED.items()
    for number in range(12):
        for name, change in (("cut", _cut), ("flipped", _flip), ("noise", _noise)):
            yield f"{name} {number}", with_bytes(change)
    for number in range(6):
        yield f"config noise {number}", with_bytes(_noise, CONFIG)
        yield f"config flipped {number}", with_bytes(_flip, CONFIG)
    plain = pickled(lambda folder: load_file(folder / TENSORS))
    for number in range(6):
        for name, change in (("cut", _cut), ("flipped", _flip), ("noise", _noise)):
            yield f"pickle {name} {number}", both(plain, with_bytes(change, PICKLED))
