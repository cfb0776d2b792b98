//! Object stores: s3://, gs://, az://, file://, and what a caller brings. Keys are taken as they are written, not as URLs
//! encode them.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use tokio::runtime::{Builder, Runtime};

use super::{Fault, cut};
use crate::listing::hidden_parts;

/// Object stores by the head of their URLs, such as `s3://photos`; opened at first use, with the settings that the
/// environment has for their kind (`AWS_…`, `GOOGLE_…`, `AZURE_…`).
#[derive(Clone, Default)]
pub struct Stores(Arc<Shared>);

#[derive(Default)]
struct Shared {
    opened: Mutex<HashMap<String, Arc<dyn ObjectStore>>>,
    runtime: OnceLock<Runtime>,
}

impl fmt::Debug for Stores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stores")
    }
}

impl Stores {
    /// Takes `store` for URLs that begin with `root`, such as `memory://bucket`.
    #[must_use]
    pub fn with(self, root: &str, store: Arc<dyn ObjectStore>) -> Self {
        self.0.opened.lock().unwrap_or_else(PoisonError::into_inner).insert(root.to_owned(), store);
        self
    }

    /// The object that `url` names; it need not be there.
    pub(super) fn object(&self, url: &str) -> Result<Object, Fault> {
        let fault = |reason: String| Fault::new("url", format!("{}: {reason}", cut(url)));
        let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
        let (host, key) = rest.split_once('/').unwrap_or((rest, ""));
        let root = format!("{scheme}://{host}");
        let path = Path::parse(key).map_err(|error| fault(error.to_string()))?;
        let mut opened = self.0.opened.lock().unwrap_or_else(PoisonError::into_inner);
        let store = match opened.get(&root) {
            Some(store) => store.clone(),
            None => {
                let store = open(&root).map_err(fault)?;
                opened.insert(root.clone(), store.clone());
                store
            }
        };
        Ok(Object { stores: self.clone(), store, root, path, size: None })
    }

    fn runtime(&self) -> io::Result<&Runtime> {
        if let Some(runtime) = self.0.runtime.get() {
            return Ok(runtime);
        }
        let fresh = Builder::new_multi_thread().worker_threads(2).thread_name("nbn-objects").enable_all().build()?;
        Ok(self.0.runtime.get_or_init(|| fresh))
    }
}

fn open(root: &str) -> Result<Arc<dyn ObjectStore>, String> {
    // Of two callers the second finds it done.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let url = format!("{root}/").parse::<url::Url>().map_err(|error| error.to_string())?;
    let known = ["s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss", "file"];
    if !known.contains(&url.scheme()) {
        return Err(format!(
            "{}:// is not an object store that nbn reads; expected s3://, gs://, az:// or file://",
            url.scheme()
        ));
    }
    // Other names mean something to the builders, too, such as TIMEOUT and TOKEN.
    let settings = std::env::vars_os().filter_map(|(name, value)| {
        let name = name.into_string().ok()?;
        let own = ["AWS_", "GOOGLE_", "AZURE_"].iter().any(|kind| name.starts_with(kind));
        own.then_some((name, value.into_string().ok()?))
    });
    let (store, _) = object_store::parse_url_opts(&url, settings).map_err(|error| chain(&error))?;
    Ok(Arc::from(store))
}

/// An error with its causes, which say what its own words do not.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text
}

