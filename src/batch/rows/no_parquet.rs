//! In place of `parquet` in builds without that feature.

use std::convert::Infallible;
use std::fs::File;
use std::marker::PhantomData;

use super::{Form, Row, WriteError};
use crate::features::Feature;

/// Parquet, which this build does not write.
pub struct Parquet<'a, W> {
    never: Infallible,
    form: PhantomData<(Form<'a>, W)>,
}

impl<'a, W> Parquet<'a, W> {
    pub(super) fn new(_: W, _: Form<'a>) -> Result<Self, WriteError> {
        Err(WriteError::Form(missing()))
    }

    pub(super) fn write(&mut self, _: &Row) -> Result<(), WriteError> {
        match self.never {}
    }

    pub(super) fn finish(&mut self) -> Result<(), WriteError> {
        match self.never {}
    }

    pub(super) fn into_inner(self) -> Result<W, WriteError> {
        let _: PhantomData<_> = self.form;
        match self.never {}
    }
}

pub(in super::super) fn keys(_: File, _: impl FnMut(&str)) -> Result<(), String> {
    Err(missing())
}

fn missing() -> String {
    Feature::Parquet.missing("--format parquet").to_string()
}
