"""Writes tests/data/decoding: small files in forms that users have, and what Pillow makes of each, turned upright.

    python tests/oracle/make_decoding.py      # needs pillow 13 and numpy

`expected.json` has, for each file, its width and height and the SHA-256 of its RGB bytes; files that Pillow reads and this
project does not stand in the test.
"""

import hashlib
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

OUT = Path(__file__).parents[1] / "data" / "decoding"
RANDOM = np.random.default_rng(4)
WIDTH, HEIGHT = 33, 20


def picture():
    small = Image.fromarray(RANDOM.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return small.resize((WIDTH, HEIGHT), Image.BICUBIC)


def tags(orientation, kind=3, byte_order="<", more=()):
    """EXIF with the tag 274 of the type `kind`."""
    head = b"II*\0" if byte_order == "<" else b"MM\0*"
    form = {3: "HH", 4: "I", 6: "bbbb", 8: "hh", 9: "i", 1: "BBBB"}[kind]
    value = struct.pack(byte_order + form, orientation, *[0] * (len(form) - 1))
    entries = [struct.pack(byte_order + "HHI", 274, kind, 1) + value, *more]
    return head + struct.pack(byte_order + "IH", 8, len(entries)) + b"".join(entries) + b"\0\0\0\0"


def xmp(form):
    return b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF>' + form + b"</rdf:RDF></x:xmpmeta>"


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(before=b"", behind=b""):
    """A PNG with chunks before its pixels and behind them."""
    data = io.BytesIO()
    picture().save(data, "PNG")
    data = data.getvalue()
    head, end = data[:33], data.rindex(b"IEND") - 4
    return head + before + data[33:end] + behind + data[end:]


def jpeg(markers):
    data = io.BytesIO()
    picture().save(data, "JPEG", quality=90)
    data = data.getvalue()
    app1 = b"".join(b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content for content in markers)
    return data[:2] + app1 + data[2:]


def webp(**chunks):
    data = io.BytesIO()
    picture().save(data, "WEBP", lossless=True, **chunks)
    return data.getvalue()


def tiff(bits, photometric, data, samples=1, more=()):
    entries = [
        (256, 4, 1, WIDTH), (257, 4, 1, HEIGHT), (259, 3, 1, 1), (262, 3, 1, photometric), (273, 4, 1, None),
        (277, 3, 1, samples), (278, 4, 1, HEIGHT), (279, 4, 1, len(data)), *more,
    ]
    of_bits = struct.pack(f"<{samples}H", *[bits] * samples)
    entries.append((258, 3, samples, of_bits if samples > 2 else int.from_bytes(of_bits, "little")))
    entries.sort(key=lambda entry: entry[0])
    behind, at = b"", 8 + 2 + 12 * len(entries) + 4
    body = []
    for tag, kind, count, value in entries:
        if isinstance(value, bytes):
            body.append(struct.pack("<HHII", tag, kind, count, at + len(behind)))
            behind += value
        else:
            body.append((tag, kind, count, value))
    offset = at + len(behind)
    listed = [
        entry if isinstance(entry, bytes)
        else struct.pack("<HHII", *entry[:3], offset if entry[3] is None else entry[3])
        for entry in body
    ]
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(listed) + b"\0\0\0\0" + behind + data


def tiff_of(fields, parts, tiled=False, order="<"):
    """A TIFF with these SHORT and LONG fields (fractions as pairs), of strips or tiles, each packed by Deflate."""
    parts = [zlib.compress(part) for part in parts]
    places = [8 + sum(map(len, parts[:n])) for n in range(len(parts))]
    lengths = [len(part) for part in parts]
    offsets, counts = (324, 325) if tiled else (273, 279)
    fields = {256: [WIDTH], 257: [HEIGHT], 259: [8], offsets: places, counts: lengths, **fields}
    at = 8 + sum(lengths)
    behind, entries, end = b"", b"", at + 2 + 12 * len(fields) + 4
    for tag, values in sorted(fields.items()):
        kind = 5 if isinstance(values[0], tuple) else 4 if tag in (offsets, counts, 256, 257) else 3
        of = {3: "H", 4: "I", 5: "II"}[kind]
        data = b"".join(struct.pack(order + of, *(value if kind == 5 else [value])) for value in values)
        if len(data) > 4:
            data, behind = struct.pack(order + "I", end + len(behind)), behind + data
        entries += struct.pack(order + "HHI", tag, kind, len(values)) + data.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", at)
    return head + b"".join(parts) + struct.pack(order + "H", len(fields)) + entries + b"\0\0\0\0" + behind


def blocks(width, height, across, down):
    """YCbCr of a strip or tile: the luma of each block, row by row, and its two colours."""
    return noise(-(-width // across) * -(-height // down) * (across * down + 2))


def ycbcr(across, down, rows, order="<", tile=None, more={}):
    fields = {258: [8, 8, 8], 262: [6], 277: [3], 530: [across, down], **more}
    if tile:
        fields |= {322: [tile], 323: [tile]}
        count = -(-WIDTH // tile) * -(-HEIGHT // tile)
        return tiff_of(fields, [blocks(tile, tile, across, down) for _ in range(count)], True, order)
    fields[278] = [rows]
    heights = [min(rows, HEIGHT - top) for top in range(0, HEIGHT, rows)]
    return tiff_of(fields, [blocks(WIDTH, height, across, down) for height in heights], False, order)


def planes(samples, bits, tile, order="<"):
    """Tiles of red, then those of green, and so on."""
    fields = {258: [bits] * samples, 262: [2], 277: [samples], 284: [2], 322: [tile], 323: [tile]}
    if samples > 3:
        fields[338] = [2] * (samples - 3)
    count = samples * -(-WIDTH // tile) * -(-HEIGHT // tile)
    return tiff_of(fields, [noise(tile * tile * bits // 8) for _ in range(count)], True, order)


def noise(length):
    return RANDOM.integers(0, 256, length, dtype=np.uint8).tobytes()


def gif(screen, frame, at, transparent=None, own_table=False):
    """A frame of few colours on a screen that may be larger."""
    table = noise(3 * 8)
    width, height = frame
    indices = RANDOM.integers(0, 8, width * height, dtype=np.uint8)
    # Codes of 4 bits: clear before every six colours, so that they never grow.
    codes = []
    for n, index in enumerate(indices):
        codes += [8] * (n % 6 == 0) + [int(index)]
    codes.append(9)
    bits = sum(code << (4 * n) for n, code in enumerate(codes))
    data = bits.to_bytes((4 * len(codes) + 7) // 8, "little")
    blocks = b"".join(bytes([len(part)]) + part for part in (data[n : n + 255] for n in range(0, len(data), 255)))
    control = b"" if transparent is None else b"\x21\xf9\x04" + bytes([1, 0, 0, transparent, 0])
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x00 if own_table else 0x82, 5, 0)
    place = b"\x2c" + struct.pack("<HHHHB", *at, *frame, 0x82 if own_table else 0)
    tables = (b"", table) if own_table else (table, b"")
    return head + tables[0] + control + place + tables[1] + b"\x03" + blocks + b"\0\x3b"


def encoded(image, kind, **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def files():
    head = b"Exif\0\0"
    for orientation in range(1, 9):
        yield f"exif_{orientation}.jpg", jpeg([head + tags(orientation)])
    for name, kind in (("long", 4), ("signed_byte", 6), ("signed_short", 8), ("signed_long", 9), ("byte", 1)):
        yield f"exif_6_{name}.jpg", jpeg([head + tags(6, kind)])
    yield "exif_8_big_endian.jpg", jpeg([head + tags(8, byte_order=">")])
    whole = tags(3)
    yield "exif_3_in_two_markers.jpg", jpeg([head + whole[:12], head + whole[12:]])
    yield "xmp_6.jpg", jpeg([b"http://ns.adobe.com/xap/1.0/\0" + xmp(b'<rdf:Description tiff:Orientation="6"/>')])
    yield "xmp_8_beside_exif_3.jpg", jpeg(
        [head + whole, b"http://ns.adobe.com/xap/1.0/\0" + xmp(b'<rdf:Description tiff:Orientation="8"/>')]
    )
    yield "exif_6_before.png", png(chunk(b"eXIf", tags(6)))
    yield "exif_6_behind.png", png(behind=chunk(b"eXIf", tags(6)))
    yield "exif_6_with_head.png", png(chunk(b"eXIf", head + tags(6)))
    profile = head + tags(5)
    text = f"\nexif\n{len(profile):8}\n".encode() + b"\n".join(
        profile.hex()[n : n + 72].encode() for n in range(0, len(profile.hex()), 72)
    ) + b"\n"
    yield "raw_profile_5.png", png(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)))
    yield "raw_profile_5_plain.png", png(chunk(b"tEXt", b"Raw profile type exif\0" + text))
    packet = xmp(b"<tiff:Orientation>7</tiff:Orientation>")
    yield "xmp_7.png", png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet))
    yield "xmp_7_compressed.png", png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(packet)))
    yield "exif_6.webp", webp(exif=tags(6))
    # Pillow takes the head away when it writes.
    written = webp(exif=b"XXXXXX" + tags(6))
    yield "exif_6_with_head.webp", written.replace(b"XXXXXX", head)
    yield "xmp_8.webp", webp(xmp=xmp(b'<rdf:Description tiff:Orientation="8"/>'))
    yield "exif_6.tif", encoded(picture(), "TIFF", tiffinfo={274: 6})

    for bits in (1, 2, 4):
        row = (WIDTH * bits + 7) // 8
        yield f"grey{bits}.tif", tiff(bits, 1, noise(row * HEIGHT))
        yield f"grey{bits}_white_is_0.tif", tiff(bits, 0, noise(row * HEIGHT))
    for bits in (1, 2, 4, 8):
        row = (WIDTH * bits + 7) // 8
        colours = (320, 3, 3 << bits, noise(6 << bits))
        yield f"palette{bits}.tif", tiff(bits, 3, noise(row * HEIGHT), more=[colours])
    yield "grey8_white_is_0.tif", tiff(8, 0, noise(WIDTH * HEIGHT))
    yield "grey_alpha.tif", tiff(8, 1, noise(2 * WIDTH * HEIGHT), 2, [(338, 3, 1, 2)])
    yield "cmyk.tif", tiff(8, 5, noise(4 * WIDTH * HEIGHT), 4)
    yield "alpha.tif", tiff(8, 2, noise(4 * WIDTH * HEIGHT), 4, [(338, 3, 1, 2)])
    yield "premultiplied.tif", tiff(8, 2, noise(4 * WIDTH * HEIGHT), 4, [(338, 3, 1, 1)])
    palette = picture().convert("P", palette=Image.ADAPTIVE, colors=90)
    yield "palette_lzw.tif", encoded(palette, "TIFF", compression="tiff_lzw")
    yield "cmyk_deflate.tif", encoded(picture().convert("CMYK"), "TIFF", compression="tiff_adobe_deflate")
    yield "bits_group4.tif", encoded(picture().convert("1"), "TIFF", compression="group4")

    yield "smaller_than_screen.gif", gif((WIDTH, HEIGHT), (9, 7), (5, 4))
    yield "smaller_and_transparent.gif", gif((WIDTH, HEIGHT), (9, 7), (5, 4), transparent=3)
    yield "transparent.gif", gif((9, 7), (9, 7), (0, 0), transparent=2)
    yield "own_table.gif", gif((WIDTH, HEIGHT), (9, 7), (20, 10), own_table=True)

    raw = noise(3 * WIDTH * HEIGHT)
    size = b"%d %d" % (WIDTH, HEIGHT)
    yield "rgb.ppm", b"P6\n# a comment\n" + size + b"\n255\n" + raw
    yield "rgb_of_100.ppm", b"P6 " + size + b" 100\n" + bytes(value % 101 for value in raw)
    yield "rgb_of_1000.ppm", b"P6 " + size + b" 1000\n" + b"".join(struct.pack(">H", 4 * value) for value in raw[: 250 * 3]) + b"\0" * 6000
    yield "grey.pgm", b"P5 " + size + b" 255\n" + raw[: WIDTH * HEIGHT]
    yield "plain.ppm", b"P3 " + size + b" 255\n" + b" ".join(b"%d" % value for value in raw) + b"\n"
    yield "plain.pbm", b"P1 " + size + b"\n" + bytes(48 + value % 2 for value in raw[: WIDTH * HEIGHT]) + b"\n"
    yield "bits.pbm", b"P4 " + size + b"\n" + raw[: (WIDTH + 7) // 8 * HEIGHT]

    data = jpeg([])
    yield "no_end_but_more_behind.jpg", data[:-2] + b"SEFHk\1\0\0\0" + b"\0" * 20 + b"SEFT"

    # Not 4×4: there libtiff misplaces the last blocks of a row that are not whole.
    for across, down in ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (4, 2)):
        yield f"ycbcr_{across}{down}.tif", ycbcr(across, down, 8)
    yield "ycbcr_plain.tif", tiff(8, 6, noise(3 * WIDTH * HEIGHT), 3, [(530, 3, 2, 1 | 1 << 16)])
    yield "ycbcr_big_endian.tif", ycbcr(2, 2, 8, ">")
    yield "ycbcr_one_strip.tif", ycbcr(2, 2, HEIGHT)
    yield "ycbcr_tiles.tif", ycbcr(2, 2, 0, tile=16)
    video = {
        529: [(2126, 10000), (7152, 10000), (722, 10000)],
        532: [(16, 1), (235, 1), (128, 1), (240, 1), (128, 1), (240, 1)],
    }
    yield "ycbcr_of_video.tif", ycbcr(2, 1, 8, more=video)
    yield "planes_in_tiles.tif", planes(3, 8, 16)
    yield "planes_in_one_tile.tif", planes(3, 8, 48)
    yield "planes_in_tiles_big_endian.tif", planes(3, 8, 16, ">")
    yield "planes_in_tiles_alpha.tif", planes(4, 8, 16)


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    expected = {}
    for name, content in files():
        (OUT / name).write_bytes(content)
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
        expected[name] = {
            "width": image.width, "height": image.height, "sha256": hashlib.sha256(image.tobytes()).hexdigest()
        }
    (OUT / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    print(len(expected), "files")


if __name__ == "__main__":
    main()
