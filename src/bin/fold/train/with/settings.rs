//! The recipe that the flags of `nbn fold train` say: named settings, what is given beside them, and what a run was begun with.

use anyhow::bail;
use clap::ValueEnum;
use nbn::bundle::{Exif, Size};
use nbn::data::GroupBy;
use nbn::fold::architecture::{Magnitude, NbnLayers};
use nbn::fold::export::Preset;
use nbn::train::arch::Arch;
use nbn::train::recipe::{Augmentation, BiasStart, Decay, Head, Loss, MagnitudeMode, Norm, Recipe, Schedule, Shortcut};

use super::Train;

/// Share of the epochs after which LDAM weighs rare classes more, as its authors do (160 of 200).
const LDAM_DEFERRED: f64 = 0.8;

/// Settings that belong together.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub(super) enum Named {
    /// 60 epochs, learning rate 0.05 with a cosine, weight decay 5e-4 on convolutions and classifiers
    Quick,
    /// 120 epochs, learning rate 0.1 that rises first and falls after 80 and 90 % of the epochs, weight decay 2e-4 on
    /// everything; plain BatchNorm and a linear classifier; of CIFAR networks, shortcuts with a norm
    Thorough,
}

/// What a name stands for, where no flag says otherwise.
struct Set {
    norm: Norm,
    head: Head,
    shortcut: Shortcut,
    epochs: usize,
    learning_rate: f64,
    schedule: Schedule,
    /// Share of the epochs in which the learning rate rises.
    warm_up: f64,
    /// Shares of the epochs after which steps lower it.
    milestones: &'static [f64],
    weight_decay: f64,
    decay: Decay,
}

const QUICK: Set = Set {
    norm: Norm::Nbn,
    head: Head::Linear,
    shortcut: Shortcut::A,
    epochs: 60,
    learning_rate: 0.05,
    schedule: Schedule::Cosine,
    warm_up: 0.0,
    milestones: &[],
    weight_decay: 5e-4,
    decay: Decay::Weights,
};

const THOROUGH: Set = Set {
    norm: Norm::Bn,
    head: Head::Linear,
    shortcut: Shortcut::B,
    epochs: 120,
    learning_rate: 0.1,
    schedule: Schedule::Step,
    warm_up: 0.04,
    milestones: &[0.8, 0.8, 0.9],
    weight_decay: 2e-4,
    decay: Decay::All,
};

/// What a [`Set`] and the flags beside it come to.
struct Settings {
    norm: Norm,
    head: Head,
    shortcut: Shortcut,
    epochs: usize,
    learning_rate: f64,
    schedule: Schedule,
    warm_up: usize,
    milestones: Vec<usize>,
    weight_decay: f64,
    decay: Decay,
}

impl Settings {
    fn of(args: &Train, begun: Option<&Recipe>) -> Self {
        let set = match args.recipe {
            Named::Quick => &QUICK,
            Named::Thorough => &THOROUGH,
        };
        let epochs = args.epochs.or(begun.map(|begun| begun.epochs)).unwrap_or(set.epochs);
        let schedule = args.schedule.unwrap_or(set.schedule);
        // A run that gets more epochs keeps the steps, and the rise, that it began with.
        let after = |share: f64| (epochs as f64 * share).round() as usize;
        let milestones = if args.milestones.is_empty() && schedule == set.schedule {
            begun.map_or_else(|| set.milestones.iter().map(|at| after(*at)).collect(), |begun| begun.milestones.clone())
        } else {
            args.milestones.clone()
        };
        Self {
            norm: args.norm.unwrap_or(set.norm),
            head: args.head.unwrap_or(set.head),
            shortcut: args.shortcut.unwrap_or(set.shortcut),
            epochs,
            learning_rate: args.lr.unwrap_or(set.learning_rate),
            schedule,
            warm_up: args.warm_up.or(begun.map(|begun| begun.warm_up)).unwrap_or_else(|| after(set.warm_up)),
            milestones,
            weight_decay: args.weight_decay.unwrap_or(set.weight_decay),
            decay: args.decay.unwrap_or(set.decay),
        }
    }
}

