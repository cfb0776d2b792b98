//! What the registry says of itself: which versions answer, and why others do not.

use super::{Registry, Slot};

/// What the index says of a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelState {
    /// It answers.
    Ready,
    /// It is being opened for the first time.
    Loading,
    /// It does not answer.
    Unavailable,
}

/// One line of the index.
#[derive(Debug, Clone)]
pub struct IndexEntry {
    /// The model.
    pub name: String,
    /// Its version; empty where none is known.
    pub version: String,
    /// Whether it answers.
    pub state: ModelState,
    /// Why it does not, or why a newer state of its folder does not.
    pub reason: String,
}

impl Registry {
    /// What is served and what is not, with reasons. Names the repository's other folders, too.
    pub fn index(&self) -> Vec<IndexEntry> {
        let mut entries: Vec<IndexEntry> = self.read(|all| {
            let entry = |(name, number, slot): (&String, &u64, &Slot)| IndexEntry {
                name: name.clone(),
                version: slot.model.as_ref().map_or_else(|| number.to_string(), |m| m.version.clone()),
                state: match slot {
                    Slot { model: Some(_), .. } => ModelState::Ready,
                    Slot { loading: true, .. } => ModelState::Loading,
                    _ => ModelState::Unavailable,
                },
                reason: slot.reason.clone(),
            };
            all.iter().flat_map(|(name, versions)| versions.iter().map(move |(n, s)| entry((name, n, s)))).collect()
        });
        let others = self.repository().and_then(|r| Ok(r.models()?)).unwrap_or_default();
        for name in others {
            if !entries.iter().any(|entry| entry.name == name) {
                let reason = match self.wanted(&name) {
                    Ok(_) => "not loaded".into(),
                    Err(error) => self.public(&error),
                };
                entries.push(IndexEntry { name, version: String::new(), state: ModelState::Unavailable, reason });
            }
        }
        entries
    }
}
