"""Captions: what can be seen of them, and shufflings of their tags with the odds that they should have."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
from scipy import stats

from stages.lib.data.caption_text import (
    UnusableCaptionError,
    tag_variants,
    text_of,
    usable_caption,
    usable_captions,
)

SEED = 7


@pytest.mark.parametrize(
    ("written", "caption"),
    [
        ("a cat", "a cat"),
        ("  a \t cat\r\n\n asleep \u3000 ", "a cat asleep"),
        ("a\u00a0cat\u2028asleep\x0b\x1f.", "a cat asleep ."),
        ("\ufeffa cat", "a cat"),
        ("\u200ba cat\u200b\u2060", "a cat"),
        ("猫", "猫"),
        ("مرحبا", "مرحبا"),
        ("e\u0301", "e\u0301"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("❤\ufe0f", "❤\ufe0f"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("𝒜", "𝒜"),
        ("\ue000", "\ue000"),
        (".", "."),
        ("0", "0"),
        ("NaN", "NaN"),
        ("none", "none"),
    ],
)
def test_what_can_be_seen_is_kept_with_single_blanks(written: str, caption: str) -> None:
    assert usable_caption(written) == caption
    assert usable_caption(caption) == caption


@pytest.mark.parametrize(
    "written",
    ["", " ", "\n\t\r", "\u00a0", "\u3000", "\u2028\u2029", "\ufeff", "\u200b", "\u200c\u200d", "\u2060",
     "\u00ad", "\u061c\u200e\u200f\u202a\u202e", "\u2066\u2069", "\u180e", "\u115f\u1160", "\u3164", "\uffa0",
     "\u2800", "\u034f", "\u17b4\u17b5", "\0", "\x7f\x80\x9f", "\ufff9\ufffa\ufffb",
     "\U000e0001\U000e0041", None],
)  # fmt: skip
def test_what_cannot_be_seen_is_empty(written: str | None) -> None:
    with pytest.raises(UnusableCaptionError, match=r"^empty caption$"):
        usable_caption(written)


@pytest.mark.parametrize(
    "value", [0, 1, 1.5, float("nan"), True, b"a cat", ["a cat"], {"en": "a cat"}, "\ud800", "a\udc80"]
)
def test_what_is_no_text(value: object) -> None:
    with pytest.raises(UnusableCaptionError, match=r"^caption is not text: "):
        usable_caption(value)


def test_a_null_byte_is_named() -> None:
    with pytest.raises(UnusableCaptionError, match="null byte"):
        usable_caption("a\0cat")


def test_a_long_value_is_shortened_in_the_reason() -> None:
    with pytest.raises(UnusableCaptionError) as caught:
        usable_caption({"a" * 5000: list(range(10_000))})
    assert len(str(caught.value)) < 300


def test_captions_of_an_image_behind_a_prefix() -> None:
    assert usable_captions("a cat") == (["a cat"], [])
    assert usable_captions(["a", "", "b", None, 5]) == (
        ["a", "b"], ["empty caption", "empty caption", "caption is not text: 5"]
    )  # fmt: skip
    for nothing in (None, [], ""):
        assert usable_captions(nothing) == ([], ["empty caption"])
        assert usable_captions(nothing, "sks dog, ") == (["sks dog"], [])
    assert usable_captions(["a", "\u200b"], "sks dog, ") == (["sks dog, a", "sks dog"], [])
    assert usable_captions([0, False, {}], "sks dog") == (
        [],
        [f"caption is not text: {each}" for each in (0, False, {})],
    )
    assert usable_captions(0) == ([], ["caption is not text: 0"])
    assert usable_captions("a", "  ") == (["a"], [])
    assert usable_captions("", "  ") == ([], ["empty caption"])


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"a cat", "a cat"), (b"", ""), ("\ufeff猫".encode(), "猫"), (b"\xff\xd8\xff", None), (b"BM\0\0", None)],
)
def test_bytes_that_are_text(data: bytes, text: str | None) -> None:
    assert text_of(data) == text


# Shufflings

TAGS = ["1girl", "solo", "red hair", "smile"]
CAPTION = ", ".join(TAGS)


def split(caption: str) -> list[str]:
    return caption.split(", ")


def test_a_variant_is_a_permutation_behind_the_tags_that_stay() -> None:
    for keep in range(6):
        for variant in tag_variants(CAPTION, 50, keep, 0.0, SEED):
            assert split(variant)[:keep] == TAGS[:keep]
            assert sorted(split(variant)) == sorted(TAGS)
    assert set(tag_variants(CAPTION, 20, 3, 0.0, SEED)) == {CAPTION}
    assert len({*tag_variants(CAPTION, 500, 0, 0.0, SEED)}) == math.factorial(4)


def test_variants_depend_on_the_arguments_alone() -> None:
    first = tag_variants(CAPTION, 8, 1, 0.3, SEED)
    assert tag_variants(CAPTION, 8, 1, 0.3, SEED) == first
    assert tag_variants(CAPTION, 3, 1, 0.3, SEED) == first[:3]  # more variants leave the first ones
    assert tag_variants(CAPTION, 8, 1, 0.3, SEED + 1) != first
    assert tag_variants(f"{CAPTION}, hat", 8, 1, 0.3, SEED) != first
    assert first[:4] == (  # what is drawn is part of what a run is: a change here changes every run
        "1girl, solo, smile, red hair",
        "1girl, solo, red hair",
        "1girl, red hair, smile, solo",
        "1girl, red hair, solo, smile",
    )


def test_odd_commas_make_no_tags() -> None:
    assert set(tag_variants(" a ,, b,", 40, 0, 0.0, SEED)) == {"a, b", "b, a"}
    assert tag_variants("a cat", 2, 0, 0.0, SEED) == ("a cat", "a cat")
    assert tag_variants("a cat", 2, 0, 0.99, SEED) == ("a cat", "a cat")
    assert tag_variants(",", 2, 0, 0.5, SEED) == (",", ",")
    assert tag_variants("a, a", 3, 0, 0.0, SEED) == ("a, a",) * 3
    assert tag_variants(CAPTION, 0, 0, 0.0, SEED) == ()


@pytest.mark.parametrize("seed", range(3))
def test_all_orders_are_equally_probable(seed: int) -> None:
    counts = Counter(tag_variants(CAPTION, 4800, 0, 0.0, seed))
    assert set(counts) == {", ".join(order) for order in itertools.permutations(TAGS)}
    statistic = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert statistic < stats.chi2.ppf(0.9999, 23)


def test_places_and_captions_are_independent() -> None:
    """The first tags of two variants of one caption, and of two captions, are pairs of independent draws."""
    by_number: Counter[tuple[str, str]] = Counter()
    by_caption: Counter[tuple[str, str]] = Counter()
    for number in range(1600):
        one, two = tag_variants(f"{CAPTION}, {number}", 2, 0, 0.0, SEED)
        other = tag_variants(f"{CAPTION}, {number}!", 1, 0, 0.0, SEED)[0]
        firsts = [next(tag for tag in split(each) if tag in TAGS) for each in (one, two, other)]
        by_number[firsts[0], firsts[1]] += 1
        by_caption[firsts[0], firsts[2]] += 1
    for counts in (by_number, by_caption):
        statistic = sum((counts[pair] - 100) ** 2 / 100 for pair in itertools.product(TAGS, TAGS))
        assert statistic < stats.chi2.ppf(0.9999, 15)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_each_of_the_other_tags_is_left_out_with_the_probability_asked_for(dropout: float) -> None:
    count = 4000
    variants = [split(each) for each in tag_variants(CAPTION, count, 1, dropout, SEED)]
    for variant in variants:
        assert variant[0] == "1girl" and set(variant) <= set(TAGS) and len(set(variant)) == len(variant)
    four_sigma = 4 * math.sqrt(count * dropout * (1 - dropout))
    for tag in TAGS[1:]:
        assert abs(sum(tag not in variant for variant in variants) - count * dropout) < four_sigma
    sizes = Counter(
        len(variant) - 1 for variant in variants
    )  # binomial where tags are left out independently
    expected = [
        count * math.comb(3, size) * (1 - dropout) ** size * dropout ** (3 - size) for size in range(4)
    ]
    statistic = sum((sizes[size] - each) ** 2 / each for size, each in enumerate(expected))
    assert statistic < stats.chi2.ppf(0.9999, 3)


def test_which_tags_are_left_out_says_nothing_of_their_order() -> None:
    pairs: Counter[str] = Counter()
    for variant in tag_variants(CAPTION, 6000, 0, 0.5, SEED):
        if sorted(split(variant)) == sorted(TAGS[:2]):
            pairs[variant] += 1
    total = pairs.total()
    assert abs(total - 6000 / 16) < 4 * math.sqrt(6000 / 16 * 15 / 16)
    assert abs(pairs["1girl, solo"] - total / 2) < 4 * math.sqrt(total / 4)


def test_one_tag_stays_where_all_would_be_left_out() -> None:
    variants = tag_variants(CAPTION, 2000, 0, 0.9, SEED)
    assert min(map(len, variants)) > 0
    alone = sum(variant == "1girl" for variant in variants)
    probability = 0.9**4 + 0.1 * 0.9**3  # all left out, or all others
    assert abs(alone - 2000 * probability) < 4 * math.sqrt(2000 * probability * (1 - probability))
