//! Which of a file's tensors are the network's: one set of weights, by the names that the architectures know, whatever
//! wrappers training put around them.
//!
//! A dictionary within a dictionary and a prefix of names are the same here: both say where a network begins. It begins
//! where its first stage does.

use std::collections::{BTreeMap, BTreeSet};

use super::FoldError;
use super::names::{
    CLASSIFIERS, FIGURES, MOMENTS, NOT_WEIGHTS, PROJECTIONS, QUANTIZED, SCALES, TRAINING_ONLY, WRAPPERS, canonical,
    shared, words,
};
use super::roots::{name_of, root, roots};
use super::torch::Float;

/// Groups that are listed as left out.
const LISTED: usize = 20;

/// A tensor in a file.
#[derive(Debug, Clone)]
pub(super) struct Entry<P> {
    /// The dictionaries that it lies in, the outermost first.
    pub(super) dictionary: Vec<String>,
    /// Its name in the innermost.
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) content: Content<P>,
}

/// What a tensor's elements are.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Content<P> {
    /// Floats, and where they lie.
    Float(Float, P),
    /// Something else: whole numbers, or a kind of tensor that is no weight.
    Other(String),
    /// No tensor: what it is.
    Plain(&'static str),
}

impl<P> Entry<P> {
    /// Where it stands in the file: dictionaries and name in one.
    fn full(&self) -> String {
        self.dictionary.iter().chain([&self.name]).map(String::as_str).collect::<Vec<_>>().join(".")
    }

    /// Whether it is what an optimizer or the like remembers.
    pub(super) fn is_remembered(&self) -> bool {
        let first = self.dictionary.first().map(String::as_str).unwrap_or_default();
        NOT_WEIGHTS.contains(&first) || MOMENTS.contains(&self.name.as_str())
    }
}

/// What the user says of the choice.
#[derive(Debug, Clone, Default)]
pub struct Choice {
    /// The set of weights, by its dictionary or prefix; `.` is the one without.
    pub weights: Option<String>,
    /// The module that gives the logits, by its name.
    pub classifier: Option<String>,
    /// What the network does not need, by the beginnings of names.
    pub ignore: Vec<String>,
}

/// The tensors of one network.
#[derive(Debug, Default)]
pub(super) struct Chosen {
    /// Name as architectures have it → number of the entry.
    pub(super) tensors: BTreeMap<String, usize>,
    /// Where the network begins, where that is not the file's own top.
    pub(super) root: Option<String>,
    /// What the file holds besides.
    pub(super) left_out: Vec<String>,
    /// What of it stands among the network's own tensors.
    pub(super) idle: Vec<String>,
    /// Classifiers that the names may mean: for whom the one that is looked for is missing.
    pub(super) likely_classifiers: Vec<String>,
    /// Tensors that have a place and no floats: name as architectures have it → kind.
    pub(super) unread: BTreeMap<String, String>,
    /// Whether the classifier is named as classifier-balancing's cosine is.
    pub(super) is_cosine: bool,
}

