//! Images that belong together: frames of one track, pictures of one object, camera or patient.
//!
//! A network has seen what it is asked about when some of a group are trained on and others held out: its accuracy and its
//! scores then look better than they are. Splits that know the groups keep each on one side.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use fastrand::Rng;
use regex_lite::Regex;

use super::source::content;
use super::{DataError, LabelledImages, Split};

/// What tells which images belong together.
#[derive(Debug, Clone)]
pub enum GroupBy {
    /// Nothing: each image is by itself.
    Apart,
    /// The folder that an image lies in, unless a table has a column of that name.
    Folder,
    /// A table's column of this name; else the part of an image's path within the set that the expression's first group
    /// matches, all that it matches where it has no group.
    Text(String, Result<Regex, String>),
}

impl FromStr for GroupBy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "none" => return Ok(Self::Apart),
            "folder" => return Ok(Self::Folder),
            _ => {}
        }
        if text.is_empty() {
            return Err(
                "expected folder, a column's name, or a regular expression that is looked for in each path".into()
            );
        }
        // A column's name need not be an expression.
        Ok(Self::Text(text.to_owned(), Regex::new(text).map_err(|error| error.to_string())))
    }
}

impl fmt::Display for GroupBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Apart => f.write_str("none"),
            Self::Folder => f.write_str("folder"),
            Self::Text(text, _) => f.write_str(text),
        }
    }
}

impl GroupBy {
    /// By the image's path.
    fn key(&self, id: &str) -> Option<String> {
        match self {
            Self::Apart => Some(id.to_owned()),
            Self::Folder => Some(Path::new(id).parent()?.display().to_string()),
            Self::Text(_, regex) => {
                let found = regex.as_ref().ok()?.captures(id)?;
                found.get(usize::from(found.len() > 1)).map(|part| part.as_str().to_owned())
            }
        }
    }

    /// The key of each image, as far as it has one.
    fn keys(&self, images: &LabelledImages) -> Vec<Option<String>> {
        let named = match self {
            Self::Apart => None,
            _ => images.columns().and_then(|columns| columns.column(&self.to_string())),
        };
        match named {
            Some(column) => column.map(|value| (!value.is_empty()).then(|| value.to_owned())).collect(),
            None => (0..images.len()).map(|index| self.key(&images.id(index))).collect(),
        }
    }

    /// The group of each of the `images`, numbered in the order in which they are met.
    ///
    /// # Errors
    /// When the images have no paths, or an image belongs to no group.
    pub fn groups(&self, images: &LabelledImages) -> Result<Vec<usize>, DataError> {
        let refuse = |reason: String| Err(content(images.origin(), &format!("--group-by {self}: {reason}")));
        if images.are_in_one_file() {
            return refuse("its images have no paths: --group-by is for folders, lists and tables of images".into());
        }
        let has_column = |text: &str| images.columns().is_some_and(|columns| columns.column(text).is_some());
        if let Self::Text(text, Err(error)) = self
            && !has_column(text)
        {
            return refuse(format!("it is neither a column of the set nor a regular expression: {error}"));
        }
        let keys = self.keys(images);
        if let Some(first) = keys.iter().position(Option::is_none) {
            let (found, all) = (keys.iter().filter(|key| key.is_none()).count(), images.len());
            if matches!(self, Self::Text(text, _) if has_column(text)) {
                let reason = format!("the column is empty for {found} of {all} images, such as {}", images.id(first));
                return refuse(reason);
            }
            let hint = match images.columns() {
                Some(columns) => format!("; the columns of the table are {}", columns.names()),
                None => "; as a regular expression it is looked for in each path".into(),
            };
            return refuse(format!("{found} of {all} paths do not match, such as {}{hint}", images.id(first)));
        }
        let mut numbers = HashMap::new();
        let mut groups = Vec::with_capacity(images.len());
        for key in keys.into_iter().flatten() {
            let next = numbers.len();
            groups.push(*numbers.entry(key).or_insert(next));
        }
        Ok(groups)
    }
}

/// Holds about `fraction` of each class out, in whole `groups` (one for each image of the set), drawn with `seed`. The rarest
/// class chooses first. Each class keeps an image to train on; one whose images are all of a single group is
/// [alone](Split::alone).
///
/// # Errors
/// Names a class that is empty, or says that nothing can be held out.
pub fn hold_out_groups(
    labels: &[u32],
    records: &[usize],
    names: &[String],
    groups: &[usize],
    fraction: f64,
    seed: u64,
) -> Result<Split, String> {
    let mut members: BTreeMap<usize, BTreeMap<usize, usize>> = BTreeMap::new();
    let mut totals = vec![0; names.len()];
    for &record in records {
        let class = labels[record] as usize;
        *members.entry(groups[record]).or_default().entry(class).or_default() += 1;
        totals[class] += 1;
    }
    if let Some(k) = totals.iter().position(|&n| n == 0) {
        return Err(format!(
            "class {k} ({}) has no images that can be decoded: add some, or remove the class",
            names[k]
        ));
    }
    let share = |k: usize| if fraction > 0.0 { ((totals[k] as f64 * fraction).round() as usize).max(1) } else { 0 };
    let mut held = vec![0; names.len()];
    let mut chosen = std::collections::BTreeSet::new();
    let mut by_rarity: Vec<usize> = (0..names.len()).collect();
    by_rarity.sort_by_key(|&k| totals[k]);
    let mut rng = Rng::with_seed(seed);
    for k in by_rarity {
        let mut of_class: Vec<usize> = members.iter().filter(|(_, m)| m.contains_key(&k)).map(|(g, _)| *g).collect();
        rng.shuffle(&mut of_class);
        let size = |group: &usize| members[group].values().sum::<usize>();
        // A group that would hold out much more than is wanted is taken only when there is no other.
        let fits = |group: &usize, held: &[usize], most: &dyn Fn(usize) -> usize| {
            members[group].iter().all(|(&class, n)| held[class] + n <= most(class).min(totals[class] - 1))
        };
        let mut take = |group: usize, held: &mut Vec<usize>| {
            members[&group].iter().for_each(|(&class, n)| held[class] += n);
            chosen.insert(group);
        };
        for &group in &of_class {
            let left = share(k).saturating_sub(held[k]);
            if left > 0 && members[&group][&k] <= left.max(1) * 3 / 2 && fits(&group, &held, &|class| 2 * share(class))
            {
                take(group, &mut held);
            }
        }
        if share(k) > 0 && held[k] == 0 {
            of_class.sort_by_key(size);
            if let Some(&group) = of_class.iter().find(|group| fits(group, &held, &|_| usize::MAX)) {
                take(group, &mut held);
            }
        }
    }
    let alone: Vec<usize> = (0..names.len()).filter(|&k| share(k) > 0 && held[k] == 0).collect();
    if alone.len() == names.len() {
        return Err(
            "nothing can be held out in whole groups: in every class, all images are of one group (for --group-by \
                    folder, each object has a folder of its own: SET/LABEL/OBJECT/image.jpg)"
                .into(),
        );
    }
    let (held_out, training) = records.iter().partition(|&&record| chosen.contains(&groups[record]));
    Ok(Split { training, held_out, alone })
}
