"""The page is whole in itself, shows everything the run left, and its slider works in a browser."""

import base64
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from fsspec.implementations.dirfs import DirFileSystem
from PIL import Image

from stages import gallery
from stages.lib.core.files import write_json_lines
from stages.lib.core.sums import write_sealed_json, write_sums
from stages.lib.core.tensors import write_safetensors
from stages.lib.frame.errors import StageError
from stages.lib.page.charts import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    draw_chart,
    interval,
    number,
    signed,
    tick_labels,
    ticks,
    whiskers,
)
from stages.lib.page.lineage import read_weights_lineage
from stages.lib.page.metric_lines import verdict
from stages.lib.page.pictures import PictureFiles
from stages.lib.page.run import Curve, Estimate
from stages.lib.page.run_outputs import UNUSED, read_run
from tests.browser import headless_browser
from tests.conftest import REPOSITORY
from tests.evaluations import PROMPTS, metric, seal_run, write_lock, write_run

PAGE = Path("data/evaluation/index.html")


class Parsed(HTMLParser):
    """A page taken apart.

    Attributes:
        tags: every start tag with its attributes.
        text: what is read, single spaces.
        drawings: pixels of the static images, in order.
        pictures: pixels that the script shows, by name.

    Args:
        html: of the page.
        directory: that it lies in.
    """

    def __init__(self, html: str, directory: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.texts: list[str] = []
        self.scripts: dict[str, str] = {}
        self.feed(html)
        self.text = " ".join(" ".join(self.texts).split())
        self.data = json.loads(self.scripts["application/json"])
        sources = [attributes.get("src") or "" for tag, attributes in self.tags if tag == "img"]
        self.drawings = [decode(source, directory) for source in sources if source]
        self.pictures = {
            name: decode(entry["uri"], directory) for name, entry in self.data["pictures"].items()
        }

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside.append(dict(attrs).get("type") or tag)

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self.inside.pop()

    def handle_data(self, data):
        if not self.inside:
            self.texts.append(data)
        else:
            self.scripts[self.inside[-1]] = self.scripts.get(self.inside[-1], "") + data


def decode(address: str, directory: Path) -> bytes:
    """Pixels of a picture inside the page or beside it."""
    prefix, _, content = address.partition(",")
    if prefix == "data:image/webp;base64":
        return pixels(base64.b64decode(content))
    assert re.fullmatch(r"\w+_files/[0-9a-f]{16}\.webp", address), address
    return pixels((directory / address).read_bytes())


def pixels(content: bytes) -> bytes:
    image = Image.open(io.BytesIO(content)).convert("RGB")
    return repr(image.size).encode() + image.tobytes()


def parse(path: Path) -> Parsed:
    return Parsed(path.read_text(encoding="utf-8"), path.parent)


def check_self_contained(page: Parsed) -> None:
    """No attribute, style or script names another place."""
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            value = attributes.get(name) or ""
            beside = re.fullmatch(r"(index|comparison)_files/[0-9a-f]{16}\.webp", value) and tag == "img"
            assert not value or value.startswith(("data:", "#")) or beside, (tag, name, value[:80])
    assert not re.search(r"url\(|@import", page.scripts["style"])
    addresses = set(re.findall(r"https?://[^\"'\s]*", page.scripts["script"]))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    policies = [attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes]
    assert len(policies) == 1 and "default-src 'none'; img-src data: file: 'self';" in policies[0]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    return tmp_path


def written() -> Parsed:
    gallery.main(None)
    return parse(PAGE)


def test_every_picture_is_inside_and_nothing_is_fetched(run):
    page = written()
    check_self_contained(page)
    samples = {pixels(path.read_bytes()) for path in Path("data").glob("*/samples/*/*.png")}
    assert set(page.pictures.values()) == samples
    drawn = [path for path in Path("data").rglob("*.png") if "samples" not in path.parts]
    assert len(drawn) == 9
    assert {pixels(path.read_bytes()) for path in drawn} == set(page.drawings)


def test_each_cell_shows_its_own_prompt_seed_and_setting(run):
    data = written().data
    assert [prompt["text"] for prompt in data["prompts"]] == list(PROMPTS)
    assert data["prompts"][0]["example"] == "hearts/<red>.png"
    folders = ("baseline", "evaluation")
    for folder, source in zip(folders, data["sources"], strict=True):
        for cell, name in source["cells"].items():
            setting, prompt, place = map(int, cell.split("/"))
            setting_name = ("base_guidance5_steps25", "ddim_guidance2_steps10")[setting]
            file = Path(f"data/{folder}/samples/{setting_name}/prompt{prompt:02d}_seed{(0, 7)[place]}.png")
            assert decode(data["pictures"][name]["uri"], PAGE.parent) == pixels(file.read_bytes())


def test_the_same_inputs_give_the_same_bytes(run, tmp_path, monkeypatch):
    gallery.main(None)
    first = PAGE.read_bytes()
    gallery.main(None)
    assert PAGE.read_bytes() == first
    other = tmp_path / "elsewhere"
    other.mkdir()
    write_run(other)
    monkeypatch.chdir(other)
    gallery.main(None)
    assert PAGE.read_bytes() == first
    assert str(tmp_path).encode() not in first


def test_no_text_of_a_user_becomes_markup(run):
    page = written()
    allowed = {"application/json", "script"}
    assert {attributes.get("type") or tag for tag, attributes in page.tags if tag == "script"} == allowed
    assert all("swatch" in attributes["class"] for tag, attributes in page.tags if tag == "i")
    html = PAGE.read_text()
    assert "<b>bold" not in html and "<i>.png" not in html and "alert(1)</script" not in html
    assert "0<i>.png" in page.text and "hearts/<red>.png" in page.text


def test_text_of_any_language_is_kept_and_takes_its_own_direction(run):
    page = written()
    assert "قلب أحمر" in page.text and "赤いハート 🫀" in page.text
    cells = [attributes for tag, attributes in page.tags if tag == "td" and attributes.get("dir") == "auto"]
    assert len(cells) > 50
    assert ("meta", {"charset": "utf-8"}) in page.tags


def test_numbers_intervals_and_verdicts_are_shown(run):
    text = written().text
    assert (
        "Held-out loss, base → fine-tuned 0.1000 → 0.08000 −0.02000 (−20.0 %), interval −0.03000 to −0.01000"
        in text
    )
    metrics = text[text.index("Metrics Whiskers") : text.index("Training Point")]
    for name, shown in (
        ("Held-out loss", "fine-tuned 0.08000 0.07000 to 0.09000 −0.02000 better −0.03000 to −0.01000"),
        ("CLIP score", "fine-tuned 21.51 21.50 to 21.52 +0.007812 unsettled"),
        ("KID", "fine-tuned 0.06000 0.05000 to 0.07000 +0.04000 worse"),
        ("KID of real images", "held-out images 0.001000 0.0005000 to 0.001500"),
        ("FID", "base – fine-tuned –"),
    ):
        assert shown in metrics, name
    assert metrics.count("held-out images") == 1
    assert "how KID is measured" in metrics and "↑ higher is better" in metrics


def test_more_of_what_is_better_the_higher_is_better(run):
    report = json.loads(Path("data/evaluation/report.json").read_text())
    report["metrics"] += [
        metric(f"metric_{number}", f"Metric {number}", "higher", 0.5, tuned)
        for number, tuned in enumerate((0.6, 0.4))
    ]
    Path("data/evaluation/report.json").write_text(json.dumps(report))
    seal_run(Path())
    text = written().text
    assert "Metric 0 ↑ higher is better" in text
    assert "fine-tuned 0.6000 0.5900 to 0.6100 +0.1000 better 0.09000 to 0.1100" in text
    assert "fine-tuned 0.4000 0.3900 to 0.4100 −0.1000 worse −0.1100 to −0.09000" in text


def test_a_verdict_follows_the_interval_and_the_direction():
    def judged(better: str, low: float | None, high: float | None) -> str:
        return verdict(Estimate(0.0, low, high), better)

    assert judged("lower", -2, -1) == judged("higher", 1, 2) == "better"
    assert judged("lower", 1, 2) == judged("higher", -2, -1) == "worse"
    assert judged("lower", -1, 1) == judged("lower", 0, 1) == "unsettled"
    assert judged("lower", None, None) == ""


def test_curves_keep_every_point_and_skip_what_is_not_finite(run):
    path = Path("data/training/plots/metrics/grad_norm.tsv")
    path.write_text("step\tgrad_norm\n10\t1.0\n20\tnan\n30\t3.0\n")
    seal_run(Path())
    page = written()
    titles = ["Training loss", "Held-out loss", "Learning rate", "Gradient norm"]
    assert re.findall(r"<h3>([^<]*)</h3>\s*<p class=\"readout\"", PAGE.read_text()) == titles
    line = page.data["charts"][3]["lines"][0]
    assert (line["steps"], line["values"]) == ([10, 30], [1.0, 3.0])
    assert len(page.data["charts"][0]["lines"][0]["steps"]) == 10


def test_rejected_samples_are_counted_and_the_first_listed(run):
    page = written()
    assert "Rejected by prepare 23" in page.text and "and 3 more." in page.text
    assert "19<i>.png broken" in page.text and "20<i>.png" not in page.text
    assert "Left out by encode_images 1" in page.text


def test_what_is_switched_off_is_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, pictures=False)
    page = written()
    assert len(page.drawings) == 1  # the contact sheet
    assert "Rejected" not in page.text and "Denoising" not in page.text and "Learning over" not in page.text


