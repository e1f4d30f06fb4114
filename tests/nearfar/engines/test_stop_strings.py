"""Stop strings: found however the text is cut into pieces, and nothing held back needlessly."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nearfar.engines.stop_strings import StopStrings

#: Two letters make overlaps and repetitions likely.
TEXT = st.text(alphabet="ab", max_size=12)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3)


def first_stop(text: str, stops: list[str]) -> int | None:
    """How much of `text` comes before the earliest stop string; `None` without one."""
    return min((text.find(stop) for stop in stops if stop in text), default=None)


@given(st.lists(TEXT, max_size=6), STOPS)
def test_shown_text_is_what_comes_before_the_earliest_stop(pieces, stops):
    watch = StopStrings(stops)
    shown, seen, is_stopped = "", "", False
    for piece in pieces:
        text, is_stopped = watch.feed(piece)
        shown += text
        seen += piece
        if is_stopped:
            break
        # What is held back could still become a stop string: nothing more, nothing less.
        held = seen[len(shown) :]
        assert seen.startswith(shown)
        possible = [
            n
            for n in range(len(seen) + 1)
            if any(stop.startswith(seen[len(seen) - n :]) and n < len(stop) for stop in stops)
        ]
        assert len(held) == max(possible, default=0)
    cut = first_stop(seen, stops)
    assert is_stopped == (cut is not None)
    if cut is None:
        assert shown + watch.flush() == seen
    else:
        assert shown == seen[:cut]


def test_text_flows_freely_without_stop_strings():
    assert StopStrings(()).feed("anything") == ("anything", False)


def test_a_stop_string_split_over_three_pieces_is_found():
    watch = StopStrings(["</answer>"])
    assert watch.feed("42</") == ("42", False)
    assert watch.feed("ans") == ("", False)
    assert watch.feed("wer> and more") == ("", True)


def test_a_beginning_that_comes_to_nothing_is_shown():
    watch = StopStrings(["</answer>"])
    assert watch.feed("a </b") == ("a </b", False)
    assert watch.feed("<") == ("", False)
    assert watch.flush() == "<"
    assert watch.flush() == ""
