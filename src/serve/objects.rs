//! Structs from JSON objects only: serde would take a list of their fields' values, too, which no document describes.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, de};

use super::cut;

struct Object<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Object<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map))
    }
}

impl<'de, T: Deserialize<'de>> DeserializeSeed<'de> for Object<T> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<T> Clone for Object<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Object<T> {}

/// Elements of a list in a request's JSON. A body of two bytes an element would take many times its size otherwise.
pub(crate) const MAX_ELEMENTS: usize = 100_000;

/// Refuses one element more than `before` when those are [`MAX_ELEMENTS`].
pub(crate) fn few<E: de::Error>(before: usize) -> Result<(), E> {
    if before < MAX_ELEMENTS { Ok(()) } else { Err(E::custom(format!("more than {MAX_ELEMENTS} elements"))) }
}

/// A list of at most [`MAX_ELEMENTS`], each read by a copy of the seed.
struct Few<S> {
    each: S,
    expected: &'static str,
}

impl<'de, S: DeserializeSeed<'de> + Copy> Visitor<'de> for Few<S> {
    type Value = Vec<S::Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut all = Vec::new();
        while let Some(one) = list.next_element_seed(self.each)? {
            few(all.len())?;
            all.push(one);
        }
        Ok(all)
    }
}

/// For a field that is a list, of at most [`MAX_ELEMENTS`].
pub(crate) fn list<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    deserializer.deserialize_seq(Few { each: PhantomData, expected: "a list" })
}

/// For a field that is an object.
pub(crate) fn object<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    Object(PhantomData).deserialize(deserializer)
}

/// For a field that is a list of objects, of at most [`MAX_ELEMENTS`].
pub(crate) fn objects<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    deserializer.deserialize_seq(Few { each: Object(PhantomData), expected: "a list of objects" })
}

/// Why a document does not fit, with the client's values cut.
pub(crate) fn reason(error: &serde_json::Error) -> String {
    cut::sentence(&error.to_string())
}

/// A whole document that is an object.
pub(crate) fn from_slice<T: de::DeserializeOwned>(bytes: &[u8]) -> serde_json::Result<T> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = object(&mut deserializer)?;
    deserializer.end()?;
    Ok(value)
}