def test_a_run_without_held_out_samples_has_no_headline(run):
    report = json.loads(Path("data/evaluation/report.json").read_text())
    report["metrics"] = report["metrics"][1:]
    Path("data/evaluation/report.json").write_text(json.dumps(report))
    seal_run(Path())
    assert "→" not in written().text.split("Samples")[0]


def test_all_parameters_are_printed(run):
    page = written()
    params = yaml.safe_load(Path("params.yaml").read_text())
    for section, values in params.items():
        if section in UNUSED:
            continue
        assert ("summary", {}) in page.tags and section in page.text
        for key in values:
            assert key in page.text


def test_the_stage_guards_every_section_it_prints():
    source = (REPOSITORY / "stages/gallery.py").read_text()
    guarded = re.findall(r'^            "(\w+)",$', source, re.MULTILINE)
    sections = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    assert guarded == [section for section in sections if section not in UNUSED]


def test_lineage_lists_the_stages_upstream_in_order(run):
    assert "There is no dvc.lock here" in written().text
    write_lock(run)
    lineage = written().text.split("Lineage What")[1]
    places = [lineage.index(f" {name} {name} ") for name in ("fetch_base", "train", "evaluate")]
    assert places == sorted(places)
    assert "plots_page" not in lineage and "gallery gallery" not in lineage
    for stage in ("fetch_base", "train", "evaluate"):
        for out in yaml.safe_load(Path("dvc.lock").read_text())["stages"][stage]["outs"]:
            assert out["md5"] in lineage
    assert "prediction_type epsilon" in lineage


