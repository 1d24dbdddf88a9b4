"""Tables in JSON lines, Parquet, Arrow and TFRecord: damaged, nested, of other types."""

from __future__ import annotations

import io
import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.bad_inputs.cases import (
    GOOD,
    GOOD_IMAGES,
    REFUSED,
    REJECTED,
    TAKEN,
    Case,
    Row,
    at_each,
    flipped,
    folder,
    picture,
    single,
)
from tests.bad_inputs.tables import KIND, case, joined

OBJECTS = [json.dumps({"file_name": name, "text": row.captions[0]}) for name, row in GOOD.items()]
EMBEDDED = {f"set.parquet/{number:08d}": row for number, row in enumerate(GOOD.values())}


def cases() -> Iterator[Case]:
    yield from _json_lines()
    yield from _json_files()
    yield from _parquet_tables()
    yield from _with_images()
    yield from _of_other_kinds()


def _line(name: str, text: str | bytes, *may: str, **values: Any) -> Case:
    return case(name, text, *may, file="metadata.jsonl", **values)


def _json_lines() -> Iterator[Case]:
    """One odd line: rejected by its number, the others taken."""
    wrong = {
        "not JSON": "odd.png a cat",
        "single quotes": "{'file_name': 'odd.png', 'text': 'a cat'}",
        "a comma too many": '{"file_name": "odd.png", "text": "a cat",}',
        "an array": '["odd.png", "a cat"]',
        "a number": "17",
        "a text": '"odd.png"',
        "null": "null",
        "not a number": "NaN",
        "two objects": '{"file_name": "odd.png", "text": "a"} {"file_name": "odd.png", "text": "b"}',
        "an unclosed text": '{"file_name": "odd.png", "text": "a cat',
        "a control character": '{"file_name": "odd.png", "text": "a\x01cat"}',
        "a number of 5000 digits": f'{{"file_name": "odd.png", "text": "a", "n": {"9" * 5000}}}',
        "no name": '{"text": "a cat"}',
        "a name that is null": '{"file_name": null, "text": "a cat"}',
        "a name that is a number": '{"file_name": 17, "text": "a cat"}',
        "a name that is a list": '{"file_name": ["odd.png"], "text": "a cat"}',
        "a name that is an object": '{"file_name": {"a": 1}, "text": "a cat"}',
        "an empty name": '{"file_name": "", "text": "a cat"}',
    }
    for name, text in wrong.items():
        yield _line(name, joined([*OBJECTS, text]), REJECTED, odd=("line 4",))
    cut = '{"file_name": "odd.png"'
    for where, lines in at_each(["", *OBJECTS], cut):  # in the place of a header stands nothing
        odd = (f"line {lines.index(cut)}",)
        yield _line(f"a cut object, {where} line", joined(lines[1:]), REJECTED, odd=odd)
    for depth in (500, 10_000, 100_000):
        nested = '{"file_name": "odd.png", "text": "a cat", "more": ' + "[" * depth + "]" * depth + "}"
        may = (REJECTED, TAKEN)
        yield _line(f"lists {depth} deep", joined([*OBJECTS, nested]), *may, bad="a cat")
        nested = '{"a":' * depth + "1" + "}" * depth
        yield _line(f"objects {depth} deep", joined([*OBJECTS, nested]), REJECTED, odd=("line 4",))
        yield _line(f"{depth} brackets alone", joined([*OBJECTS, "[" * depth]), REJECTED, odd=("line 4",))
    twice = '{"file_name": "odd.png", "text": "one", "text": "two"}'
    yield _line("a key twice", joined([*OBJECTS, twice]), REJECTED, TAKEN, bad="two")
    other = '{"file_name": "odd.png", "text": "a cat", "score": NaN, "size": Infinity}'
    yield _line("numbers that are none beside", joined([*OBJECTS, other]), REJECTED, TAKEN, bad="a cat")
    yield _line(
        "a number of 1e400 beside",
        joined([*OBJECTS, other.replace("NaN", "1e400")]),
        REJECTED,
        TAKEN,
        bad="a cat",
    )
    yield _line(
        "no caption",
        joined([*OBJECTS, '{"file_name": "odd.png"}']),
        REJECTED,
        odd=("odd.png",),
        says=("empty caption",),
    )


