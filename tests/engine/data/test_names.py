"""Text from outside, as it is printed."""

from simmim.data.names import printable


def test_printable_text_is_one_line_that_cannot_steer_a_terminal() -> None:
    assert printable("ä ß.jpg") == "ä ß.jpg"
    assert printable("a\n\t\x1b[31m\u202e\udcff.jpg") == r"a\n\t\x1b[31m\u202e\udcff.jpg"