/// Refuses flags that would change nothing: whoever gives them expects something.
fn refuse_idle(args: &Train, settings: &Settings) -> anyhow::Result<()> {
    let nbn = settings.norm == Norm::Nbn;
    let learned = args.magnitude_mode.is_none_or(|mode| mode == MagnitudeMode::Learned);
    let of = |loss| args.loss == loss;
    let flags = [
        ("--nbn-layers", args.nbn_layers.is_some(), nbn, "--norm nbn"),
        ("--magnitude", args.magnitude.is_some(), nbn, "--norm nbn"),
        ("--magnitude-start", args.magnitude_start.is_some(), nbn, "--norm nbn"),
        ("--magnitude-mode", args.magnitude_mode.is_some(), nbn, "--norm nbn"),
        ("--magnitude-lr", args.magnitude_lr.is_some(), nbn && learned, "--norm nbn --magnitude-mode learned"),
        ("--bias-start", args.bias_start.is_some(), nbn, "--norm nbn"),
        ("--shortcut", args.shortcut.is_some(), args.arch.is_cifar(), "a CIFAR network (--arch)"),
        ("--tau", args.tau.is_some(), of(Loss::LogitAdjustment), "--loss logit-adjustment"),
        ("--ldam-margin", args.ldam_margin.is_some(), of(Loss::Ldam), "--loss ldam"),
        ("--ldam-scale", args.ldam_scale.is_some(), of(Loss::Ldam), "--loss ldam"),
        ("--decay-factor", args.decay_factor.is_some(), settings.schedule == Schedule::Step, "--schedule step"),
    ];
    match flags.into_iter().find(|(_, given, used, _)| *given && !used) {
        Some((flag, .., needs)) => bail!("{flag} has an effect only with {needs}: give that, or leave it out"),
        None => Ok(()),
    }
}

/// The recipe that the flags say; what they leave open in a run that goes on is as in `begun`.
pub(super) fn recipe(args: &Train, begun: Option<Recipe>) -> anyhow::Result<Recipe> {
    let settings = Settings::of(args, begun.as_ref());
    refuse_idle(args, &settings)?;
    let cifar = args.arch.is_cifar();
    let multi = matches!(args.arch, Arch::ImageNet { experts, .. } if experts > 1);
    let augment = match args.augment.as_deref() {
        Some("none") => Vec::new(),
        Some(text) => text
            .split(',')
            .map(|step| Augmentation::from_str(step.trim(), false).map_err(|_| unknown_step(step)))
            .collect::<Result<_, _>>()?,
        None if cifar => vec![Augmentation::Crop, Augmentation::Flip],
        None => vec![Augmentation::ResizedCrop, Augmentation::Flip, Augmentation::ColorJitter],
    };
    let preset = args.preprocessing.unwrap_or(if cifar { Preset::Cifar } else { Preset::Imagenet });
    let epochs = settings.epochs;
    let deferred = match &begun {
        Some(begun) if begun.loss == Loss::Ldam => begun.reweight_from,
        _ => Some((epochs as f64 * LDAM_DEFERRED) as usize),
    };
    let layers = if multi { NbnLayers::LastStageAll } else { NbnLayers::LastStageOutputs };
    Ok(Recipe {
        arch: args.arch.clone(),
        norm: settings.norm,
        nbn_layers: args.nbn_layers.clone().unwrap_or(layers),
        magnitude: args.magnitude.unwrap_or(Magnitude::Expert),
        magnitude_start: args.magnitude_start.unwrap_or(1.0),
        magnitude_mode: args.magnitude_mode.unwrap_or(MagnitudeMode::Learned),
        magnitude_rate: args.magnitude_lr.filter(|factor| *factor != 1.0),
        bias_start: args.bias_start.unwrap_or(BiasStart::Normal),
        head: settings.head,
        shortcut: settings.shortcut,
        loss: args.loss,
        tau: args.tau.unwrap_or(1.0),
        ldam_margin: args.ldam_margin.unwrap_or(0.5),
        ldam_scale: args.ldam_scale.unwrap_or(1.0),
        label_smoothing: args.label_smoothing,
        reweight_from: args.reweight_from.or(deferred.filter(|_| args.loss == Loss::Ldam)),
        epochs,
        batch: args.batch,
        learning_rate: settings.learning_rate,
        schedule: settings.schedule,
        warm_up: settings.warm_up,
        milestones: settings.milestones,
        decay_factor: args.decay_factor.unwrap_or(0.1),
        momentum: args.momentum,
        nesterov: args.nesterov,
        weight_decay: settings.weight_decay,
        decay: settings.decay,
        clip: args.clip,
        ema: args.ema,
        augment,
        mixup: args.mixup,
        preprocessing: preset.preprocessing(args.input_size.map(Size::square), Exif::Apply),
        imbalance_factor: args.imbalance_factor,
        calibration_fraction: args.calibration_fraction,
        group_by: match &args.group_by {
            Some(GroupBy::Apart) => None,
            Some(by) => Some(by.to_string()),
            None => begun.and_then(|begun| begun.group_by),
        },
        seed: args.seed,
    })
}

fn unknown_step(step: &str) -> anyhow::Error {
    let known: Vec<String> = Augmentation::value_variants()
        .iter()
        .filter_map(|v| v.to_possible_value().map(|v| v.get_name().to_owned()))
        .collect();
    anyhow::anyhow!("--augment: {step:?} is unknown; expected none, or steps from {}", known.join(", "))
}
