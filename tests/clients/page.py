"""The server's web page in a real browser: what it shows is what the API answers, and it can be used by keyboard alone.

    page.py BASE_URL [--screenshots DIR]

Needs playwright and a chromium in the path, and a server with --control and without keys. Makes its own pictures, and
plays the answers that a healthy server with one calibrated model does not give (401, 503, no connection, a model
without calibration). A page of another site then tries to load and unload the server's models.
Exit status 1 when a check fails.
"""

import argparse
import contextlib
import http.server
import json
import shutil
import struct
import sys
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
import zlib
from pathlib import Path

from playwright.sync_api import Error, expect, sync_playwright

CHROMIUM_ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync"]
TEXT = b"This is no picture.\n"
SOFTMAX_MODEL = "page-test-softmax"

# Contrast of every visible text with what lies behind it, by WCAG 2; gives those below 4.5.
LOW_CONTRAST = """() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = parse(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const e of document.querySelectorAll('body *')) {
    const text = [...e.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join('');
    if (!text || !e.checkVisibility() || e.closest('template, [disabled]')) continue;
    const [a, b] = [luminance(parse(getComputedStyle(e).color)), luminance(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${text.slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return low;
}"""

# Whether the focused element, or what stands for it, is outlined.
FOCUS = """() => {
  const e = document.activeElement;
  const drawn = e.type === 'radio' ? e.nextElementSibling : e;
  const style = getComputedStyle(drawn);
  return [e.id || e.className || e.value, style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2];
}"""

# Hands files to the page as a paste or a drop would.
HAND_OVER = """([kind, name, bytes]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], name, { type: 'image/png' }));
  const event = kind === 'paste'
    ? new ClipboardEvent('paste', { clipboardData: data, bubbles: true, cancelable: true })
    : new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true });
  document.body.dispatchEvent(event);
}"""


# Posts to another site as any page may, without CORS: by fetch, and by a form into a frame. Gives what fetch gives for
# each address: the type of an answer that the page may not read, or the error.
POST_ELSEWHERE = """async (urls) => {
  const outcomes = [];
  for (const url of urls) {
    const options = { method: 'POST', mode: 'no-cors', headers: { 'content-type': 'text/plain' }, body: '{}' };
    outcomes.push(await fetch(url, options).then((answer) => answer.type, String));
    const frame = Object.assign(document.createElement('iframe'), { name: url });
    const form = Object.assign(document.createElement('form'), { method: 'post', action: url, target: url });
    form.enctype = 'text/plain';
    document.body.append(frame, form);
    const done = new Promise((resolve) => frame.addEventListener('load', resolve));
    form.submit();
    await done;
  }
  return outcomes;
}"""