def test_a_lock_of_another_evaluation_is_not_taken_for_this_ones(run):
    write_lock(run)
    report = Path("data/evaluation/report.json")
    report.write_text(report.read_text() + "\n")
    text = written().text
    assert (
        "dvc.lock records another data/evaluation/report.json" in text and "fetch_base fetch_base" not in text
    )
    Path("dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    assert "dvc.lock does not list data/evaluation/report.json" in written().text


def test_the_weights_metadata_is_what_safetensors_reads(tmp_path):
    file = tmp_path / "unet" / "weights.safetensors"
    file.parent.mkdir()
    files = DirFileSystem(tmp_path.as_posix(), target_protocol="file")
    metadata = {"global_step": "700", "pairs": "d" * 64}
    safetensors.torch.save_file({"weight": torch.ones(3)}, file, metadata)
    assert read_weights_lineage(files, "unet", is_earlier=True) == metadata
    with pytest.raises(ValueError, match="checksum of the header"):
        read_weights_lineage(files, "unet")
    write_safetensors(file, {"weight": torch.ones(3)}, metadata)
    assert read_weights_lineage(files, "unet") == metadata
    with safetensors.safe_open(file, "pt") as opened:
        assert metadata.items() < opened.metadata().items()


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("data/evaluation/report.json", "report"),
        ("data/evaluation/samples/ddim_guidance2_steps10/prompt03_seed7.png", "evaluate"),
        ("data/baseline/samples/base_guidance5_steps25/prompt00_seed0.png", "baseline"),
    ],
)
def test_a_missing_output_names_the_stage_to_run(run, path, stage):
    Path(path).unlink()
    with pytest.raises(StageError, match=f"{path}: .*run `dvc repro {stage}`"):
        gallery.main(None)


