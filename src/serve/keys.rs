//! API keys: who may ask, and how much at once.
//!
//! A key is 256 random bits, so its plain SHA-256 is enough to keep: there is nothing to guess. A presented key's digest is
//! compared with every known one in constant time.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use axum::http::{HeaderMap, header};
use subtle::ConstantTimeEq;

use super::code::Code;
use super::problem::Problem;
use crate::bundle::sha256_hex;

/// One key.
struct Key {
    name: String,
    /// SHA-256 in lower-case hexadecimal.
    digest: String,
    admin: bool,
    /// Requests at once; 0 is no limit.
    concurrency: usize,
    open: Arc<AtomicUsize>,
}

/// The keys that are known; without any, everybody may ask.
#[derive(Default)]
pub struct Keys {
    known: RwLock<Vec<Key>>,
    concurrency: usize,
}

/// Who asks. Dropping it ends the request's share of the key's limit.
#[derive(Default)]
pub(crate) struct Caller {
    pub(crate) admin: bool,
    open: Option<Arc<AtomicUsize>>,
}

impl Drop for Caller {
    fn drop(&mut self) {
        if let Some(open) = &self.open {
            open.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Keys {
    /// Keys from lines `name sha256hex [concurrency=N] [admin]`; `#` begins a comment. `concurrency` holds for keys that name
    /// none; 0 is no limit.
    ///
    /// # Errors
    /// Names the first line that does not fit.
    pub fn parse(text: &str, concurrency: usize) -> Result<Self, String> {
        let keys = Self { known: RwLock::default(), concurrency };
        keys.replace(text)?;
        Ok(keys)
    }

    /// Takes the keys of `text` in place of those known. A key that stays keeps its open requests.
    ///
    /// # Errors
    /// Names the first line that does not fit; the known keys stay.
    pub fn replace(&self, text: &str) -> Result<(), String> {
        let mut fresh: Vec<Key> = Vec::new();
        let mut names = BTreeSet::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default();
            let mut words = line.split_whitespace();
            let Some(name) = words.next() else { continue };
            let fail = |what: &str| format!("line {}, key {name:?}: {what}", number + 1);
            let digest = words.next().filter(|d| d.len() == 64 && d.bytes().all(|b| b.is_ascii_hexdigit())).ok_or_else(|| {
                fail("expected `name sha256hex [concurrency=N] [admin]` with 64 hexadecimal digits; `nbn key` creates \
                      such a line")
            })?;
            let mut key = Key {
                name: name.into(),
                digest: digest.to_ascii_lowercase(),
                admin: false,
                concurrency: self.concurrency,
                open: Arc::default(),
            };
            for word in words {
                match word.strip_prefix("concurrency=").map(str::parse) {
                    Some(Ok(n)) => key.concurrency = n,
                    None if word == "admin" => key.admin = true,
                    _ => return Err(fail(&format!("{word:?} is neither admin nor concurrency=N"))),
                }
            }
            if !names.insert(name.to_owned()) {
                return Err(fail("the name is used twice"));
            }
            fresh.push(key);
        }
        if fresh.is_empty() {
            // Taken as given, it would open the server to everybody.
            return Err("there is no key: expected lines `name sha256hex [concurrency=N] [admin]`".into());
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        for key in &mut fresh {
            if let Some(old) = known.iter().find(|old| old.name == key.name && old.digest == key.digest) {
                key.open = old.open.clone();
            }
        }
        *known = fresh;
        Ok(())
    }

    /// A fresh key: 256 random bits of the system's.
    ///
    /// # Errors
    /// When the system has none to give.
    pub fn generate() -> std::io::Result<String> {
        let mut bits = [0; 32];
        getrandom::fill(&mut bits).map_err(std::io::Error::other)?;
        Ok(bits.iter().fold("nbn_".to_owned(), |key, byte| format!("{key}{byte:02x}")))
    }

    /// How many keys are known.
    pub fn len(&self) -> usize {
        self.known.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether everybody may ask.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Who presents these headers. Without keys everybody is somebody, but nobody an admin.
    pub(crate) fn admit(&self, headers: &HeaderMap) -> Result<Caller, Problem> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        if known.is_empty() {
            return Ok(Caller { admin: false, open: None });
        }
        let presented = presented(headers).ok_or_else(|| {
            let detail = "this server requires an API key: send it as `Authorization: Bearer KEY` or `X-Api-Key: KEY`";
            Problem::new(Code::KeyMissing, detail)
        })?;
        let digest = sha256_hex(presented.as_bytes());
        // All are compared, whichever fits.
        let found = known.iter().fold(None, |found, key| {
            let same: bool = key.digest.as_bytes().ct_eq(digest.as_bytes()).into();
            if same { Some(key) } else { found }
        });
        let key = found.ok_or_else(|| Problem::new(Code::KeyUnknown, "this server does not know the API key"))?;
        if key.open.fetch_add(1, Ordering::AcqRel) >= key.concurrency && key.concurrency > 0 {
            key.open.fetch_sub(1, Ordering::AcqRel);
            let detail = format!(
                "{} requests with this key are being answered, which is the key's limit: wait until one of them ends",
                key.concurrency
            );
            let problem = Problem::new(Code::KeyConcurrency, detail);
            return Err(problem.with_limit(key.concurrency as u64).retry_in(std::time::Duration::from_secs(1)));
        }
        tracing::Span::current().record("key", key.name.as_str());
        Ok(Caller { admin: key.admin, open: Some(key.open.clone()) })
    }
}

fn presented(headers: &HeaderMap) -> Option<&str> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.to_str().ok()?.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(key)
    });
    bearer.or_else(|| headers.get("x-api-key")?.to_str().ok()).map(str::trim)
}
