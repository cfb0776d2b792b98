//! The memory that decoding takes: the largest picture of each format stays within what docs/serving.md states.

use std::path::Path;

use image::{DynamicImage, ImageFormat};

use crate::support::{Process, picture, progressive_jpeg};

/// As docs/serving.md states it, for the default `--max-pixels`.
const BOUND_MIB: f64 = 512.0;

/// Has the server classify a file. Gives its peak memory meanwhile beyond what it had before, in MiB, and what it answered.
fn peak(server: &Process, file: &Path) -> (f64, String) {
    let before = server.memory("VmRSS");
    server.forget_peak();
    let answer = server.post("/v1/classify", "application/octet-stream", &std::fs::read(file).unwrap());
    (server.memory("VmHWM") - before, answer)
}

fn write(folder: &Path, name: &str, picture: &DynamicImage) {
    let format = ImageFormat::from_path(name).unwrap();
    picture.save_with_format(folder.join(name), format).unwrap();
}

#[test]
fn the_largest_picture_of_each_format_stays_within_the_memory_that_is_stated() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("small.png"), picture(32, 32, ImageFormat::Png)).unwrap();
    let server = Process::serve(&["--workers", "1", "--max-body-mb", "1024", "--max-buffered-mb", "2048"]);
    peak(&server, &folder.join("small.png"));
    // 39.7 megapixels, as wide as a WebP may be: resizing, which needs little memory, then has little to do.
    let (width, height) = (16_000, 2_480);
    let rgba16 = DynamicImage::new_rgba16(width, height);
    write(folder, "deep.png", &rgba16);
    write(folder, "deep.tif", &rgba16);
    drop(rgba16);
    let rgb = DynamicImage::new_rgb8(width, height);
    for name in ["rgb.png", "rgb.bmp", "rgb.tif", "rgb.webp", "rgb.jpg"] {
        write(folder, name, &rgb);
    }
    drop(rgb);
    write(folder, "alpha.webp", &DynamicImage::new_rgba8(width, height));
    write(folder, "floats.tif", &DynamicImage::new_rgb32f(width, height));
    std::fs::write(folder.join("scans.jpg"), progressive_jpeg(width as u16, height as u16, 8)).unwrap();
    std::fs::write(folder.join("screen.gif"), gif([16_000, 2_480], [4, 4])).unwrap();
    std::fs::write(folder.join("frame.gif"), gif([16_000, 2_480], [15_984, 2_464])).unwrap();
    std::fs::write(folder.join("profile.png"), with_profile(&folder.join("deep.png"), 500 << 20)).unwrap();
    std::fs::write(folder.join("groups.webp"), groups(65_536)).unwrap();
    let mut told = Vec::new();
    for name in [
        "deep.png",
        "deep.tif",
        "rgb.png",
        "rgb.bmp",
        "rgb.tif",
        "rgb.webp",
        "rgb.jpg",
        "alpha.webp",
        "floats.tif",
        "scans.jpg",
        "screen.gif",
        "frame.gif",
        "profile.png",
        "groups.webp",
    ] {
        let file = folder.join(name);
        let size = std::fs::metadata(&file).unwrap().len() as f64 / (1 << 20) as f64;
        let (peak, answer) = peak(&server, &file);
        let outcome = if answer.starts_with("HTTP/1.1 200") { "classified" } else { &answer };
        // The body is in memory meanwhile.
        let decoding = peak - size;
        told.push(format!("{name}: {decoding:.0} MiB, {size:.0} MiB of file, {outcome}"));
        assert!(decoding <= BOUND_MIB, "{}", told.join("\n"));
    }
    eprintln!("{}", told.join("\n"));
}