/// Chooses the tensors of one network.
///
/// # Errors
/// When there are several and `choice` does not say which, when it names one that is not there, or when a tensor's kind
/// says that the network was changed for inference.
pub(super) fn choose<P>(entries: &[Entry<P>], choice: &Choice) -> Result<Chosen, FoldError> {
    let names: Vec<String> = entries.iter().map(Entry::full).collect();
    let quantized =
        |entry: &Entry<P>| matches!(&entry.content, Content::Other(kind) if QUANTIZED.contains(&kind.as_str()));
    if let Some(at) = entries.iter().position(quantized) {
        return Err(FoldError::Quantized { name: names[at].clone() });
    }
    let root = root(entries, &names, choice)?;
    let others: BTreeSet<String> =
        roots(entries, &names).into_iter().filter(|other| Some(other) != root.as_ref()).collect();
    let root = root.unwrap_or_default();
    let mut set =
        Set { entries, names: &names, root: &root, others: &others, own: BTreeMap::new(), related: BTreeSet::new() };
    for (n, name) in names.iter().enumerate() {
        let nearest = others.iter().map(|other| shared(name, other)).max();
        if !others.iter().any(|other| other.len() > root.len() && name.starts_with(other.as_str()))
            && let Some(rest) = name.strip_prefix(&root)
        {
            set.own.insert(n, canonical(rest));
        } else if shared(name, &root) >= nearest.unwrap_or(0)
            && !others.iter().any(|other| name.starts_with(other.as_str()))
            && !entries[n].is_remembered()
        {
            set.related.insert(n);
        }
    }
    let mut found = Chosen { root: Some(name_of(&root)).filter(|_| !root.is_empty()), ..Chosen::default() };
    let layers = set.layers();
    let classifier = set.classifier(&layers, choice, &mut found)?;
    let projections = set.projections(&layers, classifier.as_ref());
    // Dictionaries that the network lies in.
    let dictionaries: BTreeSet<&[String]> = set
        .own
        .keys()
        .chain(classifier.iter().flat_map(|c| &c.tensors))
        .filter(|&&n| set.is_stage(n) || classifier.as_ref().is_some_and(|c| c.tensors.contains(&n)))
        .map(|&n| entries[n].dictionary.as_slice())
        .collect();
    let mut unused: BTreeSet<&str> = choice.ignore.iter().map(String::as_str).collect();
    let (mut left, mut idle): (Vec<usize>, Vec<usize>) = (Vec::new(), Vec::new());
    for (n, entry) in entries.iter().enumerate() {
        let name = &names[n];
        if name.ends_with("num_batches_tracked") {
            continue;
        }
        let place = set.place(n, classifier.as_ref());
        let below = name.strip_prefix(&root).unwrap_or(name);
        let ignored =
            choice.ignore.iter().find(|i| [name, &entry.name, below].iter().any(|n| n.starts_with(i.as_str())));
        if let Some(ignored) = ignored {
            unused.remove(ignored.as_str());
        }
        let is_float = matches!(entry.content, Content::Float(..));
        if let (false, None, Some(place)) = (is_float, ignored, place.as_ref().filter(|place| place.contains('.'))) {
            let kind = match &entry.content {
                Content::Other(kind) => kind.as_str(),
                Content::Plain(kind) => *kind,
                Content::Float(..) => "",
            };
            found.unread.insert(place.clone(), kind.to_owned());
        }
        let among = dictionaries.contains(entry.dictionary.as_slice())
            && (set.own.contains_key(&n) || set.related.contains(&n));
        let word_of = |words_of: &[&str]| words(below).any(|word| words_of.contains(&word));
        let in_classifier = classifier.as_ref().is_some_and(|c| c.tensors.contains(&n));
        let needless = match () {
            () if ignored.is_some() => true,
            () if !is_float => true,
            () if in_classifier || set.is_stage(n) => false,
            () if !set.own.contains_key(&n) && !set.related.contains(&n) => true,
            () if word_of(&TRAINING_ONLY) || projections.iter().any(|prefix| name.starts_with(prefix.as_str())) => true,
            // A number that training wrote down.
            () if !among => {
                let last = entry.name.to_ascii_lowercase();
                entry.shape.iter().product::<usize>() == 1 && FIGURES.iter().any(|figure| last.contains(figure))
            }
            () => false,
        };
        match place {
            _ if needless && matches!(entry.content, Content::Plain(_)) => {}
            _ if needless && among => idle.push(n),
            _ if needless => left.push(n),
            // Strictly: whatever may belong to the network has a place, or is refused by its name.
            place => {
                let place = place.unwrap_or_else(|| name.clone());
                if let Some(other) = found.tensors.insert(place, n) {
                    return Err(FoldError::OnePlace { first: names[other].clone(), second: name.clone() });
                }
            }
        }
    }
    if let Some(unused) = unused.into_iter().next() {
        return Err(FoldError::Input(format!("--ignore {unused}: no tensor's name begins so")));
    }
    let prefixes: Vec<&str> = others.iter().chain(&projections).map(String::as_str).collect();
    found.idle = summary(&names, &idle, entries, &prefixes);
    found.left_out = summary(&names, &left, entries, &prefixes);
    Ok(found)
}