def _json_files() -> Iterator[Case]:
    """Files of JSON lines that are another thing as a whole, or only look so."""
    good = {"file_name": "odd.png", "text": "ein schöner Käfer"}
    lines = [*OBJECTS, json.dumps(good, ensure_ascii=False)]
    text = joined(lines)
    array = [json.loads(line) for line in lines]
    yield _line("an array of all rows", json.dumps(array))
    yield _line("an array over several lines", json.dumps(array, indent=2))
    yield _line("an object of all rows", json.dumps({row["file_name"]: row["text"] for row in array}))
    yield _line("no byte", b"")
    yield _line("blank lines alone", "\n \n\n")
    yield _line("brackets alone", "[" * 100_000)
    yield _line("a page", "<!DOCTYPE html>\n<html>404</html>\n")
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        yield _line(encoding, text.encode(encoding), says=("utf",))
    yield _line("one line in latin-1", text.encode("latin-1"), REJECTED, odd=("line 4",), says=("utf-8",))
    yield _line("UTF-8 with a mark", text.encode("utf-8-sig"), TAKEN, bad=good["text"])
    for name, end in (("CRLF", "\r\n"), ("empty lines between", "\n\n")):
        yield _line(f"lines that end with {name}", joined(lines, end), TAKEN, bad=good["text"])
    yield _line("letters as escapes", joined([*OBJECTS, json.dumps(good)]), TAKEN, bad=good["text"])
    yield _line("no end of the last line", text[:-1], TAKEN, bad=good["text"])
    yield _line("NULs behind", text.encode() + bytes(100), REJECTED, bad=good["text"])


