"""What the client tests share: pictures, a process's memory, and one line per check."""

import contextlib
import io
import time

import numpy as np
from PIL import Image


def picture(width, height, seed=0):
    """A smooth picture with some noise, the same for the same seed."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / width * a + b) + np.cos(y / height * c) for a, b, c in random.uniform(1, 9, (3, 3))]
    pixels = 127 + 55 * np.stack(waves, axis=-1) + random.normal(0, 6, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image, kind="PNG", **options):
    """The bytes of a file of this kind."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rss_mib(pid):
    """Resident memory of a process; None without a process."""
    if pid is None:
        return None
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


class Report:
    """Prints a line per check and counts the failures."""

    def __init__(self):
        self.passed = 0
        self.failed = []

    @contextlib.contextmanager
    def check(self, name):
        """A check: it fails when its body raises. The body may add figures to the list that it gets."""
        figures = []
        began = time.monotonic()
        try:
            yield figures
        except Exception as error:
            self.failed.append(name)
            reason = " ".join(str(error).split()) or "assertion"
            print(f"FAIL {name}: {type(error).__name__}: {reason[:500]}", *figures, flush=True)
        else:
            self.passed += 1
            print(f"ok   {name} ({(time.monotonic() - began) * 1000:.0f} ms)", *figures, flush=True)

    def end(self):
        """Prints the summary; the exit status."""
        print(f"{self.passed} passed, {len(self.failed)} failed" + "".join(f"\n  {name}" for name in self.failed))
        return 1 if self.failed else 0