def png(size, pixel):
    """A PNG of size × size pixels; pixel(x, y) gives red, green, blue in 0 to 1."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = b"".join(
        b"\0" + bytes(round(255 * channel) for x in range(size) for channel in pixel(x / size, y / size))
        for y in range(size))
    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def sea(x, y):
    """A dark hull on blue water under a light sky."""
    if 0.5 < y < 0.62 and abs(x - 0.5) < 0.3 - (y - 0.5):
        return 0.25, 0.12, 0.1
    return (0.6, 0.75, 0.95 - 0.2 * y) if y < 0.58 else (0.1, 0.25, 0.5 - 0.3 * (y - 0.58))


def frog(x, y):
    """A green disc on brown."""
    inside = (x - 0.5) ** 2 + (y - 0.55) ** 2 < 0.09
    return (0.3, 0.55 + 0.2 * (0.5 - y), 0.15) if inside else (0.4, 0.33, 0.22 + 0.1 * x)


class Checks:
    """Counts checks, and says of each failed one what was found."""

    def __init__(self):
        self.passed, self.failed = 0, 0

    def that(self, what, holds, found=""):
        """One check."""
        if holds:
            self.passed += 1
        else:
            self.failed += 1
            print(f"FAILED: {what}: {found}")

    def equal(self, what, found, expected):
        """One comparison."""
        self.that(what, found == expected, f"found {found!r}, expected {expected!r}")


class Api:
    """The server, asked without the page."""

    def __init__(self, base):
        self.base = base
        models = self.get("/v1/models")["models"]
        self.model = next((m for m in models if m["default"]), models[0])
        self.card = self.get(f"/v1/models/{self.model['name']}")

    def get(self, path):
        """A JSON document."""
        with urllib.request.urlopen(self.base + path) as reply:
            return json.load(reply)

    def post(self, path, body=b""):
        """The status of an answer, and its content."""
        request = urllib.request.Request(self.base + path, body, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def loads(self):
        """How often models were loaded, by outcome, as /metrics tells it; and the repository's index."""
        with urllib.request.urlopen(self.base + "/metrics") as reply:
            lines = reply.read().decode().splitlines()
        index = json.loads(self.post("/v2/repository/index")[1])
        return [line for line in lines if line.startswith("nbn_model_loads_total")], index

    def classify(self, data, **options):
        """The answer for one picture as the page asks for it, or the problem."""
        query = urllib.parse.urlencode({"include": "uncalibrated,support,timings", **options})
        url = f"{self.base}/v1/models/{self.model['name']}/classify?{query}"
        request = urllib.request.Request(url, data, {"content-type": "application/octet-stream"})
        try:
            with urllib.request.urlopen(request) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            return json.load(error)


def percent_of(text):
    """The number in a percentage's text."""
    return float(text.strip(" %").lstrip("<>"))


def near(text, share):
    """Whether a percentage's text says this share."""
    return text.endswith(" %") and abs(percent_of(text) - 100 * share) <= 0.11


def settled(page):
    """Waits until no picture is being scored."""
    expect(page.locator("[aria-busy]")).to_have_count(0)
    page.wait_for_timeout(60)  # two frames, until bars have their width


def fresh(page):
    """The page as it opens, with the server's own answers."""
    page.unroute_all()
    page.reload()
    expect(page.locator("#model")).to_be_enabled()


def send(page, *files):
    """Chooses files of (name, bytes)."""
    page.locator("#files").set_input_files(
        [{"name": name, "mimeType": "application/octet-stream", "buffer": data} for name, data in files])
    settled(page)


def compare(checks, card, reply, what, limited=False):
    """A card's rows, verdict, set and timings against the API's answer; whether a limit decides on the best class."""
    result = reply["results"][0]
    rows = card.locator(".rows > li")
    checks.equal(f"{what}: rows", rows.count(), len(result["predictions"]))
    for row, expected in zip(rows.all(), result["predictions"]):
        label = expected["label"]
        checks.equal(f"{what}: label", row.locator(".label").inner_text(), label)
        checks.equal(f"{what}: group of {label}", row.locator(".group").inner_text(), expected.get("group", ""))
        founded = row.locator(".founded").inner_text()
        for number in (expected.get("training_images"), expected.get("support")):
            checks.that(f"{what}: images of {label}", number is None or f"{number:,}" in founded, founded)
        status = expected.get("status", "").replace("_", " ")
        checks.equal(f"{what}: status of {label}", row.locator(".status").inner_text(), status)
        for kind, key in (("calibrated", "score"), ("softmax", "uncalibrated")):
            meter = row.get_by_role("meter", name=f"{label}, {kind}", exact=True)
            share = expected[key]
            text = meter.locator("xpath=following-sibling::*[1]").inner_text()
            checks.that(f"{what}: {kind} of {label}", near(text, share), f"{text}, expected {share}")
            now = float(meter.get_attribute("aria-valuenow") or "nan")
            checks.that(f"{what}: aria of {label}", abs(now - share) < 1e-3
                        and meter.get_attribute("aria-valuetext") == text
                        and meter.get_attribute("aria-valuemax") == "1", meter.evaluate("e => e.outerHTML"))
            width = meter.evaluate("e => e.firstElementChild.getBoundingClientRect().width / e.clientWidth")
            checks.that(f"{what}: bar of {label}", abs(width - share) < 0.02, f"{width:.3f}, expected {share:.3f}")
    verdict = card.locator(".verdict").inner_text()
    checks.that(f"{what}: decision", (result["decision"] in verdict) == limited, verdict)
    checks.that(f"{what}: reason", result.get("reason", "") in verdict, verdict)
    checks.that(f"{what}: prior", f"{reply['prior']} prior" in card.locator(".of-score").text_content())
    chips = card.locator(".set li").all_inner_texts() if "set" in result else []
    checks.equal(f"{what}: set", chips, result.get("set", {}).get("labels", []))
    checks.equal(f"{what}: set is shown", card.locator(".set").is_visible(), "set" in result)
    timings = card.locator(".timings > div")
    times = dict(zip(timings.locator("dt").all_inner_texts(), timings.locator("dd").all_inner_texts()))
    stages = [stage.removesuffix("_ms") for stage in result["timings"] if stage.endswith("_ms")] + ["round trip"]
    checks.that(f"{what}: timings", {"queue", "decode", "infer"} < set(stages) and set(stages) <= set(times)
                and all(float(times[stage].removesuffix(" ms")) >= 0 for stage in stages), times)
    checks.that(f"{what}: round trip", float(times["round trip"].removesuffix(" ms")) > 0, times)


