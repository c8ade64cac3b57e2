"""Tiny files in the public formats, of which a test spoils one thing."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

SIZE = (40, 30)


class Folder:
    """A folder of JSON documents and pictures."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, document: Any) -> Path:
        file = self.path / name
        file.write_text(json.dumps(document), encoding="utf-8")
        return file

    def picture(self, name: str, mode: str = "RGB", size: tuple[int, int] = SIZE) -> Path:
        Image.effect_noise(size, 50).convert(mode).save(self.path / name)
        return self.path / name
