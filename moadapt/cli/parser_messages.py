"""What the parser says, for those who do not program."""

from collections.abc import Sequence

# Lines of the parser's messages that name types of Python or repeat whole sections.
_NOISE = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "- Expected a <class 'NoneType'>",
    "Given value type:",
    "Given value: {",
    "Given value: [",
    "Given value: Namespace",
)


def tidied(message: str, files: Sequence[str] = ()) -> str:
    """Return a message of the parser with its files named, and without what only a programmer reads.

    Args:
        message: As it says it.
        files: Those that were read; none where there was the command line alone.
    """
    message = message.strip().replace('"<unicode string>"', " or ".join(files) or "the command line")
    lines = [line for line in message.splitlines() if not line.strip().startswith(_NOISE)]
    if len(lines) == 1:
        return lines[0].strip().removeprefix("- ")
    return "\n".join(lines)
