"""Processors of bases, also where torchvision is missing.

transformers reads videos with torchvision alone, and then refuses the processor of any class that takes them. Pictures
need none of it, so such a processor is put together without that part.
"""

from functools import cache
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils.import_utils import is_torchvision_available
from transformers.video_processing_utils import VideoProcessorMixin


class NoVideos(VideoProcessorMixin):
    """Stands in a processor for the part that reads videos.

    Args:
        settings: Those of the part that it stands for, which are written again where the processor is saved.
    """

    num_frames = fps = None

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._settings = settings

    def preprocess(self, videos: Any, **options: Any) -> Any:
        """Refuse videos.

        Raises:
            ImportError: Always.
        """
        raise ImportError("videos need torchvision; install it, or give their frames as pictures")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as they were read."""
        return dict(self._settings)


_PARTS: dict[str, Any] = {
    "tokenizer": AutoTokenizer,
    "image_processor": AutoImageProcessor,
    "video_processor": NoVideos,
}


def load_processor(folder: str, config: PreTrainedConfig) -> Any:
    """Load the processor of a base: for one without pictures its tokenizer, for one without text its image processor.

    Args:
        folder: What `from_pretrained` reads.
        config: Of the base.
    """
    kind: Any = PROCESSOR_MAPPING.get(type(config), None)
    if is_torchvision_available() or kind is None or "video_processor" not in kind.get_attributes():
        return AutoProcessor.from_pretrained(folder)
    settings, _ = kind.get_processor_dict(folder)
    parts = [_PARTS[name].from_pretrained(folder) for name in kind.get_attributes()]
    return without_videos(kind).from_args_and_dict(parts, settings)


@cache
def without_videos(kind: Any) -> Any:
    """Return a class of processors that takes `NoVideos`, which is saved and pickled as the given one.

    Args:
        kind: A class of processors that takes a part which reads videos.
    """

    def check(self: Any, name: str, part: Any) -> Any:
        return NoVideos if isinstance(part, NoVideos) else kind.check_argument_for_proper_class(self, name, part)

    def reduce(self: Any) -> Any:
        return _empty, (kind,), self.__dict__

    own = {"check_argument_for_proper_class": check, "__reduce__": reduce, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), own)


def _empty(kind: Any) -> Any:
    made = without_videos(kind)
    return made.__new__(made)
