"""Text of rows and models, made harmless for a terminal."""


def printable(text: str) -> str:
    """The text without characters that could command a terminal or turn its direction: a model may generate any."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else repr(character)[1:-1]
        for character in text
    )