/// A network's tensors in a file.
struct Set<'a, P> {
    entries: &'a [Entry<P>],
    names: &'a [String],
    root: &'a str,
    /// Where other networks in the file begin.
    others: &'a BTreeSet<String>,
    /// Under the root, by the names of architectures.
    own: BTreeMap<usize, String>,
    /// What else belongs to it.
    related: BTreeSet<usize>,
}

/// A module that has a matrix of weights, outside of the stages.
#[derive(Debug)]
struct Linear {
    /// Its name in the file, with a dot behind it.
    prefix: String,
    /// Rows and columns of its matrix.
    shape: [usize; 2],
    has_bias: bool,
}

/// The layer that gives the logits.
#[derive(Debug)]
struct Classifier {
    /// Its name in the file, with a dot behind it.
    prefix: String,
    /// Its tensors, and the factors of its outputs.
    tensors: BTreeSet<usize>,
    /// What it takes and gives.
    features: usize,
    classes: usize,
}

impl Linear {
    fn module(&self) -> &str {
        self.prefix.trim_end_matches('.')
    }

    /// The row of layers that it is one of, with a dot behind it.
    fn row(&self) -> Option<&str> {
        let (row, number) = self.module().rsplit_once('.')?;
        number.parse::<usize>().ok().map(|_| &self.prefix[..=row.len()])
    }
}

