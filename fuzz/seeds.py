"""Makes the seeds of the fuzzers: small whole files of every kind that a target reads, with the standard library alone.

    python3 fuzz/seeds.py

writes fuzz/seeds/TARGET/NAME anew, the same bytes each time. Findings are kept beside them, in fuzz/regressions.
"""

import base64
import collections
import gzip
import io
import json
import pathlib
import pickle
import shutil
import struct
import sys
import tarfile
import types
import zipfile
import zlib

HERE = pathlib.Path(__file__).resolve().parent
DATA = HERE.parent / "tests" / "data" / "pixels"
LARGEST = 4096
SEEDS = {}


def seed(target, name, content):
    content = content.encode() if isinstance(content, str) else bytes(content)
    assert len(content) <= LARGEST, f"{target}/{name} has {len(content)} bytes"
    assert SEEDS.setdefault(target, {}).setdefault(name, content) is content, f"{target}/{name} is there twice"


class Bits:
    """Collects numbers of some bits each, the first in the low or the high end of a byte."""

    def __init__(self, low_first):
        self.low_first, self.bits = low_first, []

    def put(self, value, count):
        places = range(count) if self.low_first else reversed(range(count))
        self.bits += [value >> place & 1 for place in places]
        return self

    def bytes(self, fill=0):
        bits = self.bits + [fill] * (-len(self.bits) % 8)
        chunks = [bits[at : at + 8] for at in range(0, len(bits), 8)]
        return bytes(sum(bit << (n if self.low_first else 7 - n) for n, bit in enumerate(chunk)) for chunk in chunks)


