"""Writes tests/data/pixels: pictures, and what torchvision makes of them with Pillow.

    python tests/oracle/make_pixels.py      # needs torch, torchvision, pillow, numpy, safetensors
"""

from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import save_file
from torchvision import transforms

OUT = Path(__file__).parents[1] / "data" / "pixels"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def picture(width, height, seed):
    """Smooth shapes with some noise: neither flat nor white noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    planes = [np.sin(x / rng.uniform(3, 30) + rng.uniform(0, 6)) + np.cos(y / rng.uniform(3, 30)) for _ in range(3)]
    values = np.stack(planes, 2) * 55 + 127 + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    rgb = picture(97, 61, 0)
    alpha = rgb.copy()
    alpha.putalpha(Image.fromarray((np.arange(97 * 61) % 256).astype(np.uint8).reshape(61, 97)))
    files = {
        "rgb.png": rgb, "grey.png": rgb.convert("L"), "palette.png": rgb.quantize(32), "alpha.png": alpha,
        "tall.png": picture(20, 90, 1), "small.png": picture(32, 32, 2), "rgb.bmp": rgb, "rgb.gif": rgb.quantize(64),
        "rgb.webp": rgb, "photo.jpg": picture(120, 80, 3), "grey.jpg": rgb.convert("L"),
        "cmyk.jpg": picture(70, 50, 5).convert("CMYK"),
    }
    expected = {}
    for name, image in files.items():
        options = {"lossless": True} if name.endswith(".webp") else {"quality": 92} if name.endswith(".jpg") else {}
        image.save(OUT / name, **options)
        for side, crop in [(32, 32), (40, 33), (72, 64)]:
            pipeline = transforms.Compose([
                transforms.Resize(side), transforms.CenterCrop(crop), transforms.ToTensor(), transforms.Normalize(MEAN, STD),
            ])
            expected[f"{name}@{side}x{crop}"] = pipeline(Image.open(OUT / name).convert("RGB"))
    save_file(expected, OUT / "expected.safetensors")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    picture(60, 40, 4).save(OUT / "rotated.jpg", exif=exif)
    # Noise: what a lossy WebP takes longest for. Only its time is of interest.
    noise = np.random.default_rng(6).integers(0, 256, (320, 320, 3), dtype=np.uint8)
    Image.fromarray(noise).save(OUT / "lossy.webp", quality=50)


if __name__ == "__main__":
    main()
