//! The images of a training run, looked at before it begins: those that cannot be decoded, and those that two sets share.

use std::collections::HashMap;

use anyhow::ensure;
use nbn::bundle::Exif;
use nbn::data::{Checked, LabelledImages, PixelHash, check_pictures};
use nbn::tell;

use super::super::dataset::bar;

/// Images that an error names.
const NAMED: usize = 20;

/// Decodes all images of a set, which `what` calls it. Of those that cannot be decoded it gives the records, and the hashes of
/// the others' pixels.
///
/// # Errors
/// When there are some that cannot be decoded and they are not to be left out; names them.
pub(super) fn checked(skip_broken: bool, images: &LabelledImages, what: &str, exif: Exif) -> anyhow::Result<Checked> {
    let bar = bar(images.len(), "checking");
    let checked = check_pictures(images, exif, &|| bar.inc(1))?;
    bar.finish_and_clear();
    let broken = &checked.broken;
    let listed = |of: &[&(usize, String)]| {
        let one = |(record, reason): &&(usize, String)| format!("  {}: {reason}", images.name(*record));
        let more = (of.len() > NAMED).then(|| format!("  and {} more", of.len() - NAMED));
        of.iter().take(NAMED).map(one).chain(more).collect::<Vec<_>>().join("\n")
    };
    if broken.is_empty() {
        return Ok(checked);
    }
    let (count, total) = (broken.len(), images.len());
    // Another day they may be there: a run without them would not be the one that was asked for.
    let missing: Vec<&(usize, String)> = broken.iter().filter(|(record, _)| !images.is_readable(*record)).collect();
    ensure!(
        missing.is_empty(),
        "{} of {total} {what} are missing or may not be read, which --skip-broken does not pass over: is a disk \
         mounted, do links lead somewhere?\n{}",
        missing.len(),
        listed(&missing)
    );
    ensure!(
        skip_broken,
        "{count} of {total} {what} cannot be decoded: repair or remove them, or go on without them by --skip-broken\n{}",
        listed(&broken.iter().collect::<Vec<_>>())
    );
    tell!("left out    {count} of {total} {what}, which cannot be decoded");
    Ok(checked)
}

/// What is left out, for the run's list.
pub(super) fn list_of(broken: &[(usize, String)], images: &LabelledImages) -> Vec<serde_json::Value> {
    let one = |(record, reason): &(usize, String)| serde_json::json!({"record": record, "image": images.name(*record), "reason": reason});
    broken.iter().map(one).collect()
}

/// Warns of images, which `what` calls, that have the pixels of one that is trained on.
pub(super) fn warn_of_shared(
    what: &str,
    (images, hashes): (&LabelledImages, &[Option<PixelHash>]),
    (training, seen): (&LabelledImages, &HashMap<PixelHash, usize>),
    advice: &str,
) {
    let same = |hash: &Option<PixelHash>| seen.get(hash.as_ref()?).copied();
    let shared: Vec<(usize, usize)> =
        hashes.iter().enumerate().filter_map(|(n, hash)| Some((n, same(hash)?))).collect();
    if let Some((first, of)) = shared.first() {
        tell!(
            "warning: {} of {} {what} have the pixels of one that is trained on, such as {} those of {}: {advice}",
            shared.len(),
            hashes.len(),
            images.name(*first),
            training.name(*of)
        );
    }
}
