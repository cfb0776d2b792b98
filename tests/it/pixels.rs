//! Parity with torchvision on Pillow images; tests/oracle/make_pixels.py wrote the expectations.

use std::fs;

use image::ImageFormat;
use nbn::bundle::{Exif, Pixels, Preprocessing};
use nbn::fold::preprocessing::from_file;
use nbn::pixels::{DecodeError, DecodeLimits, Preprocessor, decode, decode_at_least};
use nbn::stop::Stop;
use safetensors::SafeTensors;

use crate::support::{data, picture};

fn preprocessing(shorter_side: u32, crop: u32, exif: Exif) -> Preprocessing {
    let (mean, std) = (vec![0.485, 0.456, 0.406], vec![0.229, 0.224, 0.225]);
    Preprocessing { mean, std, exif, ..Preprocessing::bilinear(shorter_side, crop) }
}

/// Differences between our tensor and torchvision's, in steps of one 8-bit level.
fn differences(file: &str, expected: &SafeTensors<'_>, key: &str, settings: Preprocessing) -> Vec<f32> {
    let bytes = fs::read(data("pixels").join(file)).unwrap();
    let std = settings.std.clone();
    let found = Preprocessor::new(settings, DecodeLimits::default()).prepare(&bytes, &Stop::default()).unwrap();
    let tensor = expected.tensor(key).unwrap();
    let values: Vec<f32> = tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(values.len(), found.len(), "{key}");
    let plane = values.len() / 3;
    let steps = |(n, (a, b)): (usize, (&f32, &f32))| (a - b).abs() * std[n / plane] * 255.0;
    found.iter().zip(&values).enumerate().map(steps).collect()
}

