//! Pictures that are made to see other callers' answers, to hold a worker or to fill the memory.

use std::io::Cursor;
use std::sync::Arc;
use std::time::Duration;

use image::ImageFormat;
use nbn::bundle::{Exif, Manifest};
use nbn::classify::{Classifier, Input};
use nbn::pixels::{DecodeError, DecodeLimits, Preprocessor, decode};
use nbn::runtime::{Outputs, Runner, RuntimeError};
use nbn::serve::RequestLimits;
use nbn::stop::Stop;
use ndarray::{Array2, ArrayView4};
use rustix::time::{ClockId, clock_gettime};

use crate::support::{self, Server, picture, progressive_jpeg, shipped};

const FORMATS: [ImageFormat; 6] =
    [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::WebP, ImageFormat::Gif, ImageFormat::Bmp, ImageFormat::Tiff];

/// Gives the network's whole input back, as a bundle that returns its pixels would.
struct Echo;

impl Runner for Echo {
    fn run(&mut self, pictures: ArrayView4<'_, f32>, _: &Stop) -> Result<Outputs, RuntimeError> {
        let n = pictures.shape()[0];
        let flat = pictures.to_shape((n, 3 * 32 * 32)).map_err(|error| RuntimeError::Run(error.to_string()))?;
        Ok(Outputs { logits: Array2::zeros((n, 10)), features: Some(flat.to_owned()) })
    }
}

fn classifier(manifest: &Arc<Manifest>) -> Classifier {
    Classifier::new(manifest.clone(), DecodeLimits::default(), Box::new(Echo)).with_max_batch(4)
}

/// A file of each format whose width or height is 0, made by writing zeros over the size of an ordinary one.
fn without_pixels() -> Vec<(ImageFormat, Vec<u8>)> {
    let mut files = Vec::new();
    for format in FORMATS {
        let whole = picture(10, 7, format);
        let find = |needle: &[u8]| whole.windows(needle.len()).position(|window| window == needle).unwrap();
        let sizes: [std::ops::Range<usize>; 2] = match format {
            ImageFormat::Jpeg => {
                let frame = find(&[0xFF, 0xC0]);
                [frame + 5..frame + 7, frame + 7..frame + 9]
            }
            ImageFormat::Png => [16..20, 20..24],
            ImageFormat::Gif => [6..8, 8..10],
            ImageFormat::Bmp => [18..22, 22..26],
            // Of a lossless WebP, the width is 14 bits behind the signature; it is stored less one, so that 0 cannot be said.
            ImageFormat::WebP => [0..0, 0..0],
            _ => {
                let entry =
                    |tag: u16| find(&[&tag.to_le_bytes()[..], &4u16.to_le_bytes(), &1u32.to_le_bytes()].concat());
                let (width, height) = (entry(256), entry(257));
                [width + 8..width + 12, height + 8..height + 12]
            }
        };
        for size in sizes.into_iter().filter(|size| !size.is_empty()) {
            let mut file = whole.clone();
            file[size].fill(0);
            if format == ImageFormat::Png {
                let checksum = crc(&file[12..29]);
                file[29..33].copy_from_slice(&checksum.to_be_bytes());
            }
            files.push((format, file));
        }
    }
    files
}

/// PNG's checksum.
pub(crate) fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xEDB8_8320 } else { crc >> 1 })
    })
}

