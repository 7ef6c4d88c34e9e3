"""Texts of models, servers and users, cut for show."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from envs.text import one_line, quoted, shown


@given(st.text(), st.integers(min_value=0, max_value=20))
def test_a_text_is_shown_whole_or_its_beginning_and_a_mark(text, most):
    cut = shown(text, most)
    assert cut == text if len(text) <= most else cut == text[:most] + "…"


@given(st.text(alphabet="ab \t\n\u2028"), st.integers(min_value=0, max_value=20))
def test_one_line_has_no_line_break_and_no_double_space(text, most):
    line = one_line(text, most)
    assert len(line.splitlines()) <= 1 and "  " not in line and len(line) <= most + 1


@given(st.text(alphabet=st.characters()))
def test_a_quoted_text_holds_neither_control_characters_nor_half_characters(text):
    written = quoted(f"\x1b[31m\ud800{text}", 60)
    assert written.encode() and "\x1b" not in written and "\n" not in written
