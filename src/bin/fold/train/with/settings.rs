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
#[derive(Clone, Copy, ValueEnum)]
pub(super) enum Named {
    /// 60 epochs, learning rate 0.05 with a cosine, weight decay 5e-4 on convolutions and classifiers; NBN and a linear
    /// classifier
    Quick,
    /// 120 epochs, learning rate 0.1 that rises first and falls after 80 and 90 % of the epochs, weight decay 2e-4 on
    /// everything; plain BatchNorm and a linear classifier; of CIFAR networks, shortcuts with a norm
    Thorough,
}

/// What a name stands for, and what that and the flags beside it come to.
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
    /// What `named` stands for, over `epochs` where that many are asked for.
    fn named(named: Named, epochs: Option<usize>) -> Self {
        match named {
            Named::Quick => Self {
                norm: Norm::Nbn,
                head: Head::Linear,
                shortcut: Shortcut::A,
                epochs: epochs.unwrap_or(60),
                learning_rate: 0.05,
                schedule: Schedule::Cosine,
                warm_up: 0,
                milestones: Vec::new(),
                weight_decay: 5e-4,
                decay: Decay::Weights,
            },
            Named::Thorough => {
                let epochs = epochs.unwrap_or(120);
                let after = |share: f64| (epochs as f64 * share).round() as usize;
                Self {
                    norm: Norm::Bn,
                    head: Head::Linear,
                    shortcut: Shortcut::B,
                    epochs,
                    learning_rate: 0.1,
                    schedule: Schedule::Step,
                    warm_up: after(0.04),
                    milestones: vec![after(0.8), after(0.8), after(0.9)],
                    weight_decay: 2e-4,
                    decay: Decay::All,
                }
            }
        }
    }

    /// What a run was begun with.
    fn begun(recipe: &Recipe) -> Self {
        Self {
            norm: recipe.norm,
            head: recipe.head,
            shortcut: recipe.shortcut,
            epochs: recipe.epochs,
            learning_rate: recipe.learning_rate,
            schedule: recipe.schedule,
            warm_up: recipe.warm_up,
            milestones: recipe.milestones.clone(),
            weight_decay: recipe.weight_decay,
            decay: recipe.decay,
        }
    }

    /// What a run that goes on was begun with, unless a name is given; then what that stands for, but for the run's own
    /// rise, and the steps of a schedule that is its own, which other epochs do not move. Flags replace either.
    fn of(args: &Train, begun: Option<&Recipe>) -> Self {
        let base = match (args.recipe, begun.map(Self::begun)) {
            (None, Some(begun)) => begun,
            (Some(named), Some(begun)) => {
                let base = Self::named(named, Some(begun.epochs));
                let milestones = if begun.schedule == base.schedule { begun.milestones } else { base.milestones };
                Self { warm_up: begun.warm_up, milestones, ..base }
            }
            (named, None) => Self::named(named.unwrap_or(Named::Quick), args.epochs),
        };
        let schedule = args.schedule.unwrap_or(base.schedule);
        let keeps_steps = args.milestones.is_empty() && schedule == base.schedule;
        Self {
            norm: args.norm.unwrap_or(base.norm),
            head: args.head.unwrap_or(base.head),
            shortcut: args.shortcut.unwrap_or(base.shortcut),
            epochs: args.epochs.unwrap_or(base.epochs),
            learning_rate: args.lr.unwrap_or(base.learning_rate),
            schedule,
            warm_up: args.warm_up.unwrap_or(base.warm_up),
            milestones: if keeps_steps { base.milestones } else { args.milestones.clone() },
            weight_decay: args.weight_decay.unwrap_or(base.weight_decay),
            decay: args.decay.unwrap_or(base.decay),
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

/// Refuses what a run is not to be begun with. One that goes on has it, if it was begun by an earlier version, and may have got
/// other epochs.
fn refuse_to_begin(args: &Train, recipe: &Recipe) -> anyhow::Result<()> {
    let epochs = recipe.epochs;
    for (flag, epoch) in
        [("--milestones", args.milestones.iter().max()), ("--reweight-from", args.reweight_from.as_ref())]
    {
        if let Some(epoch) = epoch.filter(|epoch| **epoch >= epochs) {
            bail!("{flag} is {epoch}, and there are {epochs} epochs, counted from 0: it would never come");
        }
    }
    if !recipe.milestones.is_sorted() {
        bail!("--milestones is {}; give them in the order of the epochs", recipe.steps());
    }
    if recipe.decay_factor > 1.0 {
        bail!("--decay-factor is {}; the learning rate would rise: give at most 1", recipe.decay_factor);
    }
    let mut steps = recipe.augment.iter().enumerate();
    if let Some((_, twice)) = steps.find(|(n, step)| recipe.augment[..*n].contains(step)) {
        let name = twice.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
        bail!("--augment names {name} twice: give it once");
    }
    Ok(())
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
        Some(begun) => begun.reweight_from,
        None => Some((epochs as f64 * LDAM_DEFERRED) as usize).filter(|_| args.loss == Loss::Ldam),
    };
    let begins = begun.is_none();
    let layers = if multi { NbnLayers::LastStageAll } else { NbnLayers::LastStageOutputs };
    let recipe = Recipe {
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
        reweight_from: args.reweight_from.or(deferred),
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
    };
    if begins {
        refuse_to_begin(args, &recipe)?;
    }
    Ok(recipe)
}

fn unknown_step(step: &str) -> anyhow::Error {
    let known: Vec<String> = Augmentation::value_variants()
        .iter()
        .filter_map(|v| v.to_possible_value().map(|v| v.get_name().to_owned()))
        .collect();
    anyhow::anyhow!("--augment: {step:?} is unknown; expected none, or steps from {}", known.join(", "))
}