#[tokio::test]
async fn a_picture_without_pixels_is_refused_in_every_format_and_shows_nothing() {
    let manifest = Arc::new(shipped().manifest);
    let model = support::model(manifest, Echo, 8);
    let server = Server::of(vec![model], RequestLimits::default()).await;
    let before = picture(32, 32, ImageFormat::Png);
    for (format, file) in without_pixels() {
        let type_ = format.to_mime_type();
        assert_eq!(server.post("/v1/classify", "image/png", before.clone()).await.status, 200);
        let answer = server.post("/v1/classify?include=logits", type_, file).await;
        assert_eq!(answer.status, 422, "{format:?}: {}", support::text(&answer.body));
        let code = &answer.json()["code"];
        // Some decoders find it first.
        let codes = ["no_pixels", "damaged_image", "unsupported_image"];
        assert!(codes.iter().any(|known| code == known), "{format:?}: {code}");
    }
    let gif = without_pixels().into_iter().find(|(format, _)| *format == ImageFormat::Gif).unwrap().1;
    let refused = decode(&gif, Exif::Apply, &DecodeLimits::default(), &Stop::default());
    assert!(matches!(refused, Err(DecodeError::NoPixels { width: 0, height: 7 })), "{refused:?}");
}

#[test]
fn no_file_shows_anything_of_the_picture_before_it() {
    let manifest = Arc::new(shipped().manifest);
    let preprocessor = Preprocessor::new(manifest.preprocessing.clone(), DecodeLimits::default());
    let (stop, mut random) = (Stop::default(), fastrand::Rng::with_seed(11));
    let mut classifier = classifier(&manifest);
    // A colour that no other picture here has by itself.
    let secret = image::RgbImage::from_pixel(32, 32, image::Rgb([201, 33, 97]));
    let mut bytes = Cursor::new(Vec::new());
    secret.write_to(&mut bytes, ImageFormat::Png).unwrap();
    let secret = Input::Encoded(bytes.into_inner().into());
    let (mut whole, mut refused) = (0, 0);
    let mut files: Vec<Vec<u8>> = without_pixels().into_iter().map(|(_, file)| file).collect();
    files.push(progressive_jpeg(9, 5, 3));
    for format in FORMATS {
        for (width, height) in [(1, 1), (10, 7), (33, 41)] {
            let file = picture(width, height, format);
            for _ in 0..40 {
                let mut file = file.clone();
                for _ in 0..random.usize(0..4) {
                    let at = random.usize(0..file.len());
                    match random.u8(0..4) {
                        0 => file[at] = random.u8(..),
                        1 => file[at] ^= 1 << random.u8(0..8),
                        2 => file.truncate(at.max(1)),
                        _ => {
                            let other = random.usize(0..file.len());
                            file.copy_within(at.min(other)..at.max(other), 0);
                        }
                    }
                }
                files.push(file);
            }
        }
    }
    for file in files {
        let input = Input::Encoded(file.clone().into());
        let batch = [(&secret, &stop), (&input, &stop), (&secret, &stop)];
        assert!(classifier.classify(&batch, &stop).iter().step_by(2).all(Result::is_ok));
        // Alone, in the place where the secret was, and beside it.
        let alone = classifier.classify(&[(&input, &stop)], &stop).remove(0);
        let beside = classifier.classify(&batch, &stop).remove(1);
        let expected = preprocessor.prepare(&file, &stop);
        for found in [alone, beside] {
            match (&expected, found) {
                (Ok(expected), Ok(found)) => {
                    assert_eq!(found.features.as_ref(), Some(expected), "{file:02x?}");
                    whole += 1;
                }
                (Err(_), Err(_)) => refused += 1,
                (expected, found) => panic!("{:?} but {:?}: {file:02x?}", expected.is_ok(), found.is_ok()),
            }
        }
    }
    assert!(whole > 100 && refused > 100, "{whole} whole, {refused} refused");
}

#[test]
fn scans_beyond_the_bound_are_refused_before_anything_is_decoded() {
    let limits = DecodeLimits::default();
    let file = progressive_jpeg(6000, 6000, 8000);
    let began = cpu();
    let refused = decode(&file, Exif::Apply, &limits, &Stop::default());
    assert!(matches!(refused, Err(DecodeError::TooManyScans { scans: 8000, width: 6000, height: 6000, limit: 64 })));
    assert!(cpu() - began < Duration::from_millis(100), "{:?}", cpu() - began);
    for (side, most) in [(2000, 64), (500, 256), (8, 1000)] {
        assert!(decode(&progressive_jpeg(side, side, most), Exif::Apply, &limits, &Stop::default()).is_ok());
        let refused = decode(&progressive_jpeg(side, side, most + 1), Exif::Apply, &limits, &Stop::default());
        assert!(matches!(refused, Err(DecodeError::TooManyScans { .. })), "{side}");
    }
}

