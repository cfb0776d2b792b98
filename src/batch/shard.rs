//! A machine's share of a source.

use std::str::FromStr;

use sha2::{Digest, Sha256};

/// Share `index` of `count`, counted from 0.
///
/// A picture belongs to the share that the first 64 bits of its key's SHA-256 name, modulo `count`: whatever else is in
/// the source, and in whatever order it is listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    index: u32,
    count: u32,
}

/// A share that cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShardError {
    /// Not of a known form.
    #[error("{0:?} is not a share: give INDEX/COUNT, such as 0/4, or auto/COUNT")]
    Form(String),
    /// Outside of the count.
    #[error("share {index} of {count}: shares are counted from 0, so the last is {}", count.saturating_sub(1))]
    Range {
        /// The share.
        index: u32,
        /// How many there are.
        count: u32,
    },
    /// Nothing says which.
    #[error(
        "auto takes the share from JOB_COMPLETION_INDEX (Kubernetes) or SLURM_ARRAY_TASK_ID (Slurm); neither is set \
         to a number: give INDEX/COUNT"
    )]
    NoIndex,
}

impl Default for Shard {
    fn default() -> Self {
        Self { index: 0, count: 1 }
    }
}

impl Shard {
    /// Share `index` of `count`.
    ///
    /// # Errors
    /// When there is no such share.
    pub fn new(index: u32, count: u32) -> Result<Self, ShardError> {
        if index < count { Ok(Self { index, count }) } else { Err(ShardError::Range { index, count }) }
    }

    /// `INDEX/COUNT`, or `auto/COUNT`, whose index is what `variable` says of JOB_COMPLETION_INDEX, else of
    /// SLURM_ARRAY_TASK_ID.
    ///
    /// # Errors
    /// When the text has another form or there is no such share.
    pub fn parse(text: &str, variable: impl Fn(&str) -> Option<String>) -> Result<Self, ShardError> {
        let form = || ShardError::Form(text.to_owned());
        let (index, count) = text.split_once('/').ok_or_else(form)?;
        let count = count.parse().map_err(|_| form())?;
        if index != "auto" {
            return Self::new(index.parse().map_err(|_| form())?, count);
        }
        let number = |name| variable(name).and_then(|value| u32::from_str(&value).ok());
        let index = number("JOB_COMPLETION_INDEX").or_else(|| number("SLURM_ARRAY_TASK_ID"));
        Self::new(index.ok_or(ShardError::NoIndex)?, count)
    }

    /// Which share it is.
    pub fn index(self) -> u32 {
        self.index
    }

    /// How many there are.
    pub fn count(self) -> u32 {
        self.count
    }

    /// Whether what `key` names belongs here.
    pub fn has(self, key: &str) -> bool {
        if self.count == 1 {
            return true;
        }
        let hash = Sha256::digest(key.as_bytes());
        let first = hash.iter().take(8).fold(0u64, |n, byte| n << 8 | u64::from(*byte));
        first % u64::from(self.count) == u64::from(self.index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_disjoint_and_leave_nothing_out() {
        for n in 0..500 {
            let key = format!("photos/{n}.jpg");
            assert_eq!((0..7).filter(|&i| Shard::new(i, 7).unwrap().has(&key)).count(), 1);
        }
    }

    #[test]
    fn the_scheduler_names_the_share() {
        let with =
            |name: &'static str, value: &'static str| move |asked: &str| (asked == name).then(|| value.to_owned());
        assert_eq!(Shard::parse("3/4", |_| None), Shard::new(3, 4));
        assert_eq!(Shard::parse("auto/4", with("JOB_COMPLETION_INDEX", "2")), Shard::new(2, 4));
        assert_eq!(Shard::parse("auto/8", with("SLURM_ARRAY_TASK_ID", "5")), Shard::new(5, 8));
        assert_eq!(Shard::parse("auto/4", |_| None), Err(ShardError::NoIndex));
        assert_eq!(Shard::parse("4/4", |_| None), Err(ShardError::Range { index: 4, count: 4 }));
        for wrong in ["", "1", "1/0x2", "-1/2", "a/b", "1/2/3"] {
            assert_eq!(Shard::parse(wrong, |_| None), Err(ShardError::Form(wrong.to_owned())));
        }
    }
}
