//! Holds what users read to the list of phrases in tests/words.txt that readers stumbled over.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::{nbn, root, text};

/// Phrases, and what to write instead.
fn phrases() -> Vec<(String, String)> {
    let list = fs::read_to_string(root().join("tests/words.txt")).unwrap();
    let lines = list.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| line.split_once(" => ").unwrap()).map(|(a, b)| (a.to_lowercase(), b.to_owned())).collect()
}

fn files(folder: &Path, ending: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, ending, found);
        } else if path.extension().is_some_and(|e| e == ending) {
            found.push(path);
        }
    }
}

/// The help of a command and of all below it.
fn help(words: &[&str], found: &mut Vec<(String, String)>) {
    let out = nbn(&[words, &["--help"]].concat());
    let said = text(&out.stdout);
    let commands: Vec<String> = said
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .map(|line| line.split_whitespace().next().unwrap().to_owned())
        .filter(|command| command != "help")
        .collect();
    found.push((format!("nbn {} --help", words.join(" ")), said));
    for command in commands {
        help(&[words, &[&command[..]]].concat(), found);
    }
}

/// String literals of a line of code; a comment has none.
fn literals(line: &str) -> String {
    if line.trim_start().starts_with("//") {
        return String::new();
    }
    line.split('"').skip(1).step_by(2).collect::<Vec<_>>().join(" ")
}

#[test]
fn nothing_that_users_read_has_a_phrase_that_readers_stumbled_over() {
    let phrases = phrases();
    assert!(phrases.len() > 30);
    let mut texts = Vec::new();
    help(&[], &mut texts);
    assert!(texts.len() > 12 && texts.iter().any(|(name, _)| name == "nbn fold export --help"), "{}", texts.len());
    let mut documents: Vec<PathBuf> =
        ["README.md", "SECURITY.md", "CONTRIBUTING.md", "openapi.yaml"].iter().map(|name| root().join(name)).collect();
    files(&root().join("docs"), "md", &mut documents);
    files(&root().join("src/serve/page"), "html", &mut documents);
    files(&root().join("src/serve/page"), "js", &mut documents);
    let read = |path: &PathBuf| (path.display().to_string(), fs::read_to_string(path).unwrap());
    texts.extend(documents.iter().map(read));
    let mut code = Vec::new();
    files(&root().join("src"), "rs", &mut code);
    for path in code.iter().filter(|path| !path.ends_with("fuzz/tests.rs")) {
        let (name, content) = read(path);
        texts.push((name, content.lines().map(literals).collect::<Vec<_>>().join("\n")));
    }
    let mut found = Vec::new();
    for (name, content) in &texts {
        // Lines are broken anywhere.
        let flat = content.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
        for (phrase, instead) in &phrases {
            if let Some(at) = flat.find(phrase) {
                let around = &flat[flat.floor_char_boundary(at.saturating_sub(40))..];
                let around = &around[..around.floor_char_boundary(100)];
                found.push(format!("{name}: {around:?}: write {instead:?}"));
            }
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}
