"""The service's page in a real browser: `make browser`, which needs Debian's chromium-headless-shell."""

import base64
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from playwright.sync_api import Page, expect, sync_playwright
from pycocotools import mask as coco_mask

from demo.score import rle_of
from shardsight.models.yolo.model import Yolo
from shardsight.row import ROW
from tests.conftest import ROOT, WEIGHTS
from tests.test_serve import ask, inputs, rows, service  # noqa: F401  (fixtures)
from tests.test_yolo import annotated

pytestmark = pytest.mark.slow


@pytest.fixture
def page(service: str) -> Iterator[Page]:  # noqa: F811
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium-headless-shell"))
        page = browser.new_page(viewport={"width": 1100, "height": 800})
        elsewhere: list[str] = []
        page.on(
            "request", lambda asked: None if asked.url.startswith((service, "blob:")) else elsewhere.append(asked.url)
        )
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if "Policy" in said.text else None)
        page.goto(service)
        yield page
        assert not elsewhere and not complaints
        browser.close()


def test_drop_filter_ask(page: Page, ask: httpx.Client, jpegs: list[bytes], tmp_path: Path) -> None:  # noqa: F811
    """What is drawn is what the endpoint says; labels and score filter it; an answer streams in."""
    row = ask.post("/v1/annotate", files={"image": jpegs[0]}, data={"conf": "0.05"}).json()
    page.evaluate(
        """data => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "scene.jpg", { type: "image/jpeg" }));
            const drop = new DragEvent("drop", { dataTransfer: transfer, bubbles: true });
            document.querySelector("#drop").dispatchEvent(drop);
        }""",
        base64.b64encode(jpegs[0]).decode(),
    )
    page.wait_for_selector("#marks rect")
    assert _drawn(page) == _expected(row, 0.25)
    page.locator("#score").fill("0.6")
    assert _drawn(page) == _expected(row, 0.6)
    page.locator("#score").fill("0.25")
    label = row["detections"][0]["label"]
    page.get_by_label(label, exact=True).uncheck()
    assert _drawn(page) == [one for one in _expected(row, 0.25) if one[0] != label]
    page.get_by_label(label, exact=True).check()
    page.get_by_label("Prompt").fill("detect circle ; star")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#answer")).not_to_have_text(re.compile("^…?$"))
    expect(page.get_by_role("button", name="Ask")).to_be_enabled()
    said = ask.post("/v1/annotate", files={"image": jpegs[0]}, data={"prompt": "detect circle ; star"}).json()
    assert page.locator("#answer").inner_text().strip() == (said["answers"][0]["text"] or "(nothing)")
    page.get_by_label("Prompt").fill("caption en")
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("button", name="Ask")).to_be_enabled()
    page.screenshot(path=ROOT / "demo-output" / "page.png")  # the README's is one of these


@pytest.mark.parametrize("task", ["segment", "pose", "obb"])
def test_masks_keypoints_and_oriented_boxes(page: Page, jpegs: list[bytes], tmp_path: Path, task: str) -> None:
    """Drawn where the row has them: a mask to the pixel. The rows are the model's own."""
    (whole,) = annotated(Yolo(str(WEIGHTS / f"{task}.pt")), jpegs[:1])
    row = {name: whole[name] for name in ROW.names}
    found = [one for one in row["detections"] if one["score"] >= 0.25]
    assert found
    page.route("**/v1/annotate", lambda route: route.fulfill(json=row))
    (tmp_path / "scene.jpg").write_bytes(jpegs[0])
    page.locator("#file").set_input_files(tmp_path / "scene.jpg")
    page.wait_for_selector("#marks .mark")
    if task == "segment":
        drawn = page.locator("#marks .mask").evaluate_all(_RASTER, [row["width"], row["height"]])
        for one, inside in zip(found, drawn, strict=True):
            assert np.flatnonzero(coco_mask.decode(rle_of(one["mask"]))).tolist() == inside
    elif task == "obb":
        drawn = page.locator("#marks polygon").evaluate_all("all => all.map(p => p.getAttribute('points'))")
        assert [[float(x) for x in points.split()] for points in drawn] == [one["corners"] for one in found]
    else:
        drawn = page.locator("#marks circle").evaluate_all(
            "all => all.map(c => [Number(c.getAttribute('cx')), Number(c.getAttribute('cy'))])"
        )
        points = [point for one in found for point in one["keypoints"]]
        assert drawn == [[point["x"], point["y"]] for point in points if (point["score"] or 1) >= 0.5] != []
    page.screenshot(path=ROOT / "demo-output" / f"page-{task}.png")


# Of each path the pixels whose middle is in it, row after row.
_RASTER = """(all, [width, height]) => all.map((path) => {
    const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    context.fill(new Path2D(path.getAttribute("d")));
    const pixels = context.getImageData(0, 0, width, height).data;
    return Array.from({ length: width * height }, (_, n) => n).filter((n) => pixels[4 * n + 3] > 127);
})"""


def test_a_picture_that_is_none(page: Page, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no picture")
    page.locator("#file").set_input_files(tmp_path / "a.jpg")
    page.wait_for_selector("#status.wrong")
    assert "no picture format" in page.locator("#status").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1100, 360])
def test_light_dark_and_a_phone(page: Page, scheme: Any, width: int, jpegs: list[bytes], tmp_path: Path) -> None:
    """Nothing is cut off at a phone's width, and everything can be reached by keyboard. Leaves screenshots."""
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    (tmp_path / "scene.jpg").write_bytes(jpegs[0])
    page.locator("#file").set_input_files(tmp_path / "scene.jpg")
    page.wait_for_selector("#marks rect")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"file", "score", "prompt", "BUTTON"} <= reached
    page.screenshot(path=ROOT / "demo-output" / f"page-{scheme}-{width}.png", full_page=True)


def _drawn(page: Page) -> list[tuple[Any, ...]]:
    """(label, x1, y1, x2, y2) of each box on the page."""
    boxes = page.locator("#marks rect").evaluate_all(
        "all => all.map(r => ['x', 'y', 'width', 'height'].map(name => Number(r.getAttribute(name))))"
    )
    names = [text.rpartition(" ")[0] for text in page.locator("#marks text").all_text_contents()]
    return [
        (name, *(round(v, 2) for v in (x, y, x + w, y + h))) for name, (x, y, w, h) in zip(names, boxes, strict=True)
    ]


def _expected(row: dict[str, Any], least: float) -> list[tuple[Any, ...]]:
    found = [one for one in row["detections"] if one["score"] >= least]
    return [(one["label"], *(round(one[side], 2) for side in ("x1", "y1", "x2", "y2"))) for one in found]