#[test]
fn preprocessing_equals_torchvision_bit_for_bit() {
    let bytes = fs::read(data("pixels/expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let (mut checked, mut wrong) = (0, Vec::new());
    for key in expected.names() {
        let (file, sizes) = key.split_once('@').unwrap();
        let (side, crop) = sizes.split_once('x').unwrap();
        let settings = preprocessing(side.parse().unwrap(), crop.parse().unwrap(), Exif::Ignore);
        let differences = differences(file, &expected, key, settings);
        let largest = differences.iter().copied().fold(0.0, f32::max);
        if largest > 0.0 {
            wrong.push(format!("{key}: largest difference {largest} levels"));
        }
        checked += 1;
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(checked >= 20, "only {checked} expectations");
}

#[test]
fn what_timm_and_hugging_face_write_down_gives_their_own_pixels_bit_for_bit() {
    let bytes = fs::read(data("transforms/expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let (mut checked, mut wrong) = (0, Vec::new());
    for key in expected.names() {
        let (name, file) = key.split_once('@').unwrap();
        let settings = from_file(&data(&format!("transforms/{name}.json")), Exif::Ignore, None).unwrap();
        let picture = fs::read(data("pixels").join(file)).unwrap();
        let found = Preprocessor::new(settings, DecodeLimits::default()).prepare(&picture, &Stop::default()).unwrap();
        let values =
            expected.tensor(key).unwrap().data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        let values: Vec<f32> = values.collect();
        assert_eq!(values.len(), found.len(), "{key}");
        let differ = values.iter().zip(&found).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
        if differ > 0 {
            let largest = values.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            wrong.push(format!("{key}: {differ} of {} values, by up to {largest}", values.len()));
        }
        checked += 1;
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(checked >= 116, "only {checked} expectations");
}

#[test]
fn exif_orientation_is_applied_or_ignored_as_the_manifest_says() {
    let bytes = fs::read(data("pixels/rotated.jpg")).unwrap();
    let limits = DecodeLimits::default();
    assert_eq!(decode(&bytes, Exif::Ignore, &limits, &Stop::default()).unwrap().dimensions(), (60, 40));
    assert_eq!(decode(&bytes, Exif::Apply, &limits, &Stop::default()).unwrap().dimensions(), (40, 60));
}

#[test]
fn what_follows_a_jpegs_end_is_not_looked_at() {
    let whole = fs::read(data("pixels/photo.jpg")).unwrap();
    let limits = DecodeLimits::default();
    let expected = decode(&whole, Exif::Apply, &limits, &Stop::default()).unwrap();
    // A phone's film, in which anything may stand; another picture.
    for tail in [&[0xFF, 0xDA, 0][..], &[0, 0xFF, 0xD9, 7, 0xFF, 0xDA], b"\0\0\0\x18ftypmp42", &whole] {
        let longer = [&whole[..], tail].concat();
        assert_eq!(decode(&longer, Exif::Apply, &limits, &Stop::default()).unwrap(), expected, "{tail:?}");
    }
    let cut = &whole[..whole.len() / 2];
    for tail in [&[][..], &whole] {
        let refused = decode(&[cut, tail].concat(), Exif::Apply, &limits, &Stop::default());
        assert!(matches!(refused, Err(DecodeError::Damaged { .. })), "{refused:?}");
    }
}

#[test]
fn of_colours_with_16_bits_the_high_byte_counts() {
    let values = [0x00FF, 0x0100, 0x7FFF, 0x8000, 0xFF00, 0xFFFF];
    let colours = image::ImageBuffer::<image::Rgb<u16>, _>::from_raw(2, 1, values.to_vec()).unwrap();
    let with_alpha: Vec<u16> = values.chunks(3).flat_map(|rgb| [rgb, &[9][..]].concat()).collect();
    let with_alpha = image::ImageBuffer::<image::Rgba<u16>, _>::from_raw(2, 1, with_alpha).unwrap();
    let greys = image::ImageBuffer::<image::LumaA<u16>, _>::from_raw(2, 1, vec![0x7FFF, 9, 0xFF00, 9]).unwrap();
    // As Pillow 13.0 has it.
    for (picture, expected) in [
        (image::DynamicImage::ImageRgb16(colours), [0x00, 0x01, 0x7F, 0x80, 0xFF, 0xFF]),
        (image::DynamicImage::ImageRgba16(with_alpha), [0x00, 0x01, 0x7F, 0x80, 0xFF, 0xFF]),
        (image::DynamicImage::ImageLumaA16(greys), [0x7F, 0x7F, 0x7F, 0xFF, 0xFF, 0xFF]),
    ] {
        let mut bytes = std::io::Cursor::new(Vec::new());
        picture.write_to(&mut bytes, ImageFormat::Png).unwrap();
        let found = decode(bytes.get_ref(), Exif::Apply, &DecodeLimits::default(), &Stop::default()).unwrap();
        assert_eq!(found.as_raw(), &expected);
    }
}

#[test]
fn limits_hold_before_memory_is_allocated() {
    let png = picture(200, 100, ImageFormat::Png);
    let few_pixels = DecodeLimits { max_pixels: 19_999, ..DecodeLimits::default() };
    assert!(matches!(
        decode(&png, Exif::Apply, &few_pixels, &Stop::default()),
        Err(DecodeError::TooManyPixels { width: 200, height: 100, limit: 19_999 })
    ));
    for format in
        [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP, ImageFormat::Gif, ImageFormat::Tiff, ImageFormat::Bmp]
    {
        let few_bytes = DecodeLimits { max_decoded_bytes: 50_000, ..DecodeLimits::default() };
        let refused = decode(&picture(200, 100, format), Exif::Apply, &few_bytes, &Stop::default());
        assert!(matches!(refused, Err(DecodeError::TooManyBytes { .. })), "{format:?}: {refused:?}");
    }
}

#[test]
fn no_cut_or_flipped_file_panics() {
    for format in
        [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP, ImageFormat::Gif, ImageFormat::Tiff, ImageFormat::Bmp]
    {
        let whole = picture(37, 23, format);
        for cut in 0..whole.len() {
            let _ = decode(&whole[..cut], Exif::Apply, &DecodeLimits::default(), &Stop::default());
        }
        assert!(
            decode(&whole[..whole.len() / 2], Exif::Apply, &DecodeLimits::default(), &Stop::default()).is_err(),
            "{format:?} cut in half"
        );
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 0x55;
            let _ = decode(&changed, Exif::Apply, &DecodeLimits::default(), &Stop::default());
        }
    }
}

/// `tests/oracle/make_decoding.py` made the files.
#[test]
fn forms_that_users_have_are_what_pillow_makes_of_them() {
    let expected: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&fs::read(data("decoding/expected.json")).unwrap()).unwrap();
    let mut wrong = Vec::new();
    for (name, entry) in &expected {
        let bytes = fs::read(data("decoding").join(name)).unwrap();
        match decode(&bytes, Exif::Apply, &DecodeLimits::default(), &Stop::default()) {
            Ok(found) => {
                let size = (u64::from(found.width()), u64::from(found.height()));
                let digest = nbn::bundle::sha256_hex(found.as_raw());
                if (entry["width"].as_u64(), entry["height"].as_u64()) != (Some(size.0), Some(size.1)) {
                    wrong.push(format!("{name}: {size:?}"));
                } else if entry["sha256"] != digest {
                    wrong.push(format!("{name}: other pixels"));
                }
            }
            Err(error) => wrong.push(format!("{name}: {error}")),
        }
    }
    assert!(wrong.is_empty() && expected.len() >= 73, "{wrong:#?}");
    // The same file with less of its scan is cut, whatever stands behind it.
    let whole = fs::read(data("decoding/no_end_but_more_behind.jpg")).unwrap();
    for kept in [200, 400, 600] {
        let cut = [&whole[..whole.len() - 33 - kept.min(whole.len() / 3)], b"SEFT"].concat();
        let refused = decode(&cut, Exif::Apply, &DecodeLimits::default(), &Stop::default()).unwrap_err();
        assert!(matches!(refused, DecodeError::Damaged { .. }), "{refused}");
    }
}

#[test]
fn formats_that_are_not_read_are_named() {
    let ftyp = |brand: &[u8]| [b"\0\0\0\x1Cftyp", brand, &[0; 20]].concat();
    for (bytes, name) in [
        (ftyp(b"avif"), "AVIF"),
        (ftyp(b"heic"), "HEIC"),
        (ftyp(b"isom"), "a film"),
        (b"\xFF\x0A\xFA\x7F".to_vec(), "JPEG XL"),
        (b"\0\0\0\x0CjP  \r\n\x87\n".to_vec(), "JPEG 2000"),
        (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>".to_vec(), "SVG"),
        (b"%PDF-1.7".to_vec(), "PDF"),
        (b"<!DOCTYPE html><html>".to_vec(), "a web page"),
        (b"II\x2B\0\x08\0\0\0".to_vec(), "BigTIFF"),
    ] {
        let error = decode(&bytes, Exif::Apply, &DecodeLimits::default(), &Stop::default()).unwrap_err();
        let words = format!("the image is {name}");
        assert!(error.to_string().starts_with(&words) && error.code() == "unknown_format", "{error}");
        assert!(error.to_string().ends_with("convert it to JPEG or PNG"));
    }
    let float = {
        let mut tiff = fs::read(data("decoding/grey8_white_is_0.tif")).unwrap();
        // The interpretation becomes CIELAB.
        let at = tiff.windows(4).position(|part| part == [6, 1, 3, 0]).unwrap();
        tiff[at + 8] = 8;
        tiff
    };
    let error = decode(&float, Exif::Apply, &DecodeLimits::default(), &Stop::default()).unwrap_err().to_string();
    assert!(error.starts_with("this form of TIFF is not supported: its colours are CIELAB"), "{error}");
}

#[test]
fn of_large_jpegs_fewer_pixels_are_decoded_where_that_is_asked_for() {
    let image = image::RgbImage::from_fn(1000, 801, |x, y| {
        let wave = |a: f64, b: f64| (127.0 + 100.0 * (a * f64::from(x) + b * f64::from(y)).sin()) as u8;
        image::Rgb([wave(0.01, 0.003), wave(0.004, 0.012), wave(0.02, 0.0)])
    });
    let encoded = |format| {
        let mut bytes = std::io::Cursor::new(Vec::new());
        image.write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    };
    let (jpeg, png) = (encoded(ImageFormat::Jpeg), encoded(ImageFormat::Png));
    let size = |bytes: &[u8], least| {
        let limits = DecodeLimits::default();
        decode_at_least(bytes, Exif::Apply, &limits, &Stop::default(), least).unwrap().dimensions()
    };
    // libjpeg rounds up what is left over; Pillow's `draft` gives the same sizes.
    for (least, expected) in [
        (None, (1000, 801)),
        (Some(401), (1000, 801)),
        (Some(400), (500, 401)),
        (Some(201), (500, 401)),
        (Some(200), (250, 201)),
        (Some(100), (125, 101)),
        (Some(1), (125, 101)),
    ] {
        assert_eq!(size(&jpeg, least), expected, "{least:?}");
        assert_eq!(size(&png, least), (1000, 801), "{least:?}");
    }
    let of = |side, pixels| {
        let limits = DecodeLimits { pixels, ..DecodeLimits::default() };
        Preprocessor::new(preprocessing(side, side, Exif::Apply), limits).prepare(&jpeg, &Stop::default()).unwrap()
    };
    for (side, most) in [(32, 0.25), (64, 0.25), (200, 0.25), (256, 0.0), (500, 0.0)] {
        let (exact, fast) = (of(side, Pixels::Exact), of(side, Pixels::Fast));
        let largest = exact.iter().zip(&fast).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        // More than 200 pixels are not twice in half of the shorter side: nothing changes.
        assert!((largest > 0.0) == (most > 0.0) && largest <= most, "{side}: {largest}");
    }
}