def test_a_report_of_another_version_is_refused(run):
    write_sealed_json(Path("data/evaluation/report.json"), {"prompts": ["red heart"]})
    with pytest.raises(StageError, match=r"report\.json: .*KeyError.*run `dvc repro -f -s report`"):
        gallery.main(None)


def test_names_of_any_bytes_reach_the_page(run):
    """What ends a line for `str.splitlines`, steers a terminal, or was no UTF-8 in a file name."""
    names = ["a\u0085b.png", "c\u2028d.png", "e\u2029f.png", "g\x1b[31mh.png", os.fsdecode(b"i\xff.png")]
    rows = [{"name": name, "reason": "broken"} for name in names]
    write_json_lines(Path("data/pairs/rejected.jsonl"), rows)
    assert Path("data/pairs/rejected.jsonl").read_bytes().isascii()
    assert [json.loads(line) for line in Path("data/pairs/rejected.jsonl").read_text().splitlines()] == rows
    seal_run(Path())
    text = written().text
    shown = ["a\\x85b.png", "c\\u2028d.png", "e\\u2029f.png", "g\\x1b[31mh.png", "i\\udcff.png"]
    assert all(name in text for name in shown)


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("data/training/plots/metrics/lr.tsv", b"step\tlr\n1\tnone\n"),
        ("data/training/plots/metrics/lr.tsv", b"\xff\xfe"),
        ("data/pairs/rejected.jsonl", b"{"),
        ("data/encode_images_report/left_out.jsonl", b'{"name": 1}\n'),
        ("data/unet/diffusion_pytorch_model.safetensors", b"short"),
    ],
)
def test_an_input_with_the_right_hash_and_the_wrong_content_is_one_error(run, path, content):
    Path(path).write_bytes(content)
    seal_run(Path())
    place = path if "unet" not in path else "data/unet"
    with pytest.raises(StageError, match=rf"{place}: expected .* got .*run `dvc repro -f -s"):
        gallery.main(None)


