"""The service's page and a job's page in a real browser: `make browser`, which needs Debian's chromium-headless-shell.

But for one test the service's answers are given by the test, so that each can be what the test is about.
"""

import base64
import io
import json
import mimetypes
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, Page, Request, Route, expect, sync_playwright
from pycocotools import mask as coco_mask

import shardsight.viewer
from demo.score import rle_of
from serve.guard import HEADERS
from shardsight.decode import video
from shardsight.decode.pictures import decode
from shardsight.models.yolo.model import Yolo
from shardsight.row import ROW
from shardsight.viewer import mp4
from shardsight.viewer.page import page as build_page
from tests.clips import encode, number_of, numbered
from tests.conftest import ROOT, WEIGHTS
from tests.test_serve import ask, clip, clip_rows, inputs, rows, service  # noqa: F401  (fixtures)
from tests.test_show import HOSTILE, detection, frame_rows, row
from tests.test_yolo import annotated

pytestmark = pytest.mark.slow
expect.set_options(timeout=60_000)  # ms; a model's first answer takes its time on a busy machine

ADDRESS = "http://localhost"
FOLDERS = {"page": ROOT / "serve" / "page", "viewer": Path(shardsight.viewer.__file__).parent}
LOCATIONS = "<loc0100><loc0200><loc0300><loc0400>"
DETECT = {
    "prompt": "detect star ; ring",
    "text": f"{LOCATIONS} star ; {LOCATIONS} star ; {LOCATIONS} ring ; <loc0001> ring",
    "detections": [detection("star", 0.9), detection("star", 0.8, x1=200.0, x2=300.0), detection("ring", 0.7)],
    "finish_reason": "stop",
    "score": -0.1,
}
CAPTION = {"prompt": "caption en", "text": "a red <star>", "detections": None, "finish_reason": "length", "score": -0.2}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium-headless-shell"))
        yield browser
        browser.close()


def watched(page: Page, *allowed: str) -> list[str]:
    """What must not happen on a page: requests to elsewhere, exceptions, violations of its policy, dialogs."""
    wrong: list[str] = []
    page.on("request", lambda asked: None if asked.url.startswith(allowed) else wrong.append(asked.url[:200]))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if "Policy" in said.text else None)
    page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    return wrong


class Server:
    """Serves the page's own files as the service does, and answers with what a test sets.

    row: of each picture. clip: rows of each clip. answers: by prompt. problem: (status, detail), instead of a row, with
    the rows of a clip. asked: every /v1/annotate.
    """

    def __init__(self) -> None:
        self.row: dict[str, Any] = row("scene.jpg") | dict.fromkeys(["classes", "answers", "metadata", "error"])
        self.clip: list[dict[str, Any]] = []
        self.answers: dict[str, dict[str, Any]] = {}
        self.problem: tuple[int, str] | None = None
        self.key: str | None = None
        self.asked: list[Request] = []

    def __call__(self, route: Route) -> None:
        path = route.request.url.removeprefix(ADDRESS).strip("/")
        folder, _, name = path.partition("/")
        if path == "" or folder in FOLDERS:
            file = FOLDERS[folder] / name if path else FOLDERS["page"] / "index.html"
            route.fulfill(body=file.read_bytes(), content_type=mimetypes.guess_type(file)[0], headers=HEADERS)
        elif self.key and route.request.headers.get("authorization") != f"Bearer {self.key}":
            route.fulfill(status=401, json={"detail": "a valid key is missing"})
        elif path == "v1/annotate":
            self.asked.append(route.request)
            self.annotate(route)
        else:
            route.fulfill(json={"data": [{"id": "paligemma"}]})

    def annotate(self, route: Route) -> None:
        body = (route.request.post_data_buffer or b"").decode("latin1")
        prompt = re.search(r'name="prompt"\r\n\r\n(.*?)\r\n', body)
        if self.problem:
            route.fulfill(status=self.problem[0], json={"detail": self.problem[1], "rows": self.clip or None})
        elif 'name="video"' in body:
            route.fulfill(json={"rows": self.clip})
        else:
            route.fulfill(json=self.row | {"answers": [self.answers[prompt[1]]] if prompt else None})


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """The service's page."""
    page = browser.new_page(viewport={"width": 1100, "height": 800})
    wrong = watched(page, ADDRESS, f"blob:{ADDRESS}")
    page.route("**/*", server)
    page.goto(ADDRESS)
    yield page
    assert not wrong
    page.close()