def problem(status, detail, **headers):
    """An error as the server writes it."""
    body = {"type": "about:blank", "title": "", "status": status, "detail": detail, "instance": "", "code": "",
            "request_id": ""}
    return {"status": status, "content_type": "application/problem+json", "headers": headers, "body": json.dumps(body)}


def start(checks, page, base, api):
    """The page as it opens."""
    reply = page.goto(base + "/")
    policy = reply.headers.get("content-security-policy", "")
    checks.that("strict policy", "default-src 'none'" in policy and "unsafe" not in policy, policy)
    expect(page.locator("#model")).to_be_enabled()
    checks.equal("chosen model", page.locator("#model").input_value(), api.model["name"])
    facts = page.locator("#facts")
    for fact in (api.card["manifest"]["arch"], str(len(api.card["manifest"]["classes"])), api.card["calibration"]["id"],
                 "calibrated", api.card["device"]):
        expect(facts).to_contain_text(fact)
    for role, name in (("button", "Choose pictures"), ("combobox", "Model"), ("group", "Class prior"),
                       ("group", "Prediction set, α"), ("radio", "uniform"), ("radio", "0.05"),
                       ("spinbutton", "Classes shown"), ("combobox", "Abstain below"), ("status", None)):
        checks.equal(f"{role} {name}", page.get_by_role(role, name=name, exact=True).count(), 1)


