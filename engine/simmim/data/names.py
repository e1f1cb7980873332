"""Text that comes from outside, such as file names and class names, as it may be printed."""


def printable(text: str) -> str:
    """A text as one line that cannot steer a terminal: what is not printable becomes its escape."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
