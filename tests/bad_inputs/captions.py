"""Captions: nothing that can be seen, no text, text that UTF-8 cannot hold, text of megabytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.bad_inputs.cases import (
    GOOD,
    GOOD_FILES,
    GOOD_IMAGES,
    REJECTED,
    TAKEN,
    Case,
    Row,
    encoded,
    folder,
    picture,
)

KIND = "captions"
ODD = picture(7)
INVISIBLE = {
    "nothing": "", "a blank": " ", "line feeds": "\n\n", "tabs": "\t \t", "U+FEFF": "\ufeff", "U+200B": "\u200b", "U+200C": "\u200c",
    "U+200D": "\u200d", "U+2060": "\u2060", "U+00AD": "\u00ad", "U+3164": "\u3164", "U+FFA0": "\uffa0", "U+115F": "\u115f",
    "U+2800": "\u2800", "U+180E": "\u180e", "U+00A0": "\u00a0", "U+3000": "\u3000", "U+200E": "\u200e", "U+202E": "\u202e",
    "U+FE0F": "\ufe0f", "U+E0001": "\U000e0001", "U+E0041": "\U000e0041", "U+2028": "\u2028", "U+034F": "\u034f", "NUL": "\0",
    "U+0001": "\x01", "U+007F": "\x7f", "U+0085": "\x85", "escape": "\x1b",
    "several of them": " \ufeff\u200b\u200d\u2060\u00ad\u3164\u2800 ",
}  # fmt: skip
INTACT = {
    "an emoji of several letters": "an astronaut 👩‍🚀 waves",
    "a flag of letters": "a 🏳️‍🌈 flag",
    "from right to left": "قطة حمراء",
    "a joiner that Persian needs": "می‌خواهم",
    "combining marks": "e\u0301te\u0301",
    "Hangul in parts": "\u1112\u1161\u11ab",
    "braille": "⠉⠁⠞",
    "entities of HTML": "cats &amp; dogs <b>",
    "a template": "{caption} %s $HOME",
    "the word null": "null",
    "the word NaN": "nan",
    "a number": "17",
    "one letter": "x",
    "a quote": '"',
    "a backslash": "\\",
    "a letter of plane 2": "𠀋",
    "a private letter": "\ue000 logo",
}


def listed(
    name: str, value: Any, *may: str, row: Row | None = None, raw: str | None = None, **values: Any
) -> Case:
    """A line of metadata.jsonl with a value for a caption, in the middle of good ones."""
    lines = [json.dumps({"file_name": good, "text": one.captions[0]}) for good, one in GOOD.items()]
    text = json.dumps(value) if raw is None else raw
    lines.insert(1, f'{{"file_name": "odd.png", "text": {text}}}')
    files = {
        **GOOD_IMAGES,
        "odd.png": encoded(ODD),
        "metadata.jsonl": "".join(f"{line}\n" for line in lines).encode(),
    }
    bad = {"odd.png": row} if row else {}
    return Case(KIND, f"jsonl, {name}", folder(files), may or (REJECTED,), GOOD, bad, **values)


def beside(
    name: str, content: bytes, *may: str, row: Row | None = None, suffix: str = "txt", **values: Any
) -> Case:
    """A caption file of some bytes beside an image."""
    files = {**GOOD_FILES, "odd.png": encoded(ODD), f"odd.{suffix}": content}
    bad = {"odd.png": row} if row else {}
    return Case(KIND, f"{suffix}, {name}", folder(files), may or (REJECTED,), GOOD, bad, **values)


def cases() -> Iterator[Case]:
    yield from _invisible()
    yield from _no_text()
    yield from _no_utf8()
    yield from _long()
    yield from _intact()


def _invisible() -> Iterator[Case]:
    empty: dict[str, Any] = {"odd": ("odd.png",), "says": ("empty",)}
    for name, text in INVISIBLE.items():
        yield beside(name, text.encode(), **empty)
        yield listed(name, text, **empty)
    for name in ("nothing", "U+200B", "U+3164", "U+FEFF"):
        yield beside(name, json.dumps({"text": INVISIBLE[name]}).encode(), suffix="json", **empty)
        yield beside(name, INVISIBLE[name].encode(), suffix="caption", **empty)
    for name in ("nothing", "U+FEFF", "U+200B", "U+2800", "U+00AD"):
        lines = [
            "file_name,text",
            *(f"{good},{row.captions[0]}" for good, row in GOOD.items()),
            f"odd.png,{INVISIBLE[name]}",
        ]
        files = {**GOOD_IMAGES, "odd.png": encoded(ODD), "metadata.csv": "\n".join(lines).encode()}
        yield Case(KIND, f"csv, {name}", folder(files), (REJECTED,), GOOD, odd=("odd.png",), says=("empty",))


def _no_text() -> Iterator[Case]:
    for name, value in (
        ("a number", 17), ("a fraction", 0.5), ("true", True), ("false", False), ("an object", {"en": "a cat"}), ("lists of lists", [["a cat"]]),
        ("a list of numbers", [1, 2]), ("a list of objects", [{"raw": "a cat"}]), ("zero", 0),
    ):  # fmt: skip
        yield listed(name, value, says=("not text",))
        yield beside(name, json.dumps({"text": value}).encode(), suffix="json", says=("not text",))
    for name, value in (
        ("null", None),
        ("an empty list", []),
        ("a list of null", [None]),
        ("a list of nothing", [""]),
        ("a list of blanks", [" ", "\u200b"]),
    ):
        yield listed(name, value, says=("empty", "not text"))
    for name, raw in (("not a number", "NaN"), ("infinity", "-Infinity"), ("a huge number", "9" * 4000)):
        yield listed(name, None, raw=raw, says=("not text", "not json"))
    for name, value in (
        ("an empty one", ["a cat", ""]),
        ("null", ["a cat", None]),
        ("a number", ["a cat", 17]),
        ("an unseen one", ["a cat", "\u200b"]),
    ):
        case = listed(f"{name} beside a good one", value, says=("empty", "not text"), odd=("odd.png",))
        yield Case(
            KIND,
            case.name,
            case.make,
            (REJECTED,),
            {**GOOD, "odd.png": Row(("a cat",), ODD)},
            {},
            case.odd,
            case.says,
        )
    deep = "[" * 90 + '"a cat"' + "]" * 90
    yield listed("lists 90 deep", None, raw=deep, says=("not text",))
    yield beside(
        "an array",
        b'["a cat", "a red cat"]',
        TAKEN,
        REJECTED,
        row=Row(("a cat", "a red cat"), ODD),
        suffix="json",
    )
    for name, content in (
        ("no JSON", b"a cat"), ("no byte", b""), ("cut", b'{"text": "a c'), ("null", b"null"), ("no caption", b'{"width": 3}'), ("latin-1", b'{"text": "\xe9"}'),
        ("100000 brackets", b"[" * 100_000), ("lists 100000 deep", b"[" * 100_000 + b"]" * 100_000),
    ):  # fmt: skip
        yield beside(name, content, suffix="json", odd=("odd.png",))


def _no_utf8() -> Iterator[Case]:
    yield listed("half a pair of surrogates", "a \ud83d cat", says=("not text", "utf-8"))
    yield listed("the other half of a pair", "a \ude00 cat", says=("not text", "utf-8"))
    yield listed("halves in the wrong order", None, raw='"\\ude00\\ud83d"', says=("not text", "utf-8"))
    yield listed("a whole pair", None, TAKEN, raw='"a \\ud83d\\ude00 cat"', row=Row(("a 😀 cat",), ODD))
    yield beside(
        "half a pair of surrogates", b'{"text": "\\ud83d"}', suffix="json", says=("not text", "utf-8")
    )
    words = "ein schöner Käfer"
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "mac-roman"):
        yield beside(encoding, words.encode(encoding), odd=("odd.png",), says=("utf",))
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        yield beside(f"ASCII in {encoding}", "a red cat".encode(encoding), odd=("odd.png",))
    for encoding, letters in (("cp932", "赤い猫"), ("gb18030", "红猫"), ("koi8-r", "кот")):
        yield beside(encoding, letters.encode(encoding), odd=("odd.png",), says=("utf-8",))
    yield beside("UTF-8 with a mark", words.encode("utf-8-sig"), TAKEN, row=Row((words,), ODD))
    for name, content in (
        ("an image", encoded(ODD)),
        ("half a letter", b"caf\xc3"),
        ("a surrogate in bytes", b"\xed\xa0\x80"),
        ("an overlong letter", b"\xc0\xaf"),
    ):
        yield beside(name, content, odd=("odd.png",), says=("utf-8",))


def _long() -> Iterator[Case]:
    either = (TAKEN, REJECTED)
    for name, text in (("5 MB of words", "word " * 1_000_000), ("3 MB of one word", "x" * 3_000_000), ("a million line feeds", "a" + "\n" * 10**6 + "b"),
                       ("2 MB of emoji", "😀" * 500_000)):  # fmt: skip
        row = Row((" ".join(text.split()),), ODD)
        yield beside(name, text.encode(), *either, row=row)
        yield listed(name, text, *either, row=row)
    many = [f"caption {number}" for number in range(20_000)]
    yield listed("20000 captions", many, *either, row=Row(tuple(many), ODD))
    yield beside("3 MB of zero-width spaces", ("\u200b" * 10**6).encode(), odd=("odd.png",), says=("empty",))


def _intact() -> Iterator[Case]:
    for name, text in INTACT.items():
        yield beside(name, text.encode(), TAKEN, row=Row((text,), ODD))
    for name, text in (
        ("a line feed", "a\ncat"),
        ("two blanks", "a  cat"),
        ("U+00A0", "a\u00a0cat"),
        ("U+3000", "a\u3000cat"),
        ("CRLF", "a\r\ncat\r\n"),
    ):
        yield beside(f"{name} between words", text.encode(), TAKEN, row=Row(("a cat",), ODD))
    for name, text in (
        ("escapes of terminals", "\x1b[31mred\x1b[0m cat"),
        ("a bell", "a\x07cat"),
        ("NUL", "a\0cat"),
    ):
        yield beside(f"{name} in words", text.encode(), TAKEN, REJECTED, row=Row((), ODD))
    yield listed("one caption twice", ["a cat", "a cat"], TAKEN, row=Row(("a cat",), ODD))