def by_keyboard(checks, page, api, picture):
    """Choosing a picture, a set, a prior and the number of classes without a mouse."""
    stops = []
    for _ in range(10):
        page.keyboard.press("Tab")
        stops.append(page.evaluate(FOCUS))
    checks.equal("focus order", [name for name, _ in stops],
                 ["choose", "sample-airplane", "sample-ship", "sample-truck", "reading", "model", "uniform", "", "top-k",
                  "min-score"])
    checks.that("focus is visible", all(seen for _, seen in stops), stops)

    page.locator("#choose").focus()
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files({"name": "sea.png", "mimeType": "image/png", "buffer": picture})
    card = page.get_by_role("article", name="sea.png")
    expect(card.locator(".rows > li")).to_have_count(5)
    settled(page)
    uniform = api.classify(picture, top_k=5, prior="uniform")
    compare(checks, card, uniform, "uniform")
    best = uniform["results"][0]["predictions"][0]
    status = page.get_by_role("status").inner_text()
    checks.that("status says the answer", status.startswith("Scored: ") and best["label"] in status, status)
    checks.that("thumbnail", card.locator("img").evaluate("e => e.complete && e.naturalWidth > 0"))

    page.get_by_role("radio", name="off").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(card.locator(".set li").first).to_be_visible()
    settled(page)
    compare(checks, card, api.classify(picture, top_k=5, prior="uniform", alpha=0.1), "alpha 0.1")
    page.keyboard.press("ArrowLeft")
    settled(page)
    compare(checks, card, api.classify(picture, top_k=5, prior="uniform", alpha=0.05), "alpha 0.05")

    before = card.locator(".bar.score + .value").all_inner_texts()
    page.get_by_role("radio", name="uniform").focus()
    page.keyboard.press("ArrowRight")
    expect(card.locator(".of-score")).to_have_text("calibrated, train prior")
    settled(page)
    compare(checks, card, api.classify(picture, top_k=5, prior="train", alpha=0.05), "train")
    after = card.locator(".bar.score + .value").all_inner_texts()
    checks.that("the prior moves scores", before != after, after)

    count = len(api.card["manifest"]["classes"])
    for typed, shown in (("3", 3), ("999", count), ("0", 1), ("", 5)):
        page.get_by_label("Classes shown").fill(typed)
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        expect(card.locator(".rows > li")).to_have_count(shown)
    settled(page)
    page.get_by_label("Abstain below").select_option("0.95")
    settled(page)
    compare(checks, card, api.classify(picture, top_k=5, prior="train", alpha=0.05, min_score=0.95), "abstain", limited=True)
    expect(page.locator("#min-score-hint")).to_have_text("Classes that score less are left out.")
    page.get_by_label("Abstain below").select_option("0.25")
    settled(page)
    compare(checks, card, api.classify(picture, top_k=5, prior="train", alpha=0.05, min_score=0.25), "accept", limited=True)
    page.get_by_label("Abstain below").select_option("")
    page.get_by_role("radio", name="off").check(force=True)
    page.get_by_role("radio", name="uniform").check(force=True)
    settled(page)


def samples(checks, page):
    """The server's own pictures, each of which must be taken for what it shows."""
    for label in ("airplane", "ship", "truck"):
        page.locator(f"#sample-{label}").click()
        card = page.get_by_role("article", name=f"{label}.jpg")
        expect(card.locator(".rows > li")).to_have_count(5)
        best = card.locator(".best").inner_text()
        checks.that(f"sample {label}", best.startswith(f"{label}, "), best)
        card.get_by_role("button", name="Remove").click()


def static(x, y):
    """Colours without any order."""
    seed = int(1e4 * x) * 7919 + int(1e4 * y) * 104729
    return tuple((seed * factor % 1009) / 1009 for factor in (17, 71, 239))


def unfamiliar(checks, page, api):
    """A picture of nothing: what is told of it, and what is withheld on request."""
    fresh(page)
    noise = png(32, static)
    send(page, ("noise.png", noise))
    card = page.get_by_role("article", name="noise.png")
    line = card.locator(".familiarity").inner_text()
    checks.that("noise is unlike", line.startswith("Unlike the training images, by its brightness"), line)
    checks.that("nothing is withheld", not card.locator(".decision").is_visible())
    page.locator("#unlike-share").select_option("0.01")
    settled(page)
    decision = card.locator(".decision").inner_text()
    checks.equal("noise is withheld", decision, "abstain: unlike the training images")
    reason = api.classify(noise, unlike=0.01)["results"][0]["reason"]
    checks.that("the reason", reason.startswith("unlike_training: "), reason)
    page.locator("#unlike-share").select_option("")
    settled(page)
    checks.that("nothing is withheld again", not card.locator(".decision").is_visible())
    card.get_by_role("button", name="Remove").click()


