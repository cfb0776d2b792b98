//! Everything that can be wrong with a checkpoint or a fold, one sentence each.

use std::path::PathBuf;

/// Names that an error lists.
const LISTED: usize = 6;

/// `a, b and c`, cut where there are many.
fn listed(names: &[String]) -> String {
    let shown: Vec<&str> = names.iter().take(LISTED).map(String::as_str).collect();
    let shown: Vec<&str> =
        shown.into_iter().map(|name| if name == "." { "\".\" (names without a prefix)" } else { name }).collect();
    match (names.len().saturating_sub(LISTED), shown.as_slice()) {
        (0, [rest @ .., last]) if !rest.is_empty() => format!("{} and {last}", rest.join(", ")),
        (0, _) => shown.join(", "),
        (more, _) => format!("{} and {more} more", shown.join(", ")),
    }
}

/// Why a checkpoint was refused.
#[derive(Debug, thiserror::Error)]
pub enum FoldError {
    /// The file could not be read or written.
    #[error("{path}: {cause}")]
    File {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// An ONNX file that cannot be folded.
    #[error("{path}: {cause}")]
    Onnx {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        cause: super::onnx::OnnxError,
    },
    /// Neither a PyTorch checkpoint nor safetensors.
    #[error("{path}: not a checkpoint: {reason}: expected a file written by `torch.save` or a .safetensors file")]
    NotACheckpoint {
        /// Which file.
        path: PathBuf,
        /// What the reader said.
        reason: String,
    },
    /// It begins as a checkpoint does, and does not go on as one.
    #[error("{path}: damaged or truncated: copy it again, or save it again ({reason})")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What the reader said.
        reason: String,
    },
    /// An intact file of another kind.
    #[error("{path} is {what}: {instead}")]
    Foreign {
        /// Which file.
        path: PathBuf,
        /// What it is.
        what: String,
        /// What to do.
        instead: &'static str,
    },
    /// The file holds several networks.
    #[error("the file holds weights of several networks, {}: choose with --weights", listed(sets))]
    SeveralWeights {
        /// Where each begins; `.` is the one whose names have no prefix.
        sets: Vec<String>,
    },
    /// `--weights` names a network that the file does not hold.
    #[error("--weights {asked}: the file holds {}", if sets.is_empty() { "no network that is known".into() } else { listed(sets) })]
    NoSuchWeights {
        /// What was asked for, cut where it is long.
        asked: String,
        /// What there is.
        sets: Vec<String>,
    },
    /// Several layers may give the logits.
    #[error(
        "{} may be the classifier: choose with --classifier, and leave out what takes no part in the logits with --ignore",
        listed(names)
    )]
    SeveralClassifiers {
        /// The layers.
        names: Vec<String>,
    },
    /// `--classifier` names a layer that the network does not have.
    #[error("--classifier {asked}: no linear layer has that name; there {}", match there.len() {
        0 => "is none".into(),
        1 => format!("is {}", there[0]),
        _ => format!("are {}", listed(there)),
    })]
    NoSuchClassifier {
        /// What was asked for, cut where it is long.
        asked: String,
        /// The linear layers that there are.
        there: Vec<String>,
    },
    /// Two tensors are the same one of the network by their names.
    #[error("{first} and {second} are the same tensor of the network by their names: leave one out with --ignore")]
    OnePlace {
        /// One.
        first: String,
        /// The other.
        second: String,
    },
    /// Weights of whole numbers.
    #[error("{name} is quantized, and the rest of the network with it: export the network before quantization")]
    Quantized {
        /// A tensor.
        name: String,
    },
    /// A name that no network's tensor has.
    #[error("tensor {name:?}: {reason}: the file is damaged, or is not the checkpoint of a network")]
    Name {
        /// The name, cut where it is long.
        name: String,
        /// What is wrong with it, and the limit.
        reason: String,
    },
    /// A tensor's element type is no number that a network can have.
    #[error("{name} is of the kind {dtype}; weights must be tensors of f64, f32, f16 or bf16")]
    ElementType {
        /// Key of the tensor.
        name: String,
        /// Its type.
        dtype: String,
    },
    /// The names match no known network.
    #[error(
        "the checkpoint's {keys} keys are not those of a known network (e.g. {example}): expected torchvision-named \
         ResNet/ResNeXt (layer1 … layer4), CIFAR ResNet (layer1 … layer3) or the multi-expert layout (layer3s.0, \
         layer4s.0, linears.0); export any other network as ONNX"
    )]
    UnknownArchitecture {
        /// Number of keys.
        keys: usize,
        /// The first key.
        example: String,
    },
    /// A tensor that the network needs is not there.
    #[error("missing key {name}, which {arch} needs{}", match likely {
        Some(likely) => format!(": is it {likely}?"),
        None => "; a network of another form goes in as ONNX".into(),
    })]
    Missing {
        /// The key.
        name: String,
        /// The network.
        arch: String,
        /// The key that it most likely is.
        likely: Option<String>,
    },
    /// Tensors that the network has no place for.
    #[error(
        "unexpected keys, which {arch} has no place for: {names} (--ignore NAME leaves out what the network's outputs do not \
         depend on)"
    )]
    Unexpected {
        /// The keys.
        names: String,
        /// The network.
        arch: String,
    },
    /// A tensor of the wrong shape.
    #[error("{name} has shape {found:?}; expected {expected}")]
    Shape {
        /// The key.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that fits.
        expected: String,
    },
    /// NaN or infinite.
    #[error("{name} holds {value} at element {index}: the training run diverged; use an earlier checkpoint")]
    NotFinite {
        /// The key.
        name: String,
        /// Flat index.
        index: usize,
        /// The value.
        value: f64,
    },
    /// A variance below zero.
    #[error("{name} is {value} at channel {channel}; a variance cannot be negative: the file is damaged")]
    NegativeVariance {
        /// The key.
        name: String,
        /// The channel.
        channel: usize,
        /// The value.
        value: f64,
    },
    /// A weight direction of length zero.
    #[error("the direction {name} has norm 0, so NBN cannot normalise it: the layer is dead; use another checkpoint")]
    ZeroDirection {
        /// The key.
        name: String,
    },
    /// More experts than the authors' own code tells apart.
    #[error(
        "the network has {0} experts; at most 10 are supported, because the authors' layer names are ambiguous beyond \
         that"
    )]
    TooManyExperts(usize),
    /// `--arch` differs from what the tensors say.
    #[error("--arch {asked} does not fit: the tensors are those of {found}")]
    Arch {
        /// What was asked for.
        asked: String,
        /// What the names and shapes say.
        found: String,
    },
    /// What the values of `scale_factor` act on cannot be told.
    #[error(
        "{name} has {values} values, of which more than {acting} were trained: that is no network of the authors, and whether \
         it has a magnitude for each stage or for each layer cannot be told: say which with --magnitude expert, stage or layer"
    )]
    Magnitudes {
        /// The key.
        name: String,
        /// How many values it has.
        values: usize,
        /// How many of them act in the authors' networks.
        acting: usize,
    },
    /// The bundle's logits are not those that the user's own network gave.
    #[error("{path}: {reason}: nothing was written")]
    Expectation {
        /// The file with them.
        path: PathBuf,
        /// By how much they differ, and what may be the cause.
        reason: String,
    },
    /// `--nbn-layers` cannot be followed.
    #[error("--nbn-layers: {0}")]
    NbnLayers(String),
    /// A pass was handed, or left, a graph that does not hold together.
    #[error("{pass}: node {node}: {reason}")]
    Graph {
        /// The pass or check.
        pass: &'static str,
        /// Name of the node.
        node: String,
        /// What is wrong.
        reason: String,
    },
    /// The folded network is not the checkpoint's.
    #[error(
        "proof failed: output {output} differs by up to {found:.3e} of its standard deviation; the tolerance is \
         {tolerance:.3e}: nothing was written"
    )]
    Proof {
        /// Name of the output.
        output: String,
        /// Largest relative difference.
        found: f64,
        /// Largest accepted.
        tolerance: f64,
    },
    /// A class file or another input of the command does not fit.
    #[error("{0}")]
    Input(String),
    /// ONNX Runtime could not be used for the proof.
    #[error(transparent)]
    Runtime(#[from] crate::runtime::RuntimeError),
}
