"""Captions as they are stored: text that can be seen, with single blanks; and shufflings of their tags."""

from __future__ import annotations

import reprlib
import unicodedata
from typing import Any

from stages.lib.data.pairs import unit_hash

_SHOWN = 60  # characters of a value in a reason
# Letters by their category, and drawn as nothing: fillers of Hangul, the braille pattern without dots.
_BLANK_LETTERS = frozenset("\u115f\u1160\u2800\u3164\uffa0\u034f\u17b4\u17b5")
# Marks alone stand on nothing.
_INVISIBLE = frozenset(("Cc", "Cf", "Cs", "Me", "Mn", "Zl", "Zp", "Zs"))
_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = _SHOWN


class UnusableCaptionError(Exception):
    """The caption cannot be used; the message is the reason."""


def usable_caption(value: Any) -> str:
    """The caption with single blanks.

    Raises:
        UnusableCaptionError: if it is no text, or nothing of it can be seen.
    """
    if value is None:
        raise UnusableCaptionError("empty caption")
    if not is_text(value):
        raise UnusableCaptionError(f"caption is not text: {_shorten.repr(value)}")
    caption = " ".join(value.split()).strip("\ufeff\u200b\u2060 ")
    if not any(map(_is_visible, caption)):
        raise UnusableCaptionError("empty caption")
    if "\0" in value:
        raise UnusableCaptionError("caption holds a null byte, as texts in UTF-16 do")
    return caption


def usable_captions(value: Any, prefix: str = "") -> tuple[list[str], list[str]]:
    """The captions of one image, and why others of it cannot be used.

    Args:
        value: a text or a list of texts; may be anything.
        prefix: text in front of each; it stands alone, without the comma at its end, where none follows.
    """
    captions, reasons = [], []
    for each in value if isinstance(value, list) and value else [None if value == [] else value]:
        if prefix and (each is None or (isinstance(each, str) and not any(map(_is_visible, each)))):
            text: Any = prefix.rstrip(", ")
        else:
            text = f"{prefix}{each}" if isinstance(each, str) else each
        try:
            captions.append(usable_caption(text))
        except UnusableCaptionError as error:
            reasons.append(str(error))
    return captions, reasons


def is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can hold."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def text_of(data: bytes) -> str | None:
    """The text that bytes are, None if they are none: of images the first byte, or a zero, says so."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def tag_variants(
    caption: str, num_variants: int, keep_tags: int, tag_dropout: float, seed: int
) -> tuple[str, ...]:
    """Shufflings of a caption's comma-separated tags, each drawn by the seed, the caption and its number
    alone.

    Args:
        caption: the text; one of a single tag gives that tag each time.
        num_variants: how many; some may be equal.
        keep_tags: tags that stay in front, in their order, and are never dropped.
        tag_dropout: probability with which each of the others is left out, 0 to 1.
        seed: of all draws.

    Returns:
        ``num_variants`` captions. Where all tags would be left out, one of them stays.
    """
    tags = [tag for part in caption.split(",") if (tag := part.strip())]
    kept, others = tags[:keep_tags], tags[keep_tags:]
    variants = []
    for number in range(num_variants):
        # The order of independent uniform numbers is a uniform permutation.
        places = [unit_hash("tag order", seed, caption, number, index) for index in range(len(others))]
        drops = [unit_hash("tag dropout", seed, caption, number, index) for index in range(len(others))]
        order = sorted(range(len(others)), key=places.__getitem__)
        stay = [others[index] for index in order if drops[index] >= tag_dropout]
        variants.append(", ".join(kept + stay or others[:1]) or caption)
    return tuple(variants)


def _is_visible(character: str) -> bool:
    return unicodedata.category(character) not in _INVISIBLE and character not in _BLANK_LETTERS