def several(checks, page, api, pictures):
    """Several files at once, one of them no picture; paste, drop, and removal."""
    fresh(page)
    send(page, ("sea.png", pictures[0]))
    send(page, ("frog.png", pictures[1]), ("notes.txt", TEXT))
    checks.equal("newest first", page.locator(".card h3").all_inner_texts(), ["frog.png", "notes.txt", "sea.png"])
    expect(page.get_by_role("status")).to_have_text("2 pictures scored, 1 not scored.")
    notes = page.get_by_role("article", name="notes.txt")
    checks.equal("error is a sentence", notes.locator(".problem p").inner_text(), api.classify(TEXT)["detail"])
    checks.equal("nothing to try again", notes.locator(".retry").is_visible(), False)
    checks.equal("no scores with an error", notes.locator(".scores").is_visible(), False)
    expect(notes.locator(".thumb")).to_have_text("no preview")
    compare(checks, page.get_by_role("article", name="frog.png"),
            api.classify(pictures[1], top_k=5, prior="uniform"), "second picture")

    for kind, name in (("paste", "pasted 1"), ("drop", "dropped.png")):
        page.evaluate(HAND_OVER, [kind, "dropped.png", list(pictures[0])])
        card = page.get_by_role("article", name=name, exact=True)
        expect(card.locator(".rows > li")).to_have_count(5)
        settled(page)
        compare(checks, card, api.classify(pictures[0], top_k=5, prior="uniform"), kind)
    page.evaluate("""() => document.body.dispatchEvent(
        new DragEvent('drop', { dataTransfer: new DataTransfer(), bubbles: true, cancelable: true }))""")
    expect(page.get_by_role("status")).to_contain_text("not a file")

    page.get_by_role("button", name="Remove dropped.png").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".card")).to_have_count(4)
    checks.equal("focus after removal", page.evaluate("document.activeElement.getAttribute('aria-label')"),
                 "Remove pasted 1")
    page.get_by_role("button", name="Remove all").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".card")).to_have_count(0)
    checks.equal("focus after removing all", page.evaluate("document.activeElement.id"), "choose")


def refusals(checks, page, picture):
    """503 with Retry-After, no connection, 401 and the key."""
    fresh(page)
    classify = "**/classify?*"
    sentence = "the queue of waiting images is full: try again after the time in Retry-After"
    page.route(classify, lambda route: route.fulfill(**problem(503, sentence, **{"retry-after": "3"})))
    send(page, ("sea.png", picture))
    text = page.locator(".card .problem p").inner_text()
    checks.that("503 says when", text.startswith(sentence) and "in 3 seconds, from " in text, text)
    page.unroute(classify)
    page.route(classify, lambda route: route.abort())
    page.get_by_role("button", name="Try again").press("Enter")
    settled(page)
    text = page.locator(".card .problem p").inner_text()
    checks.that("no connection is a sentence", text.startswith("The server gave no answer"), text)
    page.unroute(classify)
    page.get_by_role("button", name="Try again").press("Enter")
    expect(page.locator(".card .rows > li")).to_have_count(5)
    checks.equal("focus stays on the card", page.evaluate("document.activeElement.className"), "card")

    sentence = "this server needs an API key: send it as Authorization: Bearer KEY"
    given = []

    def guard(route):
        given.append(route.request.headers.get("authorization"))
        if given[-1] == "Bearer right":
            route.continue_()
        else:
            route.fulfill(**problem(401, sentence))

    page.route("**/v1/**", guard)
    page.reload()
    field = page.get_by_label("API key")
    expect(field).to_be_focused()
    checks.that("401 is a sentence", sentence in page.locator("#key-hint").inner_text())
    page.locator("#files").set_input_files({"name": "sea.png", "mimeType": "image/png", "buffer": picture})
    expect(page.get_by_role("status")).to_have_text("1 picture waiting for a model.")
    field.fill("wrong")
    field.press("Enter")
    expect(field).to_have_attribute("aria-invalid", "true")
    field.fill("right")
    field.press("Enter")
    expect(page.locator(".card .rows > li")).to_have_count(5)
    expect(field).to_be_hidden()
    checks.that("keys as given", {None, "Bearer wrong", "Bearer right"} == set(given), given)
    page.unroute("**/v1/**")
    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    notice = page.get_by_role("alert")
    expect(notice).to_contain_text("The server gave no answer")
    page.unroute("**/v1/models")
    notice.get_by_role("button", name="Try again").press("Enter")
    expect(page.locator("#model")).to_be_enabled()
    expect(notice).to_be_hidden()


