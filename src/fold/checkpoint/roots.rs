//! Where networks begin in a file.

use std::collections::BTreeSet;

use super::FoldError;
use super::names::{INNER_WRAPPERS, words};
use super::weights::{Choice, Content, Entry};

/// Every place where a network begins, as a prefix of names.
pub(super) fn roots<P>(entries: &[Entry<P>], names: &[String]) -> BTreeSet<String> {
    let mut roots: BTreeSet<String> = BTreeSet::new();
    for (entry, name) in entries.iter().zip(names) {
        if entry.is_remembered() || !matches!(entry.content, Content::Float(..)) {
            continue;
        }
        roots.extend(beginning(name).map(str::to_owned));
    }
    // A momentum copy is no network of its own.
    let copies: Vec<String> = roots
        .iter()
        .filter(|root| {
            let original = root.replace("encoder_k.", "encoder_q.");
            **root != original && roots.contains(&original)
        })
        .cloned()
        .collect();
    roots.retain(|root| !copies.contains(root));
    roots
}

/// The prefix before a network's first stage, whose blocks have convolutions and norms, or before its stem as Hugging Face
/// names it.
fn beginning(name: &str) -> Option<&str> {
    let at = |word: &str| {
        let starts = name.starts_with(&format!("{word}.")).then_some(0);
        starts.or_else(|| name.find(&format!(".{word}.")).map(|at| at + 1))
    };
    if let Some(at) = at("encoder.stages.0.layers") {
        return Some(&name[..at]);
    }
    let at = at("layer1")?;
    let mut rest = words(&name[at..]).skip(1).filter(|word| !INNER_WRAPPERS.contains(word));
    let is_block = rest.next().is_some_and(|word| word.parse::<usize>().is_ok());
    let parts = ["conv", "bn", "norm", "downsample", "shortcut"];
    let has_parts = rest.next().is_some_and(|word| parts.iter().any(|part| word.starts_with(part)));
    (is_block && has_parts).then(|| &name[..at])
}

/// Where the network that is asked for begins; `None` where none does.
pub(super) fn root<P>(entries: &[Entry<P>], names: &[String], choice: &Choice) -> Result<Option<String>, FoldError> {
    let roots = roots(entries, names);
    let listed = || roots.iter().map(|root| name_of(root)).collect::<Vec<_>>();
    let Some(asked) = &choice.weights else {
        if roots.len() > 1 {
            return Err(FoldError::SeveralWeights { sets: listed() });
        }
        return Ok(roots.into_iter().next());
    };
    let asked = if asked == "." { "" } else { asked.trim_end_matches('.') };
    let exact = roots.iter().find(|root| root.trim_end_matches('.') == asked);
    let below: Vec<&String> = roots.iter().filter(|root| !asked.is_empty() && is_under(root, asked)).collect();
    match (exact, below.as_slice()) {
        (Some(root), _) => Ok(Some(root.clone())),
        (None, [root]) => Ok(Some((*root).clone())),
        (None, []) => Err(FoldError::NoSuchWeights { asked: asked.chars().take(100).collect(), sets: listed() }),
        (None, several) => Err(FoldError::SeveralWeights { sets: several.iter().map(|root| name_of(root)).collect() }),
    }
}

/// A root as users name it.
pub(super) fn name_of(root: &str) -> String {
    if root.is_empty() { ".".into() } else { root.trim_end_matches('.').to_owned() }
}

/// Whether `name` is `prefix`, or lies below it.
fn is_under(name: &str, prefix: &str) -> bool {
    let prefix = prefix.trim_end_matches('.');
    name.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}