@pytest.fixture
def report(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    """Opens a page of rows from the disk."""
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    wrong = watched(page, "file:", "data:")

    def open_page(shown: list[dict[str, Any]], **more: Any) -> Page:
        items = [{"picture": PIXEL, "problem": None, "rows": [{"model": None, "row": one}]} for one in shown]
        data = {"title": "job", "subtitle": "", "numbers": [], "errors": [], "items": items} | more
        (tmp_path / "page.html").write_text(build_page(data))
        page.goto((tmp_path / "page.html").as_uri())
        return page

    yield open_page
    assert not wrong
    page.close()


PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs="


def choose(page: Page, picture: bytes, name: str = "scene.jpg") -> None:
    page.locator("#file").set_input_files({"name": name, "mimeType": "image/jpeg", "buffer": picture})
    expect(page.locator("#status")).to_contain_text(re.compile(r"\d s$"))
    expect(page.locator("#figure title")).to_contain_text(":")  # it is drawn


def put_question(page: Page, prompt: str) -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#questions .waiting")).to_have_count(0)


# --- The service's page


def test_against_the_service(
    browser: Browser,
    service: str,  # noqa: F811
    ask: httpx.Client,  # noqa: F811
    jpegs: list[bytes],
    tmp_path: Path,
) -> None:
    """With the real service: what is drawn is what it says, `detect` and `segment` are drawn too, and the curl that the
    page shows gives the very row that the page shows."""
    page = browser.new_page(viewport={"width": 1100, "height": 800})
    wrong = watched(page, service, f"blob:{service}")
    page.goto(service)
    choose(page, jpegs[0])
    given = ask.post("/v1/annotate", files={"image": jpegs[0]}, data={"conf": "0.05"}).json()
    assert drawn(page, "detections") == expected(given["detections"], 0.25) != []
    for prompt in ("caption en", "detect circle ; star ; square", "segment star"):
        put_question(page, prompt)
    assert page.locator("#questions .answer").count() == 3
    assert "<loc" not in page.inner_text("body")
    (tmp_path / "scene.jpg").write_bytes(jpegs[0])
    page.get_by_text("The same with curl").click()
    command = page.locator("#curl pre").inner_text()
    row_here = json.loads(page.locator("#details pre").last.text_content() or "")
    said = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    row_there = json.loads(said.stdout)
    for one in (row_here, row_there):  # a token's probability varies a little with what else is computed with it
        for answer in one["answers"]:
            for scored in (answer, *(answer["detections"] or [])):
                scored["score"] = round(scored["score"], 3)
    assert row_here == row_there
    page.screenshot(path=ROOT / "demo-output" / "page.png")
    assert not wrong
    page.close()


def test_score_and_labels_filter(page: Page, server: Server, jpegs: list[bytes]) -> None:
    found = [detection("star", 0.9), detection("ring", 0.5, x1=200.0, x2=260.0), detection("cross", 0.1, y1=1.0)]
    server.row |= {"detections": found}
    choose(page, jpegs[0])
    assert drawn(page, "detections") == expected(found, 0.25)
    for least in (0.6, 0.05, 0.95):
        page.get_by_label("Least score").fill(str(least))
        assert drawn(page, "detections") == expected(found, least)
    page.get_by_label("Least score").fill("0.05")
    page.locator("#filters").get_by_label("ring").uncheck()
    assert drawn(page, "detections") == expected(found[::2], 0)
    page.get_by_role("button", name="None").click()
    assert drawn(page, "detections") == []
    page.get_by_role("button", name="All").click()
    assert drawn(page, "detections") == expected(found, 0)
    assert b'name="conf"\r\n\r\n0.05\r\n' in (server.asked[0].post_data_buffer or b"")


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_drop_and_paste(page: Page, server: Server, jpegs: list[bytes], kind: str) -> None:
    page.evaluate(
        """([data, kind]) => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "scene.jpg", { type: "image/jpeg" }));
            const event = kind === "drop" ? new DragEvent("drop", { dataTransfer: transfer, bubbles: true })
                : new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true });
            document.querySelector(".drop").dispatchEvent(event);
        }""",
        [base64.b64encode(jpegs[0]).decode(), kind],
    )
    expect(page.locator(".mark")).to_have_count(1)
    assert jpegs[0] in (server.asked[0].post_data_buffer or b"")


def test_samples(page: Page, server: Server) -> None:
    """One click on a sample shows what the service finds; each is small enough to come with the page."""
    server.clip = TRACKED
    buttons = page.locator("[data-sample]")
    for number in range(buttons.count()):
        buttons.nth(number).click()
        ending, marks = ("jpg", 1) if number < 3 else ("mp4", 2)
        expect(page.locator("#status:not(.waiting)")).to_contain_text(f"shapes-{number + 1}.{ending}")
        expect(page.locator(".mark")).to_have_count(marks)
    buttons.nth(0).click()
    expect(page.locator("#status")).to_contain_text("shapes-1.jpg")
    assert page.locator("#earlier button").count() == len(server.asked) == 4  # no sample is opened twice
    sizes = [file.stat().st_size for file in (FOLDERS["page"] / "samples").iterdir()]
    assert buttons.count() == len(sizes) == 4 and max(sizes) < 100_000


def test_questions_are_kept_and_drawn(page: Page, server: Server, jpegs: list[bytes]) -> None:
    """`detect` is drawn apart from YOLO and read as words; each picture keeps its questions and answers."""
    server.answers = {one["prompt"]: one for one in (DETECT, CAPTION)}
    choose(page, jpegs[0])
    put_question(page, "caption en")
    put_question(page, DETECT["prompt"])
    questions = page.locator("#questions li")
    assert questions.count() == 2
    first = questions.nth(0).inner_text()
    assert "star × 2" in first and "ring" in first and "1 more, malformed" in first and "loc" not in first
    assert "a red <star>" in questions.nth(1).inner_text() and "cut off" in questions.nth(1).inner_text()
    assert len(drawn(page, f"answer {DETECT['prompt']}")) == 3 and len(drawn(page, "detections")) == 1
    dashes = page.locator(".mark .line").evaluate_all("all => all.map(one => one.getAttribute('stroke-dasharray'))")
    assert len(set(dashes)) == 2
    page.locator("#filters").get_by_label(DETECT["prompt"]).uncheck()
    assert drawn(page, f"answer {DETECT['prompt']}") == [] and len(drawn(page, "detections")) == 1
    choose(page, jpegs[1], "second.jpg")
    assert questions.count() == 0
    page.get_by_role("button", name="scene.jpg", exact=True).click()
    assert questions.count() == 2
    shown = json.loads(page.locator("#details pre").last.text_content() or "")
    assert shown == server.row | {"answers": [CAPTION, DETECT]}


def test_copy(page: Page, jpegs: list[bytes]) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=ADDRESS)
    choose(page, jpegs[0], 'it\'s "mine".jpg')
    page.get_by_text("The same with curl").click()
    page.locator("#curl button").click()
    expect(page.locator("#curl button")).to_have_text("Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    words = subprocess.run(
        ["bash", "-c", f"curl() {{ printf '%s\\n' \"$@\"; }}\n{copied}"], capture_output=True, text=True
    )
    assert 'image=@"it\'s \\"mine\\".jpg"' in words.stdout.splitlines()
    assert f"{ADDRESS}/v1/annotate" in words.stdout.splitlines()