def exif(order="<", orientation=6):
    """An EXIF block that says how the camera was held."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return head + struct.pack(order + "HHHIHHI", 1, 0x112, 3, 1, orientation, 0, 0)


# JPEG: every coefficient is zero, so a block is one code for its DC and one for the rest.


def segment(marker, content=b""):
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def jpeg(width, height, sampling=((1, 1),), progressive=False, restart=0, before=b"", after=b""):
    components = len(sampling)
    tables = segment(0xDB, b"\0" + bytes([1] * 64))
    # Two codes of one bit: category 0 and 1 of DC; end of block and one coefficient of AC.
    for kind, symbols in [(0x00, b"\x00\x01"), (0x10, b"\x00\x01")]:
        tables += segment(0xC4, bytes([kind, 1, 1] + [0] * 14) + symbols)
    frame = struct.pack(">BHHB", 8, height, width, components)
    frame += b"".join(bytes([n + 1, h << 4 | v, 0]) for n, (h, v) in enumerate(sampling))
    out = b"\xff\xd8" + before + tables + segment(0xC2 if progressive else 0xC0, frame)
    if restart:
        out += segment(0xDD, struct.pack(">H", restart))
    most = [max(axis) for axis in zip(*sampling)]
    units = -(-width // (8 * most[0])) * -(-height // (8 * most[1]))
    blocks = 1 if components == 1 else sum(h * v for h, v in sampling)

    def scan(which, start, end, approximation, bits_of_block, blocks_of_unit, units):
        head = bytes([len(which)]) + b"".join(bytes([n + 1, 0]) for n in which)
        data = b""
        step = restart or units
        for number, first in enumerate(range(0, units, step)):
            bits = Bits(False)
            for _ in range(min(step, units - first) * blocks_of_unit):
                for bit in bits_of_block:
                    bits.put(bit, 1)
            if number:
                data += bytes([0xFF, 0xD0 + (number - 1) % 8])
            data += bits.bytes(1).replace(b"\xff", b"\xff\0")
        return segment(0xDA, head + bytes([start, end, approximation])) + data

    everything = range(components)
    if not progressive:
        out += scan(everything, 0, 63, 0, [0, 0], blocks, units)
    else:
        out += scan(everything, 0, 0, 0x01, [0], blocks, units)
        for n, (h, v) in enumerate(sampling):
            own = -(-(-(-width * h // most[0])) // 8) * -(-(-(-height * v // most[1])) // 8)
            out += scan([n], 1, 63, 0, [0], 1, own)
        out += scan(everything, 0, 0, 0x10, [1], blocks, units)
    return out + after + b"\xff\xd9"


def jpegs():
    colour = ((2, 2), (1, 1), (1, 1))
    seed("picture_jpeg", "grey.jpg", jpeg(16, 16))
    seed("picture_jpeg", "colour.jpg", jpeg(33, 17, colour))
    seed("picture_jpeg", "restarts.jpg", jpeg(64, 16, colour, restart=1))
    seed("picture_jpeg", "progressive.jpg", jpeg(24, 24, progressive=True))
    seed("picture_jpeg", "progressive-colour.jpg", jpeg(40, 24, colour, progressive=True))
    adobe = segment(0xEE, b"Adobe" + struct.pack(">HHHB", 100, 0, 0, 2))
    seed("picture_jpeg", "inks.jpg", jpeg(16, 8, ((1, 1),) * 4, before=adobe))
    turned = segment(0xE1, b"Exif\0\0" + exif())
    seed("picture_jpeg", "turned.jpg", jpeg(24, 8, colour, before=turned))
    seed("picture_jpeg", "no-height.jpg", jpeg(16, 16).replace(b"\0\x10\0\x10", b"\0\0\0\x10"))
    for name in ["grey.jpg", "rotated.jpg"]:
        seed("picture_jpeg", "photo-" + name, (DATA / name).read_bytes())


# PNG


def chunk(kind, content=b""):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, depth, colour, interlaced=False, between=b""):
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]

    def part(width, height):
        if not width or not height:
            return b""
        row = -(-width * samples * depth // 8)
        return b"".join(bytes([y % 5]) + bytes((x * 7 + y * 31) % 251 for x in range(row)) for y in range(height))

    if interlaced:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
        data = b"".join(part(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes)
    else:
        data = part(width, height)
    out = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))
    if colour == 3:
        out += chunk(b"PLTE", bytes(n * 5 % 256 for n in range(3 << depth)))
    return out + between + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND")


def pngs():
    for colour, depths in {0: [1, 2, 4, 8, 16], 2: [8, 16], 3: [1, 4, 8], 4: [8, 16], 6: [8, 16]}.items():
        for depth in depths:
            seed("picture_png", f"colour{colour}-{depth}.png", png(11, 7, depth, colour))
    seed("picture_png", "interlaced.png", png(13, 9, 8, 2, interlaced=True))
    seed("picture_png", "interlaced-bits.png", png(13, 9, 1, 0, interlaced=True))
    seed("picture_png", "transparent-palette.png", png(9, 9, 8, 3, between=chunk(b"tRNS", bytes(40))))
    seed("picture_png", "turned.png", png(12, 5, 8, 2, between=chunk(b"eXIf", exif(">"))))
    animation = chunk(b"acTL", struct.pack(">II", 1, 0)) + chunk(
        b"fcTL", struct.pack(">IIIIIHHBB", 0, 8, 8, 0, 0, 1, 9, 0, 0)
    )
    seed("picture_png", "animated.png", png(8, 8, 8, 6, between=animation))
    text = chunk(b"tEXt", b"Title\0a picture") + chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(200)))
    seed("picture_png", "texts.png", png(8, 8, 8, 0, between=text + chunk(b"gAMA", struct.pack(">I", 45455))))


# GIF


def lzw_for_gif(pixels, bits):
    """Each pixel by its own code; the table is cleared before codes grow longer."""
    out, since = Bits(True), 0
    for pixel in pixels:
        if since % ((1 << bits) - 2) == 0:
            out.put(1 << bits, bits + 1)
        out.put(pixel, bits + 1)
        since += 1
    data = out.put((1 << bits) + 1, bits + 1).bytes()
    blocks = [data[at : at + 255] for at in range(0, len(data), 255)]
    return bytes([bits]) + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"


def gif(screen, frame, bits=2, local=False, interlaced=False, control=None, frames=1):
    palette = bytes(n * 37 % 256 for n in range(3 << bits))
    out = b"GIF89a" + struct.pack("<HHBBB", *screen, 0 if local else 0x80 | bits - 1, 0, 0)
    out += b"" if local else palette
    for _ in range(frames):
        if control is not None:
            out += b"\x21\xf9\x04" + bytes([control, 1, 0, 1, 0])
        flags = (0x80 | bits - 1 if local else 0) | (0x40 if interlaced else 0)
        out += b"\x2c" + struct.pack("<HHHHB", *frame, flags) + (palette if local else b"")
        width, height = frame[2:]
        out += lzw_for_gif([(x + y) % (1 << bits) for y in range(height) for x in range(width)], bits)
    return out + b"\x3b"


def gifs():
    seed("picture_gif", "plain.gif", gif((10, 6), (0, 0, 10, 6)))
    seed("picture_gif", "local.gif", gif((10, 6), (0, 0, 10, 6), bits=4, local=True))
    seed("picture_gif", "interlaced.gif", gif((9, 17), (0, 0, 9, 17), bits=8, interlaced=True))
    seed("picture_gif", "transparent.gif", gif((8, 8), (0, 0, 8, 8), control=0x01))
    seed("picture_gif", "small-frame.gif", gif((20, 20), (5, 6, 4, 3)))
    seed("picture_gif", "frame-outside.gif", gif((6, 6), (3, 3, 8, 8)))
    seed("picture_gif", "two-frames.gif", gif((8, 8), (0, 0, 8, 8), control=0x08, frames=2))
    seed("picture_gif", "no-height.gif", gif((10, 0), (0, 0, 10, 6)))
    seed("picture_gif", "no-width.gif", gif((0, 10), (0, 0, 10, 6)))
    seed("picture_gif", "no-frame.gif", gif((10, 10), (0, 0, 10, 6), frames=0))
    seed("picture_gif", "comment.gif", gif((4, 4), (0, 0, 4, 4)).replace(b"\x2c", b"\x21\xfe\x03abc\0\x2c", 1))


# WebP


def riff(*chunks):
    body = b"WEBP" + b"".join(kind + struct.pack("<I", len(c)) + c + b"\0" * (len(c) % 2) for kind, c in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def lossless(width, height, transform=None, cache=0, alpha=True):
    """VP8L of one colour: five codes of one symbol each, so that pixels take no bits."""
    out = Bits(True).put(0x2F, 8).put(width - 1, 14).put(height - 1, 14).put(alpha, 1).put(0, 3)

    def codes():
        for symbol in [0x20, 0x80, 0xC0, 0xFF, 0]:
            out.put(1, 1).put(0, 1).put(symbol > 1, 1).put(symbol, 8 if symbol > 1 else 1)

    if transform is not None:
        out.put(1, 1).put(transform, 2)
        if transform in (0, 1):
            # Blocks of 8 pixels, in a picture of their own without a colour cache.
            out.put(1, 3).put(0, 1)
            codes()
        if transform == 3:
            out.put(0, 8).put(0, 1)
            codes()
    out.put(0, 1)
    if cache:
        out.put(1, 1).put(cache, 4)
    else:
        out.put(0, 1)
    out.put(0, 1)
    codes()
    return out.bytes()


def lossy(width, height):
    """VP8: a key frame whose partitions are zeros, which are macroblocks as good as others."""
    first, second = bytes(40), bytes(200)
    tag = len(first) << 5 | 1 << 4
    return struct.pack("<I", tag)[:3] + b"\x9d\x01\x2a" + struct.pack("<HH", width, height) + first + second


def extended(flags, width, height):
    return b"VP8X", struct.pack("<I", flags) + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]


def webps():
    seed("picture_webp", "lossless.webp", riff((b"VP8L", lossless(9, 5))))
    for transform in range(4):
        seed("picture_webp", f"transform-{transform}.webp", riff((b"VP8L", lossless(20, 12, transform))))
    seed("picture_webp", "cache.webp", riff((b"VP8L", lossless(16, 16, cache=4, alpha=False))))
    seed("picture_webp", "lossy.webp", riff((b"VP8 ", lossy(32, 20))))
    alpha = (b"ALPH", b"\0" + bytes(32 * 20))
    seed("picture_webp", "alpha.webp", riff(extended(0x10, 32, 20), alpha, (b"VP8 ", lossy(32, 20))))
    packed = (b"ALPH", b"\x01" + lossless(32, 20)[5:])
    seed("picture_webp", "packed-alpha.webp", riff(extended(0x10, 32, 20), packed, (b"VP8 ", lossy(32, 20))))
    turned = [extended(0x08, 9, 5), (b"VP8L", lossless(9, 5)), (b"EXIF", b"Exif\0\0" + exif())]
    seed("picture_webp", "turned.webp", riff(*turned))
    frame = struct.pack("<I", 0)[:3] * 2 + struct.pack("<I", 8)[:3] + struct.pack("<I", 4)[:3] + b"\x64\0\0\0"
    image = lossless(9, 5)
    inner = b"VP8L" + struct.pack("<I", len(image)) + image + b"\0" * (len(image) % 2)
    animation = [extended(0x02, 9, 5), (b"ANIM", bytes(6)), (b"ANMF", frame + inner)]
    seed("picture_webp", "animated.webp", riff(*animation))


# BMP


def bmp(width, height, depth, compression=0, palette=b"", masks=b"", data=None, head=40):
    row = -(-width * depth // 32) * 4
    data = bytes((n * 13) % 256 for n in range(row * abs(height))) if data is None else data
    info = struct.pack(
        "<IiiHHIIiiII", head, width, height, 1, depth, compression, len(data), 0, 0, len(palette) // 4, 0
    )
    info = (info + masks).ljust(head, b"\0") if head > 40 else info + masks
    if head == 12:
        info = struct.pack("<IHHHH", 12, width, height, 1, depth)
    offset = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + info + palette + data


def bmps():
    palette = bytes(n * 11 % 256 for n in range(1024))
    for depth, entries in [(1, 2), (4, 16), (8, 64)]:
        seed("picture_bmp", f"palette-{depth}.bmp", bmp(11, 5, depth, palette=palette[: 4 * entries]))
    for depth in [16, 24, 32]:
        seed("picture_bmp", f"plain-{depth}.bmp", bmp(9, 7, depth))
    seed("picture_bmp", "upside-down.bmp", bmp(9, -7, 24))
    seed("picture_bmp", "core.bmp", bmp(9, 7, 24, head=12))
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    seed("picture_bmp", "masks-16.bmp", bmp(9, 7, 16, compression=3, masks=masks))
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    seed("picture_bmp", "masks-32.bmp", bmp(9, 7, 32, compression=3, masks=masks, head=124))
    runs = b"\x06\x01\0\0" + b"\0\x04\x01\x02\x03\x04\x02\x05\0\0" + b"\x06\x02\0\0" + b"\x03\x07\x03\x08\0\x01"
    seed("picture_bmp", "runs-8.bmp", bmp(6, 4, 8, 1, palette[:64], data=runs))
    jump = runs.replace(b"\x06\x02\0\0", b"\0\x02\x01\x01")
    seed("picture_bmp", "jump-8.bmp", bmp(6, 4, 8, 1, palette[:64], data=jump))
    short = runs.replace(b"\0\x04\x01\x02\x03\x04", b"\0\x04\x12\x34")
    seed("picture_bmp", "runs-4.bmp", bmp(6, 4, 4, 2, palette[:64], data=short))


# TIFF


def tiff(
    width, height, samples=3, depth=8, photometric=2, compression=1, order="<", tile=None, planar=1, extra=(), big=False
):
    row = -(-width * samples * depth // 8) if planar == 1 else -(-width * depth // 8)
    plane = b"".join(bytes((x * 5 + y * 17) % 253 for x in range(row)) for y in range(height))
    if tile:
        plane = bytes((n * 5) % 253 for n in range(tile * tile * samples * depth // 8))
    pack = {1: lambda d: d, 8: lambda d: zlib.compress(d, 9), 32946: lambda d: zlib.compress(d, 9), 32773: packbits}[
        compression
    ]
    parts = [pack(plane)] * (samples if planar == 2 else 1)
    if tile:
        parts *= -(-width // tile) * -(-height // tile)
    entries = {256: (3, [width]), 257: (3, [height]), 258: (3, [depth] * samples), 259: (3, [compression])}
    entries |= {262: (3, [photometric]), 277: (3, [samples]), 284: (3, [planar])}
    entries |= {322: (3, [tile]), 323: (3, [tile])} if tile else {278: (3, [height])}
    entries |= dict(extra)
    offsets, counts = (324, 325) if tile else (273, 279)
    entries |= {offsets: (4, [0] * len(parts)), counts: (4, [len(part) for part in parts])}
    count_form, place_form, entry_size, inline = ("Q", "Q", 20, 8) if big else ("H", "I", 12, 4)
    start = 16 if big else 8
    after = start + struct.calcsize("<" + count_form) + entry_size * len(entries) + inline
    # Long values lie behind the directory, and the picture behind them.
    forms = {3: "H", 4: "I"}
    long = sum(
        len(v) * struct.calcsize(forms[f]) for f, v in entries.values() if len(v) * struct.calcsize(forms[f]) > inline
    )
    places, at = [], after + long
    for part in parts:
        places.append(at)
        at += len(part)
    entries[offsets] = (4, places)
    directory, behind = struct.pack(order + count_form, len(entries)), b""
    for tag, (form, values) in sorted(entries.items()):
        content = struct.pack(f"{order}{len(values)}{forms[form]}", *values)
        if len(content) > inline:
            place = struct.pack(order + place_form, after + len(behind))
            behind += content
        else:
            place = content.ljust(inline, b"\0")
        directory += struct.pack(order + "HH" + place_form, tag, form, len(values)) + place
    magic = b"II" if order == "<" else b"MM"
    head = struct.pack(order + "HHHQ", 43, 8, 0, 16) if big else struct.pack(order + "HI", 42, 8)
    return magic + head + directory + bytes(inline) + behind + b"".join(parts)


def packbits(data):
    chunks = [data[at : at + 128] for at in range(0, len(data), 128)]
    return b"".join(bytes([len(chunk) - 1]) + chunk for chunk in chunks)


def tiffs():
    seed("picture_tiff", "rgb.tif", tiff(9, 7))
    seed("picture_tiff", "rgb-16.tif", tiff(9, 7, depth=16, order=">"))
    seed("picture_tiff", "grey.tif", tiff(9, 7, samples=1, photometric=1))
    seed(
        "picture_tiff", "grey-float.tif", tiff(9, 7, samples=1, depth=32, photometric=1, extra={339: (3, [3])}.items())
    )
    seed("picture_tiff", "bits.tif", tiff(19, 7, samples=1, depth=1, photometric=0))
    seed(
        "picture_tiff",
        "palette.tif",
        tiff(9, 7, samples=1, depth=4, photometric=3, extra={320: (3, [257] * 48)}.items()),
    )
    seed("picture_tiff", "inks.tif", tiff(9, 7, samples=4, photometric=5))
    seed("picture_tiff", "alpha.tif", tiff(9, 7, samples=4, extra={338: (3, [1])}.items()))
    seed("picture_tiff", "deflate.tif", tiff(9, 7, compression=8, extra={317: (3, [2])}.items()))
    seed("picture_tiff", "old-deflate.tif", tiff(9, 7, compression=32946))
    seed("picture_tiff", "packbits.tif", tiff(9, 7, compression=32773))
    seed("picture_tiff", "tiles.tif", tiff(20, 17, tile=16, compression=8))
    seed("picture_tiff", "planes.tif", tiff(9, 7, planar=2))
    seed("picture_tiff", "planes-in-tiles.tif", tiff(20, 17, tile=16, planar=2, compression=8))
    seed("picture_tiff", "turned.tif", tiff(9, 7, extra={274: (3, [6])}.items()))
    seed("picture_tiff", "big.tif", tiff(9, 7, big=True))
    seed("picture_tiff", "ycbcr.tif", tiff(8, 8, photometric=6, extra={530: (3, [1, 1])}.items()))


# Request bodies. The model `test` has the classes `class 0` to `class 2` and an input of 8×8 pixels.


def bodies():
    picture = bmp(8, 8, 24)
    b64 = base64.b64encode(picture).decode()
    image = {"b64": b64, "id": "a"}
    options = {
        "every": {
            "top_k": 2,
            "min_score": 0.2,
            "prior": "train",
            "alpha": 0.1,
            "set_score": "plain",
            "set_rung": "class",
            "max_set_size": 2,
            "abstain_prior_only": True,
            "include": ["logits", "uncalibrated", "support", "timings"],
        },
        "vector": {"prior": [0.2, 0.3, 0.5], "alpha": 0.5},
        "labels": {"prior": {"class 0": 1, "class 1": 2e-3, "class 2": 5e300}},
        "foreign-label": {"prior": {"class 0": 1, "x" * 3000: 2}},
        "unknown": {"y" * 3000: 1},
        "wrong-word": {"set_score": "z" * 3000},
    }
    for name, some in options.items():
        small = len(json.dumps(some)) > 2000
        seed("json_body", name, json.dumps({"images": [{"b64": "AAAA"} if small else image], "options": some}))
    seed("json_body", "one", json.dumps({"images": [image]}))
    seed(
        "json_body",
        "several",
        json.dumps({"images": [image, {"b64": "!"}, {"b64": ""}, {"b64": b64, "id": "b\u0000ä"}]}),
    )
    seed("json_body", "none", '{"images": []}')
    seed("json_body", "twice", '{"images": [], "images": [{"b64": "", "b64": "AA=="}]}')
    seed(
        "json_body",
        "numbers",
        '{"images": [{"b64": "AA=="}], "options": {"top_k": 18446744073709551616, "alpha": -1e999}}',
    )
    seed("json_body", "deep", '{"images": ' + "[" * 200 + "]" * 200 + "}")
    seed("json_body", "long-text", json.dumps({"images": ["w" * 3500]}))
    # The protocol's JSON.
    floats = [round(n / 192, 3) for n in range(192)]
    tensor = {"name": "images", "datatype": "FP32", "shape": [1, 3, 8, 8], "data": floats}
    bytes_in = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [b64]}
    parameters = {
        "timeout": 5_000_000,
        "nbn_top_k": 2,
        "nbn_alpha": 0.1,
        "nbn_prior": [1, 2, 3],
        "binary_data_output": True,
    }
    outputs = [{"name": "logits", "parameters": {"classification": 2}}, {"name": "set"}]
    nested = [[[floats[8 * y : 8 * y + 8] for y in range(8)]] * 3]
    seed("v2_json", "tensor", json.dumps({"id": "1", "inputs": [tensor]}))
    seed("v2_json", "nested", json.dumps({"inputs": [tensor | {"data": nested[0]}]}, separators=(",", ":")))
    seed("v2_json", "bytes", json.dumps({"inputs": [bytes_in], "outputs": outputs, "parameters": parameters}))
    seed(
        "v2_json",
        "prior",
        json.dumps({"inputs": [bytes_in], "parameters": {"nbn_prior": '{"class 0": 1}', "nbn_alpha": "0.5"}}),
    )
    seed("v2_json", "both", json.dumps({"inputs": [bytes_in, {"name": "q" * 3000, "datatype": "", "shape": [-1]}]}))
    seed("v2_json", "shape", json.dumps({"inputs": [tensor | {"shape": [9223372036854775807, 3, 8, 8], "data": []}]}))
    seed("v2_json", "no-output", json.dumps({"inputs": [bytes_in], "outputs": [{"name": "r" * 3000}]}))
    seed("v2_json", "overflow", json.dumps({"inputs": [tensor | {"data": [3e38] * 192}]}, separators=(",", ":")))

    def binary(name, request, rest, length=None):
        text = json.dumps(request, separators=(",", ":")).encode()
        seed("v2_binary", name, struct.pack("<H", len(text) if length is None else length) + text + rest)

    def sized(tensor, size):
        return {k: v for k, v in tensor.items() if k != "data"} | {"parameters": {"binary_data_size": size}}

    element = struct.pack("<I", len(picture)) + picture
    binary("tensor", {"inputs": [sized(tensor, 768)]}, struct.pack("<192f", *floats))
    binary("not-finite", {"inputs": [sized(tensor, 768)]}, struct.pack("<192f", *floats[:-1], float("nan")))
    wanted = [{"name": "probabilities", "parameters": {"binary_data": True}}, {"name": "set"}]
    binary("bytes", {"inputs": [sized(bytes_in, len(element))], "outputs": wanted}, element)
    two = sized(bytes_in | {"shape": [2, 1]}, 2 * len(element))
    binary("two", {"inputs": [two], "parameters": {"binary_data_output": True}}, element * 2)
    binary("cut", {"inputs": [sized(bytes_in, 20)]}, element[:20])
    binary("too-long", {"inputs": [sized(bytes_in, 1 << 40)]}, element)
    binary("length", {"inputs": []}, b"", length=60_000)
    seed("v2_binary", "picture", b"\0\0" + picture)

    def part(content, head='form-data; name="image"; filename="a.bmp"', more=""):
        return f"--nbn\r\nContent-Disposition: {head}\r\n{more}\r\n".encode() + content + b"\r\n"

    end = b"--nbn--\r\n"
    seed("multipart", "one", part(picture) + end)
    seed("multipart", "several", part(picture) + part(b"damaged") + part(b"", more="Content-Type: image/png\r\n") + end)
    seed("multipart", "no-end", part(picture))
    seed("multipart", "foreign-part", part(picture, f'form-data; name="{"p" * 3000}"') + end)
    seed("multipart", "odd-names", part(picture, "form-data; name=image; filename*=UTF-8''%e4%00") + b"preface" + end)
    seed("multipart", "empty", end)
    seed("multipart", "boundary-inside", part(b"--nbn\r\n--nb\r\n\r\n") + b"--nbn" + end)

    grpc_messages(picture, floats)


def grpc_messages(picture, floats):
    def varint(n):
        out = b""
        while n > 127:
            out, n = out + bytes([n & 127 | 128]), n >> 7
        return out + bytes([n])

    def field(tag, content):
        if isinstance(content, int):
            return varint(tag << 3) + varint(content)
        content = content.encode() if isinstance(content, str) else content
        return varint(tag << 3 | 2) + varint(len(content)) + content

    def parameter(tag, name, choice):
        return field(tag, field(1, name) + field(2, choice))

    def tensor(name, datatype, shape, contents=b""):
        return field(5, field(1, name) + field(2, datatype) + field(3, b"".join(map(varint, shape))) + contents)

    head = field(1, "test") + field(3, "7")
    raw = field(7, struct.pack("<I", len(picture)) + picture)
    values = struct.pack("<192f", *floats)
    seed("grpc_message", "raw", head + tensor("image", "BYTES", [1]) + raw)
    seed("grpc_message", "raw-tensor", head + tensor("images", "FP32", [1, 3, 8, 8]) + field(7, values))
    seed("grpc_message", "contents", head + tensor("image", "BYTES", [1, 1], field(5, field(8, picture))))
    seed("grpc_message", "floats", head + tensor("images", "FP32", [1, 3, 8, 8], field(5, field(6, values))))
    wanted = field(6, field(1, "logits") + parameter(2, "classification", field(3, "2"))) + field(6, field(1, "set"))
    options = parameter(4, "nbn_prior", field(3, "[1,2,3]")) + parameter(4, "nbn_top_k", field(2, 2))
    alpha = parameter(4, "nbn_alpha", varint(4 << 3 | 1) + struct.pack("<d", 0.1)) + parameter(
        4, "timeout", field(5, 10**7)
    )
    seed("grpc_message", "options", head + tensor("image", "BYTES", [1]) + raw + wanted + options + alpha)
    seed("grpc_message", "both", head + tensor("image", "BYTES", [1], field(5, field(8, picture))) + raw)
    seed("grpc_message", "foreign-model", field(1, "m" * 3000) + tensor("image", "BYTES", [1]) + raw)
    seed("grpc_message", "no-output", head + tensor("image", "BYTES", [1]) + raw + field(6, field(1, "o" * 3000)))
    seed("grpc_message", "long-shape", head + tensor("image", "BYTES", [1] * 2000) + raw)
    seed("grpc_message", "many-parts", head + field(5, b"") * 1500)


# Checkpoints


class Storage:
    def __init__(self, name, kind, size):
        self.name, self.kind, self.size = name, kind, size


def torch_pickle(content, protocol=2):
    """A pickle whose tensors name their storages."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            if isinstance(thing, Storage):
                return ("storage", thing.kind, thing.name, "cpu", thing.size)
            return None

    text = io.BytesIO()
    Pickler(text, protocol).dump(content)
    return text.getvalue()


