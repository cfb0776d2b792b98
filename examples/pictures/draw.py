"""Draws the pictures in this folder: plain scenes of classes that the shipped model knows.

    python3 examples/pictures/draw.py      # needs pillow and numpy
"""

import pathlib
import random

import numpy
from PIL import Image, ImageDraw, ImageFilter

SIDE = 384
HERE = pathlib.Path(__file__).parent


def gradient(top, bottom, height):
    """Rows from one colour to the other, SIDE pixels wide."""
    share = numpy.linspace(0, 1, height)[:, None, None]
    rows = numpy.array(top) * (1 - share) + numpy.array(bottom) * share
    return numpy.repeat(rows, SIDE, axis=1)


def scene(sky, ground, horizon):
    """Sky above, ground below, with a little noise in both."""
    rows = numpy.concatenate([gradient(*sky, horizon), gradient(*ground, SIDE - horizon)])
    noise = numpy.random.default_rng(1).normal(0, 4, (SIDE, SIDE, 1))
    return Image.fromarray(numpy.clip(rows + noise, 0, 255).astype(numpy.uint8))


def ship():
    picture = scene([(120, 165, 215), (205, 222, 235)], [(62, 100, 132), (28, 58, 92)], 215)
    draw = ImageDraw.Draw(picture)
    draw.polygon([(30, 205), (356, 190), (330, 265), (72, 268)], fill=(38, 42, 58))
    draw.polygon([(66, 250), (336, 246), (330, 265), (72, 268)], fill=(140, 40, 36))
    draw.rectangle([92, 150, 232, 202], fill=(236, 236, 232))
    draw.rectangle([112, 112, 196, 152], fill=(225, 226, 224))
    draw.rectangle([140, 70, 166, 114], fill=(190, 60, 44))
    for x in range(102, 226, 20):
        draw.rectangle([x, 166, x + 9, 176], fill=(52, 66, 86))
    for x in range(120, 190, 18):
        draw.rectangle([x, 124, x + 9, 133], fill=(52, 66, 86))
    draw.line([(280, 192), (280, 100)], fill=(70, 70, 76), width=5)
    draw.line([(280, 104), (236, 196)], fill=(70, 70, 76), width=2)
    waves = random.Random(2)
    for _ in range(140):
        x, y = waves.randrange(SIDE), waves.randrange(258, SIDE)
        draw.line([(x, y), (x + waves.randrange(12, 46), y)], fill=(96, 136, 164), width=2)
    return picture


def airplane():
    picture = scene([(72, 130, 200), (150, 190, 228)], [(150, 190, 228), (196, 216, 234)], 200)
    draw = ImageDraw.Draw(picture)
    white, shade, dark = (238, 240, 243), (186, 192, 202), (70, 80, 96)
    draw.polygon([(196, 190), (120, 300), (156, 300), (262, 196)], fill=shade)
    draw.polygon([(206, 176), (176, 96), (200, 96), (262, 176)], fill=shade)
    draw.polygon([(40, 206), (58, 186), (300, 158), (340, 164), (352, 178), (330, 192), (90, 214)], fill=white)
    draw.polygon([(58, 196), (36, 128), (62, 128), (104, 190)], fill=(200, 60, 50))
    draw.polygon([(60, 204), (22, 226), (44, 228), (104, 208)], fill=shade)
    draw.polygon([(322, 163), (338, 165), (344, 172), (326, 172)], fill=dark)
    for x in range(120, 310, 16):
        draw.rectangle([x, 183 - (x - 120) // 9, x + 6, 188 - (x - 120) // 9], fill=dark)
    draw.ellipse([150, 226, 192, 248], fill=dark)
    return picture


def truck():
    picture = scene([(150, 186, 222), (214, 226, 236)], [(132, 132, 134), (96, 96, 100)], 250)
    draw = ImageDraw.Draw(picture)
    draw.rectangle([0, 222, SIDE, 252], fill=(104, 128, 84))
    draw.rectangle([24, 104, 252, 268], fill=(222, 222, 218))
    draw.rectangle([24, 104, 252, 118], fill=(196, 196, 194))
    draw.polygon([(256, 150), (312, 150), (344, 206), (356, 212), (356, 270), (256, 270)], fill=(196, 44, 40))
    draw.polygon([(274, 162), (306, 162), (330, 204), (274, 204)], fill=(64, 84, 104))
    draw.rectangle([20, 264, 358, 280], fill=(48, 48, 52))
    draw.rectangle([340, 226, 356, 240], fill=(250, 236, 170))
    for x in (74, 132, 306):
        draw.ellipse([x - 30, 252, x + 30, 312], fill=(26, 26, 28))
        draw.ellipse([x - 13, 269, x + 13, 295], fill=(150, 150, 154))
    return picture


for make in (ship, airplane, truck):
    make().filter(ImageFilter.GaussianBlur(1.2)).save(HERE / f"{make.__name__}.jpg", quality=88)
