//! Which of a file's tensors are the network's: one set of weights, by the names that the architectures know, whatever
//! wrappers training put around them.
//!
//! A dictionary within a dictionary and a prefix of names are the same here: both say where a network begins. It begins
//! where its first stage does.

use std::collections::{BTreeMap, BTreeSet};

use super::FoldError;
use super::torch::Float;

/// Words of wrappers, which say nothing of what they hold.
const WRAPPERS: [&str; 9] =
    ["module", "model", "net", "network", "_orig_mod", "_fsdp_wrapped_module", "state_dict", "backbone", "0"];
/// Words that wrappers of single layers put into the middle of names.
const INNER_WRAPPERS: [&str; 4] = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"];
/// Words that a classifier's name ends in.
const CLASSIFIERS: [&str; 12] = [
    "fc",
    "linear",
    "classifier",
    "head",
    "cls",
    "last_linear",
    "logits",
    "output",
    "clf",
    "fc_out",
    "final",
    "state_dict_classifier",
];
/// Words of what training needs beside the network that is evaluated: momentum copies, projections, queues.
const TRAINING_ONLY: [&str; 16] = [
    "encoder_k",
    "linear_k",
    "fc_k",
    "classifier_k",
    "momentum_encoder",
    "queue",
    "queue_ptr",
    "queue_l",
    "proj",
    "projection",
    "projector",
    "projection_head",
    "predictor",
    "prototypes",
    "centroids",
    "criterion",
];
/// Names of per-class factors that classifiers' outputs are multiplied by, bias included: MiSLAS's and classifier-balancing's
/// learnable weight scaling.
const SCALES: [&str; 2] = ["scales", "learned_norm"];
/// Dictionaries that hold what an optimizer or a loss remembers, under names of tensors, too.
const NOT_WEIGHTS: [&str; 9] = [
    "optimizer",
    "optimizers",
    "optimizer_states",
    "optim",
    "scheduler",
    "lr_scheduler",
    "lr_schedulers",
    "scaler",
    "criterion",
];

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
}

