use std::fs;
use std::io::Write;
use std::path::Path;

use image::{ImageFormat, Rgb, RgbImage};
use nbn::bundle::Exif;
use nbn::data::{Form, LabelledImages, Purpose, Records, pixel_hashes};
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
    let beyond = Records::load(&at("r.json")).unwrap().select(&gone).unwrap_err().to_string();
    assert!(beyond.contains("1 images, counted from 0, but record 3"), "{beyond}");
    fs::write(at("r.json"), "{\"rows\": 1}").unwrap();
    assert!(Records::load(&at("r.json")).unwrap_err().to_string().contains("records"));
}

#[test]
fn a_list_means_the_same_images_whatever_comes_and_goes() {
    let folder = tempfile::tempdir().unwrap();
    let set = folder.path().join("set");
    let names = ["cat", "cow"];
    for class in names {
        fs::create_dir_all(set.join(class)).unwrap();
        for n in 0..4 {
            image::RgbImage::from_pixel(2, 2, image::Rgb([n, 0, 0]))
                .save(set.join(class).join(format!("{n}.png")))
                .unwrap();
        }
    }
    let labels = names.map(str::to_owned);
    let open = || LabelledImages::open(&set, Form::Folder, &labels).unwrap();
    let list = folder.path().join("run.calibration.json");
    let before = open();
    fs::write(&list, Records::new(&set, &before, &[1, 6], Purpose::HeldOut, 0).to_json()).unwrap();
    let ids = |images: &LabelledImages| (0..images.len()).map(|n| images.id(n)).collect::<Vec<_>>();
    let wanted = ["cat/1.png", "cow/2.png"];
    let chosen = |images: &LabelledImages| Records::load(&list).unwrap().select(images);
    assert_eq!(ids(&chosen(&before).unwrap()), wanted);
    fs::copy(set.join("cat/0.png"), set.join("cat/00.png")).unwrap();
    fs::remove_file(set.join("cow/0.png")).unwrap();
    fs::remove_file(set.join("cow/1.png")).unwrap();
    assert_eq!(ids(&chosen(&open()).unwrap()), wanted);
    fs::remove_file(set.join("cow/2.png")).unwrap();
    let refused = chosen(&open()).unwrap_err().to_string();
    assert!(refused.contains("1 of its 2 images are not in") && refused.contains("such as cow/2.png"), "{refused}");
    // By another spelling of the set's place, and one that an earlier version wrote.
    let spelt = LabelledImages::open(&set.join("../set"), Form::Folder, &labels).unwrap();
    fs::copy(set.join("cow/3.png"), set.join("cow/2.png")).unwrap();
    assert_eq!(chosen(&spelt).unwrap_err().to_string().matches("cow/2.png").count(), 1);
    fs::write(&list, "{\"file\": \"set\", \"seed\": 0, \"records\": [0, 1]}").unwrap();
    let old = chosen(&open()).unwrap_err().to_string();
    assert!(old.contains("an earlier version") && old.contains("--resume"), "{old}");
    for (text, words) in [("{\"records\": []}", "lists no images"), ("[1, 0, 1]", "lists image 1 twice")] {
        fs::write(&list, text).unwrap();
        assert!(Records::load(&list).unwrap_err().to_string().contains(words));
    }
    // In one file, the numbers count, and so does how many there are.
    let raw = folder.path().join("set.bin");
    fs::write(&raw, [cifar_record(&[0], &picture(0)), cifar_record(&[1], &picture(1))].concat()).unwrap();
    let cifar = || LabelledImages::open(&raw, Form::Cifar10, &labels).unwrap();
    fs::write(&list, Records::new(&raw, &cifar(), &[1], Purpose::HeldOut, 0).to_json()).unwrap();
    assert_eq!(chosen(&cifar()).unwrap().labels(), [1]);
    fs::write(&raw, cifar_record(&[0], &picture(0)).repeat(3)).unwrap();
    let refused = chosen(&cifar()).unwrap_err().to_string();
    assert!(refused.contains("another file than"), "{refused}");
}

#[test]
fn a_table_has_a_header_and_says_more_of_its_images() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let labels = ["cat, small", "cow"].map(str::to_owned);
    fs::write(at("t.csv"), "\u{feff}patient,path,label\np1,\"a, b.png\",\"cat, small\"\np2,c.png,1\n").unwrap();
    assert_eq!(Form::guess(&at("t.csv"), 2).unwrap(), Form::Csv);
    let table = LabelledImages::open(&at("t.csv"), Form::Csv, &labels).unwrap();
    assert_eq!((table.labels(), table.id(0).as_str()), (&[0, 1][..], "a, b.png"));
    let by = |by: &str| by.parse::<nbn::data::GroupBy>().unwrap().groups(&table).map_err(|error| error.to_string());
    assert_eq!(by("patient").unwrap(), [0, 1]);
    assert!(by("person").unwrap_err().contains("the columns of the table are patient, path, label"));
    fs::write(at("t.tsv"), "Path\t LABEL\tfolder\na.png\tcow \tone\nb.png\t cow\ttwo\n").unwrap();
    assert_eq!(Form::guess(&at("t.tsv"), 2).unwrap(), Form::Csv);
    let tabs = LabelledImages::open(&at("t.tsv"), Form::Csv, &labels).unwrap();
    let folders = "folder".parse::<nbn::data::GroupBy>().unwrap();
    assert_eq!((tabs.labels(), folders.groups(&tabs).unwrap()), (&[1, 1][..], vec![0, 1]));
    fs::write(at("t.csv"), "patient;image;class\n;a.png;0\nx;c.png;cow\n").unwrap();
    let table = LabelledImages::open(&at("t.csv"), Form::Csv, &labels).unwrap();
    assert_eq!(table.labels(), [0, 1]);
    let refused = "patient".parse::<nbn::data::GroupBy>().unwrap().groups(&table).unwrap_err().to_string();
    assert!(refused.contains("the column is empty for 1 of 2 images, such as a.png"), "{refused}");
    for (text, words) in [
        ("a.png 0\n", "has no column for the images' paths"),
        ("path,species\na.png,0\n", "no column for their classes, which is named one of label, class, target"),
        ("path,label\na.png,dog\n", "line 2: \"dog\" is no class"),
        ("path,label\na.png, \n", "line 2 has no label"),
        ("path,label,note\na.png,cow,fine\nb.png,cow,\"open\nc.png,cow,\n", "line 3 opens a quote that nothing closes"),
        ("path,label\na.png,cow\na.png,\"cat, small\"\n", "a.png two labels: keep one"),
        ("path,label,Label\na.png,cow,cow\n", "has several columns label"),
        ("path,label\na.png,7\n", "line 2: label 7 is out of range"),
        ("path,label\n,cow\n", "line 2 names no image"),
        ("path,label\na.png\n", "line: 2"),
        ("path,label\n", "holds no images"),
    ] {
        fs::write(at("t.csv"), text).unwrap();
        let error = LabelledImages::open(&at("t.csv"), Form::Csv, &labels).unwrap_err().to_string();
        assert!(error.contains(words), "{text:?}: {error}");
    }
}