impl<P> Set<'_, P> {
    fn is_stage(&self, n: usize) -> bool {
        self.own.get(&n).is_some_and(|name| name.starts_with("layer"))
    }

    fn is_expert(&self, n: usize) -> bool {
        self.own.get(&n).is_some_and(|name| name.starts_with("linears."))
    }

    /// Whether what is named so may as well belong to another network in the file.
    fn is_shared(&self, name: &str) -> bool {
        let near = shared(name, self.root);
        !name.starts_with(self.root) && self.others.iter().any(|other| shared(name, other) >= near)
    }

    /// Tensors that may be of the classifier.
    fn region(&self) -> impl Iterator<Item = usize> {
        let own = self.own.keys().copied().filter(|&n| !self.is_stage(n) && !self.is_expert(n));
        own.chain(self.related.iter().copied())
    }

    fn layers(&self) -> Vec<Linear> {
        let all: BTreeSet<&str> = self.names.iter().map(String::as_str).collect();
        let layer = |n: usize| {
            let name = &self.names[n];
            let suffixes = ["weight", "weight_v", "parametrizations.weight.original1"];
            let prefix = suffixes.iter().find_map(|suffix| name.strip_suffix(suffix))?;
            let ([a, b], Content::Float(..)) = (&self.entries[n].shape[..], &self.entries[n].content) else {
                return None;
            };
            let has_bias = all.contains(format!("{prefix}bias").as_str());
            (!prefix.is_empty()).then(|| Linear { prefix: prefix.to_owned(), shape: [*a, *b], has_bias })
        };
        self.region().filter_map(layer).collect()
    }

    /// The last word of a layer's name that is not a number or a wrapper.
    fn last_word<'b>(&self, layer: &'b Linear) -> &'b str {
        let own = |word: &&str| !word.is_empty() && !WRAPPERS.contains(word) && word.parse::<usize>().is_err();
        words(layer.prefix.strip_prefix(self.root).unwrap_or(&layer.prefix)).rfind(own).unwrap_or_default()
    }

    fn classifier(
        &self,
        layers: &[Linear],
        choice: &Choice,
        found: &mut Chosen,
    ) -> Result<Option<Classifier>, FoldError> {
        if self.own.keys().any(|&n| self.is_expert(n)) && choice.classifier.is_none() {
            return Ok(None);
        }
        let features = self.features();
        let rows = rows(layers);
        let fits = |layer: &&Linear| {
            let [a, b] = layer.shape;
            features.is_none_or(|features| b == features || (a == features && !layer.has_bias))
        };
        let usable = |layer: &&Linear| {
            let below = layer.prefix.strip_prefix(self.root).unwrap_or(&layer.prefix);
            let training = |word: &str| TRAINING_ONLY.contains(&word) || PROJECTIONS.contains(&word);
            !words(below).any(training) && !layer.row().is_some_and(|row| rows.contains(row))
        };
        // A row of a network and its classifier has no words at all.
        let is_known = |layer: &&Linear| {
            let word = self.last_word(layer);
            CLASSIFIERS.contains(&word) || (word.is_empty() && !layer.prefix.starts_with(self.root))
        };
        let chosen = match &choice.classifier {
            Some(asked) => {
                let asked = asked.trim_end_matches('.');
                let is_asked = |layer: &&Linear| {
                    let name = layer.module();
                    let own =
                        name.strip_prefix(self.root.trim_end_matches('.')).map(|rest| rest.trim_start_matches('.'));
                    name == asked || own == Some(asked) || name.ends_with(&format!(".{asked}"))
                };
                let there = || layers.iter().map(|layer| layer.module().to_owned()).collect();
                let asked_for = layers.iter().find(is_asked);
                Some(asked_for.ok_or_else(|| FoldError::NoSuchClassifier {
                    asked: asked.chars().take(100).collect(),
                    there: there(),
                })?)
            }
            None => {
                let known: Vec<&Linear> = layers.iter().filter(usable).filter(is_known).collect();
                let several = |of: &[&Linear]| {
                    let names = of.iter().map(|layer| layer.module().to_owned()).collect();
                    Err(FoldError::SeveralClassifiers { names })
                };
                match known.as_slice() {
                    // Another network's, as likely as this one's.
                    [one] if self.is_shared(&one.prefix) => return several(&[one]),
                    // By its name alone: what does not fit is refused by its shape.
                    [one] => Some(*one),
                    [] => None,
                    // One may take what another gives.
                    known => return several(known),
                }
            }
        };
        let Some(chosen) = chosen else {
            let likely = layers.iter().filter(usable).filter(fits);
            found.likely_classifiers = likely.map(|layer| layer.module().to_owned()).collect();
            return Ok(None);
        };
        let [a, b] = chosen.shape;
        let turned = features == Some(a) && features != Some(b);
        let (classes, takes) = if turned { (b, a) } else { (a, b) };
        let is_factor = |n: &usize| {
            let last = words(&self.names[*n]).next_back().unwrap_or_default();
            SCALES.contains(&last) && matches!(self.entries[*n].content, Content::Plain(_) | Content::Other(_))
                || SCALES.contains(&last) && self.entries[*n].shape.iter().product::<usize>() == classes
        };
        let within: BTreeSet<usize> = self.region().filter(|n| self.names[*n].starts_with(&chosen.prefix)).collect();
        found.is_cosine = words(self.root).any(|word| word == "feat_model")
            && !chosen.has_bias
            && within.iter().all(|&n| {
                let entry = &self.entries[n];
                entry.dictionary.last().is_some_and(|d| d == "classifier") && !entry.name.contains("fc.")
            });
        let tensors = within.into_iter().chain(self.region().filter(is_factor)).collect();
        Ok(Some(Classifier { prefix: chosen.prefix.clone(), tensors, features: takes, classes }))
    }

    /// Prefixes of layers behind the features that cannot act on the logits, since what they give fits neither the
    /// classifier nor the classes: the projections of contrastive training.
    fn projections(&self, layers: &[Linear], classifier: Option<&Classifier>) -> Vec<String> {
        let Some(classifier) = classifier else { return Vec::new() };
        let rows = rows(layers);
        let acts = |width: usize| width == classifier.features || width == classifier.classes;
        let of_row = |row: &&str| {
            let within: Vec<&Linear> = layers.iter().filter(|layer| layer.row() == Some(*row)).collect();
            // One feeds the next: a row of alternatives is none.
            let chained = within.windows(2).all(|pair| pair[0].shape[0] == pair[1].shape[1]);
            chained && within.last().is_some_and(|last| !acts(last.shape[0])) && *row != classifier.prefix
        };
        let alone = |layer: &&Linear| {
            let word = self.last_word(layer);
            PROJECTIONS.contains(&word) && !acts(layer.shape[0]) && layer.row().is_none_or(|row| !rows.contains(row))
        };
        let alone = layers.iter().filter(alone).map(|layer| layer.prefix.clone());
        rows.iter().copied().filter(of_row).map(str::to_owned).chain(alone).collect()
    }

    /// The name of tensor `n` as architectures have it, if they have one.
    fn place(&self, n: usize, classifier: Option<&Classifier>) -> Option<String> {
        let name = &self.names[n];
        if let Some(classifier) = classifier.filter(|classifier| classifier.tensors.contains(&n)) {
            return Some(match name.strip_prefix(&classifier.prefix).unwrap_or("scales") {
                "parametrizations.weight.original0" => "fc.weight_g".into(),
                "parametrizations.weight.original1" => "fc.weight_v".into(),
                rest => format!("fc.{rest}"),
            });
        }
        if let Some(own) = self.own.get(&n) {
            // Another layer than the classifier does not take its place.
            return (classifier.is_none() || !own.starts_with("fc."))
                .then(|| own.clone())
                .or_else(|| Some(name.clone()));
        }
        let key = super::super::architecture::SCALE_FACTOR;
        (self.related.contains(&n) && words(name).next_back() == Some(key)).then(|| key.to_owned())
    }

    /// Channels of the last stage, which its last norm tells.
    fn features(&self) -> Option<usize> {
        let place = |name: &str| {
            let mut parts = words(name.strip_prefix("layer")?.strip_suffix(".running_mean")?);
            let number = |text: &str| text.parse::<usize>().ok();
            let (stage, block) = (number(parts.next()?)?, number(parts.next()?)?);
            Some((stage, block, number(parts.next()?.strip_prefix("bn")?)?))
        };
        let norms = self.own.iter().filter_map(|(n, name)| Some((place(name)?, *n)));
        norms.max().and_then(|(_, n)| self.entries[n].shape.first().copied())
    }
}

