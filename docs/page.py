"""Makes docs/page.png: the page of a running server with its drawn ship.

    nbn demo --no-browser --addr 127.0.0.1:8080 &
    python3 docs/page.py http://127.0.0.1:8080/      # needs playwright, pillow and a chromium in the path
"""

import io
import pathlib
import shutil
import sys

from PIL import Image
from playwright.sync_api import expect, sync_playwright

with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1100, "height": 700}, reduced_motion="reduce", color_scheme="light")
    page.goto(sys.argv[1])
    page.locator("#sample-ship").click()
    expect(page.locator(".rows > li")).to_have_count(5)
    page.wait_for_timeout(500)
    picture = page.screenshot()
    browser.close()
# Fewer colours take half the bytes.
Image.open(io.BytesIO(picture)).convert("RGB").quantize(200).save(pathlib.Path(__file__).parent / "page.png", optimize=True)
