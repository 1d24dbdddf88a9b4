"""Names: written otherwise than on the disk, leading elsewhere, of bytes that are no text, of letters that steer."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from tests.bad_inputs.cases import (
    GOOD,
    GOOD_FILES,
    GOOD_IMAGES,
    REFUSED,
    REJECTED,
    TAKEN,
    Case,
    Row,
    encoded,
    files_of,
    folder,
    picture,
    rows,
    single,
)
from tests.bad_inputs.zips import packed

KIND = "names"
ODD = picture(7)
OTHER = picture(8)
CAPTION = "an odd name"
_LETTERS = "é", "ü", "が", "한"  # each has two forms in Unicode


def listed(
    name: str,
    written: str,
    files: Mapping[str | bytes, bytes],
    *may: str,
    stored: Mapping[str, Row] | None = None,
    **values: Any,
) -> Case:
    """A metadata.jsonl that names ``written`` after the good rows, beside ``files``."""
    lines = [json.dumps({"file_name": good, "text": row.captions[0]}) for good, row in GOOD.items()]
    lines.append(json.dumps({"file_name": written, "text": CAPTION}, ensure_ascii=not written.isprintable()))
    table = "".join(f"{line}\n" for line in lines).encode()
    return Case(
        KIND,
        name,
        folder({**GOOD_IMAGES, **files, "metadata.jsonl": table}),
        may or (TAKEN,),
        GOOD,
        stored or {},
        **values,
    )


def found(name: str, written: str, on_disk: str, *may: str, **values: Any) -> Case:
    """``written`` means ``on_disk``, which is the one file that it can mean."""
    stored = {on_disk: Row((CAPTION,), ODD)}
    return listed(name, written, {on_disk: encoded(ODD)}, *may, stored=stored, **values)


def cases() -> Iterator[Case]:
    yield from _alike()
    yield from _ambiguous()
    yield from _tidied()
    yield from _leading_elsewhere()
    yield from _strange_letters()
    yield from _of_other_encodings()
    yield from _caption_files()
    yield from _in_zips()


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def _alike() -> Iterator[Case]:
    for letter in _LETTERS:
        yield found(f"{letter} decomposed on the disk", _nfc(f"{letter}.png"), _nfd(f"{letter}.png"))
        yield found(f"{letter} composed on the disk", _nfd(f"{letter}.png"), _nfc(f"{letter}.png"))
    yield found("a folder decomposed on the disk", _nfc("é/a.png"), _nfd("é/a.png"))
    for written, on_disk in (("CAT.png", "cat.png"), ("cat.png", "Cat.PNG"), ("Sub/cat.png", "sub/Cat.png"), ("STRASSE.png", "straße.png"),
                             ("ÉTÉ.png", "été.png"), ("ΣΑΣ.png", "σας.png")):  # fmt: skip
        yield found(f"{written} for {on_disk}", written, on_disk)
    yield found("capitals and decomposed at once", _nfc("ÉTÉ.PNG"), _nfd("été.png"))


def _ambiguous() -> Iterator[Case]:
    files = {"Cat.png": encoded(ODD), "CAT.png": encoded(OTHER)}
    yield listed(
        "cat.png for Cat.png and CAT.png", "cat.png", files, REJECTED, odd=("cat.png",), says=("cat.png",)
    )
    yield listed("Cat.png beside CAT.png", "Cat.png", files, stored={"Cat.png": Row((CAPTION,), ODD)})
    yield listed("CAT.png beside Cat.png", "CAT.png", files, stored={"CAT.png": Row((CAPTION,), OTHER)})
    both = {_nfc("é.png"): encoded(ODD), _nfd("é.png"): encoded(OTHER)}
    for form, shown in ((_nfc, ODD), (_nfd, OTHER)):
        name = form("é.png")
        yield listed(
            f"é in both forms, {len(name)} letters", name, both, stored={name: Row((CAPTION,), shown)}
        )
    mixed = _nfc("é") + _nfd("é") + ".png"
    forms = {_nfc("éé.png"): encoded(ODD), _nfd("éé.png"): encoded(OTHER)}
    yield listed("é in both forms for é in each", mixed, forms, REJECTED, odd=(".png",))
    folders = {"Sub/a.png": encoded(ODD), "SUB/a.png": encoded(OTHER)}
    yield listed("sub/a.png for Sub/a.png and SUB/a.png", "sub/a.png", folders, REJECTED, odd=("sub/a.png",))
    capitals = {"É.png": encoded(ODD), _nfd("é.png"): encoded(OTHER)}
    yield listed(
        "é.png for É.png and its decomposed form",
        "é.png",
        capitals,
        TAKEN,
        REJECTED,
        stored={_nfd("é.png"): Row((CAPTION,), OTHER)},
    )


def _tidied() -> Iterator[Case]:
    for written in (
        " odd.png",
        "odd.png ",
        "\todd.png\n",
        "\u00a0odd.png",
        "./odd.png",
        ".\\odd.png",
        "sub/../odd.png",
        ".//odd.png",
    ):
        yield found(f"{written!r} for odd.png", written, "odd.png")
    for written in (
        "sub\\odd.png",
        "sub//odd.png",
        "sub/./odd.png",
        "sub\\\\odd.png",
        " sub\\odd.png ",
        "a/../sub/odd.png",
    ):
        yield found(f"{written!r} for sub/odd.png", written, "sub/odd.png")
    for on_disk in (" odd.png", "odd .png", "odd.png .png", "sub\\odd.png", "a  b.png", "odd..png", "-odd.png", "~odd.png", "%20.png", "#odd.png",
                    "CON.png", "'odd'.png", '"odd".png', "$(id).png", "*.png", "[odd].png", "{odd}.png", "a;b.png", "a&b.png"):  # fmt: skip
        yield found(f"{on_disk!r} as it is", on_disk, on_disk)
    for written in ("odd", "odd%2Epng", "odd.jpg", "od.png", "odd.png.png", "o\u200bdd.png"):
        yield listed(
            f"{written!r} beside odd.png",
            written,
            {"odd.png": encoded(ODD)},
            REJECTED,
            odd=(written,),
            says=("no such file",),
        )
    twice = [
        json.dumps({"file_name": name, "text": text})
        for name, text in (("odd.png", "one"), ("./ODD.png", "two"))
    ]
    table = "".join(
        f"{line}\n"
        for line in [*(json.dumps({"file_name": n, "text": r.captions[0]}) for n, r in GOOD.items()), *twice]
    )
    files = {**GOOD_IMAGES, "odd.png": encoded(ODD), "metadata.jsonl": table.encode()}
    yield Case(
        KIND, "one file by two names", folder(files), (TAKEN,), {**GOOD, "odd.png": Row(("one", "two"), ODD)}
    )


def _leading_elsewhere() -> Iterator[Case]:
    inside = {"sub/a.png": encoded(ODD)}
    for written in ("../odd.png", "..\\odd.png", "sub/../../odd.png", "/odd.png", "/etc/passwd", "C:\\odd.png", "C:odd.png", "c:/odd.png",
                    "\\\\server\\odd.png", "//server/odd.png", "..", "../set/000.png", "sub/../../set/000.png"):  # fmt: skip
        yield listed(f"{written!r}", written, inside, REJECTED, says=("outside",))
    for written in ("~/odd.png", "file:///etc/passwd", "https://example.com/odd.png", "data:image/png;base64,AAAA", "$HOME/odd.png",
                    "sub", "sub/", ".", "./", "000.png/", "000.png/odd.png", "sub/a.png/..", "metadata.jsonl"):  # fmt: skip
        may = (REJECTED, TAKEN) if written == "000.png/" else (REJECTED,)
        yield listed(f"{written!r} that is no image", written, inside, *may)
    for written in ("", " ", "\t", "\u00a0", "\n"):
        yield listed(f"{written!r} for a name", written, {}, REJECTED, odd=("line 4",))
    for length in (255, 256, 300, 5000, 100_000):
        yield listed(
            f"a name of {length} letters",
            "x" * (length - 4) + ".png",
            {},
            REJECTED,
            says=("no such file", "too long"),
        )
    yield listed("a path of 3000 folders", "a/" * 3000 + "x.png", {}, REJECTED)
    yield listed("NUL in a name", "odd\0.png", {"odd.png": encoded(ODD)}, REJECTED)
    yield listed("half a pair of surrogates in a name", "odd\ud800.png", {"odd.png": encoded(ODD)}, REJECTED)
    yield listed("a byte as a surrogate in a name", "odd\udcff.png", {b"odd\xff.png": encoded(ODD)}, REJECTED, TAKEN,
                 stored={"odd\\xff.png": Row((CAPTION,), ODD)})  # fmt: skip


def _strange_letters() -> Iterator[Case]:
    for name, letters in (
        ("a line feed", "o\ndd"), ("a carriage return", "o\rdd"), ("a tab", "o\tdd"), ("a bell", "o\x07dd"),
        ("red on terminals", "\x1b[31modd"), ("clears terminals", "\x1b[2J\x1b[Hodd"), ("the title of terminals", "\x1b]0;odd\x07"),
        ("delete", "odd\x7f"), ("C1", "odd\x9b31m"), ("right to left", "\u202egnp.ddo"), ("a zero-width space", "o\u200bdd"),
        ("U+2028", "o\u2028dd"), ("an emoji", "😀"), ("joined emoji", "👩‍🚀"), ("U+FEFF", "\ufeffodd"), ("a private letter", "\ue000"),
        ("letters of two bytes more", "𝔬𝔡𝔡"), ("combining marks", "o" + "\u0301" * 60),
    ):  # fmt: skip
        yield found(f"{name} in a name", f"{letters}.png", f"{letters}.png", TAKEN, REJECTED)
        broken = {**GOOD_FILES, f"{letters}.png": b"no picture", f"{letters}.txt": CAPTION.encode()}
        yield Case(
            KIND,
            f"{name} in the name of a broken image",
            folder(broken),
            (REJECTED,),
            GOOD,
            says=("not an image",),
        )
    for letters in ("\x1b[31mset", "s\net", "\u202etes", "s\x07et"):
        yield Case(
            KIND,
            f"a source {letters!r} that is no archive",
            single(f"{letters}.tar", b"no archive"),
            (REFUSED,),
        )


def _of_other_encodings() -> Iterator[Case]:
    for encoding, letters in (("latin-1", "café"), ("cp932", "日本"), ("gb18030", "红猫"), ("big5", "紅貓"), ("euc_kr", "고양이"),
                              ("cp1251", "кот"), ("cp437", "café"), ("cp850", "größe")):  # fmt: skip
        name = f"{letters}.png".encode(encoding)
        shown = name.decode("utf-8", "backslashreplace")
        row = Row((CAPTION,), ODD, also=(f"{letters}.png",))
        yield listed(
            f"{letters} in {encoding} on the disk",
            f"{letters}.png",
            {name: encoded(ODD)},
            stored={shown: row},
        )
        files = {**GOOD_FILES, name: encoded(ODD), f"{letters}.txt".encode(encoding): CAPTION.encode()}
        yield Case(
            KIND,
            f"{letters} in {encoding} with a caption file",
            folder(files),
            (TAKEN, REJECTED),
            GOOD,
            {shown: row},
        )
    lost = {**GOOD_FILES, b"\xff\xfe.png": encoded(ODD)}
    yield Case(KIND, "bytes that are no text, no caption", folder(lost), (REJECTED,), GOOD, odd=(".png",))
    lost = {**GOOD_FILES, b"\xff\xfe.png": b"no picture", b"\xff\xfe.txt": b"a cat"}
    yield Case(KIND, "bytes that are no text, a broken image", folder(lost), (REJECTED,), GOOD, odd=(".png",))
    lost = {**GOOD_FILES, b"sub\xff/a.png": encoded(ODD), b"sub\xff/a.txt": CAPTION.encode()}
    yield Case(
        KIND,
        "a folder of bytes that are no text",
        folder(lost),
        (TAKEN, REJECTED),
        GOOD,
        {"sub\\xff/a.png": Row((CAPTION,), ODD)},
    )


def _caption_files() -> Iterator[Case]:
    """Images with captions in files whose names differ."""
    for image, sidecar in (("odd.png", "odd.TXT"), ("odd.PNG", "odd.txt"), ("Odd.png", "odd.txt"), ("odd.png", "ODD.TXT"), ("odd.png", "odd.png.txt"),
                           ("odd.jpeg", "odd.Txt"), ("odd.png", "odd.CAPTION"), (_nfc("é.png"), _nfd("é.txt")), (_nfd("é.png"), _nfc("é.txt")),
                           ("a.b.png", "a.b.txt"), ("a b.png", "a b.txt"), ("Sub/odd.png", "Sub/ODD.txt")):  # fmt: skip
        content = {**GOOD_FILES, image: encoded(ODD), sidecar: CAPTION.encode()}
        shown = f"{image} with {sidecar}, {len(sidecar)} letters"
        yield Case(KIND, shown, folder(content), (TAKEN,), {**GOOD, image: Row((CAPTION,), ODD)})
    two = {**GOOD_FILES, "Odd.png": encoded(ODD), "odd.txt": b"one", "ODD.txt": b"two"}
    yield Case(
        KIND,
        "two caption files that are alike",
        folder(two),
        (REJECTED,),
        GOOD,
        says=("alike", "several", "ambiguous"),
    )
    lone = {**GOOD_FILES, "odd.png": encoded(ODD), "od.txt": b"one"}
    yield Case(
        KIND, "a caption file of another name", folder(lone), (REJECTED,), GOOD, odd=("od.txt", "odd.png")
    )
    lone = {**GOOD_FILES, "odd.png": encoded(ODD), "sub/odd.txt": b"one"}
    yield Case(
        KIND,
        "a caption file in another folder",
        folder(lone),
        (REJECTED,),
        GOOD,
        odd=("odd.png", "sub/odd.txt"),
    )
    lone = {**GOOD_FILES, "odd.png": encoded(ODD), ".odd.txt": b"one"}
    yield Case(KIND, "a hidden caption file", folder(lone), (REJECTED,), GOOD, odd=("odd.png",))


def _in_zips() -> Iterator[Case]:
    """Names in zips that do not say their encoding: `zipfile` sets the flag of UTF-8, which is taken away."""
    good = rows(2)
    for encoding, letters in (("utf-8", "café"), ("utf-8", "日本"), ("utf-8", _nfd("é")), ("cp932", "日本"), ("latin-1", "café"), ("gb18030", "红猫"),
                              ("cp1251", "кот"), ("cp437", "café"), ("cp850", "größe"), ("euc_kr", "고양이")):  # fmt: skip
        name = f"{letters}.png"
        table = (
            "file_name,text\n"
            + "".join(f"{n},{r.captions[0]}\n" for n, r in good.items())
            + f"{name},{CAPTION}\n"
        )
        plain = {n: c for n, c in GOOD_IMAGES.items() if n in good}
        raw = name.encode(encoding)
        content = _renamed(
            packed({**plain, "X" * len(raw): encoded(ODD), "metadata.csv": table.encode()}), raw
        )
        shown = raw.decode("utf-8", "backslashreplace")
        row = Row((CAPTION,), ODD, also=(name, shown))
        yield Case(
            KIND,
            f"zip, {_shown(letters)} in {encoding} without a flag, in a table",
            single("set.zip", content),
            (TAKEN,),
            good,
            {shown: row},
        )
        text = f"{letters}.txt".encode(encoding)
        pair = _renamed(
            packed({**files_of(good), "X" * len(raw): encoded(ODD), "Y" * len(text): CAPTION.encode()}),
            raw,
            text,
        )
        yield Case(
            KIND,
            f"zip, {_shown(letters)} in {encoding} without a flag, with a caption file",
            single("set.zip", pair),
            (TAKEN,),
            good,
            {shown: row},
        )


def _shown(letters: str) -> str:
    return letters if letters.isascii() or unicodedata.is_normalized("NFC", letters) else "decomposed letters"


def _renamed(archive: bytes, *names: bytes) -> bytes:
    """A zip with the names XX... and YY... replaced by bytes; without the flag, for these are ASCII."""
    for letter, name in zip((b"X", b"Y"), names, strict=False):
        assert archive.count(letter * len(name)) == 2
        archive = archive.replace(letter * len(name), name)
    return archive