def _bytes_of(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    # Without statistics every value stands in the file once.
    pq.write_table(table, buffer, write_statistics=False, **options)
    return buffer.getvalue()


def _table(*more: tuple[Any, Any], captions: Callable[[pa.Array], pa.Array] | None = None) -> pa.Table:
    names = [*GOOD, *(name for name, _ in more)]
    texts = pa.array([*(row.captions[0] for row in GOOD.values()), *(text for _, text in more)])
    return pa.table({"file_name": names, "text": captions(texts) if captions else texts})


def _parquet_tables() -> Iterator[Case]:
    def parquet(name: str, content: bytes, *may: str, **values: Any) -> Case:
        return case(name, content, *may, file="metadata.parquet", **values)

    whole = _bytes_of(_table(("odd.png", "a cat")), compression="none", use_dictionary=False)
    yield parquet("no byte", b"")
    yield parquet("its magic alone", b"PAR1PAR1")
    yield parquet("cut at half", whole[: len(whole) // 2])
    yield parquet("last 8 bytes cut", whole[:-8])
    yield parquet("text behind", whole + b"garbage")
    yield parquet("csv by another name", b"file_name,text\n000.png,caption 0\n")
    yield parquet("magic of the encrypted", whole[:-4] + b"PARE")
    yield parquet("magic at its end flipped", flipped(whole, -1))
    for name, size in (("0", 0), ("2 GiB", 2**31 - 1), ("behind its beginning", len(whole))):
        yield parquet(f"length of its footer says {name}", whole[:-8] + struct.pack("<I", size) + whole[-4:])
    footer = len(whole) - 8 - struct.unpack("<I", whole[-8:-4])[0]
    noise = random.Random(3).randbytes(len(whole) - 8 - footer)
    yield parquet("its footer is noise", whole[:footer] + noise + whole[-8:])
    summed = _bytes_of(
        _table(("odd.png", "a cat")), compression="none", use_dictionary=False, write_page_checksum=True
    )
    yield parquet("a letter changed, with checksums", summed.replace(b"caption 1", b"caption 7", 1))
    for compression in ("snappy", "gzip", "zstd", "brotli", "lz4"):
        content = _bytes_of(_table(("odd.png", "a cat")), compression=compression)
        yield parquet(f"compressed by {compression}", content, TAKEN, bad="a cat")
    yield parquet("no rows", _bytes_of(_table().slice(0, 0)))
    yield parquet("no names", _bytes_of(_table().drop_columns(["file_name"])))
    yield parquet("no captions", _bytes_of(_table().drop_columns(["text"])))
    yield parquet("numbers for captions", _bytes_of(_table().set_column(1, "text", pa.array([1, 2, 3]))))
    nested = pa.array([{"a": {"b": 1}}] * 3)
    yield parquet("objects for captions", _bytes_of(_table().set_column(1, "text", nested)))
    yield parquet("bytes for captions", _bytes_of(_table().set_column(1, "text", pa.array([b"\xff"] * 3))))
    yield parquet("numbers for names", _bytes_of(_table().set_column(0, "file_name", pa.array([1, 2, 3]))))
    yield parquet("null for a caption", _bytes_of(_table(("odd.png", None))), REJECTED, odd=("odd.png",))
    yield parquet("null for a name", _bytes_of(_table((None, "a cat"))), REJECTED, odd=("row 4",))
    yield parquet("an empty caption", _bytes_of(_table(("odd.png", " "))), REJECTED, odd=("odd.png",))
    for name, change in (
        ("large strings", lambda texts: texts.cast(pa.large_string())),
        ("a dictionary", lambda texts: texts.dictionary_encode()),
        ("lists", lambda texts: pa.array([[text] for text in texts.to_pylist()])),
    ):
        yield parquet(
            f"captions as {name}",
            _bytes_of(_table(("odd.png", "a cat"), captions=change)),
            TAKEN,
            bad="a cat",
        )
    later = _table(("odd.png", "a cat")).append_column("when", pa.array([2**62] * 4, pa.timestamp("us")))
    yield parquet("times after the end of days beside", _bytes_of(later), TAKEN, bad="a cat")


def _images_table(
    images: Sequence[Any], captions: Sequence[Any], kind: pa.DataType | None = None
) -> pa.Table:
    return pa.table({"image": pa.array(images, kind), "text": pa.array(captions)})


_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _with_images() -> Iterator[Case]:
    """Parquet with the images inside, as the source itself."""
    images = [{"bytes": content, "path": name} for name, content in GOOD_IMAGES.items()]
    captions = [row.captions[0] for row in GOOD.values()]

    def parquet(name: str, content: bytes, *may: str, **values: Any) -> Case:
        make = single("set.parquet", content)
        return Case(
            KIND, f"parquet with images, {name}", make, may or (REFUSED,), **{"good": EMBEDDED, **values}
        )

    def more(image: Any, caption: Any = "a cat") -> bytes:
        return _bytes_of(_images_table([*images, image], [*captions, caption], _STRUCT))

    whole = _bytes_of(_images_table(images, captions, _STRUCT), compression="none", use_dictionary=False)
    yield parquet("good", whole, TAKEN)
    yield parquet("no byte", b"")
    yield parquet("cut at half", whole[: len(whole) // 2])
    yield parquet("last byte cut", whole[:-1])
    yield parquet("an image by another name", GOOD_IMAGES["000.png"])
    yield parquet("no rows", _bytes_of(_images_table([], [], _STRUCT)))
    yield parquet("no images", _bytes_of(pa.table({"text": captions})))
    yield parquet("no captions", _bytes_of(pa.table({"image": pa.array(images, _STRUCT)})))
    yield parquet(
        "links for images",
        _bytes_of(pa.table({"image": ["https://example.com/a.png"] * 3, "text": captions})),
    )
    summed = _bytes_of(
        _images_table(images, captions, _STRUCT),
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    yield parquet("a letter changed, with checksums", summed.replace(b"caption 1", b"caption 7", 1))
    at = summed.index(b"IDAT") + 20
    yield parquet("a bit of an image flipped, with checksums", flipped(summed, at), REFUSED, REJECTED, odd=())
    bad = ("00000003",)
    yield parquet(
        "a bit of an image flipped",
        flipped(whole, whole.index(b"IDAT") + 20),
        REJECTED,
        odd=("00000000",),
        **_without_first(),
    )
    for name, image in (
        ("null for an image", None),
        ("no bytes in an image", {"bytes": None, "path": "003.png"}),
        ("0 bytes in an image", {"bytes": b"", "path": "003.png"}),
        ("text in an image", {"bytes": b"no picture", "path": "003.png"}),
        ("a cut image", {"bytes": GOOD_IMAGES["000.png"][:50], "path": "003.png"}),
        ("a path outside for an image", {"bytes": None, "path": "/etc/passwd"}),
    ):
        yield parquet(name, more(image), REJECTED, odd=bad)
    for name, caption in (("null", None), ("no letter", ""), ("a zero-width space", "\u200b")):
        yield parquet(f"{name} for a caption", more(images[0], caption), REJECTED, odd=bad)
    yield parquet("numbers for captions", _bytes_of(_images_table(images, [1, 2, 3], _STRUCT)))
    yield parquet(
        "bytes alone for images",
        _bytes_of(_images_table([image["bytes"] for image in images], captions)),
        TAKEN,
    )
    two = _bytes_of(
        pa.table({"left": pa.array(images, _STRUCT), "right": pa.array(images, _STRUCT), "text": captions})
    )
    yield parquet("two columns of images", two)


def _without_first() -> dict[str, Any]:
    first = "set.parquet/00000000"
    return {"good": {name: row for name, row in EMBEDDED.items() if name != first}, "bad": {first: Row(())}}


def _of_other_kinds() -> Iterator[Case]:
    table = _images_table(list(GOOD_IMAGES.values()), [row.captions[0] for row in GOOD.values()])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    arrow = sink.getvalue().to_pybytes()
    named = {name.replace(".parquet", ".arrow"): row for name, row in EMBEDDED.items()}
    for name, content, may in (
        ("good", arrow, TAKEN),
        ("no byte", b"", REFUSED),
        ("cut at half", arrow[: len(arrow) // 2], REFUSED),
        ("cut in its header", arrow[:100], REFUSED),
        ("no end", arrow[:-8], (REFUSED, TAKEN)),
        ("text", b"no table" * 40, REFUSED),
        ("noise", random.Random(2).randbytes(4000), REFUSED),
        ("length of its header 2 GiB", arrow[:4] + struct.pack("<I", 2**31 - 1) + arrow[8:], REFUSED),
    ):
        allowed = (may,) if isinstance(may, str) else may
        yield Case(KIND, f"arrow, {name}", single("set.arrow", content), allowed, named)
    for name, content in (
        ("no byte", b""),
        ("text", b"no table" * 40),
        ("zeros", bytes(64)),
        ("a record of 2**60 bytes", struct.pack("<Q", 2**60) + bytes(60)),
        ("cut in a header", bytes(7)),
    ):
        yield Case(KIND, f"tfrecord, {name}", single("set.tfrecord", content), (REFUSED,))
    state = {**GOOD_IMAGES, "state.json": b'{"_data_files": [{"filename": "data-0.arrow"}]}'}
    yield Case(KIND, "datasets, its table is gone", folder(state), (REFUSED,))
    yield Case(KIND, "datasets, its table is cut", folder({**state, "data-0.arrow": arrow[:300]}), (REFUSED,))
    rest = {
        f"data-0.arrow/{number:08d}": Row(row.captions, picture(number))
        for number, row in enumerate(GOOD.values())
    }
    yield Case(
        KIND,
        "datasets, its state is no JSON",
        folder({"state.json": b"{", "data-0.arrow": arrow}),
        (REFUSED, TAKEN),
        rest,
    )