def test_problems_are_sentences(page: Page, server: Server, jpegs: list[bytes]) -> None:
    server.problem = 415, "no picture format that is known"
    page.locator("#file").set_input_files({"name": "a.jpg", "mimeType": "image/jpeg", "buffer": b"x"})
    expect(page.locator("#status.wrong")).to_have_text("No picture format that is known.")
    server.problem = None
    choose(page, jpegs[0])
    server.problem = 429, "the model has more to do than it can: try again later"
    put_question(page, "caption en")
    expect(page.locator("#questions .error")).to_have_text("The model has more to do than it can: try again later.")
    page.unroute("**/*")
    page.route("**/v1/annotate", lambda route: route.abort())
    put_question(page, "ocr")
    expect(page.locator("#questions .error").first).to_have_text("The server cannot be reached.")


def test_a_server_with_keys(browser: Browser, server: Server, jpegs: list[bytes]) -> None:
    """The field for a key appears where the server wants one, and what failed without it is done with it."""
    server.key = "secret"
    page = browser.new_page()
    page.route("**/*", server)
    page.goto(ADDRESS)
    expect(page.get_by_label("API key")).to_be_focused()
    page.get_by_label("API key").fill("secret")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Prompt")).to_be_visible()
    choose(page, jpegs[0])
    assert 'Bearer $SHARDSIGHT_API_KEY"' in (page.locator("#curl pre").text_content() or "")
    assert "secret" not in page.content()
    page.close()


