use std::fs;
use std::io::Write;
use std::path::Path;

use image::{ImageFormat, Rgb, RgbImage};
use nbn::bundle::Exif;
use nbn::data::{Form, LabelledImages, pixel_hashes, records_from};
use nbn::pixels::DecodeLimits;

fn labels(names: &[&str]) -> Vec<String> {
    names.iter().map(|n| (*n).to_owned()).collect()
}

/// A picture that differs in every pixel, channel and seed.
fn picture(seed: u8) -> RgbImage {
    RgbImage::from_fn(32, 32, |x, y| Rgb([x as u8 * 3 + seed, y as u8 * 5 + seed, (x * y) as u8 ^ seed]))
}

fn cifar_record(label_bytes: &[u8], picture: &RgbImage) -> Vec<u8> {
    let mut record = label_bytes.to_vec();
    for channel in 0..3 {
        record.extend(picture.pixels().map(|p| p[channel]));
    }
    record
}

fn decoded(set: &LabelledImages) -> Vec<RgbImage> {
    (0..set.len()).map(|n| (*set.picture(n, Exif::Apply, &DecodeLimits::default()).unwrap()).clone()).collect()
}

fn open(path: &Path, names: &[&str]) -> Result<LabelledImages, String> {
    let labels = labels(names);
    Form::guess(path, labels.len())
        .and_then(|form| LabelledImages::open(path, form, &labels))
        .map_err(|error| error.to_string())
}

#[test]
fn every_form_of_a_set_gives_the_same_pictures_and_labels() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let pictures = [picture(0), picture(7), picture(99)];
    let names = ["cat", "sea lion"];
    fs::create_dir_all(at("set/cat/more")).unwrap();
    fs::create_dir_all(at("set/sea lion")).unwrap();
    let files = ["set/cat/a.png", "set/cat/more/b.png", "set/sea lion/c c.png"];
    for (file, picture) in files.iter().zip(&pictures) {
        picture.save_with_format(at(file), ImageFormat::Png).unwrap();
    }
    fs::write(at("list.txt"), "set/cat/a.png cat\nset/cat/more/b.png 0\n\nset/sea lion/c c.png\tsea lion\n").unwrap();
    let ten: Vec<u8> = pictures.iter().zip([0, 0, 1]).flat_map(|(p, l)| cifar_record(&[l], p)).collect();
    let hundred: Vec<u8> = pictures.iter().zip([0, 0, 1]).flat_map(|(p, l)| cifar_record(&[9, l], p)).collect();
    fs::write(at("ten.bin"), ten).unwrap();
    fs::write(at("hundred.bin"), hundred).unwrap();
    for form in ["set", "list.txt", "ten.bin", "hundred.bin"] {
        let set = open(&at(form), &names).unwrap();
        assert_eq!(set.labels(), [0, 0, 1], "{form}");
        assert_eq!(decoded(&set), pictures, "{form}");
        let chosen = set.select(&[2, 0]).unwrap();
        assert_eq!(chosen.labels(), [1, 0]);
        assert_eq!(decoded(&chosen), [pictures[2].clone(), pictures[0].clone()]);
        let hashes = pixel_hashes(&set, Exif::Apply, &|| ()).unwrap();
        assert_eq!(hashes.len(), 3);
        assert_eq!(hashes, pixel_hashes(&open(&at("set"), &names).unwrap(), Exif::Apply, &|| ()).unwrap(), "{form}");
    }
}

#[test]
fn idx_files_are_read_plain_and_packed() {
    let folder = tempfile::tempdir().unwrap();
    let grey: Vec<u8> = (0..2 * 3 * 4).collect();
    let header = |dimensions: &[u32]| {
        let mut bytes = vec![0, 0, 8, dimensions.len() as u8];
        dimensions.iter().for_each(|d| bytes.extend(d.to_be_bytes()));
        bytes
    };
    let images = [header(&[2, 3, 4]), grey.clone()].concat();
    let labels = [header(&[2]), vec![1, 0]].concat();
    fs::write(folder.path().join("t10k-images-idx3-ubyte"), &images).unwrap();
    fs::write(folder.path().join("t10k-labels-idx1-ubyte"), &labels).unwrap();
    for (name, bytes) in [("x-images-idx3-ubyte.gz", &images), ("x-labels-idx1-ubyte.gz", &labels)] {
        let file = fs::File::create(folder.path().join(name)).unwrap();
        let mut packed = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
        packed.write_all(bytes).unwrap();
        packed.finish().unwrap();
    }
    for name in ["t10k-images-idx3-ubyte", "x-images-idx3-ubyte.gz"] {
        let set = open(&folder.path().join(name), &["zero", "one"]).unwrap();
        assert_eq!(set.labels(), [1, 0]);
        let picture = &decoded(&set)[1];
        assert_eq!(picture.dimensions(), (4, 3));
        assert_eq!(picture.get_pixel(2, 1), &Rgb([12 + 6; 3]));
    }
    fs::write(folder.path().join("cut-images-idx3-ubyte"), &images[..images.len() - 1]).unwrap();
    assert!(open(&folder.path().join("cut-images-idx3-ubyte"), &["a", "b"]).unwrap_err().contains("cut short"));
}

#[test]
fn a_set_that_does_not_fit_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir_all(at("set/dog")).unwrap();
    fs::create_dir_all(at("empty/cat")).unwrap();
    fs::write(at("short.bin"), [0; 100]).unwrap();
    fs::write(at("beyond.bin"), cifar_record(&[5], &picture(0))).unwrap();
    fs::write(at("beyond.txt"), "a.png 2\n").unwrap();
    fs::write(at("words.txt"), "a.png cat\nonly-a-path\n").unwrap();
    fs::write(at("gone.txt"), "nowhere.png cat\n").unwrap();
    let names = ["cat", "cow"];
    for (path, words) in [
        ("set", "\"dog\""),
        ("empty", "FOLDER/LABEL/image.jpg"),
        ("short.bin", "100 bytes"),
        ("beyond.bin", "label 5; the model has 2 classes"),
        ("beyond.txt", "label 2 is out of range; the model has 2 classes"),
        ("words.txt", "line 2"),
        ("nowhere", "nowhere"),
    ] {
        let error = open(&at(path), &names).unwrap_err();
        assert!(error.contains(words), "{path}: {error}");
    }
    let gone = open(&at("gone.txt"), &names).unwrap();
    let error = pixel_hashes(&gone, Exif::Apply, &|| ()).unwrap_err().to_string();
    assert!(error.contains("1 of 1 images cannot be read") && error.contains("nowhere.png"), "{error}");
    assert!(gone.select(&[1]).unwrap_err().to_string().contains("record 1"));
    fs::write(at("r.json"), "{\"records\": [3, 1]}").unwrap();
    assert_eq!(records_from(&at("r.json")).unwrap(), [3, 1]);
    fs::write(at("r.json"), "{\"rows\": 1}").unwrap();
    assert!(records_from(&at("r.json")).unwrap_err().to_string().contains("records"));
}
