"""A picture of an example: where it lies, how large it is, and how it is opened."""

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from PIL import Image


@dataclass(frozen=True)
class Picture:
    """One picture, read when it is needed.

    Args:
        file: Where it lies; for one inside an archive or a table, a name of it for messages.
        size: Width and height as stored, in pixels.
        data: What the file would hold, for a picture that lies in no file of its own.
    """

    file: Path
    size: tuple[int, int]
    data: bytes | None = field(default=None, repr=False)

    def open(self) -> Image.Image:
        """Read it as RGB; what is transparent becomes white.

        Raises:
            ValueError: It is missing or broken.
        """
        try:
            with Image.open(self.file if self.data is None else BytesIO(self.data)) as stored:
                if not stored.has_transparency_data:
                    return stored.convert("RGB")
                seen = stored.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
        except (OSError, SyntaxError) as error:  # a broken PNG is a SyntaxError
            raise ValueError(f"the picture {self.file} cannot be read: {error}") from error