/// A PNG with a colour profile of so many bytes, all 0.
fn with_profile(png: &Path, bytes: u64) -> Vec<u8> {
    let file = std::fs::read(png).unwrap();
    let mut packed = flate2::write::ZlibEncoder::new(b"iCCPk\0\0".to_vec(), flate2::Compression::best());
    std::io::copy(&mut std::io::Read::take(std::io::repeat(0), bytes), &mut packed).unwrap();
    let chunk = packed.finish().unwrap();
    let length = (chunk.len() as u32 - 4).to_be_bytes();
    let checksum = crate::hostile::crc(&chunk).to_be_bytes();
    // Behind the file's signature and the image's header.
    [&file[..33], &length, &chunk, &checksum, &file[33..]].concat()
}

/// A lossless WebP of 8×4 pixels, two of whose sixteen blocks use prefix codes 0 and `count` − 1: a decoder that makes all
/// between them makes tables of gigabytes.
fn groups(count: u32) -> Vec<u8> {
    let mut bits = String::new();
    // The lowest bit comes first.
    let number = |value: u32, length: u32| {
        (0..length).map(|bit| if value >> bit & 1 == 1 { '1' } else { '0' }).collect::<String>()
    };
    bits += &(number(0x2F, 8) + &number(7, 14) + &number(3, 14) + "0000");
    // No transform, no cache; groups of prefix codes for blocks of 4×4 pixels, their numbers in an image of its own.
    bits += "001000";
    bits += "0";
    let of_two = |value: u32| "111".to_owned() + &number(0, 8) + &number(value, 8);
    let last = count - 1;
    bits += &(of_two(last & 0xFF) + &of_two(last >> 8) + &"1000".repeat(3));
    bits += "0011";
    // Of each group five codes, whose eleven symbols have codes of 1, 2 … 10 and 10 bits: these lengths are coded, too.
    let length_of = |symbol: u32| {
        if (1..=6).contains(&symbol) {
            3
        } else if (7..=10).contains(&symbol) {
            4
        } else {
            0
        }
    };
    let mut code = "0".to_owned() + &number(10, 4);
    for symbol in [17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8, 9, 10] {
        code += &number(length_of(symbol), 3);
    }
    code += &("1".to_owned() + &number(1, 3) + &number(9, 4));
    let canonical =
        |symbol: u32| if symbol <= 6 { format!("{:03b}", symbol - 1) } else { format!("{:04b}", symbol + 5) };
    for symbol in (1..=10).chain([10]) {
        code += &canonical(symbol);
    }
    bits += &code.repeat(5 * count as usize);
    bits += &"0".repeat(8 * 4 * 4 + 64);
    let bytes = bits.as_bytes().chunks(8).map(|byte| byte.iter().rev().fold(0u8, |all, bit| all << 1 | (bit - b'0')));
    let mut content: Vec<u8> = bytes.collect();
    content.resize(content.len().next_multiple_of(2), 0);
    let length = content.len() as u32;
    [&b"RIFF"[..], &(length + 12).to_le_bytes(), b"WEBPVP8L", &length.to_le_bytes(), &content].concat()
}

/// A GIF whose screen and whose frame have these widths and heights, all of the first colour.
fn gif(screen: [u16; 2], frame: [u16; 2]) -> Vec<u8> {
    let size = |size: [u16; 2]| size.map(u16::to_le_bytes).concat();
    let mut file = [b"GIF89a".as_slice(), &size(screen), &[0x80, 0, 0], &[7; 6]].concat();
    file.extend([&[0x2C, 0, 0, 0, 0][..], &size(frame), &[0, 2]].concat());
    // Codes of three bits: clear (4), then two colours before the next clear, so that codes stay of three bits; end (5).
    // Sixteen pixels are nine bytes.
    let pixels = usize::from(frame[0]) * usize::from(frame[1]);
    assert!(pixels.is_multiple_of(16));
    let bits: u128 = (0..24).map(|n| u128::from(n % 3 == 0) << (3 * n + 2)).sum();
    let mut packed = bits.to_le_bytes()[..9].repeat(pixels / 16);
    packed.push(5);
    for block in packed.chunks(255) {
        file.push(block.len() as u8);
        file.extend(block);
    }
    file.extend([0, 0x3B]);
    file
}