@pytest.mark.parametrize("task", ["segment", "pose", "obb"])
def test_masks_keypoints_and_oriented_boxes(page: Page, server: Server, jpegs: list[bytes], task: str) -> None:
    """Drawn where the row has them: a mask to the pixel. The rows are the model's own."""
    (whole,) = annotated(Yolo(str(WEIGHTS / f"{task}.pt")), jpegs[:1])
    server.row = {name: whole[name] for name in ROW.names} | {"id": "scene.jpg"}
    found = [one for one in whole["detections"] if one["score"] >= 0.25]
    assert found
    choose(page, jpegs[0])
    if task == "segment":
        marks = page.locator(".mask").evaluate_all(_RASTER, [whole["width"], whole["height"]])
        for one, inside in zip(found, marks, strict=True):
            assert np.flatnonzero(coco_mask.decode(rle_of(one["mask"]))).tolist() == inside
    elif task == "obb":
        polygons = page.locator("polygon.line").evaluate_all("all => all.map(p => p.getAttribute('points'))")
        assert [[float(x) for x in points.split()] for points in polygons] == [one["corners"] for one in found]
    else:
        points = page.locator("circle.point").evaluate_all(
            "all => all.map(c => [Number(c.getAttribute('cx')), Number(c.getAttribute('cy'))])"
        )
        seen = [point for one in found for point in one["keypoints"] if (point["score"] or 1) >= 0.5]
        assert points == [[point["x"], point["y"]] for point in seen] != []


# Of each path the pixels whose middle is in it, row after row.
_RASTER = """(all, [width, height]) => all.map((path) => {
    const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    context.fill(new Path2D(path.getAttribute("d")));
    const pixels = context.getImageData(0, 0, width, height).data;
    return Array.from({ length: width * height }, (_, n) => n).filter((n) => pixels[4 * n + 3] > 127);
})"""


def test_compressed_masks(page: Page) -> None:
    """Any mask that pycocotools encodes has its run lengths, from empty to full and from one pixel to long runs."""
    rng = np.random.default_rng(0)
    masks = [rng.random(rng.integers(1, 200, 2)) < share for share in np.linspace(0, 1, 100)]
    masks += [np.zeros((3000, 2), bool), np.ones((1, 1), bool), np.indices((2000, 90))[0] % 700 < 350]
    encoded = [coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"].decode() for mask in masks]
    runs = page.evaluate(
        "async (all) => { const { runs } = await import('/viewer/picture.js'); return all.map(runs) }", encoded
    )
    for mask, lengths in zip(masks, runs, strict=True):
        values = np.repeat(np.arange(len(lengths)) % 2, lengths)
        assert (values == mask.ravel(order="F")).all()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1100, 360])
def test_light_dark_and_a_phone(page: Page, server: Server, scheme: Any, width: int, jpegs: list[bytes]) -> None:
    """Nothing is cut off at a phone's width, whatever the row's words, and all can be reached by keyboard."""
    long = "a-label-that-is-longer-than-a-phone-is-wide-by-far"
    question = DETECT | {"prompt": f"detect {long}", "detections": [detection(long)]}
    server.row |= {"detections": [detection(long), detection("star", 0.8)]}
    server.answers = {question["prompt"]: question}
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    choose(page, jpegs[0], f"{long}.jpg")
    put_question(page, question["prompt"])
    page.get_by_text("Row as JSON").click()
    page.get_by_text("The same with curl").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert_labels_apart(page)
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.type"))
    assert {"file", "prompt", "checkbox", "range", "button", "submit"} <= reached
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid" or page.evaluate("document.activeElement === document.body")


# --- Clips

MP4 = encode(numbered(50), g="10")
TRACKED = [
    one | {"detections": [*one["detections"], detection("star", 0.8, x1=4.0 + one["frame_index"], y1=60.0, track_id=2)]}
    for one in frame_rows("clip.mp4", "clip.mp4", range(0, 50, 5))
]
# The number that is on the picture which a player shows.
_NUMBER = """(video) => {
    const context = new OffscreenCanvas(128, 96).getContext("2d", { willReadFrequently: true });
    context.drawImage(video, 0, 0, 128, 96);
    const bits = [...Array(8).keys()].map((bit) => context.getImageData(16 * bit + 8, 48, 1, 1).data[0] > 127);
    return bits.reduce((number, bit) => 2 * number + bit, 0);
}"""


def choose_clip(page: Page, clip: bytes, name: str = "clip.mp4") -> None:  # noqa: F811
    page.locator("#file").set_input_files({"name": name, "mimeType": "video/mp4", "buffer": clip})


