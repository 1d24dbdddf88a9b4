"""Progress: a bar on a terminal, plain lines in a log."""

import io
import re
import sys

import pytest

from stages.lib.frame.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when they are added."""
    seconds = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: seconds[0])
    return seconds


def encode(clock: list[float]) -> None:
    """90 images, 20 of them there before, one in a quarter of a second."""
    with progress_bar("encode images", "images", 90, 20) as progress:
        for row in range(70):
            clock[0] += 0.25
            progress.set_postfix(reused=20, encoded=row + 1, refresh=False)
            progress.update()


def test_elsewhere_there_is_a_line_every_ten_seconds(clock, capsys):
    encode(clock)
    text = capsys.readouterr().err
    assert "\r" not in text
    assert text.splitlines() == [
        "encode images: 20 of 90 images, ? images/s, 00:00 passed, ? left",
        "encode images: 60 of 90 images, 4.00 images/s, 00:10 passed, 00:07 left, encoded=40, reused=20",
        "encode images: 90 of 90 images, 4.00 images/s, 00:17 passed, 00:00 left, encoded=70, reused=20",
    ]


def test_slow_work_is_shown_in_images_a_second_too(clock, capsys):
    with progress_bar("train", "images", 10) as progress:
        clock[0] += 20.1
        progress.update()
    assert "train: 1 of 10 images, 0.05 images/s, 00:20 passed, 03:00 left\n" in capsys.readouterr().err


def test_a_terminal_has_one_line_that_changes(clock, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    encode(clock)
    *states, last = sys.stderr.getvalue().split("\r")
    assert len(states) > 20
    assert re.match(r"encode images: 100%\|[█#]+\| 90/90 \[00:17<00:00, +4.00 images/s, encoded=70", last)
    assert last.count("\n") == 1


def test_a_bar_that_is_not_enabled_shows_nothing(capsys):
    with progress_bar("encode images", "images", 10, enabled=False) as progress:
        progress.update(10)
    assert capsys.readouterr().err == ""