def model_choice(checks, page, api, picture):
    """A second model, which is not calibrated: one bar, a sentence, no prior, no set."""
    fresh(page)
    summary = {**api.model, "name": SOFTMAX_MODEL, "default": False}
    card = {**api.card, "name": SOFTMAX_MODEL, "scale": "softmax", "calibration": None}
    asked = []

    def classify(route):
        asked.append(urllib.parse.parse_qs(urllib.parse.urlsplit(route.request.url).query))
        reply = api.classify(picture, top_k=asked[-1]["top_k"][0])
        for one in reply["results"][0]["predictions"]:
            one["score"] = one["uncalibrated"]
            del one["support"], one["status"]
        reply = {"model": SOFTMAX_MODEL, "version": "1", "scale": "softmax", "results": reply["results"]}
        route.fulfill(json=reply)

    page.route("**/v1/models", lambda route: route.fulfill(json={"models": [api.model, summary]}))
    page.route(f"**/v1/models/{SOFTMAX_MODEL}", lambda route: route.fulfill(json=card))
    page.route(f"**/v1/models/{SOFTMAX_MODEL}/classify?*", classify)
    page.reload()
    expect(page.locator("#model option")).to_have_count(2)
    page.get_by_role("radio", name="0.1", exact=True).check(force=True)
    send(page, ("sea.png", picture))
    expect(page.locator(".rows [role=meter]:visible")).to_have_count(10)
    page.get_by_label("Model", exact=True).select_option(SOFTMAX_MODEL)
    expect(page.locator(".rows [role=meter]:visible")).to_have_count(5)
    settled(page)
    expect(page.locator("#uncalibrated")).to_be_visible()
    expect(page.locator("#facts")).to_contain_text("softmax, not calibrated")
    expect(page.locator(".of-score")).to_contain_text("not a probability")
    for part in ("#prior", "#alpha", ".set"):
        checks.equal(f"{part} is hidden", page.locator(part).is_visible(), False)
    checks.that("no prior and no set are asked for", not {"prior", "alpha"} & set(asked[-1]), asked)
    page.get_by_label("Model", exact=True).select_option(api.model["name"])
    expect(page.locator(".rows [role=meter]:visible")).to_have_count(10)
    settled(page)
    checks.equal("the set is asked for again", page.locator(".set").is_visible(), True)