/// An object in a store.
#[derive(Clone)]
pub(in super::super) struct Object {
    stores: Stores,
    store: Arc<dyn ObjectStore>,
    root: String,
    path: Path,
    size: Option<u64>,
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.root, self.path)
    }
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl Object {
    /// The object `key` beside this one; `.` and `..` are as in paths.
    pub(super) fn sibling(&self, key: &str) -> Result<Self, Fault> {
        let fault = |reason: String| Fault::new("url", format!("{}: {reason}", cut(key)));
        let folder = self.path.as_ref().rsplit_once('/').map_or("", |(folder, _)| folder);
        let mut segments: Vec<&str> = folder.split('/').filter(|segment| !segment.is_empty()).collect();
        for segment in key.split('/') {
            match segment {
                "." => {}
                ".." if segments.pop().is_none() => return Err(fault(format!("it leads out of {}", self.root))),
                ".." => {}
                segment => segments.push(segment),
            }
        }
        let path = Path::parse(segments.join("/")).map_err(|error| fault(error.to_string()))?;
        Ok(Self { path, size: None, ..self.clone() })
    }

    /// Whether the key has what patterns have: `*` or `[`. `?` may be part of a key.
    pub(super) fn is_pattern(&self) -> bool {
        self.path.as_ref().contains(['*', '['])
    }

    /// The objects whose keys match this one's, by key; `**` stands for any folders.
    pub(super) fn matching(&self) -> io::Result<Vec<Self>> {
        let key = self.path.as_ref();
        let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidInput, reason);
        let pattern = glob::Pattern::new(key).map_err(|error| invalid(error.to_string()))?;
        let head: Vec<&str> = key.split('/').take_while(|segment| !segment.contains(['*', '['])).collect();
        let head = Path::parse(head.join("/")).map_err(|error| invalid(error.to_string()))?;
        let mut found = Self { path: head, size: None, ..self.clone() }.below()?;
        let options = glob::MatchOptions { require_literal_separator: true, ..glob::MatchOptions::new() };
        let fits = |name: &str| pattern.matches_with(name, options) && hidden_parts(name) <= hidden_parts(key);
        found.retain(|object| fits(object.path.as_ref()));
        Ok(found)
    }

    /// Bytes, where a listing told them.
    pub(super) fn size(&self) -> Option<u64> {
        self.size
    }

    /// Every object below this one, by key.
    pub(super) fn below(&self) -> io::Result<Vec<Self>> {
        let mut listing = self.store.list(Some(&self.path));
        let mut found = self.stores.runtime()?.block_on(async {
            let mut found = Vec::new();
            while let Some(meta) = listing.next().await {
                let meta = meta?;
                found.push(Self { path: meta.location, size: Some(meta.size), ..self.clone() });
            }
            Ok::<_, object_store::Error>(found)
        })?;
        found.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(found)
    }

    /// All bytes, or a few more than `limit`.
    pub(super) fn read(&self, limit: u64) -> io::Result<Bytes> {
        self.stores.runtime()?.block_on(async {
            let got = self.store.get(&self.path).await?;
            let bytes = if got.meta.size > limit {
                self.store.get_range(&self.path, 0..limit + 1).await?
            } else {
                got.bytes().await?
            };
            Ok(bytes)
        })
    }

    /// The bytes as they come.
    pub(super) fn open(&self) -> io::Result<ObjectReader> {
        let chunks = self.stores.runtime()?.block_on(self.store.get(&self.path))?.into_stream();
        Ok(ObjectReader { stores: self.stores.clone(), chunks, rest: Bytes::new() })
    }

    /// Bytes that it has.
    #[cfg(feature = "parquet")]
    pub(super) fn len(&self) -> io::Result<u64> {
        Ok(self.stores.runtime()?.block_on(self.store.head(&self.path))?.size)
    }

    /// Some of its bytes.
    #[cfg(feature = "parquet")]
    pub(super) fn range(&self, range: std::ops::Range<u64>) -> io::Result<Bytes> {
        Ok(self.stores.runtime()?.block_on(self.store.get_range(&self.path, range))?)
    }
}

/// An object's bytes as they come.
pub(super) struct ObjectReader {
    stores: Stores,
    chunks: BoxStream<'static, object_store::Result<Bytes>>,
    rest: Bytes,
}

impl Read for ObjectReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.rest.is_empty() {
            match self.stores.runtime()?.block_on(self.chunks.next()) {
                Some(chunk) => self.rest = chunk?,
                None => return Ok(0),
            }
        }
        let n = buffer.len().min(self.rest.len());
        buffer[..n].copy_from_slice(&self.rest.split_to(n));
        Ok(n)
    }
}