/// Processor time of this thread.
fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn noise(len: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(1);
    std::iter::repeat_with(|| random.u8(..)).take(len).collect()
}

fn written(picture: &image::DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// A GIF of one frame of `side` × `side` pixels, whose data is `codes` of 9 bits: colours, clear (256) and end (257).
fn gif(side: u16, codes: impl Iterator<Item = u16>) -> Vec<u8> {
    let size = [side.to_le_bytes(), side.to_le_bytes()].concat();
    let mut file = [b"GIF89a".as_slice(), &size, &[0xF7, 0, 0], &noise(768)].concat();
    file.extend([&[0x2C, 0, 0, 0, 0][..], &size, &[0, 8]].concat());
    file.extend(support::gif_blocks(codes.map(u32::from), 9));
    file.push(0x3B);
    file
}

fn tiff_of(side: u32, compression: tiff::encoder::Compression, pixels: &[u8]) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    let mut encoder = tiff::encoder::TiffEncoder::new(&mut bytes).unwrap().with_compression(compression);
    encoder.write_image::<tiff::encoder::colortype::RGB8>(side, side, pixels).unwrap();
    bytes.into_inner()
}

/// What the strips or tiles of a TIFF are.
#[derive(Clone, Copy)]
enum Parts {
    /// Of so many rows.
    Strips(u32),
    /// Of this width and height.
    Tiles(u32, u32),
}

/// A grey TIFF whose parts, `count` of them, all lie in the same place and are `data`.
fn tiff_of_parts((width, height): (u32, u32), compression: u32, parts: Parts, count: u32, data: &[u8]) -> Vec<u8> {
    let (offsets, lengths) = if matches!(parts, Parts::Strips(_)) { (273, 279) } else { (324, 325) };
    let mut entries =
        vec![(256, 1, width), (257, 1, height), (258, 1, 8), (259, 1, compression), (262, 1, 1), (277, 1, 1)];
    match parts {
        Parts::Strips(rows) => entries.push((278, 1, rows)),
        Parts::Tiles(width, height) => entries.extend([(322, 1, width), (323, 1, height)]),
    }
    // Behind the fields the data, then the offsets, then the lengths.
    let data_at = 8 + 2 + 12 * (entries.len() as u32 + 2) + 4;
    let arrays = data_at + data.len() as u32;
    let (at, length) = if count == 1 { (data_at, data.len() as u32) } else { (arrays, arrays + 4 * count) };
    entries.extend([(offsets, count, at), (lengths, count, length)]);
    entries.sort();
    let mut file = [&b"II*\0"[..], &8u32.to_le_bytes(), &(entries.len() as u16).to_le_bytes()].concat();
    for (tag, count, value) in entries {
        file.extend(
            [&(tag as u16).to_le_bytes()[..], &4u16.to_le_bytes(), &count.to_le_bytes(), &value.to_le_bytes()].concat(),
        );
    }
    file.extend([0; 4]);
    file.extend(data);
    for value in [data_at, data.len() as u32] {
        file.extend(value.to_le_bytes().repeat(count as usize));
    }
    file
}

/// New-style JPEG, and Deflate, as TIFF names them.
const JPEG: u32 = 7;
const DEFLATE: u32 = 8;

fn deflated(bytes: u64) -> Vec<u8> {
    let mut packed = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::copy(&mut std::io::Read::take(std::io::repeat(0), bytes), &mut packed).unwrap();
    packed.finish().unwrap()
}

