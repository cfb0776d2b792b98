//! In place of `objects` in builds without the feature `object-stores`.

use std::fmt;
use std::io::{self, Empty};

use bytes::Bytes;

use super::{Fault, cut};
use crate::features::Feature;

/// Object stores, of which this build has none.
#[derive(Debug, Clone, Default)]
pub struct Stores(());

impl Stores {
    /// The object that `url` names: it cannot be had.
    pub(super) fn object(&self, url: &str) -> Result<Object, Fault> {
        Err(Fault::new("url", Feature::ObjectStores.missing(cut(url)).to_string()))
    }
}

/// An object in a store.
#[derive(Debug, Clone)]
pub(in super::super) enum Object {}

impl fmt::Display for Object {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {}
    }
}

impl Object {
    pub(super) fn sibling(&self, _: &str) -> Result<Self, Fault> {
        match *self {}
    }

    pub(super) fn is_pattern(&self) -> bool {
        match *self {}
    }

    pub(super) fn matching(&self) -> io::Result<Vec<Self>> {
        match *self {}
    }

    pub(super) fn size(&self) -> Option<u64> {
        match *self {}
    }

    pub(super) fn below(&self) -> io::Result<Vec<Self>> {
        match *self {}
    }

    pub(super) fn read(&self, _: u64) -> io::Result<Bytes> {
        match *self {}
    }

    #[cfg(feature = "parquet")]
    pub(super) fn len(&self) -> io::Result<u64> {
        match *self {}
    }

    #[cfg(feature = "parquet")]
    pub(super) fn range(&self, _: std::ops::Range<u64>) -> io::Result<Bytes> {
        match *self {}
    }

    pub(super) fn open(&self) -> io::Result<Empty> {
        match *self {}
    }
}