@contextlib.contextmanager
def other_site(host):
    """A site with one empty page, on a port of its own; its address."""
    class Page(http.server.BaseHTTPRequestHandler):
        """Answers everything with the page."""

        def do_GET(self):
            """The page."""
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>elsewhere</title><body></body>")

        def log_message(self, *_):
            """Says nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{host}:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def from_elsewhere(checks, browser, base, api, picture):
    """Pages of other sites change nothing: not another port's, not another host's."""
    name, before, answer = api.model["name"], api.loads(), api.classify(picture)
    urls = [f"{base}/v2/repository/models/{name}/{action}" for action in ("load", "unload")]
    urls += [f"{base}/inference.GRPCInferenceService/RepositoryModel{action}" for action in ("Load", "Unload")]
    for host in ("127.0.0.1", "localhost"):
        with other_site(host) as site:
            context = browser.new_context()
            page, statuses = context.new_page(), []
            page.on("response", lambda reply: statuses.append((reply.url, reply.status)))
            page.goto(site)
            checks.equal(f"{host}: fetch", page.evaluate(POST_ELSEWHERE, urls), ["opaque"] * len(urls))
            seen = [(url, status) for url, status in statuses if url in urls]
            checks.equal(f"{host}: both ways of posting reached the server", len(seen), 2 * len(urls))
            refused = all(status == (415 if "GRPC" in url else 403) for url, status in seen)
            checks.that(f"{host}: refused", refused, seen)
            context.close()
    checks.equal("the models are as they were", api.loads(), before)
    checks.equal("the model answers as before", api.classify(picture)["results"][0]["predictions"],
                 answer["results"][0]["predictions"])
    # The server takes the same request from a program, so it was refused because a page sent it.
    checks.equal("a program may load", api.post(f"/v2/repository/models/{name}/load", b"{}")[0], 200)


def look(checks, browser, base, pictures, folder):
    """Contrast, width and pictures of the page, by theme and size."""
    for theme in ("light", "dark"):
        for device, width, height in (("desktop", 1280, 900), ("phone", 390, 844)):
            context = browser.new_context(color_scheme=theme, viewport={"width": width, "height": height},
                                          reduced_motion="reduce")
            page = context.new_page()
            page.goto(base + "/")
            expect(page.locator("#facts dd").first).to_be_visible()
            shots = {"empty": page.screenshot()} if folder else {}
            page.get_by_role("radio", name="0.1", exact=True).check(force=True)
            send(page, ("sea.png", pictures[0]), ("frog.png", pictures[1]), ("notes.txt", TEXT))
            page.locator("summary").click()
            checks.equal(f"{theme}, {device}: contrast below 4.5", page.evaluate(LOW_CONTRAST), [])
            wide = page.evaluate("document.documentElement.scrollWidth")
            checks.that(f"{theme}, {device}: fits the width", wide <= width, wide)
            tops = [page.locator(part).first.bounding_box()["y"] for part in (".card", "#settings")]
            checks.that(f"{theme}, {device}: scores are not below the settings", device != "phone" or tops[0] < tops[1], tops)
            checks.equal(f"{theme}, {device}: no motion",
                         page.locator(".bar span").first.evaluate("e => getComputedStyle(e).transitionDuration"), "0s")
            if folder:
                shots["scored"] = page.screenshot(full_page=True)
            for name, data in shots.items():
                (folder / f"{theme}-{device}-{name}.png").write_bytes(data)
            context.close()


def run(base, folder):
    """All checks; gives the number that failed."""
    checks, api, pictures = Checks(), Api(base), [png(64, sea), png(96, frog)]
    said, asked = [], []
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM_ARGS,
                                             env={"HOME": profile, "XDG_RUNTIME_DIR": profile})
        context = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce",
                                      color_scheme="light")
        context.set_default_timeout(10_000)
        expect.set_options(timeout=10_000)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.on("filechooser", lambda _: None)  # watches for choosers from the start, not only when one is expected
        for step, arguments in ((start, (page, base, api)), (by_keyboard, (page, api, pictures[0])),
                                (several, (page, api, pictures)), (refusals, (page, pictures[0])),
                                (model_choice, (page, api, pictures[0])), (samples, (page,)),
                                (unfamiliar, (page, api)),
                                (look, (browser, base, pictures, folder)),
                                (from_elsewhere, (browser, base, api, pictures[0]))):
            try:
                step(checks, *arguments)
            except (AssertionError, Error) as error:
                checks.that(step.__name__, False, error)
        browser.close()
    # The browser itself notes each refused request that the checks above provoke.
    said = [text for text in said if not text.startswith("Failed to load resource")]
    checks.equal("console", said, [])
    others = [url for url in asked if not url.startswith((base + "/", f"blob:{base}/", "data:"))]
    checks.equal("requests to others", others, [])
    print(f"{checks.passed} passed, {checks.failed} failed")
    return checks.failed


def main():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_url", help="such as http://127.0.0.1:8080")
    parser.add_argument("--screenshots", type=Path, metavar="DIR", help="folder for pictures of the page")
    arguments = parser.parse_args()
    if arguments.screenshots:
        arguments.screenshots.mkdir(parents=True, exist_ok=True)
    sys.exit(1 if run(arguments.base_url.rstrip("/"), arguments.screenshots) else 0)


if __name__ == "__main__":
    main()
