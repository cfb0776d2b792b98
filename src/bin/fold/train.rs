//! `nbn fold train`'s command line.

#[cfg(feature = "train")]
mod pictures;
#[cfg(feature = "train")]
mod view;

#[cfg(feature = "train")]
pub(crate) use with::{Train, run};
#[cfg(not(feature = "train"))]
pub(crate) use without::{Train, run};

/// What a build without the engine answers.
#[cfg(not(feature = "train"))]
mod without {
    #[derive(clap::Args)]
    pub(crate) struct Train {
        /// Whatever training would take
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
        _arguments: Vec<String>,
    }

    pub(crate) fn run(_: Train) -> anyhow::Result<()> {
        anyhow::bail!(
            "this build cannot train: build one that can, as in `cargo run --release --features train --bin fold -- \
             train --help`"
        )
    }
}

#[cfg(feature = "train")]
mod with {
    mod settings;

    use std::collections::{BTreeSet, HashMap};
    use std::path::{Path, PathBuf};
    use std::process::exit;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    use anyhow::{Context, bail, ensure};
    use burn::tensor::Device;
    use clap::{Args, ValueEnum};
    use nbn::bundle::Class;
    use nbn::data::{
        Checked, Form, GroupBy, LabelledImages, PixelHash, Purpose, Records, Split, TrainingSet, hold_out,
        hold_out_groups, long_tail,
    };
    use nbn::fold::architecture::{Magnitude, NbnLayers};
    use nbn::fold::export::Preset;
    use nbn::stop::with_hangup_kept;
    use nbn::train::arch::Arch;
    use nbn::train::recipe::{
        Augmentation, BiasStart, Decay, Head, Loss, MagnitudeMode, Norm, Recipe, Schedule, Shortcut,
    };
    use nbn::train::run::{End, Job, run as train};
    use nbn::train::state::{Files, progress};
    use nbn::{show, tell};

    use self::settings::{Named, recipe};
    use super::pictures::{checked, list_of, warn_of_shared};
    use super::view::{View, count};