/// Rows of at least two layers, by their prefixes.
fn rows(layers: &[Linear]) -> BTreeSet<&str> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    layers.iter().filter_map(Linear::row).for_each(|row| *counts.entry(row).or_default() += 1);
    counts.into_iter().filter(|(_, count)| *count > 1).map(|(row, _)| row).collect()
}

/// What is left out, a few words for each group: another network, a dictionary that holds none, a copy or a projection that
/// training alone needs. `whole` are prefixes of what is told as one.
fn summary<P>(names: &[String], left: &[usize], entries: &[Entry<P>], whole: &[&str]) -> Vec<String> {
    let group = |n: usize| {
        let name = names[n].as_str();
        if let Some(first) = entries[n].dictionary.first().filter(|_| entries[n].is_remembered()) {
            return first.clone();
        }
        // The longest, since one network's names may begin as another's.
        if let Some(prefix) = whole.iter().filter(|prefix| name.starts_with(**prefix)).max_by_key(|prefix| prefix.len())
        {
            return if prefix.is_empty() { "names without a prefix".to_owned() } else { name_of(prefix) };
        }
        let parts: Vec<&str> = words(name).collect();
        match parts.iter().position(|word| TRAINING_ONLY.contains(word)) {
            Some(at) => parts[..=at].join("."),
            None => parts[..parts.len().saturating_sub(1).max(1)].join("."),
        }
    };
    let mut groups: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    left.iter().for_each(|&n| groups.entry(group(n)).or_default().push(n));
    let told = |(group, tensors): (String, Vec<usize>)| match tensors.as_slice() {
        [one] => match (&entries[*one].content, entries[*one].shape.as_slice()) {
            (_, []) => format!("{} (a number)", names[*one]),
            (Content::Other(kind), shape) => format!("{} ({kind} {shape:?})", names[*one]),
            (_, shape) => format!("{} ({shape:?})", names[*one]),
        },
        several => format!("{group} ({} tensors)", several.len()),
    };
    let more = groups.len().saturating_sub(LISTED);
    let mut told: Vec<String> = groups.into_iter().take(LISTED).map(told).collect();
    if more > 0 {
        told.push(format!("and {more} more"));
    }
    told
}
