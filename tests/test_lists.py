"""No message grows with what it speaks of."""

import pytest

from twotower.words import cut, listed


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["a"], "a"),
        (range(3), "0, 1, 2"),
        (list("abcdefgh"), "a, b, c, d, e, f, g, h"),
        ((f"n{number}" for number in range(3000)), "n0, n1, n2, n3, n4, n5, n6, n7, ... (3,000)"),
    ],
)
def test_a_list_names_the_first_and_counts_the_rest(names: list[str], text: str) -> None:
    assert listed(names) == text


def test_a_name_is_cut_and_its_end_stays() -> None:
    text = "/a" * 500_000 + "/train.tar"
    assert len(cut(text)) <= 203 and cut(text).endswith("/train.tar") and cut("short") == "short"
    assert len(listed([text] * 100)) < 8 * 210
