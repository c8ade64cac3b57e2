import pytest

from moadapt.reporting.markup import element, fragment
from moadapt.reporting.numerals import count, duration, fixed, percent, signed, small


def test_text_and_attributes_are_escaped_once() -> None:
    inner = element("b", "<i>&", title='"quoted"')
    assert inner == '<b title="&quot;quoted&quot;">&lt;i&gt;&amp;</b>'
    assert element("p", inner) == f"<p>{inner}</p>"
    assert fragment("<", None, inner) == f"&lt;{inner}"


def test_attributes_are_named_and_left_out() -> None:
    assert element("input", type="radio", checked=True, disabled=False, id=None) == '<input type="radio" checked>'
    assert element("label", for_="a", aria_label="b") == '<label for="a" aria-label="b"></label>'


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (fixed(0.125, 2), "0.12"),
        (fixed(None), "\N{EN DASH}"),
        (fixed(float("nan")), "\N{EN DASH}"),
        (percent(0.5), "50.0\N{NO-BREAK SPACE}%"),
        (count(1234567), "1\N{NARROW NO-BREAK SPACE}234\N{NARROW NO-BREAK SPACE}567"),
        (signed(-0.26, 1), "\N{MINUS SIGN}0.3"),
        (signed(0.01, 1), "±0.0"),
        (signed(2, 0), "+2"),
        (small(0), "0"),
        (small(0.01234), "0.012"),
        (small(1.2e-7), "1e-07"),
        (duration(59.6), "60 seconds"),
        (duration(287.4), "5 minutes"),
        (duration(3 * 3600 + 120), "3 h 2 min"),
        (duration(None), "\N{EN DASH}"),
    ],
)
def test_numbers(written: str, expected: str) -> None:
    assert written == expected
