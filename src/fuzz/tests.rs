use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::*;

/// Mutations of each file.
const MUTATIONS: u64 = 400;

fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz"))
}

/// The files of a target in `fuzz/seeds` and `fuzz/regressions`, by name.
fn files(target: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = ["seeds", "regressions"]
        .iter()
        .filter_map(|kind| fs::read_dir(folder().join(kind).join(target)).ok())
        .flat_map(|entries| entries.map(|entry| entry.unwrap().path()))
        .filter(|path| !path.file_name().unwrap().to_string_lossy().starts_with('.'))
        .collect();
    files.sort();
    files
}

/// Numbers that are the same in each run: xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % limit.max(1)
    }
}

/// `file` with one to four changes: bits turned over, numbers at their limits, parts cut, repeated, or taken from
/// `other`.
fn mutated(file: &[u8], other: &[u8], random: &mut Random) -> Vec<u8> {
    let mut out = file.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(out.len());
        let end = (at + 1 + random.below(64)).min(out.len());
        match random.below(6) {
            _ if out.is_empty() => {}
            0 => out[at] ^= 1 << random.below(8),
            1 => out[at] = [0, 1, 0x7F, 0x80, 0xFF][random.below(5)],
            2 => out.truncate(at),
            3 => drop(out.drain(at..end)),
            4 => {
                let again = out[at..end].to_vec();
                out.splice(at..at, again);
            }
            _ => {
                let from = random.below(other.len());
                let to = (from + random.below(64)).min(other.len());
                out.splice(at..end, other[from..to].iter().copied());
            }
        }
    }
    out
}

/// Runs a target, and says what it found in which bytes.
fn finding(run: fn(&[u8]), data: &[u8], what: &str) -> Option<String> {
    let panic = catch_unwind(AssertUnwindSafe(|| run(data))).err()?;
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    Some(format!("{what}: {}\n  its bytes in base64: {}", text.unwrap_or("a panic"), STANDARD.encode(data)))
}

fn replay((target, run): Target) -> Vec<String> {
    let files = files(target);
    let contents: Vec<Vec<u8>> = files.iter().map(|path| fs::read(path).unwrap()).collect();
    let mut findings = Vec::new();
    for (number, (path, content)) in files.iter().zip(&contents).enumerate() {
        let name = format!("{target}/{}", path.file_name().unwrap().to_string_lossy());
        findings.extend(finding(run, content, &name));
        let mut random = Random(number as u64 + 1);
        for n in 0..MUTATIONS {
            let other = &contents[random.below(contents.len())];
            let data = mutated(content, other, &mut random);
            findings.extend(finding(run, &data, &format!("mutation {n} of {name}")));
        }
    }
    findings
}

#[test]
fn no_seed_no_former_finding_and_no_mutation_of_them_is_a_finding() {
    let left = Mutex::new(TARGETS.to_vec());
    let findings = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                loop {
                    let Some(target) = left.lock().unwrap().pop() else { return };
                    let found = replay(target);
                    findings.lock().unwrap().extend(found);
                }
            });
        }
    });
    let findings = findings.into_inner().unwrap();
    let first = findings[..findings.len().min(5)].join("\n");
    assert!(findings.is_empty(), "{} findings, the first of them:\n{first}", findings.len());
}

#[test]
fn every_target_has_a_program_and_seeds_and_every_folder_of_seeds_a_target() {
    let targets: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let names = |kind: &str| -> BTreeSet<String> {
        let name = |path: PathBuf| path.file_stem().unwrap().to_string_lossy().into_owned();
        // Without findings there is no folder for them.
        let entries = fs::read_dir(folder().join(kind)).into_iter().flatten();
        entries.map(|entry| name(entry.unwrap().path())).collect()
    };
    assert_eq!(names("targets"), targets);
    assert_eq!(names("seeds"), targets);
    assert!(names("regressions").is_subset(&targets));
    let manifest = fs::read_to_string(folder().join("Cargo.toml")).unwrap();
    for target in &targets {
        assert!(manifest.contains(&format!("path = \"targets/{target}.rs\"")), "{target} is not in fuzz/Cargo.toml");
        assert!(!files(target).is_empty(), "{target} has no seed");
    }
}

#[test]
fn the_stand_in_for_a_network_shows_every_byte_of_a_picture() {
    let known = models::bmp([1, 2, 3]);
    let mut classifier = models::mirror(models::mirrored());
    let seen = look_at(&mut classifier, &known).unwrap();
    assert_eq!(seen.iter().map(|value| value.round() as u8).collect::<Vec<_>>(), [[1; 64], [2; 64], [3; 64]].concat());
}

#[test]
fn an_answer_that_blames_the_server_or_echoes_without_bound_is_a_finding() {
    let answer = http::post("/v1/models/test/classify", &["content-type: image/bmp"], &models::bmp([9, 8, 7]));
    assert!(String::from_utf8_lossy(&answer.body).contains(r#""label":"class 0""#));
    answer.check();
    let of = |status, bytes| http::Answer { status, body: vec![b'x'; bytes], ..http::Answer::default() };
    for wrong in [of(500, 9), of(503, 9), of(400, 5000)] {
        assert!(catch_unwind(AssertUnwindSafe(|| wrong.check())).is_err());
    }
    of(400, 500).check();
    of(504, 9).check();
}
