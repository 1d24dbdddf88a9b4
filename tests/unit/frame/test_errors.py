"""Texts that reach a terminal, whatever a file is called."""

import logging

import pytest

from stages.lib.frame.errors import StageError, printable
from stages.lib.frame.run import run_command


def test_what_steers_a_terminal_is_shown_and_not_obeyed():
    assert printable("a\x1b[31mred\x07\x9b1m\x7f\r") == "a\\x1b[31mred\\x07\\x9b1m\\x7f\\r"
    assert printable("\u202egnp.exe\u2066") == "\\u202egnp.exe\\u2066"
    assert printable("i\udcff\u2028") == "i\\udcff\\u2028"
    plain = "two lines\n\tand a tab, ü 赤い 👩\u200d🚀"
    assert printable(plain) == plain


def test_errors_and_logs_of_a_command_are_printable(capsys):
    def main():
        logging.getLogger("x").warning("log of %s", "\x1b[2J.png")
        raise StageError("error of \x1b[2J.png")

    root = logging.getLogger()
    before, level, root.handlers = root.handlers, root.level, []
    try:
        with pytest.raises(SystemExit) as stopped:
            run_command("prepare", main)
    finally:
        root.handlers = before
        root.setLevel(level)  # or later tests see messages that a stage would show
    assert stopped.value.code == "\nprepare: error of \\x1b[2J.png"
    assert capsys.readouterr().err == "log of \\x1b[2J.png\n"


def test_of_a_very_long_word_or_line_the_middle_is_left_out():
    path = "data/" + "x" * 250 + ".png"
    assert printable(f"{path}: broken") == f"{path}: broken"
    name = "a" * 50_000 + "b" * 50_000
    shown = printable(f"train.csv: line 3: {name}: expected a file\nsecond line")
    assert shown.startswith("train.csv: line 3: aaa")
    assert shown.endswith("bbb: expected a file\nsecond line")
    assert "[99,741 characters]" in shown
    assert len(shown) < 400
    blanks = printable("a " * 50_000)
    assert len(blanks) < 4100
    assert "characters]" in blanks
