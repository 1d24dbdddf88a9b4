"""Sources of another form than is read: other tables, nothing at all, pipes, sockets, devices, links."""

from __future__ import annotations

import functools
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.bad_inputs.cases import (
    EITHER,
    GOOD,
    GOOD_FILES,
    GOOD_IMAGES,
    REFUSED,
    REJECTED,
    TAKEN,
    Case,
    Row,
    csv_of,
    encoded,
    folder,
    picture,
    single,
)
from tests.bad_inputs.tars import tar
from tests.bad_inputs.zips import packed

KIND = "forms"
ODD = picture(7)
CSV = "".join(f"{line}\n" for line in csv_of(GOOD)).encode()
JSON_LINES = "".join(
    f"{json.dumps({'file_name': n, 'text': r.captions[0]})}\n" for n, r in GOOD.items()
).encode()
ODD_FILES = {"odd.png": encoded(ODD), "odd.txt": b"odd"}


def _case(name: str, make: Callable[[Path], Path], *may: str, **values: Any) -> Case:
    good = values.pop("good", GOOD)
    return Case(KIND, name, make, may or (REFUSED,), good, **values)


def cases() -> Iterator[Case]:
    yield from _other_tables()
    yield from _rivals()
    yield from _nothing()
    yield from _sources()
    yield from _special_files()
    yield from _links()
    yield from _descriptors()
    if os.geteuid():
        yield from _unreadable()


def _other_tables() -> Iterator[Case]:
    """Captions that are there, in a file that is not read: the error names it."""
    rows = [{"file_name": name, "text": row.captions[0]} for name, row in GOOD.items()]
    listing = json.dumps(rows).encode()
    tabs = CSV.replace(b",", b"\t")
    for name, content, may in (
        ("metadata.json", listing, (REFUSED,)),
        ("captions.json", listing, (REFUSED,)),
        ("annotations.json", json.dumps({"images": rows}).encode(), (REFUSED,)),
        ("dataset.json", listing, (REFUSED,)),
        ("captions.csv", CSV, (REFUSED, TAKEN)),
        ("labels.csv", CSV, (REFUSED, TAKEN)),
        ("metadata.tsv", tabs, (REFUSED, TAKEN)),
        ("captions.tsv", tabs, (REFUSED, TAKEN)),
        ("captions.jsonl", JSON_LINES, (REFUSED, TAKEN)),
        ("metadata.ndjson", JSON_LINES, (REFUSED, TAKEN)),
        ("metadata.yaml", b"000.png: caption 0\n", (REFUSED,)),
        ("captions.xlsx", b"PK\3\4" + bytes(60), (REFUSED,)),
        ("Metadata.csv", CSV, (REFUSED, TAKEN)),
        ("metadata.CSV", CSV, (REFUSED, TAKEN)),
    ):
        yield _case(
            f"{name} beside images",
            folder({**GOOD_IMAGES, name: content}),
            *may,
            says=(name.lower(),) if may == (REFUSED,) else (),
        )
    for name, content in (
        ("captions.txt", b"000.png caption 0\n"),
        ("README.md", b"# Cats\n"),
        ("metadata.csv.gz", b"\x1f\x8b" + bytes(30)),
    ):
        yield _case(f"{name} beside images", folder({**GOOD_IMAGES, name: content}))
    table = {"metadata.jsonl": JSON_LINES}
    for name, content, may in (
        ("images.zip", packed(GOOD_IMAGES), (REFUSED,)),
        ("images.tar.gz", packed(GOOD_IMAGES), (REFUSED,)),
        ("images.tar", tar(GOOD_IMAGES), (REFUSED, TAKEN)),
        ("data/images.zip", packed(GOOD_IMAGES), (REFUSED,)),
    ):
        good = {f"{name}/{key}": row for key, row in GOOD.items()} if may != (REFUSED,) else GOOD
        yield _case(
            f"{name} beside metadata.jsonl",
            folder({**table, name: content}),
            *may,
            good=good,
            says=(name,) if may == (REFUSED,) else (),
        )
    yield _case(
        "metadata.csv beside images.zip",
        folder({"metadata.csv": CSV, "images.zip": packed(GOOD_IMAGES)}),
        says=("images.zip",),
    )
    yield _case("images.zip in a folder alone", folder({"images.zip": packed(GOOD_FILES)}))


