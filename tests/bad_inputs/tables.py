"""Tables in csv: odd rows, other encodings, other separators, headers that are none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tests.bad_inputs.cases import (
    GOOD,
    GOOD_IMAGES,
    REFUSED,
    REJECTED,
    TAKEN,
    Case,
    Row,
    at_each,
    csv_of,
    encoded,
    folder,
    picture,
)

KIND = "tables"
LINES = csv_of(GOOD)
EXTRA = encoded(picture(7))
NAME = "metadata.csv"


def case(
    name: str, text: str | bytes, *may: str, bad: str | tuple[str, ...] | None = None, **values: object
) -> Case:
    """A metadata.csv beside good images and one more, ``odd.png``.

    Args:
        name: of the case.
        text: of the table.
        may: see `Case`.
        bad: captions of ``odd.png``, if the row of it may be taken.
        values: of the case.
    """
    content = text.encode() if isinstance(text, str) else text
    good = values.pop("good", GOOD)
    rows = {} if bad is None else {"odd.png": Row((bad,) if isinstance(bad, str) else bad, picture(7))}
    file = str(values.pop("file", NAME))
    files = {**GOOD_IMAGES, "odd.png": EXTRA, file: content}
    return Case(
        KIND, f"{file.rsplit('.', 1)[1]}, {name}", folder(files), may or (REFUSED,), good, rows, **values
    )  # type: ignore[arg-type]


def joined(lines: Sequence[str], end: str = "\n") -> str:
    return "".join(f"{line}{end}" for line in lines)


def cases() -> Iterator[Case]:
    yield from _quotes()
    yield from _cells()
    yield from _encodings()
    yield from _headers()
    yield from _ends()


def _quotes() -> Iterator[Case]:
    yield case(
        "a quote inside a cell", joined([*LINES, 'odd.png,a 5" nail']), REJECTED, TAKEN, bad='a 5" nail'
    )
    yield case("doubled quotes", joined([*LINES, 'odd.png,"a ""big"" cat"']), TAKEN, bad='a "big" cat')
    yield case(
        "a comma and a line feed in quotes", joined([*LINES, 'odd.png,"one,\ntwo"']), TAKEN, bad="one, two"
    )
    inside = 'odd.png,"a "big" cat"'
    for where, lines in at_each(LINES, inside):
        odd = (f"line {lines.index(inside) + 1}",)
        yield case(f"quotes inside quotes, {where} row", joined(lines), REJECTED, odd=odd)
    for opened in ('odd.png,"never closed', '"odd.png,never closed', 'odd.png,"', '"'):
        for where, lines in at_each(LINES, opened):
            odd = (f"line {lines.index(opened) + 1}",)
            yield case(f"unclosed {opened}, {where} row", joined(lines), REJECTED, odd=odd)
    many = [f"{number % 3:03d}.png,caption {number % 3}" for number in range(3000)]
    yield case(
        "unclosed quote before 3000 rows",
        joined([LINES[0], 'odd.png,"never closed', *many]),
        REJECTED,
        odd=("line 2",),
    )
    two = joined([LINES[0], 'odd.png,"one', *LINES[1:], 'odd.png,two"'])
    yield case("two unclosed quotes", two, REJECTED, bad='two"')


def _cells() -> Iterator[Case]:
    for text, what in (
        ("odd.png", "too few"),
        ("odd.png,red,cat", "too many"),
        ("odd.png,", "an empty"),
        (",a cat", "no name,"),
    ):
        for where, lines in at_each(LINES, text):
            odd = () if what == "an empty" else (f"line {lines.index(text) + 1}",)
            yield case(f"{what} cell, {where} row", joined(lines), REJECTED, odd=odd)
    for size in (131_073, 1_000_000):
        long = "long " * (size // 5)
        yield case(
            f"a cell of {size} letters",
            joined([*LINES, f"odd.png,{long}"]),
            REJECTED,
            TAKEN,
            bad=long.strip(),
        )
        wrapped = joined([LINES[0], f'odd.png,"{long}"', *LINES[1:]])
        yield case(f"a quoted cell of {size} letters first", wrapped, REJECTED, TAKEN, bad=long.strip())
    yield case("NUL in a caption", joined([*LINES, "odd.png,a\0cat"]), REJECTED, TAKEN, bad=("a\0cat",))
    yield case("NUL in a name", joined([*LINES, "odd\0.png,cat"]), REJECTED)
    yield case("NULs after the good rows", joined(LINES) + "\0" * 500, REFUSED, REJECTED)
    yield case("1000 cells", joined([*LINES, "odd.png," + "x," * 1000]), REJECTED, odd=("line 5",))
    yield case("a row of commas", joined([*LINES, ",,,,"]), REJECTED, odd=("line 5",))
    yield case("a comment", joined([LINES[0], "# by hand", *LINES[1:]]), REJECTED, odd=("line 2",))
    yield case("the header again", joined([*LINES, LINES[0]]), REJECTED)
    yield case("a row twice", joined([*LINES, LINES[1]]), TAKEN)
    yield case(
        "two captions of one image", joined([*LINES, "odd.png,one", "odd.png,two"]), TAKEN, bad=("one", "two")
    )


def _encodings() -> Iterator[Case]:
    lines = [*LINES, "odd.png,ein schöner Käfer"]
    text = joined(lines)
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        yield case(encoding, text.encode(encoding), says=("utf",))
    for encoding in ("latin-1", "cp1252", "mac-roman"):
        yield case(
            f"one row in {encoding}", text.encode(encoding), REJECTED, odd=("line 5",), says=("utf-8",)
        )
    for encoding, words in (("cp932", "赤い猫"), ("gb18030", "红猫"), ("koi8-r", "кот")):
        content = joined([*LINES, f"odd.png,{words}"]).encode(encoding)
        yield case(f"one row in {encoding}", content, REJECTED, odd=("line 5",), says=("utf-8",))
    first = joined(LINES).encode() + b"odd.png,caf\xe9\n" * 3
    yield case("three rows in latin-1", first, REJECTED, odd=("line 5", "line 6", "line 7"))
    yield case(
        "header in latin-1",
        joined(["file_name,text,größe", *(f"{line},1" for line in LINES[1:])]).encode("latin-1"),
    )
    yield case("UTF-8 with a mark", text.encode("utf-8-sig"), TAKEN, bad="ein schöner Käfer")
    yield case("half a letter", joined(LINES).encode() + b"odd.png,caf\xc3\n", REJECTED, odd=("line 5",))
    yield case(
        "a surrogate in bytes", joined(LINES).encode() + b"odd.png,\xed\xa0\x80\n", REJECTED, odd=("line 5",)
    )
    yield case(
        "an overlong letter", joined(LINES).encode() + b"odd.png,\xc0\xaf\n", REJECTED, odd=("line 5",)
    )


def _headers() -> Iterator[Case]:
    rows = LINES[1:]
    for name, separator in (("semicolons", ";"), ("tabs", "\t"), ("bars", "|")):
        yield case(f"separated by {name}", joined([line.replace(",", separator) for line in LINES]))
    for name, header in (
        ("no header", None),
        ("a header of another kind", "image,label"),
        ("a header in capitals", "FILE_NAME,TEXT"),
        ("a column twice", "file_name,file_name"),
        ("the caption's column twice", "file_name,text,text"),
        ("a column of no name", "file_name,"),
        ("one column", "file_name"),
        ("an unclosed quote in the header", 'file_name,"text'),
        ("a header of commas", ",,,"),
    ):
        yield case(name, joined([*([header] if header else []), *rows]))
    yield case("no byte", b"")
    yield case("a header alone", "file_name,text\n")
    yield case("blank lines alone", "\n\n\n")
    yield case("a mark alone", b"\xef\xbb\xbf")
    yield case("an image", EXTRA)
    yield case("a page", "<!DOCTYPE html>\n<html>404</html>\n")
    yield case("blanks around names of columns", joined([" file_name , text ", *rows]), TAKEN)
    yield case(
        "more columns",
        joined(["id,text,file_name", *(f"{n},caption {n},{n:03d}.png" for n in range(3))]),
        TAKEN,
    )
    yield case("quoted header", joined(['"file_name","text"', *rows]), TAKEN)
    yield case(
        "its caption under another name",
        joined(["file_name,prompt", *rows]),
        TAKEN,
        params={"caption_column": "prompt"},
    )


def _ends() -> Iterator[Case]:
    lines = [*LINES, "odd.png,a cat"]
    for name, end in (("CRLF", "\r\n"), ("CR", "\r"), ("empty lines between", "\n\n")):
        yield case(f"lines that end with {name}", joined(lines, end), TAKEN, bad="a cat")
    yield case("no end of the last line", joined(lines)[:-1], TAKEN, bad="a cat")
    yield case("mixed ends", "\r\n".join(lines[:3]) + "\n" + "\n".join(lines[3:]), TAKEN, bad="a cat")
    yield case(
        "blanks behind commas", joined([line.replace(",", ", ") for line in lines]), TAKEN, bad="a cat"
    )
    for name, mark in (
        ("U+2028", "\u2028"),
        ("U+0085", "\u0085"),
        ("a form feed", "\f"),
        ("a vertical tab", "\v"),
    ):
        yield case(f"{name} in a caption", joined([*LINES, f"odd.png,a{mark}cat"]), TAKEN, bad="a cat")
    yield case("cut in its last row", joined(lines)[:-8], REJECTED, TAKEN)
    yield case("cut inside quotes", joined([*LINES, 'odd.png,"a cat"'])[:-3], REJECTED, odd=("line 5",))