    #[derive(Args)]
    #[command(
        after_help = "Examples:\n  nbn fold train --data photos/ --arch resnet18 --epochs 60 --out runs/mine.safetensors\n  nbn fold train --data photos/ --arch resnet18 --epochs 60 --out runs/mine.safetensors --resume"
    )]
    pub(crate) struct Train {
        /// Class folders, a list of `path label` lines, a CSV table, or a benchmark's file or folder (CIFAR binary, IDX)
        #[arg(long, value_name = "SET", help_heading = "Images")]
        data: PathBuf,
        /// Format of the set, if it is not recognised correctly
        #[arg(long = "data-format", alias = "dataset", value_name = "FORMAT", help_heading = "Images")]
        dataset: Option<Form>,
        /// File with the names of the classes in the order of the logits, one per line
        #[arg(long, value_name = "FILE", help_heading = "Images")]
        classes: Option<PathBuf>,
        /// Images to measure accuracy on [default: the benchmark's own test set, or the held-out images]
        #[arg(long, value_name = "SET", help_heading = "Images")]
        test: Option<PathBuf>,
        /// Measure accuracy every N epochs, and after the last one
        #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..), help_heading = "Images")]
        test_every: u32,
        /// Cut the set to an exponential profile in which the first class is F times as large as the last
        #[arg(long, value_name = "F", help_heading = "Images")]
        imbalance_factor: Option<f64>,
        /// Share of each class to hold out for `nbn fold calibrate`, at least one image, of a class with one image none
        #[arg(long, value_name = "SHARE", default_value_t = 0.1, help_heading = "Images")]
        calibration_fraction: f64,
        /// Keep images of one object, camera or patient together, all trained on or all held out: folder, for images in one
        /// folder; a column of the table; or a regular expression whose first group (or match) in the image's path says what
        /// it belongs to; or none
        #[arg(long, value_name = "folder|COLUMN|REGEX", value_parser = str::parse::<GroupBy>, help_heading = "Images")]
        group_by: Option<GroupBy>,
        /// Train without the images that cannot be decoded, which are listed in NAME.broken.json
        #[arg(long, help_heading = "Images")]
        skip_broken: bool,
        /// Preprocessing of the images [default: cifar for CIFAR networks, imagenet for others]
        #[arg(long, help_heading = "Images")]
        preprocessing: Option<Preset>,
        /// Side of the network's square input in pixels [default: as the preprocessing says]
        #[arg(long, value_name = "PX", value_parser = clap::value_parser!(u32).range(8..=4096), help_heading = "Images")]
        input_size: Option<u32>,
        /// Augmentations of the training images, in this order, separated by commas, or `none` [default: crop,flip for
        /// CIFAR networks, resized-crop,flip,color-jitter for others]
        #[arg(long, value_name = "STEPS", help_heading = "Images")]
        augment: Option<String>,
        /// Blend pairs of images with shares drawn from Beta(ALPHA, ALPHA)
        #[arg(long, value_name = "ALPHA", help_heading = "Images")]
        mixup: Option<f64>,

        /// Settings by name; flags that are given beside it replace its own. docs/training.md says when to choose which
        /// [default: quick; with --resume, what the run was begun with]
        #[arg(long, value_name = "NAME", help_heading = "Network")]
        recipe: Option<Named>,
        /// resnet20, resnet32 … (CIFAR, 6n+2), resnet18 … resnet152, resnext50_32x4d, resnet50_ride3
        #[arg(long, default_value = "resnet20", help_heading = "Network")]
        arch: Arch,
        /// Kind of norm in the layers that --nbn-layers names [default: nbn; thorough: bn]
        #[arg(long, help_heading = "Network")]
        norm: Option<Norm>,
        /// Normalised layers: last-stage-outputs, last-stage-all, all, or names separated by commas [default:
        /// last-stage-outputs; with several experts last-stage-all]
        #[arg(long, value_name = "LAYERS", help_heading = "Network")]
        nbn_layers: Option<NbnLayers>,
        /// Layers that share a magnitude: those of an expert, those of a stage, or none (layer) [default: expert]
        #[arg(long, value_name = "OF", help_heading = "Network")]
        magnitude: Option<Magnitude>,
        /// Initial value of the magnitude [default: 1]
        #[arg(long, value_name = "ALPHA", help_heading = "Network")]
        magnitude_start: Option<f32>,
        /// Whether the magnitude is learned [default: learned]
        #[arg(long, value_name = "MODE", help_heading = "Network")]
        magnitude_mode: Option<MagnitudeMode>,
        /// Learning rate of the magnitude, as a multiple of the others' [default: 1]
        #[arg(long, value_name = "FACTOR", help_heading = "Network")]
        magnitude_lr: Option<f64>,
        /// Initial bias of a normalised layer [default: normal]
        #[arg(long, value_name = "START", help_heading = "Network")]
        bias_start: Option<BiasStart>,
        /// Kind of classifier [default: linear]
        #[arg(long, help_heading = "Network")]
        head: Option<Head>,
        /// Kind of shortcut in CIFAR blocks [default: a; thorough: b]
        #[arg(long, help_heading = "Network")]
        shortcut: Option<Shortcut>,

        /// Loss function
        #[arg(long, default_value = "cross-entropy", help_heading = "Loss")]
        loss: Loss,
        /// τ of logit adjustment [default: 1]
        #[arg(long, help_heading = "Loss")]
        tau: Option<f32>,
        /// Margin of LDAM for the rarest class [default: 0.5]
        #[arg(long, value_name = "M", help_heading = "Loss")]
        ldam_margin: Option<f32>,
        /// Scale of LDAM's logits; its authors use 30 with a cosine classifier, which these networks do not have
        /// [default: 1]
        #[arg(long, value_name = "S", help_heading = "Loss")]
        ldam_scale: Option<f32>,
        /// Share of the target that is spread over all classes
        #[arg(long, value_name = "SHARE", default_value_t = 0.0, help_heading = "Loss")]
        label_smoothing: f32,
        /// Epoch, counted from 0, from which rare classes have more weight [default with LDAM: after 80 % of the
        /// epochs]
        #[arg(long, value_name = "EPOCH", help_heading = "Loss")]
        reweight_from: Option<usize>,

        /// Number of epochs [default: 60; thorough: 120; with --resume, as many as the run has]
        #[arg(long, value_name = "N", help_heading = "Optimisation")]
        epochs: Option<usize>,
        /// Images per step
        #[arg(long, default_value_t = 64, help_heading = "Optimisation")]
        batch: usize,
        /// Highest learning rate [default: 0.05; thorough: 0.1]
        #[arg(long, help_heading = "Optimisation")]
        lr: Option<f64>,
        /// How the learning rate falls [default: cosine; thorough: step]
        #[arg(long, help_heading = "Optimisation")]
        schedule: Option<Schedule>,
        /// Epochs in which the learning rate first rises linearly [default: 0; thorough: 4 % of the epochs]
        #[arg(long, value_name = "EPOCHS", help_heading = "Optimisation")]
        warm_up: Option<usize>,
        /// Epochs at which --schedule step lowers the learning rate, separated by commas [thorough: after 80 % of the epochs
        /// twice, after 90 % once]
        #[arg(long, value_delimiter = ',', help_heading = "Optimisation")]
        milestones: Vec<usize>,
        /// Factor by which --schedule step multiplies the learning rate [default: 0.1]
        #[arg(long, value_name = "FACTOR", help_heading = "Optimisation")]
        decay_factor: Option<f64>,
        /// Momentum
        #[arg(long, default_value_t = 0.9, help_heading = "Optimisation")]
        momentum: f64,
        /// Use Nesterov momentum
        #[arg(long, help_heading = "Optimisation")]
        nesterov: bool,
        /// Weight decay [default: 0.0005; thorough: 0.0002]
        #[arg(long, value_name = "LAMBDA", help_heading = "Optimisation")]
        weight_decay: Option<f64>,
        /// Parameters that weight decay applies to [default: weights; thorough: all]
        #[arg(long, value_name = "WHAT", help_heading = "Optimisation")]
        decay: Option<Decay>,
        /// Largest norm of the whole gradient; a longer one is scaled down
        #[arg(long, value_name = "NORM", help_heading = "Optimisation")]
        clip: Option<f64>,
        /// Measure and save a running mean of the weights with this decay, such as 0.999; the decay is smaller in the
        /// first steps, so that the random start does not stay in the mean
        #[arg(long, value_name = "DECAY", help_heading = "Optimisation")]
        ema: Option<f64>,
        /// Random seed
        #[arg(long, default_value_t = 0, help_heading = "Optimisation")]
        seed: u64,

        /// Checkpoint to write, NAME.safetensors; the run's other files are written beside it
        #[arg(long, value_name = "FILE", help_heading = "Run")]
        out: PathBuf,
        /// Continue the run of this checkpoint, also with other --epochs, or start it if there is none yet
        #[arg(long, conflicts_with = "overwrite", help_heading = "Run")]
        resume: bool,
        /// Replace an existing run and start again
        #[arg(long, help_heading = "Run")]
        overwrite: bool,
        /// Threads that compute the network; 0 uses all processors
        #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=1024), help_heading = "Run")]
        threads: u16,
        /// Threads that prepare images
        #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64), help_heading = "Run")]
        loaders: u8,
        /// Device that computes the network; cuda needs a build with --features train,cuda
        #[arg(long, default_value = "cpu", help_heading = "Run")]
        device: DeviceArg,
    }

    /// Signals within this time are one request.
    const ONE_REQUEST: Duration = Duration::from_millis(500);

    #[derive(Clone, Copy, PartialEq, ValueEnum)]
    enum DeviceArg {
        Cpu,
        Cuda,
    }

    pub(crate) fn run(args: Train) -> anyhow::Result<()> {
        ensure!(
            args.out.extension().is_some_and(|e| e == "safetensors"),
            "--out is {}; give a name that ends in .safetensors",
            args.out.display()
        );
        let files = Files::of(&args.out);
        if let Some(folder) = files.every().find(|path| path.is_dir()) {
            bail!("{} is a folder, and the run would write a file there: give another --out", folder.display());
        }
        // This thread is one of the pool: otherwise every operation would wake another and wait for it.
        rayon::ThreadPoolBuilder::new().num_threads(args.threads.into()).use_current_thread().build_global()?;
        let device = device(args.device)?;
        let resume = args.resume && files.state.exists();
        let recipe = recipe(&args, resume.then(|| progress(&files.state)).flatten().map(|begun| begun.recipe))?;
        recipe.check()?;
        ensure!(
            resume || !args.resume || !args.out.exists(),
            "--resume: {} is missing, so {} cannot be continued: start again with --overwrite instead of --resume",
            files.state.display(),
            args.out.display()
        );
        ensure!(
            resume || args.overwrite || !(files.state.exists() || args.out.exists()),
            "{} already exists: continue it with --resume, or replace it with --overwrite",
            if args.out.exists() { args.out.display() } else { files.state.display() }
        );
        nbn::memory::keep();
        let folder = args.out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let job = job(&args, recipe, files, resume, device)?;
        let stop = Arc::new(AtomicBool::new(false));
        let asked = stop.clone();
        let mut first: Option<Instant> = None;
        let ask = move || match first {
            // A terminal that is closed may say so twice: the shell, and the system.
            Some(first) if first.elapsed() < ONE_REQUEST => {}
            Some(_) => exit(130),
            None => {
                first = Some(Instant::now());
                asked.store(true, Ordering::Relaxed);
                tell!("finishing the step, then saving; press Ctrl-C again to stop at once");
            }
        };
        with_hangup_kept(|| ctrlc::set_handler(ask))?;
        let mut view = View::new(job.recipe.epochs, job.training.len(), job.recipe.batch);
        let end = train(&job, &stop, &mut |event| view.show(&event))?;
        view.bar.finish_and_clear();
        for (what, path) in
            [("trained on", &job.files.training), ("held out", &job.files.calibration), ("left out", &job.files.broken)]
        {
            if path.exists() {
                tell!("{what:<11} {}", path.display());
            }
        }
        match end {
            End::Stopped => tell!("stopped     continue from here with --resume"),
            End::Done => tell!("next        nbn fold export {} --out models/NAME/1", args.out.display()),
        }
        show!("{}", args.out.display())?;
        Ok(())
    }

    /// How it learns, in a line.
    fn told(recipe: &Recipe) -> String {
        let Recipe { batch, learning_rate, weight_decay, warm_up, .. } = recipe;
        let (loss, epochs) = (name(recipe.loss), count(recipe.epochs, "epoch"));
        let mut line = format!("{loss}, {epochs} in batches of {batch}; learning rate {learning_rate}");
        if *warm_up > 0 {
            line += &format!(", rising over {warm_up}");
        }
        line += &match recipe.schedule {
            Schedule::Constant => ", constant".to_owned(),
            Schedule::Cosine => ", falling as a cosine".to_owned(),
            Schedule::Step => format!(", × {} after {}", recipe.decay_factor, recipe.steps()),
        };
        line + &format!("; weight decay {weight_decay} on {}", name(recipe.decay))
    }

    /// What the command line calls it.
    fn name(value: impl ValueEnum) -> String {
        value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    #[cfg(feature = "cuda")]
    fn device(place: DeviceArg) -> anyhow::Result<Device> {
        Ok(match place {
            DeviceArg::Cpu => Device::flex(),
            DeviceArg::Cuda => {
                // The engine panics without a driver; that must not be the message.
                std::panic::set_hook(Box::new(|_| {}));
                let device = std::panic::catch_unwind(|| {
                    let device = Device::cuda(0);
                    let probe = burn::tensor::Tensor::<1>::ones([1], &device);
                    let _ = probe.into_data();
                    device
                });
                let _ = std::panic::take_hook();
                match device {
                    Ok(device) => device,
                    Err(_) => {
                        bail!("--device cuda: no CUDA device can be used: install its driver, or use --device cpu")
                    }
                }
            }
        })
    }

    #[cfg(not(feature = "cuda"))]
    fn device(place: DeviceArg) -> anyhow::Result<Device> {
        if place == DeviceArg::Cuda {
            bail!("--device cuda: this build has no CUDA: build with --features train,cuda, or use --device cpu");
        }
        Ok(Device::flex())
    }

    fn job(args: &Train, recipe: Recipe, files: Files, resume: bool, device: Device) -> anyhow::Result<Job> {
        let set = TrainingSet::open(&args.data, args.dataset, args.classes.as_deref())?;
        ensure!(
            set.labels.len() >= 2,
            "{} has {} class; a classifier needs at least 2",
            set.path.display(),
            set.labels.len()
        );
        let refuse = |reason: String| anyhow::anyhow!("{}: {reason}", set.path.display());
        let exif = recipe.preprocessing.exif;
        let Checked { broken, hashes } = checked(args.skip_broken, &set.images, "images", exif)?;
        let mut left_out = list_of(&broken, &set.images);
        let broken: BTreeSet<usize> = broken.into_iter().map(|(record, _)| record).collect();
        let whole: Vec<usize> = (0..set.images.len()).filter(|record| !broken.contains(record)).collect();
        let records: Vec<usize> = match recipe.imbalance_factor {
            Some(factor) => {
                let labels: Vec<u32> = whole.iter().map(|&record| set.images.labels()[record]).collect();
                let kept = long_tail(&labels, &set.labels, factor, recipe.seed).map_err(refuse)?;
                kept.into_iter().map(|n| whole[n]).collect()
            }
            None => whole,
        };
        let (labels, fraction, seed) = (set.images.labels(), recipe.calibration_fraction, recipe.seed);
        let group_by =
            recipe.group_by.as_deref().map(|by| by.parse::<GroupBy>().map_err(anyhow::Error::msg)).transpose()?;
        let split = match &group_by {
            None => hold_out(labels, &records, &set.labels, fraction, seed),
            Some(by) => {
                let found = by.groups(&set.images.select(&records)?)?;
                let count = found.iter().max().map_or(0, |last| last + 1);
                ensure!(
                    count > 1,
                    "{}: --group-by {by}: all {} images are in one group, and a group is not divided",
                    set.path.display(),
                    found.len()
                );
                tell!("groups      {count} of images that stay together (--group-by {by})");
                // Of what is left out, none is asked for.
                let mut groups = vec![0; set.images.len()];
                records.iter().zip(found).for_each(|(&record, group)| groups[record] = group);
                hold_out_groups(labels, &records, &set.labels, &groups, fraction, seed)
            }
        };
        let Split { training, held_out, alone } = split.map_err(refuse)?;
        if let Some(first) = alone.first() {
            tell!(
                "warning: {} of {} classes have a single {}, which is trained on, such as {:?}: none of theirs is held \
                 out, so that their scores will be calibrated by what the others say (status prior_only)",
                alone.len(),
                set.labels.len(),
                if group_by.is_some() { "group of images" } else { "image" },
                set.labels[*first]
            );
        }
        if recipe.augment.contains(&Augmentation::Flip) {
            tell!(
                "augment     images are mirrored at random: where left and right tell classes apart (signs, texts, organs), \
                 give --augment without flip"
            );
        }
        let counts = set.counts(&training);
        let classes: Vec<Class> = set
            .labels
            .iter()
            .zip(&counts)
            .map(|(label, &count)| Class { label: label.clone(), count: Some(count) })
            .collect();
        let test = args.test.clone().or_else(|| set.test.clone());
        let seen: HashMap<PixelHash, usize> =
            training.iter().rev().filter_map(|&record| Some((hashes[record]?, record))).collect();
        let trained = (&set.images, &seen);
        let own: Vec<_> = held_out.iter().map(|&record| hashes[record]).collect();
        let advice = "scores that are calibrated on them will be overconfident. Remove the copies, or leave them out by `nbn fold \
                      calibrate --drop-shared`";
        warn_of_shared("held-out images", (&set.images.select(&held_out)?, &own), trained, advice);
        let evaluation = match &test {
            Some(path) => {
                let alike = path.is_dir() == set.path.is_dir() && path.extension() == set.path.extension();
                let form = args.dataset.filter(|_| alike);
                let form = form.map_or_else(|| Form::guess(path, set.labels.len()), Ok)?;
                let images = LabelledImages::open(path, form, &set.labels)?;
                let Checked { broken, hashes } = checked(args.skip_broken, &images, "test images", exif)?;
                left_out.extend(list_of(&broken, &images));
                let advice = "accuracy on them says little. Remove the copies from one of the sets";
                warn_of_shared("test images", (&images, &hashes), trained, advice);
                let broken: BTreeSet<usize> = broken.into_iter().map(|(record, _)| record).collect();
                let whole: Vec<usize> = (0..images.len()).filter(|record| !broken.contains(record)).collect();
                ensure!(!whole.is_empty(), "{}: no image is left to measure accuracy on", path.display());
                Some((images.select(&whole)?, path.display().to_string()))
            }
            None if !held_out.is_empty() => Some((set.images.select(&held_out)?, "held-out images".to_owned())),
            None => None,
        };
        let records = [(&training, Purpose::Training), (&held_out, Purpose::HeldOut)].map(|(records, purpose)| {
            Records::new(&set.path, &set.images, records, purpose, recipe.seed).grouped(group_by.as_ref())
        });
        let (most, least) = (counts.iter().max().unwrap_or(&0), counts.iter().min().unwrap_or(&0));
        tell!(
            "images      {} in {} classes, {most} to {least} each; {} held out",
            training.len(),
            classes.len(),
            held_out.len()
        );
        match &evaluation {
            Some((images, name)) => tell!("measured    on {} images: {name}", images.len()),
            None => tell!("measured    on nothing: neither --test nor held-out images"),
        }
        let norm = match recipe.norm {
            Norm::Nbn => format!("NBN ({})", recipe.nbn_layers),
            Norm::Bn => "plain BatchNorm".into(),
        };
        tell!("network     {}, {norm}, {} head", recipe.arch, name(recipe.head));
        tell!("recipe      {}", told(&recipe));
        Ok(Job {
            training: set.images.select(&training)?,
            records,
            broken: (!left_out.is_empty()).then(|| serde_json::Value::from(left_out).to_string()),
            recipe,
            classes,
            evaluation,
            evaluate_every: args.test_every as usize,
            files,
            resume,
            loaders: args.loaders.into(),
            device,
        })
    }
}