#[test]
fn a_row_may_be_as_long_as_a_picture_may_be_large() {
    let long = image::DynamicImage::new_rgba16(3_000_000, 1);
    let decoded = decode(&written(&long, ImageFormat::Png), Exif::Apply, &DecodeLimits::default(), &Stop::default());
    assert_eq!(decoded.unwrap().dimensions(), (3_000_000, 1));
}

#[test]
fn strips_and_tiles_take_no_more_work_than_the_picture_explains() {
    let read = |file: &[u8]| decode(file, Exif::Apply, &DecodeLimits::default(), &Stop::default());
    let whole = read(&tiff_of_parts((300, 200), DEFLATE, Parts::Tiles(512, 512), 1, &deflated(512 * 512))).unwrap();
    assert_eq!(whole.dimensions(), (300, 200));
    let rows = read(&tiff_of_parts((300, 200), DEFLATE, Parts::Strips(1), 200, &deflated(300))).unwrap();
    assert_eq!(rows.dimensions(), (300, 200));
    let jpeg = progressive_jpeg(6000, 6000, 8);
    for (name, file) in [
        ("JPEGs in one place", tiff_of_parts((6000, 6000), JPEG, Parts::Strips(1), 6000, &jpeg)),
        (
            "a large JPEG for each row",
            tiff_of_parts((1, 1000), JPEG, Parts::Strips(1), 1000, &progressive_jpeg(1000, 1000, 2)),
        ),
        ("wide tiles", tiff_of_parts((1, 400), DEFLATE, Parts::Tiles(30_000_000, 1), 400, &deflated(30_000_000))),
        ("tiles of one pixel", tiff_of_parts((2000, 1000), DEFLATE, Parts::Tiles(1, 1), 2_000_000, &deflated(1))),
    ] {
        let began = cpu();
        let refused = read(&file);
        assert!(matches!(refused, Err(DecodeError::Unsupported { format: "TIFF", .. })), "{name}: {refused:?}");
        let most = Duration::from_nanos(200_000_000 + 100 * file.len() as u64);
        assert!(cpu() - began < most, "{name}: {:?} of {most:?}", cpu() - began);
    }
}

/// A grey TIFF of `side` × `side` pixels whose only strip is `jpeg`.
fn tiff_around(side: u32, jpeg: &[u8]) -> Vec<u8> {
    tiff_of_parts((side, side), JPEG, Parts::Strips(side), 1, jpeg)
}

#[test]
fn a_jpeg_inside_a_tiff_may_take_no_more_work_than_the_picture_explains() {
    let read = |file: &[u8]| decode(file, Exif::Apply, &DecodeLimits::default(), &Stop::default());
    let whole = read(&tiff_around(1200, &progressive_jpeg(1200, 1200, 8))).unwrap();
    assert_eq!(whole.dimensions(), (1200, 1200));
    for jpeg in [progressive_jpeg(1200, 1200, 90), progressive_jpeg(9000, 9000, 2)] {
        let refused = read(&tiff_around(1200, &jpeg));
        let Err(DecodeError::Unsupported { format: "TIFF", reason }) = &refused else { panic!("{refused:?}") };
        assert!(reason.contains("JPEG strips"), "{reason}");
    }
}

