"""Labels are drawn in the scripts that people write prompts in, with the same pixels on every machine."""

import importlib.util
import logging

import numpy as np
import pytest
from PIL import Image

from stages.lib.drawing import fonts, grids
from stages.lib.drawing.grids import GridRow, draw_grid, draw_message, stack
from stages.lib.drawing.labels import Label, draw_labels, text_width, wrap

TEXTS = {
    "Latin": "Größe ça",
    "Cyrillic": "красное сердце",
    "Greek": "κόκκινη καρδιά",
    "Arabic": "قلب أحمر",
    "Hebrew": "לב אדום",
    "Devanagari": "लाल हृदय",
    "Tamil": "சிவப்பு இதயம்",
    "Thai": "หัวใจ",
    "emoji": "🚀🍕",
}
CJK = {"Han": "红心", "kana": "ハート", "Hangul": "하트"}


def drawn(text: str, width: int = 200) -> np.ndarray:
    blank = Image.new("RGB", (width, 40), "#ffffff")
    return np.asarray(draw_labels(blank, [Label(4, 4, text, 18)], "#000000"))


def boxes(text: str) -> np.ndarray:
    return drawn("\U000f1234" * len(text))


@pytest.mark.parametrize("script", TEXTS)
def test_each_script_is_drawn_and_not_as_boxes(script, caplog):
    with caplog.at_level(logging.WARNING):
        picture = drawn(TEXTS[script])
    assert (picture < 128).sum() > 100
    assert not np.array_equal(picture, boxes(TEXTS[script]))
    assert not caplog.text


@pytest.mark.skipif(importlib.util.find_spec("manimgx_fonts_cjk") is None, reason="needs manimgx-fonts-cjk")
@pytest.mark.parametrize("script", CJK)
def test_chinese_japanese_and_korean_are_drawn(script, caplog):
    with caplog.at_level(logging.WARNING):
        picture = drawn(CJK[script])
    assert (picture < 128).sum() > 100
    assert not caplog.text


def test_arabic_letters_join_and_run_from_right_to_left():
    joined, apart = drawn("بب"), drawn("ب\u200cب")
    assert not np.array_equal(joined, apart)
    first, second = (np.flatnonzero((drawn(text) < 128).any(axis=(0, 2))) for text in ("ا ب", "ب ا"))
    # The narrow letter comes first in the text, and so last on the line.
    assert np.diff(first).argmax() > np.diff(second).argmax()


def test_a_mixed_line_holds_what_its_parts_hold():
    words, mixed = ("heart", "قلب", "сердце"), drawn("heart قلب сердце")
    ink = [(drawn(word) < 128).sum() for word in words]
    assert (mixed < 128).sum() == pytest.approx(sum(ink), rel=0.05)


def test_a_letter_that_no_font_has_is_named(caplog):
    fonts.report_missing.cache_clear()
    with caplog.at_level(logging.WARNING):
        drawn("a \U00012000")
    assert "no installed font has \U00012000" in caplog.text


def test_what_xml_cannot_hold_is_drawn_as_a_space():
    assert np.array_equal(drawn("a\x00b\ud800"), drawn("a b "))
    assert (drawn("<b>&amp;") < 128).sum() > (drawn("b") < 128).sum()


def test_the_same_text_has_the_same_pixels():
    text = " ".join(TEXTS.values())
    assert np.array_equal(drawn(text), drawn(text))
    assert (drawn("") == 255).all()


def test_lines_fit_and_lose_nothing():
    text = "a word " * 10 + "supercalifragilistic" * 3 + " हृदय" * 9
    lines = wrap(text, 120, 13)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert max(text_width(line, 13) for line in lines) <= 120
    assert not any(line.startswith(("\u0943", "\u094d")) for line in wrap("हृदय" * 20, 30, 13))
    assert wrap("", 10, 13) == [""]


def test_an_emoji_of_several_is_not_broken_apart():
    astronaut = "👩\u200d🚀"
    assert all(line in ("", astronaut) for line in wrap(astronaut * 4, 1, 13))


def test_a_grid_draws_title_headings_and_rows():
    picture = Image.new("RGB", (64, 64), "#123456")
    grid = np.asarray(draw_grid("Title", ["one", "two"], [GridRow("label", [picture, None])]))
    assert grid.shape[1] == 150 + 2 * 134 + 6
    bottom = grid[-134:-6]
    assert (bottom[:, 150:278] == (0x12, 0x34, 0x56)).all() and (bottom[:, 284:412] == 0xE6).all()
    for area in (grid[:22, :150], grid[22:-134, 150:278], grid[22:-134, 284:412], bottom[:, :150]):
        assert (area < 128).any()


def test_a_label_that_does_not_fit_beside_its_row_ends_in_an_ellipsis(monkeypatch):
    drawn = []

    def record(grid, labels, colour):
        drawn.extend(labels)
        return draw_labels(grid, labels, colour)

    monkeypatch.setattr(grids, "draw_labels", record)
    for text in ("a word " * 40, "x" * 400):
        drawn.clear()
        draw_grid("", ["one"], [GridRow(text, [None])])
        *lines, last = [label.text for label in drawn if label.text not in ("", "one")]
        whole = wrap(text, 138, 13)
        assert lines == whole[:6] and last.endswith("…") and whole[6].startswith(last[:-1])
        assert len(last) > 5 and text_width(last, 13) <= 138
    drawn.clear()
    draw_grid("", ["one"], [GridRow("a word", [None])])
    assert [label.text for label in drawn][-1] == "a word"


def test_a_long_title_takes_more_lines():
    short, long = (draw_grid(title, ["one"], [GridRow("label", [None])]) for title in ("a", "a prompt " * 20))
    assert long.width == short.width and long.height > short.height + 40


def test_pictures_are_stacked_below_and_beside_one_another():
    wide, tall = Image.new("RGB", (8, 2), "#000000"), Image.new("RGB", (3, 5), "#ff0000")
    below, beside = np.asarray(stack([wide, tall])), np.asarray(stack([wide, tall], beside=True))
    assert below.shape == (7, 8, 3) and beside.shape == (5, 11, 3)
    assert (below[2:, :3, 0] == 255).all() and (below[2:, 3:] == 255).all() and not below[:2].any()
    assert (beside[:, 8:, 0] == 255).all() and (beside[2:, :8] == 255).all() and not beside[:2, :8].any()


def test_a_message_stands_in_for_a_picture():
    picture = np.asarray(draw_message("No previews: train.preview_every_steps is null"))
    assert 20 < picture.shape[0] < 60 and picture.shape[1] > 200 and (picture < 128).any()
