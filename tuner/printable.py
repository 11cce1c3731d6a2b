"""Text from data and models, made safe to print in a terminal."""


def printable(text: str) -> str:
    """The text with control and direction characters escaped, which a model may generate."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else repr(character)[1:-1]
        for character in text
    )