def assert_frame(page: Page, index: int, found: list[dict[str, Any]]) -> None:
    """The player shows that frame, and the boxes of its row."""
    (wanted,) = (one for one in found if one["frame_index"] == index)
    expect(page.locator(".player output")).to_contain_text(f"frame {index} at {wanted['pts_seconds']:.2f} s")
    expect(page.locator(".player title")).to_have_text(re.compile(f"^{re.escape(wanted['id'])}: "))
    assert drawn(page, "detections") == expected(wanted["detections"], 0)
    assert page.locator(".player video").evaluate(_NUMBER) == index


def test_a_clip(page: Page, server: Server) -> None:
    """It plays with the boxes of its rows, each at its frame; keys go frame by frame; an identity keeps its colour."""
    server.clip = TRACKED
    choose_clip(page, MP4)
    expect(page.locator("#status")).to_contain_text("2 star tracked · 10 frames, 1.8 s")
    assert_frame(page, 0, TRACKED)
    colours = page.locator(".mark").evaluate_all("all => all.map(one => one.getAttribute('stroke'))")
    assert len(set(colours)) == 2
    for key, index in ((".", 5), (".", 10), (",", 5)):
        page.keyboard.press(key)
        assert_frame(page, index, TRACKED)
    page.get_by_role("slider", name="Frame").fill("9")
    assert_frame(page, 45, TRACKED)
    assert page.locator(".mark").evaluate_all("all => all.map(one => one.getAttribute('stroke'))") == colours
    assert page.locator("#details").inner_text().startswith("Frame 45 at 1.80 s")
    page.get_by_role("button", name="Play").click()
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    expect(page.locator(".player output")).not_to_contain_text("frame 45 ")
    page.locator(".screen").focus()
    page.keyboard.press(" ")
    expect(page.get_by_role("button", name="Play")).to_be_visible()
    page.get_by_role("slider", name="Frame").fill("4")
    assert_frame(page, 20, TRACKED)
    assert json.loads(page.locator("#all pre").text_content() or "") == TRACKED
    assert json.loads(page.locator("#details pre").last.text_content() or "") == TRACKED[4]


def test_options_of_a_clip(page: Page, server: Server) -> None:
    """They are asked for, and are in the command for a shell."""
    server.clip = TRACKED
    choose_clip(page, MP4)
    expect(page.locator("#status")).to_contain_text("10 frames")
    page.get_by_label("Frames").select_option("2 a second")
    page.get_by_label("Keep identities").uncheck()
    expect(page.locator("#status:not(.waiting)")).to_contain_text("10 frames")
    bodies = [asked.post_data_buffer or b"" for asked in server.asked]
    assert len(bodies) == 3 and MP4 in bodies[2]
    assert [b'name="track"\r\n\r\nbotsort' in body for body in bodies] == [True, True, False]
    assert [b'name="fps"\r\n\r\n2' in body for body in bodies] == [False, True, True]
    command = page.locator("#curl pre").text_content() or ""
    for part in ("'video=@\"clip.mp4\"'", "--form fps=2", "--form conf=0.05"):
        assert part in command


def test_a_question_about_a_frame(page: Page, server: Server) -> None:
    """PaliGemma sees the frame that is shown; its answer stays with that frame."""
    server.clip, server.answers = TRACKED, {CAPTION["prompt"]: CAPTION}
    choose_clip(page, MP4)
    page.get_by_role("slider", name="Frame").fill("3")
    assert_frame(page, 15, TRACKED)
    put_question(page, "caption en")
    expect(page.locator("#questions li")).to_contain_text("frame 15")
    body = server.asked[-1].post_data_buffer or b""
    picture = body[body.index(b"\xff\xd8") : body.rindex(b"\xff\xd9") + 2]
    assert number_of(decode(picture)[0]) == 15
    expect(page.locator("#details")).to_contain_text("a red <star>")
    assert_frame(page, 15, TRACKED)
    page.locator(".screen").focus()
    page.keyboard.press(".")
    expect(page.locator("#details")).not_to_contain_text("a red <star>")