@pytest.mark.parametrize(
    "path",
    [
        "data/evaluation/report.json",
        "data/baseline/samples/base_guidance5_steps25/prompt00_seed0.png",
        "data/evaluation/sweep.png",
        "data/training/plots/metrics/lr.tsv",
        "data/training/plots/SHA256SUMS",
        "data/training/plots/run.json",
        "data/pairs/rejected.jsonl",
        "data/pairs/rejected.jsonl.sha256",
        "data/encode_images_report/left_out.jsonl",
        "data/unet/SHA256SUMS",
    ],
)
def test_what_is_not_as_its_stage_wrote_it_is_named(run, path):
    whole = Path(path).read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 2
    for content in (bytes(damaged), whole[: len(whole) // 2], b""):
        Path(path).write_bytes(content)
        with pytest.raises(StageError, match=r"data/.*run `dvc repro"):
            gallery.main(None)
    Path(path).unlink()
    with pytest.raises(StageError, match=r"data/.*run `dvc repro"):
        gallery.main(None)


def test_weights_and_curves_of_another_run_are_told_from_those_that_were_evaluated(run):
    (Path("data/unet") / "notes.json").write_text("{}")
    write_sums(Path("data/unet"))
    with pytest.raises(
        StageError, match=r"data/unet/SHA256SUMS: expected the weights that .*report\.json was"
    ):
        gallery.main(None)


def test_ticks_are_round_and_reach_around_the_values():
    assert ticks(0.0, 700.0) == [0, 200, 400, 600, 800]
    assert ticks(0.0755, 0.1074) == [0.07, 0.08, 0.09, 0.1, 0.11]
    assert tick_labels(ticks(0.0755, 0.1074)) == ["0.07", "0.08", "0.09", "0.10", "0.11"]
    assert tick_labels(ticks(0.0, 3e-6)) == ["0", "1e−6", "2e−6", "3e−6"]
    assert ticks(2.0, 2.0) == [1.0, 1.5, 2.0, 2.5, 3.0]
    for low, high in ((0.0, 1e-12), (-3.7, 12.2), (99.99, 100.01), (1e6, 3e6)):
        found = ticks(low, high)
        assert found[0] <= low and high <= found[-1] and 3 <= len(found) <= 7


def test_curves_lie_where_their_axes_say():
    chart = draw_chart("lr", [("run", "run-0", Curve("lr", (10, 50, 100), (1.0, 2.0, 4.0)))], reference=3.0)
    assert (LEFT, RIGHT, TOP, BOTTOM) == (50, 350, 10, 172)
    assert chart.lines[0].points == "80,172 200,118 350,10"  # 162 units are values from 1 to 4
    assert [tick.label for tick in chart.step_ticks] == ["0", "50", "100"]
    assert [tick.at for tick in chart.step_ticks] == [50, 200, 350]
    assert chart.value_ticks[0] == (172, "1") and chart.value_ticks[-1] == (10, "4")
    assert chart.reference == (64, "base 3.000")


def test_whiskers_share_one_scale_and_stay_inside():
    first, second, unknown = whiskers(
        [Estimate(1.0, 0.0, 2.0), Estimate(5.0, None, None), Estimate(None, None, None)]
    )
    assert unknown is None
    assert first.low < first.value < first.high < second.value == second.low == second.high
    assert first.low == pytest.approx(100 * 0.06 / 1.12 * 1.0, abs=0.01)
    assert second.high == pytest.approx(100 - first.low)
    assert whiskers([Estimate(3.0, 3.0, 3.0)])[0].value == 50.0


def test_numbers_have_four_digits_and_a_minus_sign():
    shown = [number(value) for value in (0.0, -0.1234567, 1.752e-9, 21.0, None)]
    assert shown == ["0", "−0.1235", "1.752e−9", "21.00", "–"]
    assert [signed(value) for value in (0.5, -0.5, None)] == ["+0.5000", "−0.5000", "–"]
    assert interval(Estimate(1.0, None, 2.0)) == ""


@pytest.fixture(scope="module")
def browser():
    with headless_browser() as opened:
        yield opened


SPLIT = "getComputedStyle(document.getElementById('right')).clipPath"


def shown_split(browser) -> float:
    """Per cent of the picture that lies left of the divider."""
    return float(re.search(r"([\d.]+)%\)$", browser.run(SPLIT))[1])


@pytest.mark.parametrize("width", [1280, 390, 360])
def test_the_page_opens_without_a_complaint_a_request_or_a_sideways_scroll(run, browser, width):
    gallery.main(None)
    browser.open(PAGE.absolute(), width=width)
    assert browser.complaints() == []
    page, *others = browser.requests()
    assert page == PAGE.absolute().as_uri()
    assert all(other.startswith(f"{PAGE.parent.absolute().as_uri()}/index_files/") for other in others)
    browser.run("for (const image of document.images) image.loading = 'eager'")
    browser.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") <= width
    broken = "[...document.images].filter((each) => each.src && !each.hidden && !each.naturalWidth).length"
    assert (
        browser.run(
            "Promise.all([...document.images].map((each) => each.decode().catch(() => 0))).then(() => 0)"
        )
        == 0
    )
    assert browser.run(broken) == 0
    assert browser.run("getComputedStyle(document.getElementById('left')).imageRendering") == "pixelated"


def box_of(browser, element: str) -> list[float]:
    """Left, top, width and height of ``element``, in pixels of the window."""
    return browser.run(f"(({{x, y, width, height}}) => [x, y, width, height])"
                       f"(document.querySelector('{element}').getBoundingClientRect())")  # fmt: skip


def shown_pixels(address: str) -> np.ndarray:
    prefix, _, content = address.partition(",")
    assert prefix == "data:image/webp;base64"  # so small a picture lies inside
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"), int)


def check_halves(browser, divider: float) -> None:
    """The left picture is seen up to the divider, at a share of the width, and the right one from there."""
    browser.screenshot(Path("window.png"))
    window = np.asarray(Image.open("window.png").convert("RGB"), int)
    left, top, width, height = box_of(browser, "#frame")
    pictures = [
        shown_pixels(browser.run(f"document.getElementById('{side}').getAttribute('src')"))
        for side in ("left", "right")
    ]
    difference = 0
    for row, column in np.ndindex(6, 16):  # below lie the divider's knob and the labels
        place = (column + 0.5) / 16
        if abs(place - divider) < 0.02:
            continue
        seen = window[round(top + (row + 0.5) / 16 * height), round(left + place * width)]
        shown, hidden = pictures if place < divider else pictures[::-1]
        assert np.abs(seen - shown[row, column]).max() <= 2, (row, column)
        difference = max(difference, np.abs(shown[row, column] - hidden[row, column]).max())
    assert difference > 20
    line, _, thickness, _ = box_of(browser, ".divider")
    assert line + thickness / 2 == pytest.approx(left + divider * width, abs=1)


def test_the_divider_follows_pointer_keys_and_touch(run, browser):
    gallery.main(None)
    browser.open(PAGE.absolute())
    left, top, width, height = box_of(browser, "#frame")
    assert shown_split(browser) == 50
    check_halves(browser, 0.5)

    def mouse(kind: str, share: float) -> None:
        browser.call("Input.dispatchMouseEvent", type=kind, x=left + share * width, y=top + height / 2,
                     button="left", buttons=1, clickCount=1)  # fmt: skip

    mouse("mousePressed", 0.5)
    mouse("mouseMoved", 0.8)
    assert shown_split(browser) == 80
    mouse("mouseReleased", 0.8)
    mouse("mouseMoved", 0.3)
    assert shown_split(browser) == 80
    check_halves(browser, 0.8)
    browser.press("ArrowLeft")
    assert shown_split(browser) == 79
    browser.press("ArrowRight")
    assert shown_split(browser) == 80
    assert browser.run("document.getElementById('split').value") == "80"

    browser.call("Emulation.setTouchEmulationEnabled", enabled=True)
    for kind, share in (("touchStart", 0.6), ("touchMove", 0.4), ("touchMove", 0.2)):
        point = [{"x": left + share * width, "y": top + height / 2}]
        browser.call("Input.dispatchTouchEvent", type=kind, touchPoints=point)
    browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    browser.call("Emulation.setTouchEmulationEnabled", enabled=False)
    assert shown_split(browser) == 20
    assert browser.complaints() == []


def test_keys_lead_through_prompts_seeds_and_settings(run, browser):
    page = written()
    browser.open(PAGE.absolute())

    def shown() -> list[str]:
        names = "[...['left', 'right']].map((side) => Object.keys(page.pictures)"
        return browser.run(
            f"{names}.find((name) => page.pictures[name].uri === document.getElementById(side).src))"
        )

    def expected(cell: str) -> list[str]:
        return [source["cells"][cell] for source in page.data["sources"]]

    assert shown() == expected("0/0/0")
    for key, cell in (("j", "0/1/0"), ("s", "0/1/1"), ("g", "1/1/1"), ("k", "1/0/1"), ("k", "1/3/1")):
        browser.press(key)
        assert shown() == expected(cell), key
    browser.run("document.querySelector('#chooser button').focus()")
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    assert shown() == expected("1/1/0")
    assert browser.run("document.activeElement.getAttribute('aria-pressed')") == "true"
    assert browser.run("document.getElementById('prompt').textContent") == PROMPTS[1]


def test_a_curve_tells_its_value_under_the_pointer_and_by_key(run, browser):
    gallery.main(None)
    browser.open(PAGE.absolute())
    browser.run("document.querySelector('.chart').scrollIntoView({ block: 'center' })")
    left, top, width, height = box_of(browser, ".chart svg")
    browser.call(
        "Input.dispatchMouseEvent", type="mouseMoved", x=left + width * 200 / 360, y=top + height / 2
    )

    def readout() -> str:
        return browser.run("document.querySelector('.chart .readout').innerText")

    assert readout().split() == ["step", "50", number(0.08 * 1.2)]
    browser.run("document.querySelector('.chart svg').focus()")
    browser.press("ArrowRight")
    assert readout().split() == ["step", "60", number(0.08 * (1 + 10 / 60))]


def test_a_drawing_opens_at_full_size_and_closes(run, browser):
    gallery.main(None)
    browser.open(PAGE.absolute())
    browser.run("document.querySelector('.zoom').click()")
    assert browser.run("document.getElementById('lightbox').open") is True
    assert browser.run("document.querySelector('#lightbox img').naturalWidth") == 400
    browser.run("document.querySelector('#lightbox button').click()")
    assert browser.run("document.getElementById('lightbox').open") is False


def test_the_policy_stops_a_request_that_something_might_slip_in(run, browser):
    gallery.main(None)
    browser.open(PAGE.absolute())
    browser.run("new Promise((done) => { const image = new Image();"
                "image.onerror = done; image.src = 'http://127.0.0.1:9/picture.png'; })")  # fmt: skip
    assert any("Content Security Policy" in complaint for complaint in browser.complaints())
    failed = [event["params"] for event in browser.events if event.get("method") == "Network.loadingFailed"]
    assert [failure["blockedReason"] for failure in failed] == ["csp"]


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A run with pictures too large to lie inside its page."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, prompts=[f"prompt {number}" for number in range(9)], size=160)
    return tmp_path


def test_large_pictures_lie_beside_the_page_and_are_loaded_when_they_are_shown(large, browser):
    page = written()
    samples = {pixels(path.read_bytes()) for path in Path("data").glob("*/samples/*/*.png")}
    assert set(page.pictures.values()) == samples
    thumbnails = [entry["thumbnail"] for entry in page.data["pictures"].values()]
    assert {Image.open(io.BytesIO(base64.b64decode(each.split(",")[1]))).size for each in thumbnails} == {
        (96, 96)
    }
    browser.open(PAGE.absolute())
    asked = {address.rpartition("/")[2] for address in browser.requests()[1:]}
    shown = {
        Path(page.data["pictures"][source["cells"]["0/0/0"]]["uri"]).name for source in page.data["sources"]
    }
    drawings = {
        attributes["src"].rpartition("/")[2] for tag, attributes in page.tags if attributes.get("src")
    }
    assert shown <= asked <= shown | drawings
    for picture in Path("data/evaluation/index_files").iterdir():
        picture.unlink()
    browser.open(PAGE.absolute())
    note = "document.querySelector('.absent.right').textContent"
    browser.run("new Promise((resolve) => setTimeout(resolve, 500))")
    assert browser.run(note).endswith(".webp is not beside this page")


def test_an_address_leads_to_a_prompt_seed_and_setting_by_name(large, browser):
    written()
    browser.open(PAGE.absolute())
    browser.run("change({prompt: 7, seed: 1, setting: 1})")
    address = browser.run("location.href")
    browser.open("about:blank")
    browser.open(address)
    assert browser.run("[state.prompt, state.seed, state.setting]") == [7, 1, 1]
    assert browser.run("document.getElementById('prompt').textContent") == "prompt 7"
    browser.open("about:blank")
    browser.open(f"{PAGE.absolute().as_uri()}#prompt=prompt+3&seed=12345")
    assert browser.run("[state.prompt, state.seed, state.setting]") == [3, 0, 0]


def test_prompts_are_searched_and_letter_keys_can_be_switched_off(large, browser):
    written()
    browser.open(PAGE.absolute())
    browser.run(
        "(() => { const field = document.getElementById('search'); field.value = '7 prom';"
        "field.dispatchEvent(new Event('input')); })()"
    )
    rows = "[...document.querySelectorAll('#chooser .row')].map((row) => !row.hidden)"
    assert browser.run(rows) == [number == 7 for number in range(9)]
    assert browser.run("document.getElementById('found').textContent") == "1 of 9"
    browser.press("j")
    assert browser.run("state.prompt") == 1
    browser.run("document.getElementById('letter-keys').click()")
    browser.press("j")
    assert browser.run("state.prompt") == 1


def test_the_picture_stays_in_sight_while_a_prompt_is_chosen(tmp_path, monkeypatch, browser):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, prompts=[f"prompt {number}" for number in range(40)])
    written()
    for width, height in ((1280, 700), (390, 800)):
        browser.open(PAGE.absolute(), width=width, height=height)
        browser.run("[...document.querySelectorAll('#chooser .row')].at(-1).scrollIntoView({block: 'end'})")
        _, top, _, height_of_frame = box_of(browser, "#frame")
        assert top >= 0
        assert top + height_of_frame <= height
        assert height_of_frame > 200


def test_a_folder_that_no_page_made_is_left_alone(run):
    mine = Path("data/evaluation/index_files/holiday.jpg")
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    with pytest.raises(StageError, match=r"index_files: expected pictures of an earlier page.*holiday\.jpg"):
        gallery.main(None)
    assert mine.read_bytes() == b"mine"


def test_a_picture_that_no_webp_can_hold_stays_a_png(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (17000, 2), "red").save(buffer, "PNG")
    files = PictureFiles(tmp_path / "page.html")
    [picture] = files.add([("wide.png", buffer.getvalue())])
    files.finish()
    assert (tmp_path / picture.source).read_bytes() == buffer.getvalue()


def test_the_title_says_what_was_trained_on_what(run):
    steps = yaml.safe_load(Path("params.yaml").read_text())["train"]["max_train_steps"]
    assert written().text.startswith(f"Fine-tuned on openmoji, {steps} steps")


def test_what_is_set_for_export_is_on_no_page(tmp_path):
    write_run(tmp_path)
    assert "export" in yaml.safe_load((tmp_path / "params.yaml").read_text())
    files = DirFileSystem(tmp_path.as_posix(), target_protocol="file")
    params = read_run(files, "this run", PictureFiles(tmp_path / "page.html")).params
    assert "train" in params and "export" not in params
