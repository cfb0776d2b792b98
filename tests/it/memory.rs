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
    // 39.7 megapixels.
    let side = 6300;
    let rgba16 = DynamicImage::new_rgba16(side, side);
    write(folder, "deep.png", &rgba16);
    write(folder, "deep.tif", &rgba16);
    drop(rgba16);
    let rgb = DynamicImage::new_rgb8(side, side);
    for name in ["rgb.png", "rgb.bmp", "rgb.tif", "rgb.webp", "rgb.jpg"] {
        write(folder, name, &rgb);
    }
    drop(rgb);
    write(folder, "alpha.webp", &DynamicImage::new_rgba8(side, side));
    write(folder, "floats.tif", &DynamicImage::new_rgb32f(side, side));
    std::fs::write(folder.join("scans.jpg"), progressive_jpeg(side as u16, side as u16, 8)).unwrap();
    std::fs::write(folder.join("screen.gif"), gif(side as u16, 3)).unwrap();
    std::fs::write(folder.join("frame.gif"), gif(side as u16, side as u16 - 1)).unwrap();
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

/// A GIF whose screen has `side` × `side` pixels, and its frame `frame` × `frame`, all of the first colour.
fn gif(side: u16, frame: u16) -> Vec<u8> {
    let size = |side: u16| [side.to_le_bytes(), side.to_le_bytes()].concat();
    let mut file = [b"GIF89a".as_slice(), &size(side), &[0x80, 0, 0], &[7; 6]].concat();
    file.extend([&[0x2C, 0, 0, 0, 0][..], &size(frame), &[0, 2]].concat());
    // Codes of three bits: clear (4), then two colours before the next clear, so that codes stay of three bits; end (5).
    let pixels = usize::from(frame) * usize::from(frame);
    let (mut bits, mut held, mut data) = (0u32, 0, Vec::new());
    let codes = (0..pixels).flat_map(|n| if n % 2 == 0 { vec![4, 0] } else { vec![0] });
    for code in codes.chain([5]) {
        bits |= code << held;
        held += 3;
        while held >= 8 {
            data.push(bits as u8);
            bits >>= 8;
            held -= 8;
        }
    }
    data.push(bits as u8);
    for block in data.chunks(255) {
        file.push(block.len() as u8);
        file.extend(block);
    }
    file.extend([0, 0x3B]);
    file
}