def _rivals() -> Iterator[Case]:
    for one, content, other, rival in (
        ("metadata.csv", CSV, "metadata.jsonl", JSON_LINES),
        ("metadata.csv", CSV, "data.csv", CSV.replace(b"file_name,text", b"image_path,caption")),
        ("metadata.jsonl", JSON_LINES, "metadata.parquet", b"PAR1PAR1"),
        ("metadata.csv", CSV, "metadata.parquet", b""),
    ):
        make = folder({**GOOD_IMAGES, one: content, other: rival})
        yield _case(f"both {one} and {other}", make, says=(other,))
    deeper = {**GOOD_IMAGES, "metadata.csv": CSV, "sub/metadata.csv": CSV, "sub/metadata.jsonl": JSON_LINES}
    yield _case("both in a folder below", folder(deeper))
    yield _case(
        "a table in a folder above its images",
        folder({**GOOD_IMAGES, "sub/metadata.csv": CSV.replace(b"0", b"../0", 1)}),
        REJECTED,
        good={"000.png": GOOD["000.png"]},
    )
    sidecar = {**GOOD_FILES, "metadata.csv": CSV.replace(b"caption", b"other caption")}
    others = {name: Row((f"other {row.captions[0]}",), row.picture) for name, row in GOOD.items()}
    yield _case("both a table and caption files", folder(sidecar), TAKEN, REFUSED, good=others)


def _nothing() -> Iterator[Case]:
    texts = {name: content for name, content in GOOD_FILES.items() if name.endswith(".txt")}
    yield _case("an empty folder", folder({}))
    yield _case("a folder of folders", folder({}, lambda target: (target / "a" / "b").mkdir(parents=True)))
    yield _case("hidden files alone", folder({f".{name}": content for name, content in GOOD_FILES.items()}))
    yield _case(
        "a hidden folder alone", folder({f".git/{name}": content for name, content in GOOD_FILES.items()})
    )
    yield _case(
        "what macOS leaves alone",
        folder({f"__MACOSX/{name}": content for name, content in GOOD_FILES.items()}),
    )
    yield _case("images alone", folder(GOOD_IMAGES))
    yield _case("caption files alone", folder(texts))
    yield _case("a table alone", folder({"metadata.csv": CSV}))
    yield _case("tables of nothing", folder({"metadata.csv": b"file_name,text\n", "sub/metadata.csv": b""}))
    yield _case("images in folders, captions in another", folder(
        {**{f"images/{n}": c for n, c in GOOD_IMAGES.items()}, **{f"captions/{n}": c for n, c in texts.items()}}))  # fmt: skip
    yield _case("documents alone", folder({"a.pdf": b"%PDF-1.4", "b.docx": b"PK", "c.py": b"print(1)"}))
    yield _case(
        "an image without a caption",
        folder({**GOOD_FILES, "odd.png": encoded(ODD)}),
        REJECTED,
        odd=("odd.png",),
    )
    yield _case(
        "a caption without an image", folder({**GOOD_FILES, "odd.txt": b"odd"}), REJECTED, odd=("odd.txt",)
    )
    yield _case("an archive of nothing but folders", single("set.zip", packed({"a/": b"", "b/": b""})))
    yield _case("an archive without a caption", single("set.zip", packed(GOOD_IMAGES)))
    yield _case("an archive of captions alone", single("set.tar", tar(texts)))