def torch_file(content, storages, protocol=2):
    """What torch.save writes: a pickle, and a file for each storage."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        files = {"data.pkl": torch_pickle(content, protocol), "byteorder": b"little", "version": b"3\n"} | storages
        for name, bytes_of in files.items():
            archive.writestr(zipfile.ZipInfo("archive/" + name, (1980, 1, 1, 0, 0, 0)), bytes_of)
    return out.getvalue()


def networks():
    """Those of the tests that are small enough."""
    for path in sorted((DATA.parent / "onnx").glob("*.onnx")):
        if path.stat().st_size <= LARGEST:
            seed("onnx", path.name, path.read_bytes())


def pickles(torch, tensor):
    """What stands in checkpoints beside weights, of which nothing is to be made."""
    stage = {f"layer{n}.0.conv1.weight": tensor("FloatStorage", str(n), 4, 4, 3, 3) for n in (1, 2, 3)}
    network = {"conv1.weight": tensor("FloatStorage", "0", 4, 3, 3, 3), **stage}
    head = {"fc.weight": tensor("FloatStorage", "9", 4, 5), "queue_ptr": tensor("LongStorage", "8", 1)}

    class EasyDict(dict):
        __module__ = "easydict"

    class Loss:
        __module__ = "loss"

    setattr(sys.modules.setdefault("easydict", types.ModuleType("easydict")), "EasyDict", EasyDict)
    setattr(sys.modules.setdefault("loss", types.ModuleType("loss")), "Loss", Loss)
    EasyDict.__qualname__, Loss.__qualname__ = "EasyDict", "Loss"
    loss = Loss()
    loss.margin, loss.weights = 0.5, [1, 2.5, None, True, -7, 1 << 40, 1 << 80, "é", b"bytes", {3}, frozenset([4])]
    easy = EasyDict(a=1, b=EasyDict(c=[EasyDict()]))
    easy.again = easy
    many = collections.defaultdict(list, x=[1, (2, 3)])
    cases = {
        "beside": {"state_dict": network | head, "easy": easy, "many": many, "loss": loss},
        "two": {"model": network, "model_ema": {f"module.{name}": value for name, value in network.items()}},
        "prefixes": network | {f"module.{name}": value for name, value in network.items()},
        "parts": {"feat_model": {f"module.{name}": value for name, value in network.items()}, "classifier": head},
        "copies": {f"encoder_{which}.{name}": value for which in "qk" for name, value in network.items()},
        "optimizer": {"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "object": loss,
    }
    for name, case in cases.items():
        for protocol in (1, 2, 4, 5) if name == "beside" else (2,):
            seed("pickle", f"{name}-{protocol}", torch_pickle(case, protocol))
    # Calls, an old-style object, and numbers and texts as lines.
    seed("pickle", "calls", b"(iposix\nsystem\np0\n(S'true'\nI01\nL12L\nF1.5\nd0cos\nsystem\n(S'true'\ntR.")
    seed("pickle", "itself", b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.")


def checkpoints():
    # Stand-ins under torch's names, which pickles refer to.
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")

    def _rebuild_tensor_v2(*_):
        raise NotImplementedError

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2, torch._utils = _rebuild_tensor_v2, utils
    for kind in ["FloatStorage", "HalfStorage", "BFloat16Storage", "DoubleStorage", "LongStorage"]:
        setattr(torch, kind, type(kind, (), {"__module__": "torch", "__qualname__": kind}))
    sys.modules |= {"torch": torch, "torch._utils": utils}

    class Tensor:
        def __init__(self, storage, shape, strides):
            self.of = (storage, 0, shape, strides, False, {})

        def __reduce__(self):
            return _rebuild_tensor_v2, self.of

    def tensor(kind, name, *shape):
        size, strides = 1, []
        for extent in reversed(shape):
            strides.insert(0, size)
            size *= extent
        return Tensor(Storage(name, getattr(torch, kind), size), shape, tuple(strides))

    weights = {
        "module.conv1.weight": tensor("FloatStorage", "0", 2, 3, 1, 1),
        "fc.bias": tensor("FloatStorage", "1", 4),
    }
    files = {"data/0": struct.pack("<6f", *range(6)), "data/1": struct.pack("<4f", *range(4))}
    seed("checkpoint", "bare.pth", torch_file(weights, files))
    wrapped = {"epoch": 3, "arch": "resnet20", "state_dict": weights, "best": 0.5, "other": [1, (2, None), {"a": True}]}
    seed("checkpoint", "wrapped.pth", torch_file(wrapped, files))
    halves = {
        "a": tensor("HalfStorage", "0", 3),
        "b": tensor("BFloat16Storage", "1", 2),
        "c": tensor("DoubleStorage", "2", 2),
    }
    halves["bn.num_batches_tracked"] = tensor("LongStorage", "3")
    data = {"data/0": bytes(6), "data/1": bytes(4), "data/2": struct.pack("<2d", 1, 2), "data/3": bytes(8)}
    seed("checkpoint", "halves.pth", torch_file({"model": halves}, data))
    seed("checkpoint", "protocol-4.pth", torch_file(weights, files, protocol=4))
    large = {"a": Tensor(Storage("0", torch.FloatStorage, 1 << 40), (1 << 20, 1 << 20), (1 << 20, 1))}
    seed("checkpoint", "large.pth", torch_file(large, {"data/0": bytes(4)}))
    seed("checkpoint", "list.pth", torch_file([1, 2], {}))
    infinite = {"a": tensor("FloatStorage", "0", 1)}
    seed("checkpoint", "infinite.pth", torch_file(infinite, {"data/0": struct.pack("<f", float("inf"))}))
    old = io.BytesIO()
    for part in [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}]:
        pickle.dump(part, old, 2)
    seed("checkpoint", "old-form.pth", old.getvalue() + pickle.dumps({"a": 1}, 2) + pickle.dumps(["0"], 2))

    # The older form, whose storages lie behind their keys.
    values = {"0": struct.pack("<6f", *range(6)), "1": struct.pack("<4f", *range(4))}
    storages = b"".join(struct.pack("<q", len(data) // 4) + data for data in values.values())
    row = old.getvalue() + torch_pickle(weights) + pickle.dumps(list(values), 2) + storages
    seed("checkpoint", "row.pth", row)
    pickles(torch, tensor)

    def safetensors(header, data=b"", length=None):
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    header = {
        "__metadata__": {"nbn.classes": '[{"label": "a", "count": 1}, {"label": "b"}]', "nbn.kappa": "1"},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
    }
    seed("checkpoint", "plain.safetensors", safetensors(header, bytes(22)))
    seed(
        "checkpoint",
        "other-types.safetensors",
        safetensors({"a": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]}}, bytes(8)),
    )
    huge = {"a": {"dtype": "F32", "shape": [1 << 33, 1 << 33], "data_offsets": [0, 4]}}
    seed("checkpoint", "huge.safetensors", safetensors(huge, bytes(4)))
    seed("checkpoint", "long-header.safetensors", safetensors({}, length=1 << 50))
    seed("checkpoint", "page.html", "<!doctype html><title>404</title>")
    seed("checkpoint", "pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


# Bundles


def bundles():
    classes = [{"label": f"class {k}", "count": k + 1} for k in range(3)]
    preprocessing = {"shorter_side": 9, "crop": 8, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "exif": "apply"}
    proof = {
        "images": 8,
        "seed": 1,
        "outputs": [{"output": "logits", "max_absolute": 1e-6, "max_relative": 1e-7, "tolerance": 1e-4}],
    }
    fold = {
        "by": "fold 0.1.0",
        "head": "lr-plain",
        "kappa": 1.0,
        "experts": 1,
        "normalized_layers": ["layer3.0.bn2"],
        "alphas": [{"index": 0, "value": 6.1}],
        "batch_norms_merged": 20,
        "proof": proof,
    }
    digest = {"file": "model.onnx", "sha256": "0" * 64}
    manifest = {
        "schema_version": 1,
        "arch": "cifar_resnet20",
        "classes": classes,
        "preprocessing": preprocessing,
        "fold": fold,
        "checkpoint": digest | {"file": "a.pth"},
        "model": digest,
        "evaluation": {"overall": 0.78, "more": [None, {"a": 1}]},
    }
    seed("manifest", "whole.json", json.dumps(manifest))
    seed("manifest", "indented.json", json.dumps(manifest, indent=2))
    for name, wrong in {
        "crop-0": {"preprocessing": preprocessing | {"crop": 0}},
        "std-tiny": {"preprocessing": preprocessing | {"std": [1e-45, 0.3, 0.4]}},
        "mean-large": {"preprocessing": preprocessing | {"mean": [3e38, -3e38, 0]}},
        "counts": {"classes": [{"label": "a", "count": (1 << 64) - 1}, {"label": "b", "count": (1 << 64) - 1}]},
        "same-label": {"classes": classes + classes},
        "elsewhere": {"model": {"file": "../../etc/passwd", "sha256": ""}},
        "schema": {"schema_version": 2},
    }.items():
        seed("manifest", name + ".json", json.dumps(manifest | wrong))
    thresholds = {"calibration": [-0.1, -0.3], "uniform": [-0.1, None], "train": [None, None]}
    groups = [{"group": "few", "thresholds": thresholds}]
    table = {"marginal": thresholds, "groups": groups, "classes": [[None, None], [-0.2, -0.4], [None, -1.0]]}
    metrics = {"nll": 1.1, "ece": 0.05, "accuracy": 0.7}
    rung = {"rung": "temperature", "balanced_nll": 1.0, "standard_error": 0.1, "nll": 0.9}
    of_class = [
        {"a": 1.5, "c": -0.9, "train_prior": (k + 1) / 6, "support": 9 * k, "status": "pooled"} for k in range(3)
    ]
    calibration = {
        "schema_version": 1,
        "model_sha256": "0",
        "inputs_sha256": "0",
        "rung": "structured-vector-scaling",
        "temperature": 0.64,
        "kappa": 1.0,
        "kappa_source": "chosen",
        "temperature_alone": 0.5,
        "classes": [{"label": f"class {k}"} | of_class[k] for k in range(3)],
        "sets": {"alphas": [0.1, 0.5], "pas": table, "plain": table},
        "fit": {
            "by": "fold 0.1.0",
            "created": "2026-01-01T00:00:00Z",
            "command": "nbn fold calibrate",
            "images": 27,
            "training_overlap": "not_checked",
            "ladder": [rung],
            "before": metrics,
            "after": metrics,
            "top1_flips": 2,
        },
    }
    seed("calibration", "whole.json", json.dumps(calibration))
    for name, wrong in {
        "a-large": {"a": 1e308},
        "a-tiny": {"a": 5e-324},
        "c-large": {"c": -1e308},
        "prior-tiny": {"train_prior": 5e-324},
    }.items():
        changed = [calibration["classes"][0] | wrong, *calibration["classes"][1:]]
        seed("calibration", name + ".json", json.dumps(calibration | {"classes": changed}))
    short = {"sets": {"alphas": [0.5, 0.1], "pas": table, "plain": table}}
    seed("calibration", "alphas.json", json.dumps(calibration | short))


# Sources of pictures


def tar(*members, form=tarfile.USTAR_FORMAT, end=True):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content)
            info.linkname = "elsewhere.png" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            archive.addfile(info, io.BytesIO(content))
        used = archive.offset
    # Not the 10 KiB of zeros to which archives are filled up.
    return out.getvalue()[: used + (1024 if end else 0)]


def sources():
    file, pixel = tarfile.REGTYPE, b"a picture"
    sample = [("a/0001.png", pixel, file), ("a/0001.cls", b"3\n", file), ("a/0002.jpg", pixel, file)]
    seed("tar_source", "samples.tar", tar(*sample))
    seed("tar_source", "samples.tar.gz", gzip.compress(tar(*sample), mtime=0))
    seed(
        "tar_source",
        "two-members.tar.gz",
        gzip.compress(tar(*sample[:1], end=False), mtime=0) + gzip.compress(tar(*sample[2:]), mtime=0),
    )
    seed("tar_source", "zeros.tar.gz", gzip.compress(bytes(1 << 20), mtime=0))
    long = [("long/" * 40 + "name.png", pixel, file)]
    seed("tar_source", "long-name.tar", tar(*long, form=tarfile.GNU_FORMAT))
    seed("tar_source", "pax.tar", tar(*long, form=tarfile.PAX_FORMAT))
    links = [("a.png", b"", tarfile.SYMTYPE), ("b.png", b"", tarfile.LNKTYPE), ("c", b"", tarfile.DIRTYPE)]
    seed("tar_source", "links.tar", tar(*links))
    seed("tar_source", "no-end.tar", tar(*sample[:1], end=False)[:700])
    seed("tar_source", "empty.tar", bytes(1024))
    endless = tarfile.TarInfo("././@LongLink")
    endless.type, endless.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    seed(
        "tar_source",
        "endless-name.tar.gz",
        gzip.compress(endless.tobuf(tarfile.GNU_FORMAT) + b"a" * (1 << 20), mtime=0),
    )
    seed(
        "tar_source",
        "large-member.tar",
        tar(("a.png", b"", file)).replace(b"00000000000\0" * 2, b"77777777777\0" * 2, 1),
    )
    seed(
        "list_source",
        "paths.txt",
        "a.png\n\n  b/c.jpg  \r\n\ufeffd.webp\nfile:///tmp/e.gif\nfile://x/y\n",
    )
    seed("list_source", "labels.txt", "a.png 3\nb.png\tcat\n")
    seed("list_source", "not-text.txt", b"a\xff\xfe.png\n\x00\n")
    seed("list_source", "rows.csv", 'path,label\na.png,cat\n"b,""c"".png",\n,dog\nshort\n')
    seed("list_source", "only-header.csv", "image\r\n")
    seed("list_source", "same-columns.csv", "path,path,label\na,b,c\n")
    lines = [
        {"path": "a.png", "label": "cat"},
        {"image": "b.png", "label": 3},
        {"path": 5},
        {},
        {"file": "c", "class": None},
    ]
    seed("list_source", "rows.jsonl", "\n".join(map(json.dumps, lines)) + "\n[1]\nnot json\n")


def main():
    for make in [jpegs, pngs, gifs, webps, bmps, tiffs, bodies, checkpoints, networks, bundles, sources]:
        make()
    folder = HERE / "seeds"
    shutil.rmtree(folder, ignore_errors=True)
    for target, files in SEEDS.items():
        (folder / target).mkdir(parents=True)
        for name, content in files.items():
            (folder / target / name).write_bytes(content)
    total = sum(len(content) for files in SEEDS.values() for content in files.values())
    print(f"{sum(map(len, SEEDS.values()))} seeds for {len(SEEDS)} targets, {total} bytes")


if __name__ == "__main__":
    main()
