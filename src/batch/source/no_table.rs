//! In place of `table` in builds without the feature `parquet`.

use super::{Place, Source, SourceError, SourceOptions};
use crate::features::Feature;

pub(super) fn open(place: Place, _: &SourceOptions) -> Result<Source, SourceError> {
    Err(Feature::Parquet.missing(place.name()).into())
}