def test_clips_that_are_refused_or_cannot_be_played(page: Page, server: Server) -> None:
    """The reason, the rows of what could be decoded, and frames that are stepped through without pictures."""
    server.problem = 422, "the video is damaged here"
    server.clip = [*TRACKED[:3], TRACKED[3] | {"error": {"stage": "decode", "type": "x", "message": "y"}}]
    choose_clip(page, b"no video", "clip.avi")
    expect(page.locator("#status.wrong")).to_have_text("The video is damaged here.")
    expect(page.get_by_text("This browser cannot play the video")).to_be_visible()
    expect(page.locator(".player output")).to_contain_text("1 of 3")
    page.keyboard.press(".")
    expect(page.locator(".player title")).to_have_text(re.compile("^clip.mp4@5: "))
    assert drawn(page, "detections") == expected(TRACKED[1]["detections"], 0)
    put_question(page, "caption en")
    expect(page.locator("#questions .error")).to_have_text("There is no frame of this clip to ask about.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1100, 360])
def test_a_clip_on_a_phone(page: Page, server: Server, scheme: Any, width: int) -> None:
    server.clip = TRACKED
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    choose_clip(page, MP4)
    assert_frame(page, 0, TRACKED)
    page.get_by_text("All rows as JSON").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert_labels_apart(page)


def test_a_clip_against_the_service(
    browser: Browser,
    service: str,  # noqa: F811
    clip: bytes,  # noqa: F811
    tmp_path: Path,
) -> None:
    """With the real service: the boxes are those of its rows, which the command for a shell gives, too."""
    page = browser.new_page(viewport={"width": 1100, "height": 800})
    wrong = watched(page, service, f"blob:{service}")
    page.goto(service)
    choose_clip(page, clip)
    expect(page.locator("#status")).to_contain_text("tracked · 10 frames")
    page.keyboard.press(".")
    expect(page.locator(".player output")).to_contain_text("2 of 10")
    (tmp_path / "clip.mp4").write_bytes(clip)
    page.get_by_text("The same with curl").click()
    command = page.locator("#curl pre").inner_text()
    said = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    found = json.loads(said.stdout)["rows"]
    assert json.loads(page.locator("#all pre").text_content() or "") == found
    expect(page.locator(".player title")).to_have_text(re.compile(f"^{re.escape(found[1]['id'])}: "))
    assert drawn(page, "detections") == expected(found[1]["detections"], 0.25) != []
    assert not wrong
    page.close()


# --- A job's page


@pytest.mark.parametrize("step", [1, 12])
def test_videos_of_a_job(report: Callable[..., Page], step: int) -> None:
    """Of each frame that was annotated, dense or sparse, its picture with its own boxes."""
    found = frame_rows("v.mp4", "v.mp4", range(0, 50, step))
    with closing(video.read(io.BytesIO(MP4), video.Sampling())) as frames:
        small = mp4.encode(frames, set(range(0, 50, step)), mp4.Limits(640, 300, 1 << 20))
    assert small
    film = {"picture": PIXEL, "video": small.uri, "problem": None}
    film["rows"] = [{"model": None, "row": found[0], "frames": found}]
    page = report([], items=[film, {"picture": PIXEL, "problem": None, "rows": [{"model": None, "row": row("a.jpg")}]}])
    assert page.locator(".card .title").all_inner_texts() == ["v.mp4", "a.jpg"]
    expect(page.locator(".card .words").first).to_contain_text(f"1 star tracked · {len(found)} frames")
    page.locator(".card").first.click()
    assert_frame_of_job(page, found[0])
    page.keyboard.press(".")
    assert_frame_of_job(page, found[1])
    page.get_by_role("slider", name="Frame").fill(str(len(found) - 2))
    assert_frame_of_job(page, found[-2])
    page.get_by_role("slider", name="Frame").press("ArrowRight")
    assert_frame_of_job(page, found[-1])
    page.locator("dialog .screen").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("dialog").get_by_role("heading", name="a.jpg")).to_be_visible()


def assert_frame_of_job(page: Page, wanted: dict[str, Any]) -> None:
    expect(page.locator("dialog title")).to_have_text(re.compile(f"^{re.escape(wanted['id'])}: "))
    expect(page.locator("dialog .details .box")).to_contain_text(f"{wanted['frame_index']}, 20, 60, 80")
    assert page.locator("dialog video").evaluate(_NUMBER) == wanted["frame_index"]