#[test]
fn the_worst_file_of_each_format_stays_within_the_bound_on_processor_time() {
    const SIDE: u32 = 1500;
    let pixels = (SIDE * SIDE) as usize;
    let rgb = image::RgbImage::from_raw(SIDE, SIDE, noise(3 * pixels)).unwrap();
    let deep = noise(8 * pixels).chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
    let deep = image::ImageBuffer::<image::Rgba<u16>, Vec<u16>>::from_raw(SIDE, SIDE, deep).unwrap();
    let side = SIDE as u16;
    let clears = (0..pixels).flat_map(|n| [256, (n % 256) as u16]);
    // A code for each colour, and a clear code before codes would have ten bits.
    let colours = (0..pixels).flat_map(|n| [256, (n % 251) as u16].into_iter().skip(usize::from(n % 200 != 0)));
    let lossy = std::fs::read(support::data("pixels/lossy.webp")).unwrap();
    let files = [
        ("JPEG, 64 scans", progressive_jpeg(side, side, 64)),
        ("JPEG, noise", written(&rgb.clone().into(), ImageFormat::Jpeg)),
        ("PNG, 16 bits, noise", written(&deep.into(), ImageFormat::Png)),
        ("PNG, zeros", written(&image::RgbImage::new(SIDE, SIDE).into(), ImageFormat::Png)),
        ("GIF, a clear code before every colour", gif(side, clears)),
        ("GIF, colours", gif(side, colours)),
        ("WebP, lossless noise", written(&rgb.clone().into(), ImageFormat::WebP)),
        ("WebP, lossy", lossy),
        ("BMP", written(&rgb.clone().into(), ImageFormat::Bmp)),
        ("TIFF, LZW, noise", tiff_of(SIDE, tiff::encoder::Compression::Lzw, rgb.as_raw())),
        ("TIFF, PackBits, noise", tiff_of(SIDE, tiff::encoder::Compression::Packbits, rgb.as_raw())),
        ("TIFF, Deflate, zeros", {
            let level = tiff::encoder::DeflateLevel::Best;
            tiff_of(SIDE, tiff::encoder::Compression::Deflate(level), &vec![0; 3 * pixels])
        }),
    ];
    let mut told = Vec::new();
    for (name, file) in &files {
        let began = cpu();
        let decoded = decode(file, Exif::Apply, &DecodeLimits::default(), &Stop::default());
        let took = cpu() - began;
        let pixels = decoded.as_ref().map_or(pixels as u64, |d| u64::from(d.width()) * u64::from(d.height()));
        // docs/serving.md names this bound. It is held in builds for debugging, too, in which codecs are as fast as in others.
        let bound = Duration::from_nanos(20_000_000 + 100 * pixels + 100 * file.len() as u64);
        told.push(format!(
            "{name}: {} bytes, {:.1} ns a pixel, {:.2} of the bound, {}",
            file.len(),
            took.as_nanos() as f64 / pixels as f64,
            took.as_secs_f64() / bound.as_secs_f64(),
            decoded.map_or_else(|error| error.to_string(), |d| format!("{}×{}", d.width(), d.height()))
        ));
        assert!(took < bound, "{}", told.join("\n"));
    }
    eprintln!("{}", told.join("\n"));
}

#[test]
fn decoding_ends_soon_after_the_stop_in_every_format_that_can() {
    let stop = Stop::default();
    stop.ask();
    for format in FORMATS {
        let refused = decode(&picture(64, 64, format), Exif::Apply, &DecodeLimits::default(), &stop);
        assert!(matches!(refused, Err(DecodeError::Stopped)), "{format:?}: {refused:?}");
    }
    // In the middle: the deadline is a small part of what the whole takes.
    let side = 3000;
    let rgb = image::RgbImage::from_raw(side, side, noise(3 * (side * side) as usize)).unwrap();
    for format in FORMATS {
        let file = match format {
            ImageFormat::Jpeg => progressive_jpeg(side as u16, side as u16, 64),
            ImageFormat::Gif => gif(side as u16, (0..side * side).flat_map(|n| [256, (n % 256) as u16])),
            _ => written(&rgb.clone().into(), format),
        };
        let began = cpu();
        decode(&file, Exif::Apply, &DecodeLimits::default(), &Stop::default()).unwrap();
        let whole = cpu() - began;
        let began = cpu();
        let stop = Stop::at(Some(std::time::Instant::now() + whole / 10));
        let refused = decode(&file, Exif::Apply, &DecodeLimits::default(), &stop);
        assert!(matches!(refused, Err(DecodeError::Stopped)), "{format:?}");
        // What is decoded between two looks at the stop takes a few milliseconds.
        let most = whole * 3 / 4 + Duration::from_millis(20);
        assert!(cpu() - began < most, "{format:?}: {:?} of {whole:?}", cpu() - began);
    }
}
