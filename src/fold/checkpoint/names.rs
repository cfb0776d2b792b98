//! The names that the field uses: of wrappers, classifiers, and what training keeps beside a network.

/// Words of wrappers, which say nothing of what they hold.
pub(super) const WRAPPERS: [&str; 9] =
    ["module", "model", "net", "network", "_orig_mod", "_fsdp_wrapped_module", "state_dict", "backbone", "0"];
/// Words that wrappers of single layers put into the middle of names.
pub(super) const INNER_WRAPPERS: [&str; 4] =
    ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"];
/// Words that a classifier's name ends in.
pub(super) const CLASSIFIERS: [&str; 12] = [
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
/// Words of copies and memories that contrastive training needs, and no evaluation.
pub(super) const TRAINING_ONLY: [&str; 14] = [
    "encoder_k",
    "linear_k",
    "fc_k",
    "classifier_k",
    "momentum_encoder",
    "queue",
    "queue_ptr",
    "queue_l",
    "centroids",
    "criterion",
    "loss",
    "loss_fn",
    "loss_func",
    "n_averaged",
];
/// Words of layers that contrastive training puts behind the features, beside the classifier.
pub(super) const PROJECTIONS: [&str; 7] =
    ["proj", "projection", "projector", "projection_head", "predictor", "prototypes", "contrast"];
/// Parts of the names of numbers that training writes down.
pub(super) const FIGURES: [&str; 17] = [
    "acc", "prec", "best", "loss", "epoch", "step", "iter", "lr", "ece", "metric", "score", "time", "kth", "many",
    "med", "few", "map",
];
/// Names of per-class factors that classifiers' outputs are multiplied by, bias included: MiSLAS's and classifier-balancing's
/// learnable weight scaling.
pub(super) const SCALES: [&str; 2] = ["scales", "learned_norm"];
/// Dictionaries that hold what an optimizer, a loss or a trainer remembers, under names of tensors, too.
pub(super) const NOT_WEIGHTS: [&str; 26] = [
    "optimizer",
    "optimizers",
    "optimizer_states",
    "optim",
    "opt",
    "scheduler",
    "lr_scheduler",
    "lr_schedulers",
    "scaler",
    "grad_scaler",
    "loss_scaler",
    "amp",
    "criterion",
    "criterions",
    "loss",
    "callbacks",
    "loops",
    "meta",
    "message_hub",
    "hyper_parameters",
    "args",
    "config",
    "cfg",
    "rng",
    "rng_state",
    "metrics",
];
/// What optimizers keep for each tensor.
pub(super) const MOMENTS: [&str; 5] = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg"];
/// Kinds of tensors that a network has once it was quantized.
pub(super) const QUANTIZED: [&str; 4] = ["qint8", "quint8", "qint32", "quantized"];

/// The parts of a name, between dots.
pub(super) fn words(name: &str) -> impl DoubleEndedIterator<Item = &str> {
    name.split('.')
}

/// How many words `name` and `root` begin with in common.
pub(super) fn shared(name: &str, root: &str) -> usize {
    words(name).zip(words(root)).take_while(|(a, b)| a == b).count()
}

/// The name of a network's tensor in torchvision's form, from what follows where the network begins: akamaster's
/// `shortcut` and Hugging Face's names are others for the same places.
pub(super) fn canonical(name: &str) -> String {
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