def test_cards_and_layers(report: Callable[..., Page]) -> None:
    """Layers, labels and the score filter all cards; pictures with nothing left can be put away."""
    page = report([row("a.jpg", answers=[DETECT, CAPTION]), row("b.jpg", detections=[detection("ring", 0.3)])])
    cards = page.locator(".card")
    expect(cards.nth(0).locator(".mark")).to_have_count(4)
    expect(cards.nth(1).locator(".mark")).to_have_count(1)
    assert "a red <star>" in cards.nth(0).inner_text() and "<loc" not in page.inner_text("body")
    page.get_by_label("YOLO").uncheck()
    expect(cards.nth(0).locator(".mark")).to_have_count(3)
    expect(cards.nth(1).locator(".mark")).to_have_count(0)
    page.get_by_label("Only pictures with something shown").check()
    expect(cards.nth(1)).to_be_hidden()
    page.locator(".labels").get_by_label("star").uncheck()
    expect(cards.nth(0).locator(".mark")).to_have_count(1)
    page.get_by_label("Least score").fill("0.75")
    expect(page.get_by_text("No picture has anything that the filters let through.")).to_be_visible()


def test_keyboard(report: Callable[..., Page]) -> None:
    """From card to card, one large, the next, layers off and on, and back where one was."""
    page = report([row(f"{n}.jpg", answers=[DETECT]) for n in range(3)])
    page.locator(".card").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("heading", name="1.jpg")).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(dialog.get_by_role("heading", name="2.jpg")).to_be_visible()
    expect(dialog.locator(".mark")).to_have_count(4)
    page.keyboard.press("1")
    expect(dialog.locator(".mark")).to_have_count(3)
    page.keyboard.press("2")
    expect(dialog.locator(".mark")).to_have_count(0)
    page.keyboard.press("1")
    expect(dialog.locator(".tag")).to_have_count(1)
    page.keyboard.press("l")
    expect(dialog.locator(".tag")).to_have_count(0)
    expect(dialog.locator(".mark")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(page.locator(".card").nth(2)).to_be_focused()


def test_everything_of_a_row(report: Callable[..., Page]) -> None:
    """Large, a row says all that it holds; what a table's row is about lights up in the picture."""
    classes = [{"label": "cat", "class_id": 0, "score": 0.7}]
    tracked = detection("star", 0.9, track_id=12, text="a small star")
    whole = row("v.mp4@5", detections=[tracked, detection("ring")], classes=classes, answers=[CAPTION])
    whole |= {"frame_index": 5, "pts_seconds": 0.2, "metadata": json.dumps({"camera": {"name": "north"}})}
    page = report([whole])
    page.locator(".card").click()
    words = page.get_by_role("dialog").inner_text()
    for word in ("a small star", "12", "cat", "0.70", "north", "frame 5 at 0.20 s", "caption en", "10, 20, 60, 80"):
        assert word in words
    assert "#12" in page.locator("dialog .tag").first.text_content()
    page.locator("dialog tbody tr").nth(1).hover()
    assert page.locator("dialog .mark.pointed").get_attribute("data-index") == "1"
    shown = json.loads(page.locator("dialog pre").last.text_content() or "")
    assert shown == whole


def test_classes(report: Callable[..., Page]) -> None:
    """Of a classifier's job each card says its best class, which labels and score filter as they do boxes."""
    ranked = [
        {"label": name, "class_id": n, "score": score} for n, (name, score) in enumerate([("cat", 0.7), ("dog", 0.2)])
    ]
    layer = {"key": "classes", "name": "YOLO's best class", "labels": [["cat", 1], ["dog", 1]], "scores": [0] * 20}
    rows_of_classes = [row("a.jpg", detections=None, classes=ranked), row("b.jpg", detections=None, classes=ranked[1:])]
    page = report(rows_of_classes, layers=[layer])
    expect(page.locator(".card .words")).to_have_text(["cat 0.70", "dog 0.20"])
    page.get_by_label("Only pictures with something shown").check()
    page.locator(".labels").get_by_label("dog").uncheck()
    expect(page.locator(".card:visible")).to_have_count(1)
    page.get_by_label("Least score").fill("0.8")
    expect(page.locator(".card:visible")).to_have_count(0)


def test_hostile_names(report: Callable[..., Page]) -> None:
    """Names of files, labels, prompts and errors are text, whatever they hold, and keep the page whole."""
    markup = f"<img src=x onerror=alert(2)>{HOSTILE}"
    hostile = row(markup, detections=[detection(markup)], metadata=markup)
    hostile |= {"answers": [DETECT | {"prompt": f"detect {markup}", "detections": [detection(markup)]}]}
    errors = [{"stage": "read", "type": markup, "count": 1, "examples": [{"id": markup, "message": markup}]}]
    page = report([hostile], errors=errors, title=markup, numbers=[{"name": markup, "value": "1", "good": None}])
    expect(page.locator(".card .mark")).to_have_count(2)
    page.locator(".errors summary").click()
    page.locator(".card").click()
    assert page.locator("h1").inner_text() == page.title() == markup
    assert page.locator("body img, body b, body script:not([type])").count() == 0
    assert markup in page.locator("dialog tbody").first.inner_text()


@pytest.mark.parametrize("width", [1200, 360])
def test_labels_neither_collide_nor_are_cut_off(report: Callable[..., Page], width: int) -> None:
    """With dozens of boxes, at edges, tiny and long-named ones; on cards and large."""
    rng = np.random.default_rng(1)
    boxes = np.sort(rng.uniform(0, 1, (40, 2, 2)), axis=1) * (640, 480)
    names = ["star", "ring", "a label longer than most", "x" * 200]
    found = [
        detection(names[n % 4], float(rng.random()), x1=x1, y1=y1, x2=x2, y2=y2)
        for n, ((x1, y1), (x2, y2)) in enumerate(boxes.tolist())
    ]
    page = report([row("a.jpg", detections=found), row("b.jpg", detections=found[:3], answers=[DETECT])])
    page.set_viewport_size({"width": width, "height": 800})
    expect(page.locator(".card .mark").last).to_be_attached()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert_labels_apart(page)
    for card in range(2):
        page.locator(".card").nth(card).click()
        expect(page.locator("dialog .mark").first).to_be_attached()
        assert page.locator("dialog .tag").count() >= 3
        assert page.evaluate("document.querySelector('dialog').scrollWidth") <= width
        assert_labels_apart(page)
        page.keyboard.press("Escape")


def test_hundreds_of_pictures(report: Callable[..., Page]) -> None:
    """Only those near the window are drawn, so that a page of hundreds opens at once; the last once it is reached."""
    page = report([row(f"{n}.jpg") for n in range(500)])
    expect(page.locator(".card").first.locator(".mark")).to_have_count(1)
    assert page.locator(".mark").count() < 100
    page.locator(".card").last.scroll_into_view_if_needed()
    expect(page.locator(".card").last.locator(".mark")).to_have_count(1)
    assert page.locator(".mark").count() < 250


def test_several_models_side_by_side(report: Callable[..., Page]) -> None:
    """Rows of one picture from several models stand beside each other under their models' names."""
    models = [{"model": name, "row": row("a.jpg", detections=[detection(name)])} for name in ("nano", "large")]
    page = report([], items=[{"picture": PIXEL, "problem": None, "rows": models}])
    expect(page.locator(".card .picture")).to_have_count(2)
    expect(page.locator(".card .words")).to_have_text("nano: 1 nano; large: 1 large")
    page.locator(".card").click()
    assert page.locator("dialog .stage h3").all_inner_texts() == ["nano", "large"]
    expect(page.locator("dialog .mark")).to_have_count(2)


def drawn(page: Page, layer: str) -> list[tuple[float, ...]]:
    """x1, y1, x2, y2 of each box of a layer in the page's picture."""
    boxes = page.locator(f'.mark[data-layer="{layer}"] rect.line').evaluate_all(
        "all => all.map(r => ['x', 'y', 'width', 'height'].map(name => Number(r.getAttribute(name))))"
    )
    return [tuple(round(side, 2) for side in (x, y, x + w, y + h)) for x, y, w, h in boxes]


def expected(found: list[dict[str, Any]], least: float) -> list[tuple[float, ...]]:
    sides = ("x1", "y1", "x2", "y2")
    return [tuple(round(one[side], 2) for side in sides) for one in found if one["score"] >= least]


def assert_labels_apart(page: Page) -> None:
    """No label overlaps another or reaches over its picture's edge."""
    pictures = page.locator("svg.picture").evaluate_all(
        """all => all.map((svg) => {
            const box = (one) => { const r = one.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom] };
            return [box(svg), [...svg.querySelectorAll(".plate")].map((one) => box(one)),
                [...svg.querySelectorAll(".tag")].map((tag) => box(tag.querySelector("text")))];
        })"""
    )
    for (left, top, right, bottom), plates, texts in pictures:
        for n, (x1, y1, x2, y2) in enumerate(plates):
            assert x1 >= left - 1 and y1 >= top - 1 and x2 <= right + 1 and y2 <= bottom + 1
            assert texts[n][0] >= x1 - 1 and texts[n][2] <= x2 + 1
            for a1, b1, a2, b2 in plates[:n]:  # a line's width may touch
                assert min(x2, a2) - max(x1, a1) < 2 or min(y2, b2) - max(y1, b1) < 2