impl<P> Entry<P> {
    /// Where it stands in the file: dictionaries and name in one.
    fn full(&self) -> String {
        self.dictionary.iter().chain([&self.name]).map(String::as_str).collect::<Vec<_>>().join(".")
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
    /// Classifiers that the names may mean: for whom the one that is looked for is missing.
    pub(super) likely_classifiers: Vec<String>,
    /// Tensors that have a place and no floats: name as architectures have it → kind.
    pub(super) unread: BTreeMap<String, String>,
    /// Whether the classifier is named as classifier-balancing's cosine is.
    pub(super) is_cosine: bool,
    /// Prefixes of rows of layers beside the stages.
    rows: Vec<String>,
}

/// Chooses the tensors of one network.
///
/// # Errors
/// When there are several and `choice` does not say which, when it names one that is not there, or when a tensor's kind
/// says that the network was changed for inference.
pub(super) fn choose<P>(entries: &[Entry<P>], choice: &Choice) -> Result<Chosen, FoldError> {
    let names: Vec<String> = entries.iter().map(Entry::full).collect();
    let quantized = |entry: &Entry<P>| {
        let packed = entry.name.contains("_packed_params");
        packed || matches!(&entry.content, Content::Other(kind) if kind.starts_with("q") && kind != "bytes")
    };
    if let Some(at) = entries.iter().position(quantized) {
        return Err(FoldError::Quantized { name: names[at].clone() });
    }
    let root = root(entries, &names, choice)?;
    let others: BTreeSet<String> =
        roots(entries, &names).into_iter().filter(|other| Some(other) != root.as_ref()).collect();
    let root = root.unwrap_or_default();
    let mut found = Chosen { root: Some(name_of(&root)).filter(|_| !root.is_empty()), ..Chosen::default() };
    // Under the root, by the names of architectures; what else belongs to it, by the file's own.
    let mut own: BTreeMap<usize, String> = BTreeMap::new();
    let mut related: Vec<usize> = Vec::new();
    for (n, name) in names.iter().enumerate() {
        if !others.iter().any(|other| other.len() > root.len() && name.starts_with(other.as_str()))
            && let Some(rest) = name.strip_prefix(&root)
        {
            own.insert(n, canonical(rest));
        } else if shared(name, &root) >= others.iter().map(|other| shared(name, other)).max().unwrap_or(0)
            && !others.iter().any(|other| name.starts_with(other.as_str()))
            && !entries[n].dictionary.first().is_some_and(|d| NOT_WEIGHTS.contains(&d.as_str()))
        {
            related.push(n);
        }
    }
    let classifier = classifier(entries, &names, &own, &related, &root, choice, &mut found)?;
    let related_too: BTreeSet<usize> = related.iter().copied().collect();
    let mut left: Vec<usize> = Vec::new();
    let in_network: BTreeSet<&[String]> = own
        .keys()
        .chain(classifier.iter().flat_map(|c| &c.tensors))
        .filter(|&&n| is_stage(&own, n) || classifier.as_ref().is_some_and(|c| c.tensors.contains(&n)))
        .map(|&n| entries[n].dictionary.as_slice())
        .collect();
    for (n, entry) in entries.iter().enumerate() {
        let name = &names[n];
        if name.ends_with("num_batches_tracked") {
            continue;
        }
        let part = classifier.as_ref().and_then(|c| c.part(n, name));
        let place = part.or_else(|| own.get(&n).cloned()).or_else(|| magnitudes(&related, n, name));
        let below = name.strip_prefix(&root).unwrap_or(name);
        let ignored =
            choice.ignore.iter().any(|i| [name.as_str(), &entry.name, below].iter().any(|n| n.starts_with(i.as_str())));
        if let (Content::Other(kind), Some(place)) = (&entry.content, &place) {
            found.unread.insert(place.clone(), kind.clone());
        }
        let needless = ignored
            || matches!(entry.content, Content::Other(_))
            || !(own.contains_key(&n) || related_too.contains(&n))
            || words(name).any(|word| TRAINING_ONLY.contains(&word))
            || !in_network.contains(entry.dictionary.as_slice())
            || (classifier.is_some() && found.is_projection(n, name, &own, classifier.as_ref()));
        match place {
            _ if needless => left.push(n),
            // Strictly: whatever lies in the same dictionary has a place, or is refused by its name.
            place => {
                let place = place.unwrap_or_else(|| name.clone());
                if let Some(other) = found.tensors.insert(place, n) {
                    return Err(FoldError::OnePlace { first: names[other].clone(), second: name.clone() });
                }
            }
        }
    }
    found.left_out = summary(&names, &left, entries, &others, &found.rows);
    Ok(found)
}

/// Every place where a network begins, as a prefix of names.
fn roots<P>(entries: &[Entry<P>], names: &[String]) -> BTreeSet<String> {
    let mut roots: BTreeSet<String> = BTreeSet::new();
    for (entry, name) in entries.iter().zip(names) {
        let remembered = entry.dictionary.first().is_some_and(|d| NOT_WEIGHTS.contains(&d.as_str()));
        if remembered || !matches!(entry.content, Content::Float(..)) {
            continue;
        }
        roots.extend(beginning(name).map(str::to_owned));
    }
    // A momentum copy is no network of its own.
    let copies: Vec<String> = roots
        .iter()
        .filter(|root| {
            let original = root.replace("encoder_k.", "encoder_q.");
            **root != original && roots.contains(&original)
        })
        .cloned()
        .collect();
    roots.retain(|root| !copies.contains(root));
    roots
}

/// The prefix before a network's first stage, or before its stem as Hugging Face names it.
fn beginning(name: &str) -> Option<&str> {
    let at = |word: &str| {
        let starts = name.starts_with(&format!("{word}.")).then_some(0);
        starts.or_else(|| name.find(&format!(".{word}.")).map(|at| at + 1))
    };
    let first = at("layer1").or_else(|| at("encoder.stages.0.layers"));
    first.map(|at| &name[..at])
}

/// Where the network that is asked for begins; `None` where none does.
fn root<P>(entries: &[Entry<P>], names: &[String], choice: &Choice) -> Result<Option<String>, FoldError> {
    let roots = roots(entries, names);
    let listed = || roots.iter().map(|root| name_of(root)).collect::<Vec<_>>();
    let Some(asked) = &choice.weights else {
        if roots.len() > 1 {
            return Err(FoldError::SeveralWeights { sets: listed() });
        }
        return Ok(roots.into_iter().next());
    };
    let asked = if asked == "." { "" } else { asked.trim_end_matches('.') };
    let exact = roots.iter().find(|root| root.trim_end_matches('.') == asked);
    let below: Vec<&String> = roots.iter().filter(|root| !asked.is_empty() && is_under(root, asked)).collect();
    match (exact, below.as_slice()) {
        (Some(root), _) => Ok(Some(root.clone())),
        (None, [root]) => Ok(Some((*root).clone())),
        (None, []) => Err(FoldError::NoSuchWeights { asked: asked.chars().take(100).collect(), sets: listed() }),
        (None, several) => Err(FoldError::SeveralWeights { sets: several.iter().map(|root| name_of(root)).collect() }),
    }
}

/// A root as users name it.
fn name_of(root: &str) -> String {
    if root.is_empty() { ".".into() } else { root.trim_end_matches('.').to_owned() }
}

/// Whether `name` is `prefix`, or lies below it.
fn is_under(name: &str, prefix: &str) -> bool {
    let prefix = prefix.trim_end_matches('.');
    name.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

fn words(name: &str) -> impl DoubleEndedIterator<Item = &str> {
    name.split('.')
}

/// How many words `name` and `root` begin with in common.
fn shared(name: &str, root: &str) -> usize {
    words(name).zip(words(root)).take_while(|(a, b)| a == b).count()
}

/// The name of a network's tensor in torchvision's form, from what follows where the network begins: akamaster's
/// `shortcut` and Hugging Face's names are others for the same places.
fn canonical(name: &str) -> String {
    let parts: Vec<&str> = words(name).filter(|word| !INNER_WRAPPERS.contains(word)).collect();
    match parts.as_slice() {
        ["embedder", "embedder", "convolution", rest @ ..] => format!("conv1.{}", rest.join(".")),
        ["embedder", "embedder", "normalization", rest @ ..] => format!("bn1.{}", rest.join(".")),
        ["encoder", "stages", stage, "layers", block, rest @ ..] => {
            let number = |text: &str| {
                text.parse::<usize>().map_or_else(|_| text.to_owned(), |n| n.saturating_add(1).to_string())
            };
            let block = format!("layer{}.{block}", number(stage));
            match rest {
                ["shortcut", "convolution", rest @ ..] => format!("{block}.downsample.0.{}", rest.join(".")),
                ["shortcut", "normalization", rest @ ..] => format!("{block}.downsample.1.{}", rest.join(".")),
                ["layer", n, "convolution", rest @ ..] => format!("{block}.conv{}.{}", number(n), rest.join(".")),
                ["layer", n, "normalization", rest @ ..] => format!("{block}.bn{}.{}", number(n), rest.join(".")),
                _ => format!("{block}.{}", rest.join(".")),
            }
        }
        [stage, .., "shortcut", _, _] if stage.starts_with("layer") => {
            parts.join(".").replacen(".shortcut.", ".downsample.", 1)
        }
        _ => parts.join("."),
    }
}

fn is_stage(own: &BTreeMap<usize, String>, n: usize) -> bool {
    own.get(&n).is_some_and(|name| name.starts_with("layer"))
}

/// `scale_factor` beside the network, where a wrapper holds both.
fn magnitudes(related: &[usize], n: usize, name: &str) -> Option<String> {
    let key = super::super::architecture::SCALE_FACTOR;
    (related.contains(&n) && words(name).next_back() == Some(key)).then(|| key.to_owned())
}

/// The layer that gives the logits.
#[derive(Debug)]
struct Classifier {
    /// Its name in the file, with a dot behind it.
    prefix: String,
    /// Its tensors, and the factors of its outputs.
    tensors: BTreeSet<usize>,
}

impl Classifier {
    /// The name of its tensor number `n` as architectures have it.
    fn part(&self, n: usize, name: &str) -> Option<String> {
        if !self.tensors.contains(&n) {
            return None;
        }
        let rest = name.strip_prefix(&self.prefix).unwrap_or("scales");
        Some(match rest {
            "parametrizations.weight.original0" => "fc.weight_g".into(),
            "parametrizations.weight.original1" => "fc.weight_v".into(),
            rest => format!("fc.{rest}"),
        })
    }
}

impl Chosen {
    /// Whether tensor `n` is of a row of layers beside the classifier, which contrastive training projects features by.
    fn is_projection(
        &self,
        n: usize,
        name: &str,
        own: &BTreeMap<usize, String>,
        classifier: Option<&Classifier>,
    ) -> bool {
        let is_stem = |name: &String| ["conv1.", "bn1."].iter().any(|stem| name.starts_with(stem));
        if is_stage(own, n) || own.get(&n).is_some_and(is_stem) || classifier.is_some_and(|c| c.tensors.contains(&n)) {
            return false;
        }
        self.rows.iter().any(|row| name.starts_with(row.as_str()))
    }
}

/// Modules that have a matrix of weights, outside of the stages.
struct Candidate {
    prefix: String,
    shape: [usize; 2],
    has_bias: bool,
}

fn classifier<P>(
    entries: &[Entry<P>],
    names: &[String],
    own: &BTreeMap<usize, String>,
    related: &[usize],
    root: &str,
    choice: &Choice,
    found: &mut Chosen,
) -> Result<Option<Classifier>, FoldError> {
    let is_expert = |name: &String| name.starts_with("linears.");
    if own.values().any(is_expert) && choice.classifier.is_none() {
        return Ok(None);
    }
    let outside = |n: &usize| !is_stage(own, *n) && !own.get(n).is_some_and(is_expert);
    let region: Vec<usize> = own.keys().copied().filter(outside).chain(related.iter().copied()).collect();
    let mut candidates: Vec<Candidate> = Vec::new();
    for &n in &region {
        let name = &names[n];
        let suffixes = ["weight", "weight_v", "parametrizations.weight.original1"];
        let prefix = suffixes.iter().find_map(|suffix| name.strip_suffix(suffix));
        let (Some(prefix), [a, b], Content::Float(..)) = (prefix, &entries[n].shape[..], &entries[n].content) else {
            continue;
        };
        if prefix.is_empty() {
            continue;
        }
        let has_bias = names.iter().any(|name| *name == format!("{prefix}bias"));
        candidates.push(Candidate { prefix: prefix.to_owned(), shape: [*a, *b], has_bias });
    }
    // The last word that is not a number or a wrapper.
    let last_word = |candidate: &Candidate| {
        let own = |word: &&str| !word.is_empty() && !WRAPPERS.contains(word) && word.parse::<usize>().is_err();
        let base = candidate.prefix.strip_prefix(root).unwrap_or(&candidate.prefix);
        words(base).rfind(own).unwrap_or_default().to_owned()
    };
    // A row of a network and its classifier has no words at all.
    let is_known = |candidate: &&&Candidate| {
        let word = last_word(candidate);
        CLASSIFIERS.contains(&word.as_str()) || (word.is_empty() && !candidate.prefix.starts_with(root))
    };
    let module = |candidate: &Candidate| candidate.prefix.trim_end_matches('.').to_owned();
    let parent = |candidate: &Candidate| {
        let (parent, last) = module(candidate).rsplit_once('.').map(|(p, l)| (p.to_owned(), l.to_owned()))?;
        last.parse::<usize>().is_ok().then_some(format!("{parent}."))
    };
    let rows: BTreeSet<String> = candidates
        .iter()
        .filter_map(parent)
        .filter(|row| candidates.iter().filter(|other| parent(other).as_ref() == Some(row)).count() > 1)
        .collect();
    found.rows = rows.iter().cloned().collect();
    let features = features(own, entries);
    let fits = |candidate: &&Candidate| {
        let [a, b] = candidate.shape;
        features.is_none_or(|features| b == features || (a == features && !candidate.has_bias))
    };
    let usable: Vec<&Candidate> = candidates
        .iter()
        .filter(|candidate| !words(&candidate.prefix).any(|word| TRAINING_ONLY.contains(&word)))
        .filter(|candidate| !parent(candidate).is_some_and(|row| rows.contains(&row)))
        .collect();
    let chosen = match &choice.classifier {
        Some(asked) => {
            let asked = asked.trim_end_matches('.');
            let is_asked = |candidate: &&Candidate| {
                let name = module(candidate);
                let own = name.strip_prefix(root.trim_end_matches('.')).map(|rest| rest.trim_start_matches('.'));
                name == asked || own == Some(asked) || name.ends_with(&format!(".{asked}"))
            };
            let Some(candidate) = candidates.iter().find(is_asked) else {
                let there = candidates.iter().map(module).collect();
                return Err(FoldError::NoSuchClassifier { asked: asked.chars().take(100).collect(), there });
            };
            Some(candidate)
        }
        None => {
            let known: Vec<&&Candidate> = usable.iter().filter(is_known).collect();
            let fitting: Vec<&&Candidate> = known.iter().copied().filter(|candidate| fits(candidate)).collect();
            match (known.as_slice(), fitting.as_slice()) {
                // By its name alone: what does not fit is refused by its shape.
                ([one], _) | (_, [one]) => Some(**one),
                (_, [_, _, ..]) => {
                    let sets = fitting.iter().map(|candidate| module(candidate)).collect();
                    return Err(FoldError::SeveralClassifiers { names: sets });
                }
                _ => None,
            }
        }
    };
    let Some(chosen) = chosen else {
        found.likely_classifiers = usable.iter().filter(|candidate| fits(candidate)).map(|c| module(c)).collect();
        return Ok(None);
    };
    let classes = |candidate: &Candidate| {
        let [a, b] = candidate.shape;
        if features == Some(a) && features != Some(b) { b } else { a }
    };
    let is_factor = |n: &usize| {
        let last = words(&names[*n]).next_back().unwrap_or_default();
        SCALES.contains(&last) && entries[*n].shape.iter().product::<usize>() == classes(chosen)
    };
    let tensors = region.iter().copied().filter(|n| names[*n].starts_with(&chosen.prefix) || is_factor(n)).collect();
    let in_classifier = |n: &&usize| names[**n].starts_with(&chosen.prefix);
    found.is_cosine = root.split('.').any(|word| word == "feat_model")
        && region.iter().filter(in_classifier).all(|n| {
            entries[*n].dictionary.last().is_some_and(|d| d == "classifier") && !entries[*n].name.contains("fc.")
        })
        && !chosen.has_bias;
    Ok(Some(Classifier { prefix: chosen.prefix.clone(), tensors }))
}

/// Channels of the last stage, which its last norm tells.
fn features<P>(own: &BTreeMap<usize, String>, entries: &[Entry<P>]) -> Option<usize> {
    let place = |name: &str| {
        let mut parts = words(name.strip_prefix("layer")?.strip_suffix(".running_mean")?);
        let number = |text: &str| text.parse::<usize>().ok();
        let (stage, block) = (number(parts.next()?)?, number(parts.next()?)?);
        Some((stage, block, number(parts.next()?.strip_prefix("bn")?)?))
    };
    let norms = own.iter().filter_map(|(n, name)| Some((place(name)?, *n)));
    norms.max().and_then(|(_, n)| entries[n].shape.first().copied())
}

/// What is left out, a few words for each group: another network, a dictionary that holds none, a copy or a projection that
/// training alone needs.
fn summary<P>(
    names: &[String],
    left: &[usize],
    entries: &[Entry<P>],
    others: &BTreeSet<String>,
    rows: &[String],
) -> Vec<String> {
    let group = |n: usize| {
        let name = names[n].as_str();
        if let Some(first) = entries[n].dictionary.first().filter(|d| NOT_WEIGHTS.contains(&d.as_str())) {
            return first.clone();
        }
        // The longest, since one network's names may begin as another's.
        let whole = others.iter().chain(rows).filter(|prefix| name.starts_with(prefix.as_str()));
        if let Some(prefix) = whole.max_by_key(|prefix| prefix.len()) {
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
            (Content::Float(..), shape) => format!("{} ({shape:?})", names[*one]),
        },
        several => format!("{group} ({} tensors)", several.len()),
    };
    groups.into_iter().map(told).collect()
}