def _sources() -> Iterator[Case]:
    """What prepare.source may name by mistake."""
    for name, content in (("one.png", GOOD_IMAGES["000.png"]), ("one.txt", b"a cat"), ("one.csv", CSV), ("metadata.jsonl", JSON_LINES), ("one", b""),
                          ("one.rar", b"Rar!"), ("one.7z", b"7z"), ("one.gz", b"\x1f\x8b"), ("one.json", b"[]"), ("one.npz", b"PK"), ("one.pkl", b"\x80\4.")):  # fmt: skip
        yield _case(f"a file {name} as the source", single(name, content))
    for name in ("gone", "gone.tar", "gone/set.zip", "gone.parquet"):
        yield _case(f"{name} as the source", lambda root, name=name: root / name)
    yield _case("a source of 5000 letters", lambda root: root / ("x" * 5000))
    yield _case("a source of 300 letters", lambda root: root / ("x" * 300 + ".tar"))
    yield _case("a device as the source", lambda root: Path("/dev/zero"))
    yield _case("nothing of /dev as the source", lambda root: Path("/dev/null"))
    for value in ("", None, 17, ["a"], "a\0b", "https://example.com/set.zip", "s3://bucket/set", "~", "*"):
        yield _case(f"{value!r} as the source", folder(GOOD_FILES), params={"source": value})
    good = folder(GOOD_FILES)
    for form in ("{}/", "./{}", "{}//", "{}/../set"):
        yield _case(
            f"{form.format('set')} as the source", good, TAKEN, params={"source": form.format("input/set")}
        )
    with_blank = functools.partial(_renamed_set, name="my set (1)")
    yield _case("blanks in the source's name", with_blank, TAKEN)
    for name, maker in (("a pipe", _pipe), ("a socket", _socket)):
        for file in ("set", "set.tar", "set.zip", "set.parquet"):
            yield _case(f"{name} {file} as the source", functools.partial(_alone, maker=maker, name=file))
    for name, target in (("nothing", "gone"), ("itself", "set")):
        yield _case(
            f"a link to {name} as the source",
            functools.partial(_alone, maker=functools.partial(_link, target=target), name="set"),
        )


def _renamed_set(root: Path, name: str) -> Path:
    return folder(GOOD_FILES)(root).rename(root / name)


def _alone(root: Path, maker: Callable[[Path], None], name: str) -> Path:
    maker(root / name)
    return root / name


def _pipe(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)


def _socket(path: Path) -> None:
    """A name in the file system is 108 bytes at most, so that it is bound from its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    here = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)


def _link(path: Path, target: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def _with(files: Mapping[str, bytes], maker: Callable[[Path], None], name: str) -> Callable[[Path], Path]:
    return folder(dict(files), lambda target: maker(target / name))


_SPECIAL: dict[str, Callable[[Path], None]] = {
    "a pipe": _pipe,
    "a socket": _socket,
    "a link to a device": functools.partial(_link, target="/dev/zero"),
    "a link to nothing": functools.partial(_link, target="gone"),
    "a link to itself": lambda path: _link(path, path.name),
    "a folder": lambda path: path.mkdir(parents=True),
}
_CAPTIONED = {**GOOD_FILES, "odd.txt": b"odd"}
_PICTURED = {**GOOD_FILES, "odd.png": encoded(ODD)}


def _special_files() -> Iterator[Case]:
    """What is no file in every place where a file is read. None may be opened: reading would wait, or never end."""
    for what, maker in _SPECIAL.items():
        yield _case(f"{what} for an image", _with(_CAPTIONED, maker, "odd.png"), REJECTED, REFUSED)
        yield _case(f"{what} for a caption", _with(_PICTURED, maker, "odd.txt"), REJECTED, REFUSED)
        yield _case(f"{what} for a JSON of a caption", _with(_PICTURED, maker, "odd.json"), REJECTED, REFUSED)
        table = {**GOOD_IMAGES, "metadata.csv": CSV + b"odd.png,odd\n"}
        yield _case(
            f"{what} for an image of a table", _with(table, maker, "odd.png"), REJECTED, odd=("odd.png",)
        )
        for name in ("metadata.csv", "metadata.jsonl", "metadata.parquet", "data.csv"):
            may = (REFUSED, TAKEN) if what == "a folder" else (REFUSED,)
            yield _case(f"{what} for {name}", _with(GOOD_FILES, maker, name), *may)
        for name in ("more.tar", "more.parquet", "openmoji.json", "state.json", "notes.md"):
            yield _case(f"{what} for {name}", _with(GOOD_FILES, maker, name), REFUSED, TAKEN)


def _links() -> Iterator[Case]:
    def outside(target: Path, name: str, content: bytes) -> None:
        elsewhere = target.parent / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / name).write_bytes(content)
        (target / name).symlink_to(f"../elsewhere/{name}")

    odd_rows = {"odd.png": Row(("odd",), ODD)}
    image = functools.partial(outside, name="odd.png", content=encoded(ODD))
    yield _case("a link to an image outside", folder(_CAPTIONED, image), TAKEN, REJECTED, bad=odd_rows)
    text = functools.partial(outside, name="odd.txt", content=b"odd")
    yield _case("a link to a caption outside", folder(_PICTURED, text), REJECTED, REFUSED, says=("outside",))
    secret = functools.partial(_link, target="/etc/passwd")
    yield _case(
        "a link to a secret for a caption",
        _with(_PICTURED, secret, "odd.txt"),
        REJECTED,
        REFUSED,
        says=("outside",),
    )
    table = functools.partial(outside, name="metadata.csv", content=CSV)
    yield _case("a link to a table outside", folder(GOOD_IMAGES, table), REFUSED)
    inside = {**GOOD_FILES, "kept/odd.bin": encoded(ODD), "odd.txt": b"odd"}
    yield _case(
        "a link to an image inside",
        _with(inside, functools.partial(_link, target="kept/odd.bin"), "odd.png"),
        TAKEN,
        good={**GOOD, **odd_rows},
    )
    for name, target in (
        ("above", ".."),
        ("that holds it", "."),
        ("of its parent", "../set"),
        ("of the system", "/etc"),
    ):
        yield _case(
            f"a link to the folder {name}",
            _with(GOOD_FILES, functools.partial(_link, target=target), "more"),
            says=("more",),
        )
    more = {**GOOD_FILES, "sub/a.md": b"x"}
    yield _case(
        "a link to a folder inside",
        _with(more, functools.partial(_link, target="sub"), "more"),
        REFUSED,
        TAKEN,
    )
    yield _case(
        "a link to a folder, deep below",
        _with(more, functools.partial(_link, target=".."), "sub/b"),
        says=("sub/b",),
    )

    def around(target: Path) -> None:
        (target / "a").symlink_to("b")
        (target / "b").symlink_to("a")

    yield _case("two links to each other", folder(GOOD_FILES, around), TAKEN, REFUSED, REJECTED)

    def linked(root: Path) -> Path:
        folder(GOOD_FILES)(root)
        (root / "link").symlink_to("set")
        return root / "link"

    yield _case("a link to a good folder as the source", linked, TAKEN, REFUSED)

    def hard(target: Path) -> None:
        os.link(target / "000.png", target / "odd.png")

    yield _case(
        "a hard link to a good image",
        folder(_CAPTIONED, hard),
        TAKEN,
        bad={"odd.png": Row(("odd",), picture(0))},
    )


def _descriptors() -> Iterator[Case]:
    """openmoji.json says that a folder is artwork of a package."""
    for name, content in (
        ("no byte", b""), ("no JSON", b"{"), ("an array", b"[]"), ("a number", b"17"), ("null", b"null"), ("nothing known", b"{}"), ("UTF-16", "{}".encode("utf-16")),
        ("100000 brackets", b"[" * 100_000), ("numbers for texts", b'{"package": 1, "version": 2}'), ("no UTF-8", b'{"package": "\xff"}'),
        ("a package that is not installed", b'{"package": "no_such_package_of_emoji", "version": "1"}'),
    ):  # fmt: skip
        yield _case(f"openmoji.json, {name}", folder({**GOOD_FILES, "openmoji.json": content}))


def _unreadable() -> Iterator[Case]:
    """Modes that let nobody read: the superuser reads all the same."""

    def closed(target: Path, name: str) -> None:
        (target / name).chmod(0)

    full = {**GOOD_FILES, **ODD_FILES}
    yield _case(
        "an image that may not be read", folder(full, functools.partial(closed, name="odd.png")), *EITHER[:2]
    )
    yield _case(
        "a caption that may not be read", folder(full, functools.partial(closed, name="odd.txt")), *EITHER[:2]
    )
    table = {**GOOD_IMAGES, "metadata.csv": CSV}
    yield _case("a table that may not be read", folder(table, functools.partial(closed, name="metadata.csv")))
