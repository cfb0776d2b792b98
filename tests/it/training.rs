//! `nbn fold train`: its arithmetic beside PyTorch's and Pillow's (tests/oracle/make_training.py), and whole runs.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use burn::tensor::module::batch_norm_train;
use burn::tensor::{Device, Tensor, TensorData};
use nbn::bundle::Exif;
use nbn::data::{hold_out, hold_out_groups, long_tail};
use nbn::fold::Checkpoint;
use nbn::fold::architecture::{self, Extras, Magnitude, NbnLayers, Overrides};
use nbn::fold::checkpoint::Tensor as Values;
use nbn::fold::export::Preset;
use nbn::fold::reference;
use nbn::pixels::RgbImage;
use nbn::train::arch::Arch;
use nbn::train::augment::Operation;
use nbn::train::blueprint;
use nbn::train::network::{Network, Parameter, Role, host, scaled_direction};
use nbn::train::objective::Objective;
use nbn::train::optimizer::{Optimizer, learning_rate};
use nbn::train::recipe::{BiasStart, Decay, Head, Loss, MagnitudeMode, Norm, Recipe, Schedule, Shortcut};
use nbn::train::run::ema_decay;
use safetensors::SafeTensors;
use serde_json::Value;

use super::support::{Owned, data, fold, nbn, text};

fn recipe() -> Recipe {
    Recipe {
        arch: "resnet8_w4".parse().unwrap(),
        norm: Norm::Nbn,
        nbn_layers: NbnLayers::LastStageOutputs,
        magnitude: Magnitude::Expert,
        magnitude_start: 1.0,
        magnitude_mode: MagnitudeMode::Learned,
        magnitude_rate: None,
        bias_start: BiasStart::Normal,
        head: Head::LrPlain,
        shortcut: Shortcut::A,
        loss: Loss::CrossEntropy,
        tau: 1.5,
        ldam_margin: 0.5,
        ldam_scale: 30.0,
        label_smoothing: 0.0,
        reweight_from: None,
        epochs: 1,
        batch: 8,
        learning_rate: 0.05,
        schedule: Schedule::Constant,
        warm_up: 0,
        milestones: Vec::new(),
        decay_factor: 0.1,
        momentum: 0.9,
        nesterov: true,
        weight_decay: 5e-3,
        decay: Decay::Weights,
        clip: None,
        ema: None,
        augment: Vec::new(),
        mixup: None,
        preprocessing: Preset::Cifar.preprocessing(None, Exif::Apply),
        imbalance_factor: None,
        calibration_fraction: 0.0,
        group_by: None,
        seed: 3,
    }
}

/// Where a weight, a norm's value, a direction and a magnitude of 1 are after one step with the gradient `gradient`.
fn stepped(recipe: &Recipe, gradient: f32) -> Vec<f32> {
    let roles = [Role::Weight, Role::Norm, Role::Direction, Role::Magnitude];
    let parameters = roles.map(|role| Parameter { name: format!("{role:?}"), shape: vec![1], role });
    let of = |value: f32| Tensor::<1>::from_data(TensorData::new(vec![value], [1]), &Device::flex());
    let mut values = parameters.clone().map(|_| of(1.0));
    let gradients = parameters.clone().map(|_| Some(of(gradient))).to_vec();
    Optimizer::new(4).step(recipe, &parameters, &mut values, gradients, 0.5);
    values.iter().flat_map(host).collect()
}

#[test]
fn decay_and_the_magnitudes_rate_act_on_what_they_name() {
    let plain = Recipe { nesterov: false, weight_decay: 0.5, ..recipe() };
    let decays = [
        (Decay::Weights, [0.75, 1.0, 1.0, 1.0]),
        (Decay::Norms, [0.75, 0.75, 1.0, 1.0]),
        (Decay::Directions, [0.75, 0.75, 0.75, 1.0]),
        (Decay::All, [0.75; 4]),
    ];
    for (decay, expected) in decays {
        assert_eq!(stepped(&Recipe { decay, ..plain.clone() }, 0.0), expected, "{decay:?}");
    }
    let faster = Recipe { magnitude_rate: Some(10.0), weight_decay: 0.0, ..plain };
    assert_eq!(stepped(&faster, 0.125), [0.9375, 0.9375, 0.9375, 0.375]);
}

/// A fixture's tensors.
struct Fixture(Vec<u8>);

impl Fixture {
    fn open(name: &str) -> Self {
        Self(fs::read(data("training").join(name)).unwrap())
    }

    fn values(&self, name: &str) -> (Vec<f32>, Vec<usize>) {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let view = file.tensor(name).unwrap();
        let values = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        (values, view.shape().to_vec())
    }

    fn tensor<const D: usize>(&self, name: &str) -> Tensor<D> {
        let (values, shape) = self.values(name);
        let shape: [usize; D] = shape.try_into().unwrap();
        Tensor::from_data(TensorData::new(values, shape), &Device::flex())
    }

    /// As a leaf whose gradient is kept.
    fn leaf<const D: usize>(&self, name: &str) -> Tensor<D> {
        Tensor::from_inner(self.tensor::<D>(name)).require_grad()
    }
}

/// ‖found − expected‖ ≤ 1e-4 · ‖expected‖.
#[track_caller]
fn assert_near<const D: usize>(found: Tensor<D>, fixture: &Fixture, name: &str) {
    let found: Vec<f32> = found.into_data().try_into_vec().unwrap();
    near(&found, &fixture.values(name).0, 1e-4, name);
}

#[track_caller]
fn near(found: &[f32], expected: &[f32], tolerance: f64, name: &str) {
    assert_eq!(found.len(), expected.len(), "{name}");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut found.iter().zip(expected).map(|(a, b)| f64::from(a - b)));
    let size = norm(&mut expected.iter().map(|v| f64::from(*v)));
    assert!(difference <= tolerance * size.max(1e-3), "{name}: {difference:e} of {size:e}");
}

#[test]
fn gradients_of_the_nbn_layer_equal_pytorchs() {
    let f = Fixture::open("gradients.safetensors");
    let (x, weight, bias, alpha) =
        (f.leaf::<4>("nbn.x"), f.leaf::<1>("nbn.weight"), f.leaf::<1>("nbn.bias"), f.leaf::<1>("nbn.alpha"));
    let gamma = scaled_direction(weight.clone(), alpha.clone());
    let beta = scaled_direction(bias.clone(), alpha.clone());
    let y = batch_norm_train(x.clone(), gamma, beta, 1e-5).output;
    assert_near(y.clone().inner(), &f, "nbn.y");
    let gradients = (y * f.tensor::<4>("nbn.r")).sum().backward();
    assert_near(x.grad(&gradients).unwrap(), &f, "nbn.x_grad");
    assert_near(weight.grad(&gradients).unwrap(), &f, "nbn.weight_grad");
    assert_near(bias.grad(&gradients).unwrap(), &f, "nbn.bias_grad");
    assert_near(alpha.grad(&gradients).unwrap(), &f, "nbn.alpha_grad");
}

#[test]
fn a_zero_direction_has_a_finite_gradient_of_a_million() {
    let v = Tensor::<1>::from_inner(Tensor::zeros([4], &Device::flex())).require_grad();
    let alpha = Tensor::<1>::ones([1], &Device::flex());
    let gradients = scaled_direction(v.clone(), alpha).sum().backward();
    near(&host(&v.grad(&gradients).unwrap()), &[1e6; 4], 1e-4, "gradient at 0");
}

#[test]
fn gradients_of_the_lr_head_equal_pytorchs() {
    let f = Fixture::open("gradients.safetensors");
    let (x, weight, gamma, beta) =
        (f.leaf::<2>("lr.x"), f.leaf::<2>("lr.weight"), f.leaf::<1>("lr.bn_weight"), f.leaf::<1>("lr.bn_bias"));
    let logits = x.clone().matmul(weight.clone().transpose()) + f.tensor::<1>("lr.bias").reshape([1, 5]);
    let y = batch_norm_train(logits, gamma.clone(), beta.clone(), 1e-5).output;
    assert_near(y.clone().inner(), &f, "lr.y");
    let gradients = (y * f.tensor::<2>("lr.r")).sum().backward();
    assert_near(x.grad(&gradients).unwrap(), &f, "lr.x_grad");
    assert_near(weight.grad(&gradients).unwrap(), &f, "lr.weight_grad");
    assert_near(gamma.grad(&gradients).unwrap(), &f, "lr.bn_weight_grad");
    assert_near(beta.grad(&gradients).unwrap(), &f, "lr.bn_bias_grad");
}

#[test]
fn gradients_of_every_loss_equal_pytorchs() {
    let f = Fixture::open("gradients.safetensors");
    let mut targets = vec![0.0; 16 * 5];
    for (row, label) in f.values("labels").0.iter().enumerate() {
        targets[row * 5 + *label as usize] = 1.0;
    }
    let of = |loss, smoothing, reweight_from| Recipe { loss, label_smoothing: smoothing, reweight_from, ..recipe() };
    for (name, recipe) in [
        ("cross-entropy", of(Loss::CrossEntropy, 0.0, None)),
        ("smoothed", of(Loss::CrossEntropy, 0.1, None)),
        ("balanced-softmax", of(Loss::BalancedSoftmax, 0.0, None)),
        ("logit-adjustment", of(Loss::LogitAdjustment, 0.0, None)),
        ("ldam", of(Loss::Ldam, 0.0, Some(0))),
    ] {
        let objective = Objective::new(&recipe, &[500, 200, 80, 20, 5]);
        let logits = f.leaf::<2>("logits");
        let terms = objective.terms(&targets, 0);
        let loss = objective.loss(std::slice::from_ref(&logits), &terms, &Device::flex());
        assert_near(loss.clone().inner(), &f, &format!("{name}.loss"));
        let gradients = loss.backward();
        assert_near(logits.grad(&gradients).unwrap(), &f, &format!("{name}.grad"));
    }
}

#[test]
fn twenty_steps_follow_pytorchs() {
    for name in ["a", "b"] {
        let f = Fixture::open(&format!("trajectory-{name}.safetensors"));
        let checkpoint = |prefix: &str| {
            let file = SafeTensors::deserialize(&f.0).unwrap();
            let mut checkpoint = Checkpoint::default();
            for key in file.names().into_iter().filter(|n| !n.ends_with("tracked")) {
                if let Some(own) = key.strip_prefix(prefix) {
                    let (values, shape) = f.values(key);
                    checkpoint.tensors.insert(own.into(), Values { shape, values });
                }
            }
            checkpoint
        };
        let recipe = recipe();
        let start = checkpoint("start/");
        let found =
            architecture::build(&start, 12, Extras { expert_logits: true, features: false }, &Overrides::default())
                .unwrap();
        let mut network = Network::new(&found).unwrap();
        let mut state = network.load(&start, &Device::flex()).unwrap();
        let mut optimizer = Optimizer::new(network.parameters().len());
        let objective = Objective::new(&recipe, &[1; 5]);
        let (images, labels, expected) = (f.values("images").0, f.values("labels").0, f.values("losses").0);
        for step in 0..20 {
            let size = 8 * 3 * 12 * 12;
            let batch = TensorData::new(images[step * size..(step + 1) * size].to_vec(), [8, 3, 12, 12]);
            let mut targets = vec![0.0; 8 * 5];
            (0..8).for_each(|row| targets[row * 5 + labels[step * 8 + row] as usize] = 1.0);
            let tracked: Vec<Tensor<1>> =
                state.parameters.iter().map(|p| Tensor::from_inner(p.clone()).require_grad()).collect();
            let trained = network.train(&tracked, &state, Tensor::from_data(batch, &Device::flex()));
            let loss = objective.loss(&trained.logits, &objective.terms(&targets, 0), &Device::flex());
            let value: f32 = loss.clone().inner().into_scalar();
            assert!((value - expected[step]).abs() <= 1e-3, "{name}: step {step}: {value}, PyTorch {}", expected[step]);
            let mut gradients = loss.backward();
            let gradients = tracked.iter().map(|p| p.grad_remove(&mut gradients)).collect();
            optimizer.step(&recipe, network.parameters(), &mut state.parameters, gradients, recipe.learning_rate);
            state.statistics = trained.statistics;
        }
        let end = checkpoint("end/");
        for (key, tensor) in network.store(&state) {
            near(&tensor.values, &end.tensors[&key].values, 1e-2, &format!("{name}: {key}"));
        }
    }
}

#[test]
fn augmentations_equal_pillows() {
    let bytes = fs::read(data("training/colours.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let picture = |name: &str| {
        let view = file.tensor(name).unwrap();
        RgbImage::from_raw(view.shape()[1] as u32, view.shape()[0] as u32, view.data().to_vec()).unwrap()
    };
    for (name, operation) in [
        ("shear-x", Operation::ShearX(0.3)),
        ("shear-y", Operation::ShearY(-0.2)),
        ("translate-x", Operation::TranslateX(5.0)),
        ("translate-y", Operation::TranslateY(-4.0)),
        ("rotate", Operation::Rotate(27.5)),
        ("rotate-back", Operation::Rotate(-12.0)),
        ("brightness", Operation::Brightness(1.37)),
        ("colour", Operation::Colour(0.45)),
        ("contrast", Operation::Contrast(1.6)),
        ("sharpness", Operation::Sharpness(1.9)),
        ("blur", Operation::Sharpness(0.1)),
        ("posterize", Operation::Posterize(3)),
        ("solarize", Operation::Solarize(113.0)),
        ("auto-contrast", Operation::AutoContrast),
        ("equalize", Operation::Equalize),
        ("invert", Operation::Invert),
    ] {
        let (found, expected) = (operation.apply(picture("picture")), picture(name));
        let apart = found.iter().zip(expected.iter()).filter(|(a, b)| a != b).count();
        assert_eq!(apart, 0, "{name}: {apart} values differ from Pillow's");
    }
}

#[test]
fn every_network_is_what_its_name_says() {
    for name in [
        "cifar_resnet8_w4",
        "cifar_resnet20",
        "cifar_resnet32",
        "resnet18",
        "resnet34",
        "resnet50",
        "resnext50_32x4d",
        "wide_resnet50_2",
        "resnet18_ride3",
    ] {
        for shortcut in [Shortcut::A, Shortcut::B] {
            let recipe = Recipe { arch: name.parse().unwrap(), shortcut, ..recipe() };
            assert_eq!(recipe.arch.to_string(), name);
            let (_, network) = blueprint::start(&recipe, 7, 64).unwrap();
            assert_eq!((network.arch.as_str(), network.classes), (name, 7));
            network.graph.check("start").unwrap();
        }
    }
    for wrong in ["resnet21", "resnet", "resnet20_ride3", "resnext50", "resnet50_ride11", "vgg16"] {
        let error = wrong.parse::<Arch>().unwrap_err();
        assert!(error.contains(wrong) && error.contains("resnet20"), "{error}");
    }
}

#[test]
fn networks_in_training_compute_what_is_folded() {
    let cases = [
        ("resnet8_w4", NbnLayers::All, Magnitude::Stage, 16),
        ("resnext50_32x4d", NbnLayers::LastStageOutputs, Magnitude::Layer, 64),
        ("resnet18_ride2", NbnLayers::LastStageAll, Magnitude::Expert, 64),
    ];
    for (arch, nbn_layers, magnitude, side) in cases {
        let recipe = Recipe { arch: arch.parse().unwrap(), nbn_layers, magnitude, head: Head::Lr, ..recipe() };
        let (mut start, _) = blueprint::start(&recipe, 3, side).unwrap();
        // Every magnitude another, so that a mistaken index shows.
        let scale = start.tensors.get_mut("scale_factor").unwrap();
        scale.values.iter_mut().enumerate().for_each(|(at, v)| *v = 1.0 + at as f32 / 4.0);
        let found =
            architecture::build(&start, side, Extras { expert_logits: true, features: false }, &Overrides::default())
                .unwrap();
        let mut network = Network::new(&found).unwrap();
        let state = network.load(&start, &Device::flex()).unwrap();
        let mut rng = fastrand::Rng::with_seed(5);
        let image: Vec<f32> = (0..3 * side * side).map(|_| 2.0 * rng.f32() - 1.0).collect();
        let expected = reference::evaluate::<f64>(&found.graph, &image).unwrap();
        let expected: Vec<f32> = expected[0].iter().map(|v| *v as f32).collect();
        let input = Tensor::from_data(TensorData::new(image, [1, 3, side, side]), &Device::flex());
        let logits: Vec<f32> = network.evaluate(&state, input).into_data().try_into_vec().unwrap();
        near(&logits, &expected, 1e-4, arch);
    }
}

#[test]
fn profiles_and_splits_are_stratified_and_repeatable() {
    let names: Vec<String> = (0..3).map(|k| format!("c{k}")).collect();
    let labels: Vec<u32> = [0; 100].into_iter().chain([1; 50]).chain([2; 25]).collect();
    let kept = long_tail(&labels, &names, 100.0, 7).unwrap();
    let counts =
        |records: &[usize]| (0..3).map(|k| records.iter().filter(|&&r| labels[r] == k).count()).collect::<Vec<_>>();
    assert_eq!(counts(&kept), [100, 10, 1]);
    assert_eq!(kept, long_tail(&labels, &names, 100.0, 7).unwrap());
    assert_ne!(kept, long_tail(&labels, &names, 100.0, 8).unwrap());
    let error = long_tail(&labels, &names, 2.0, 7).unwrap_err();
    assert!(error.contains("class 1 (c1) has 50 images") && error.contains("needs 70"), "{error}");
    let error = long_tail(&labels, &names, 1000.0, 7).unwrap_err();
    assert!(error.contains("leaves class 2 (c2) none of its 25 images") && error.contains("100 at most"), "{error}");
    let all: Vec<usize> = (0..labels.len()).collect();
    let nbn::data::Split { training, held_out, alone } = hold_out(&labels, &all, &names, 0.01, 7).unwrap();
    assert!(alone.is_empty());
    assert_eq!((counts(&training), counts(&held_out)), (vec![99, 49, 24], vec![1, 1, 1]));
    // The only image of a class is trained on.
    let split = hold_out(&labels, &kept, &names, 0.9, 7).unwrap();
    assert_eq!((counts(&split.training), counts(&split.held_out)), (vec![10, 1, 1], vec![90, 9, 0]));
    assert_eq!(split.alone, [2]);
    assert!(hold_out(&labels, &kept, &names, 0.0, 7).is_ok());
}

#[test]
fn the_learning_rate_warms_up_and_falls() {
    let cosine = Recipe { epochs: 10, warm_up: 2, schedule: Schedule::Cosine, learning_rate: 1.0, ..recipe() };
    let rates: Vec<f64> = [0, 9, 19, 20, 60, 99].iter().map(|&step| learning_rate(&cosine, step, 10)).collect();
    assert_eq!(&rates[..3], [0.05, 0.5, 1.0]);
    assert!((rates[3] - 1.0).abs() < 1e-9 && (rates[4] - 0.5).abs() < 1e-9 && rates[5] < 1e-3);
    let step = Recipe { schedule: Schedule::Step, milestones: vec![4, 8], ..cosine };
    assert!((learning_rate(&step, 90, 10) - 0.01).abs() < 1e-9);
}

/// A folder of pictures of three kinds that a small network can tell apart, 24, 12 and 6 of them.
fn pictures(folder: &Path) -> PathBuf {
    let set = folder.join("set");
    let mut rng = fastrand::Rng::with_seed(9);
    for (class, count) in [("blue", 24), ("green", 12), ("red", 6)] {
        fs::create_dir_all(set.join(class)).unwrap();
        for n in 0..count {
            let picture = RgbImage::from_fn(16, 16, |_, _| {
                let mut noise = || rng.u8(0..120);
                let mut pixel = [noise(), noise(), noise()];
                let channel = ["red", "green", "blue"].iter().position(|c| *c == class).unwrap();
                pixel[channel] = pixel[channel].saturating_add(60);
                image::Rgb(pixel)
            });
            picture.save(set.join(class).join(format!("{n:02}.png"))).unwrap();
        }
    }
    set
}

fn arguments<'a>(set: &'a Path, out: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let mut all = vec!["train", "--data", set.to_str().unwrap(), "--out", out.to_str().unwrap()];
    for (flag, value) in [("--arch", "resnet8_w4"), ("--input-size", "16"), ("--batch", "8"), ("--threads", "1")] {
        if !more.contains(&flag) {
            all.extend([flag, value]);
        }
    }
    all.extend(more);
    all
}

fn train(set: &Path, out: &Path, more: &[&str]) -> Output {
    fold(&arguments(set, out, more))
}

#[track_caller]
fn done(output: Output) {
    assert!(output.status.success(), "{}", text(&output.stderr));
}

#[track_caller]
fn refused(output: Output, parts: &[&str]) {
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    parts.iter().for_each(|part| assert!(stderr.contains(part), "{part:?} is not in: {stderr}"));
}

/// A run that is to be interrupted, once its metrics say that `epochs` are done.
fn until(set: &Path, out: &Path, more: &[&str], epochs: usize) -> Owned {
    begun(Command::new(env!("CARGO_BIN_EXE_fold")).args(arguments(set, out, more)), out, epochs)
}

/// How far the run of the checkpoint `out` has come, as its state says.
fn progress(out: &Path) -> Value {
    let state = fs::read(out.with_extension("state")).unwrap();
    let (_, header) = SafeTensors::read_metadata(&state).unwrap();
    serde_json::from_str(&header.metadata().as_ref().unwrap()["nbn.progress"]).unwrap()
}

/// The run of `command`, once its metrics say that `epochs` are done.
fn begun(command: &mut Command, out: &Path, epochs: usize) -> Owned {
    let child = Owned::begin(command.stderr(Stdio::null()).stdout(Stdio::null()));
    let metrics = out.with_extension("metrics.jsonl");
    let begun = Instant::now();
    while fs::read_to_string(&metrics).unwrap_or_default().lines().count() < epochs {
        assert!(begun.elapsed() < Duration::from_secs(120), "no epoch was done in two minutes");
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

#[test]
fn a_named_recipe_is_its_flags_and_gives_way_to_others() {
    let folder = tempfile::tempdir().unwrap();
    let set = pictures(folder.path());
    let out = |name: &str| folder.path().join(format!("{name}.safetensors"));
    let run = |name: &str, flags: &[&str]| {
        done(train(&set, &out(name), flags));
        let file = fs::read(out(name)).unwrap();
        let (_, header) = SafeTensors::read_metadata(&file).unwrap();
        serde_json::from_str::<Value>(&header.metadata().as_ref().unwrap()["nbn.recipe"]).unwrap()
    };
    let named = run("named", &["--recipe", "thorough", "--epochs", "10"]);
    let flags =
        ["--lr", "0.1", "--schedule", "step", "--milestones", "8,8,9", "--weight-decay", "2e-4", "--decay", "all"];
    assert_eq!(
        named,
        run(
            "flags",
            &[&flags[..], &["--norm", "bn", "--head", "linear", "--shortcut", "b", "--epochs", "10"]].concat()
        )
    );
    let changed = run("changed", &["--recipe", "thorough", "--epochs", "4", "--schedule", "cosine", "--lr", "0.02"]);
    assert_eq!((&changed["schedule"], &changed["milestones"]), (&"cosine".into(), &Value::Array(Vec::new())));
    assert_eq!((&changed["learning_rate"], &changed["decay"]), (&0.02.into(), &"all".into()));
    // More epochs do not move the steps of a run that was begun, and what is left out stays as it has it.
    done(train(&set, &out("named"), &["--recipe", "thorough", "--epochs", "11", "--resume"]));
    done(train(&set, &out("named"), &["--recipe", "thorough", "--epochs", "12", "--resume"]));
    done(train(&set, &out("named"), &["--epochs", "13", "--resume"]));
    refused(train(&set, &out("named"), &["--recipe", "quick", "--resume"]), &["--norm is nbn, was bn"]);
    refused(train(&set, &out("named"), &["--head", "lr", "--resume"]), &["--head is lr, was linear"]);
    done(train(&set, &out("changed"), &["--epochs", "20", "--resume"]));
    // 4 % of 20 epochs would be a rise of one.
    let same = ["--recipe", "thorough", "--epochs", "21", "--schedule", "cosine", "--lr", "0.02", "--resume"];
    done(train(&set, &out("changed"), &same));
    refused(train(&set, &out("changed"), &["--recipe", "thorough", "--resume"]), &["--schedule is step, was"]);
}

#[test]
fn a_run_that_held_nothing_out_resumes() {
    let folder = tempfile::tempdir().unwrap();
    let set = pictures(folder.path());
    let out = folder.path().join("run.safetensors");
    for epochs in ["1", "2"] {
        done(train(&set, &out, &["--epochs", epochs, "--calibration-fraction", "0", "--resume"]));
    }
}

#[test]
fn a_killed_run_resumes_to_the_same_network() {
    let folder = tempfile::tempdir().unwrap();
    let set = pictures(folder.path());
    let more = ["--epochs", "6", "--ema", "0.9", "--mixup", "0.5", "--augment", "crop,flip,auto-augment,cutout"];
    let unbroken = folder.path().join("unbroken.safetensors");
    done(train(&set, &unbroken, &more));
    let killed = folder.path().join("killed.safetensors");
    for epochs in [2, 4] {
        let resumed = [&more[..], &["--resume"]].concat();
        let mut child = until(&set, &killed, &resumed, epochs);
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let output = train(&set, &killed, &[&more[..], &["--resume"]].concat());
    assert!(text(&output.stderr).contains("resumed     after"), "{}", text(&output.stderr));
    done(output);
    // Not the files: the order of the metadata in a safetensors header is any.
    assert!(Checkpoint::load(&unbroken).unwrap() == Checkpoint::load(&killed).unwrap(), "the networks differ");
    let losses = |out: &Path| -> Vec<(Value, Value)> {
        let text = fs::read_to_string(out.with_extension("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap());
        lines.map(|line| (line["epoch"].clone(), line["loss"].clone())).collect()
    };
    assert_eq!(losses(&unbroken), losses(&killed));
}

#[cfg(unix)]
#[test]
fn an_interrupt_saves_within_the_epoch_and_exits_0() {
    let folder = tempfile::tempdir().unwrap();
    let set = pictures(folder.path());
    let out = folder.path().join("run.safetensors");
    let mut child = until(&set, &out, &["--epochs", "400"], 1);
    child.signal("INT");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(progress(&out)["epoch"].as_u64().unwrap() < 400);
    Checkpoint::load(&out).unwrap();
}

#[test]
fn the_exported_bundle_is_as_accurate_as_the_trainer_says() {
    let folder = tempfile::tempdir().unwrap();
    let set = pictures(folder.path());
    let out = folder.path().join("run.safetensors");
    let test = set.to_str().unwrap();
    done(train(&set, &out, &["--epochs", "8", "--test", test, "--loss", "balanced-softmax"]));
    let metrics = fs::read_to_string(out.with_extension("metrics.jsonl")).unwrap();
    let last: Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
    let right = last["evaluation"]["right"].as_u64().unwrap();
    assert!(right > 24, "{right} of 42 images: no more than the largest class");
    let bundle = folder.path().join("models/run/1");
    done(fold(&["export", out.to_str().unwrap(), "--out", bundle.to_str().unwrap()]));
    let list = folder.path().join("list.csv");
    let mut rows = "path,label\n".to_owned();
    for class in ["blue", "green", "red"] {
        for file in fs::read_dir(set.join(class)).unwrap() {
            rows += &format!("{},{class}\n", file.unwrap().path().display());
        }
    }
    fs::write(&list, rows).unwrap();
    let scored = nbn(&["score", "--model", bundle.to_str().unwrap(), "--top-k", "1", list.to_str().unwrap()]);
    assert!(scored.status.success(), "{}", text(&scored.stderr));
    let hits = text(&scored.stdout)
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|row| {
            let label = row["predictions"][0]["label"].as_str().unwrap();
            row["path"].as_str().unwrap().contains(&format!("/{label}/"))
        })
        .count();
    assert_eq!(hits as u64, right, "nbn score beside the trainer");
    let manifest: Value = serde_json::from_slice(&fs::read(bundle.join("manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["classes"][2]["label"], "red");
    assert_eq!(manifest["preprocessing"]["crop"], 16);
    assert_eq!(manifest["fold"]["kappa"], 1.0);
    let held_out = out.with_extension("calibration.json");
    let calibrated = fold(&[
        "calibrate",
        bundle.to_str().unwrap(),
        "--data",
        test,
        "--records",
        held_out.to_str().unwrap(),
        "--training-data",
        test,
        "--training-records",
        out.with_extension("training.json").to_str().unwrap(),
    ]);
    let stderr = text(&calibrated.stderr);
    assert!(calibrated.status.success() && stderr.contains("none of them used in training"), "{stderr}");
}

#[test]
fn what_cannot_be_trained_on_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let set = pictures(folder.path());
    let out = folder.path().join("run.safetensors");
    let short = ["--epochs", "1"];
    fs::create_dir(set.join("yellow")).unwrap();
    refused(train(&set, &out, &short), &["class 3 (yellow) has no images", "add some"]);
    fs::copy(set.join("red/00.png"), set.join("yellow/one.png")).unwrap();
    // All that is broken is named at once, before anything is trained.
    fs::write(set.join("yellow/two.png"), b"no picture").unwrap();
    fs::write(set.join("blue/zz.jpg"), &fs::read(data("pixels/photo.jpg")).unwrap()[..2000]).unwrap();
    refused(
        train(&set, &out, &short),
        &["2 of 45 images cannot be decoded", "yellow/two.png", "blue/zz.jpg", "--skip-broken"],
    );
    // A file that is not there is no broken picture.
    std::os::unix::fs::symlink("gone.png", set.join("blue/link.png")).unwrap();
    let gone = ["1 of 46 images are missing or may not be read", "blue/link.png: No such file", "is a disk mounted"];
    refused(train(&set, &out, &[&short[..], &["--skip-broken"]].concat()), &gone);
    fs::remove_file(set.join("blue/link.png")).unwrap();
    assert!(!out.exists());
    // What notebooks and other systems leave is no class and no image.
    fs::create_dir(set.join(".ipynb_checkpoints")).unwrap();
    fs::write(set.join("red/._00.png"), b"AppleDouble").unwrap();
    let skipping = folder.path().join("skipping.safetensors");
    let skipped = train(&set, &skipping, &[&short[..], &["--skip-broken"]].concat());
    let said = text(&skipped.stderr);
    assert!(skipped.status.success(), "{said}");
    for words in [
        "2 of 45 images, which cannot be decoded",
        "1 of 4 classes have a single image, which is trained on, such as \"yellow\"",
        "whose names begin with a dot are left out: 2",
        "images are mirrored at random",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    let listed: Value = serde_json::from_slice(&fs::read(skipping.with_extension("broken.json")).unwrap()).unwrap();
    assert!(listed[0]["image"].as_str().unwrap().ends_with("blue/zz.jpg") && listed.as_array().unwrap().len() == 2);
    fs::remove_dir_all(set.join(".ipynb_checkpoints")).unwrap();
    fs::remove_file(set.join("red/._00.png")).unwrap();
    // Another broken image moves the numbers in the lists, and their images are the same.
    let lists =
        || ["training.json", "calibration.json"].map(|e| fs::read_to_string(skipping.with_extension(e)).unwrap());
    let before = lists();
    fs::write(set.join("blue/000.png"), b"no picture").unwrap();
    let again = |more: &[&str]| train(&set, &skipping, &[&["--skip-broken"], more].concat());
    done(again(&["--epochs", "2", "--resume"]));
    refused(again(&["--epochs", "2", "--seed", "5", "--resume"]), &["seed is 5"]);
    assert_eq!(lists(), before);
    for broken in ["blue/000.png", "blue/zz.jpg"] {
        fs::remove_file(set.join(broken)).unwrap();
    }
    fs::remove_dir_all(set.join("yellow")).unwrap();
    assert!(again(&["--epochs", "1", "--overwrite"]).status.success());
    assert!(!skipping.with_extension("broken.json").exists(), "the list is of an earlier run");

    let one = folder.path().join("one");
    fs::create_dir_all(one.join("only")).unwrap();
    fs::copy(set.join("red/00.png"), one.join("only/a.png")).unwrap();
    refused(train(&one, &out, &short), &["1 class", "at least 2"]);
    let list = folder.path().join("list.txt");
    fs::write(&list, "set/red/00.png 0\nset/red/01.png 7\n").unwrap();
    let names = folder.path().join("names.txt");
    fs::write(&names, "a\nb\n").unwrap();
    let named = [&short[..], &["--classes", names.to_str().unwrap()]].concat();
    refused(train(&list, &out, &named), &["line 2", "label 7", "0 to 1"]);
    fs::write(&names, "").unwrap();
    refused(train(&list, &out, &named), &["names.txt", "names no class"]);
    let beside = folder.path().join("linked");
    fs::create_dir_all(beside.join("red")).unwrap();
    fs::copy(set.join("red/00.png"), beside.join("red/00.png")).unwrap();
    std::os::unix::fs::symlink("nowhere", beside.join("green")).unwrap();
    let linked = train(&beside, &out, &short);
    refused(linked, &["linked: links that cannot be followed are left out: 1, such as", "linked/green", "1 class"]);
    fs::write(&names, "green\nred\n").unwrap();
    let named = [&short[..], &["--classes", names.to_str().unwrap()]].concat();
    refused(train(&beside, &out, &named), &["linked/green is a link that cannot be followed: No such file"]);
    refused(train(&set, &out, &["--lr", "0"]), &["--lr is 0", "above 0"]);
    refused(train(&set, &out, &["--lr", "inf"]), &["--lr is inf", "above 0, and finite"]);
    refused(train(&set, &out, &["--lr", "-1"]), &["--lr is -1", "above 0"]);
    refused(train(&set, &out, &["--epochs", "2", "--warm-up", "5"]), &["--warm-up is 5", "--epochs, which is 2"]);
    let steps = |milestones: &'static str| ["--epochs", "6", "--schedule", "step", "--milestones", milestones];
    refused(train(&set, &out, &steps("5,3")), &["--milestones is 5,3", "in the order"]);
    refused(train(&set, &out, &steps("3,6")), &["--milestones is 6", "6 epochs", "never come"]);
    refused(train(&set, &out, &["--reweight-from", "9", "--epochs", "2"]), &["--reweight-from is 9", "never come"]);
    refused(train(&set, &out, &["--augment", "flip,crop,flip"]), &["--augment names flip twice"]);
    fs::create_dir_all(out.with_extension("state")).unwrap();
    refused(train(&set, &out, &["--overwrite"]), &["run.state is a folder", "another --out"]);
    fs::remove_dir(out.with_extension("state")).unwrap();
    refused(train(&set, &out, &["--batch", "1"]), &["--batch is 1", "at least 2"]);
    refused(train(&set, &out, &["--schedule", "step"]), &["--schedule is step", "--milestones"]);
    refused(train(&set, &out, &["--milestones", "3,5"]), &["--milestones is 3,5", "--schedule step"]);
    for (idle, needs) in [
        (["--tau", "1.5"], "--loss logit-adjustment"),
        (["--ldam-margin", "0.4"], "--loss ldam"),
        (["--decay-factor", "0.2"], "--schedule step"),
    ] {
        refused(train(&set, &out, &idle), &[idle[0], needs, "leave it out"]);
    }
    let plain = ["--norm", "bn", "--magnitude-start", "2"];
    refused(train(&set, &out, &plain), &["--magnitude-start", "--norm nbn"]);
    refused(train(&set, &out, &["--arch", "resnet18", "--shortcut", "b"]), &["--shortcut", "CIFAR"]);
    refused(train(&set, &out, &["--augment", "flip,spin"]), &["spin", "trivial-augment"]);
    refused(train(&set, &out, &["--nbn-layers", "layer9.0.bn2"]), &["layer9.0.bn2"]);
    refused(train(&set, &folder.path().join("run.pth"), &short), &["run.pth", ".safetensors"]);
    refused(train(&set, &out, &["--device", "cuda"]), &["--device cuda", "--device cpu"]);
    assert!(!out.exists());
}

#[test]
fn groups_are_trained_on_or_held_out_as_a_whole() {
    let mut random = fastrand::Rng::with_seed(9);
    let names: Vec<String> = (0..4).map(|k| format!("c{k}")).collect();
    for seed in 0..20 {
        // Objects of one class with 1 to 30 pictures each; the last class has one object.
        let (mut labels, mut groups) = (Vec::new(), Vec::new());
        let mut group = 0;
        for (class, objects) in [40, 12, 3, 1].into_iter().enumerate() {
            for _ in 0..objects {
                let pictures = random.usize(1..30);
                labels.extend(vec![class as u32; pictures]);
                groups.extend(vec![group; pictures]);
                group += 1;
            }
        }
        let all: Vec<usize> = (0..labels.len()).collect();
        let split = hold_out_groups(&labels, &all, &names, &groups, 0.1, seed).unwrap();
        assert_eq!(split.alone, [3]);
        let of = |records: &[usize]| records.iter().map(|&r| groups[r]).collect::<BTreeSet<usize>>();
        assert!(of(&split.training).is_disjoint(&of(&split.held_out)));
        assert_eq!(split.training.len() + split.held_out.len(), all.len());
        for class in 0..4 {
            let count = |records: &[usize]| records.iter().filter(|&&r| labels[r] == class).count();
            assert!(count(&split.training) > 0);
            assert_eq!(count(&split.held_out) > 0, class != 3);
        }
        let share = |class| {
            let count = |records: &[usize]| records.iter().filter(|&&r| labels[r] == class).count() as f64;
            count(&split.held_out) / count(&all)
        };
        assert!((0.05..0.2).contains(&share(0)), "{}", share(0));
        assert_eq!(split, hold_out_groups(&labels, &all, &names, &groups, 0.1, seed).unwrap());
    }
    // A camera sees all classes.
    let labels: Vec<u32> = (0..120).map(|r| r % 4).collect();
    let groups: Vec<usize> = (0..120).map(|r| r / 12).collect();
    let all: Vec<usize> = (0..120).collect();
    let split = hold_out_groups(&labels, &all, &names, &groups, 0.1, 1).unwrap();
    assert_eq!((split.held_out.len(), split.alone.len()), (12, 0));
    let one = hold_out_groups(&labels, &all, &names, &labels.iter().map(|&l| l as usize).collect::<Vec<_>>(), 0.1, 1);
    assert!(one.unwrap_err().contains("in every class, all images are of one group"));
}

#[test]
fn images_of_one_object_are_kept_together_by_train_and_calibrate() {
    let folder = tempfile::tempdir().unwrap();
    let set = folder.path().join("set");
    for (class, hue) in [("red", 0), ("green", 1)] {
        for object in 0..6 {
            for frame in 0..5 {
                let at = set.join(class).join(format!("object-{object}"));
                fs::create_dir_all(&at).unwrap();
                let mut picture = RgbImage::from_pixel(32, 32, image::Rgb([10 * object, 8 * frame, 30 + object]));
                picture.pixels_mut().for_each(|pixel| pixel.0[hue] = 200 + frame);
                picture.save(at.join(format!("cam{}_{frame}.png", frame % 2))).unwrap();
            }
        }
    }
    let out = folder.path().join("run.safetensors");
    let flags = |by| ["--epochs", "1", "--calibration-fraction", "0.2", "--group-by", by];
    for (by, words) in [
        ("object-9", "60 of 60 paths do not match, such as green/object-0/cam0_0.png"),
        ("object", "all 60 images are in one group"),
    ] {
        refused(train(&set, &out, &flags(by)), &[words]);
    }
    refused(train(&set, &out, &flags("(")), &["neither a column of the set nor a regular expression"]);
    let output = train(&set, &out, &flags(r"^(\w+/object-\d+)/"));
    assert!(text(&output.stderr).contains("groups      12 of images"), "{}", text(&output.stderr));
    done(output);
    done(train(&set, &out, &[&flags("folder")[..], &["--overwrite"]].concat()));
    let records = |ending: &str| -> BTreeSet<usize> {
        let text = fs::read(out.with_extension(ending)).unwrap();
        let found: Value = serde_json::from_slice(&text).unwrap();
        found["records"].as_array().unwrap().iter().map(|r| r.as_u64().unwrap() as usize).collect()
    };
    let (training, held_out) = (records("training.json"), records("calibration.json"));
    // The set's order is that of its paths: five frames of an object follow each other.
    let objects = |records: &BTreeSet<usize>| records.iter().map(|r| r / 5).collect::<BTreeSet<usize>>();
    assert!(objects(&training).is_disjoint(&objects(&held_out)), "{held_out:?}");
    assert_eq!((objects(&training).len(), objects(&held_out).len()), (10, 2));
    refused(train(&set, &out, &[&flags("object-\\d")[..], &["--resume"]].concat()), &["--group-by is", "was folder"]);

    let bundle = folder.path().join("models/objects/1");
    let (path, at) = (out.to_str().unwrap(), bundle.to_str().unwrap());
    assert!(fold(&["export", path, "--out", at]).status.success());
    let calibrate = |more: &[&str]| {
        let args = ["calibrate", at, "--data", set.to_str().unwrap(), "--dry-run", "--rung", "prior-shift"];
        fold(&[&args[..], more].concat())
    };
    let together = calibrate(&["--group-by", "folder"]);
    assert!(together.status.success(), "{}", text(&together.stderr));
    let ladder = |more: &[&str]| {
        let to = folder.path().join("calibration.json");
        let args = ["calibrate", at, "--data", set.to_str().unwrap(), "--rung", "prior-shift", "--force", "--out"];
        let out = fold(&[&args[..], &[to.to_str().unwrap()], more].concat());
        assert!(out.status.success(), "{}", text(&out.stderr));
        let found: Value = serde_json::from_slice(&fs::read(to).unwrap()).unwrap();
        found["fit"]["ladder"].clone()
    };
    assert_ne!(ladder(&["--group-by", "folder"]), ladder(&[]), "the folds are the same");
    let refused = calibrate(&["--group-by", "frame-(.)"]);
    assert!(text(&refused.stderr).contains("60 of 60 paths do not match"), "{}", text(&refused.stderr));

    // The run's list knows how it was made; that of the training images is for something else.
    let list = |ending: &str| out.with_extension(ending).to_str().unwrap().to_owned();
    let listed = calibrate(&["--records", &list("calibration.json")]);
    assert!(text(&listed.stderr).contains("--group-by folder, as the run had it"), "{}", text(&listed.stderr));
    let trained = calibrate(&["--records", &list("training.json")]);
    assert!(text(&trained.stderr).contains("lists the images that were trained on"), "{}", text(&trained.stderr));
    let training = ["--training-data", set.to_str().unwrap(), "--training-records"];
    let trained = list("training.json");
    let evaluate = |records: &[&str]| {
        let args = ["evaluate", at, "--data", set.to_str().unwrap(), "--resamples", "20"];
        fold(&[&args[..], &training, &[trained.as_str()], records].concat())
    };
    let all = evaluate(&[]);
    assert!(text(&all.stderr).contains("50 of 60 images were trained on"), "{}", text(&all.stderr));
    let dropped = evaluate(&["--drop-shared"]);
    assert!(text(&dropped.stdout).contains(": 10 images"), "{}", text(&dropped.stdout));
    assert!(evaluate(&["--records", &list("calibration.json")]).status.success());
    // What a run was begun with need not be said again.
    done(train(&set, &out, &["--epochs", "2", "--calibration-fraction", "0.2", "--resume"]));
    // The same set as a table, whose column says what belongs together.
    let mut rows = String::from("image,class,object\n");
    for (class, _) in [("red", 0), ("green", 1)] {
        for (object, frame) in (0..6).flat_map(|object| (0..5).map(move |frame| (object, frame))) {
            let path = format!("set/{class}/object-{object}/cam{}_{frame}.png", frame % 2);
            rows += &format!("{path},{class},{class}{object}\n");
        }
    }
    let table = folder.path().join("set.csv");
    fs::write(&table, rows).unwrap();
    let tabled = train(&table, &folder.path().join("table.safetensors"), &flags("object"));
    assert!(text(&tabled.stderr).contains("groups      12 of images"), "{}", text(&tabled.stderr));
    done(tabled);
}

/// The schedule is laid over the longer run; with a constant one, nothing tells the two ways apart.
#[test]
fn a_finished_run_can_be_given_more_epochs() {
    let folder = tempfile::tempdir().unwrap();
    let set = pictures(folder.path());
    let lines = |out: &Path| -> Vec<Value> {
        let text = fs::read_to_string(out.with_extension("metrics.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let of = |lines: &[Value], field: &str| -> Vec<Value> { lines.iter().map(|line| line[field].clone()).collect() };
    for (schedule, same) in [("constant", true), ("cosine", false)] {
        let run = |out: &Path, epochs: &str, more: &[&str]| {
            train(&set, out, &[&["--epochs", epochs, "--schedule", schedule, "--ema", "0.9"][..], more].concat())
        };
        let (whole, grown) = (folder.path().join("whole.safetensors"), folder.path().join("grown.safetensors"));
        done(run(&whole, "4", &["--overwrite"]));
        done(run(&grown, "2", &["--overwrite"]));
        // What is kept of the finished run is made of its state, whatever became of the checkpoint.
        fs::write(&grown, "cut short").unwrap();
        let output = run(&grown, "4", &["--resume"]);
        assert!(text(&output.stderr).contains("longer      4 epochs instead of 2"), "{}", text(&output.stderr));
        done(output);
        let networks = [&whole, &grown].map(|out| Checkpoint::load(out).unwrap());
        assert_eq!(networks[0] == networks[1], same, "{schedule}");
        let (whole, told) = (lines(&whole), lines(&grown));
        assert_eq!(of(&told, "epoch"), [1, 2, 3, 4].map(Value::from));
        assert_eq!(of(&told, "epochs"), [2, 2, 4, 4].map(Value::from));
        assert_eq!(of(&told[2..], "learning_rate"), of(&whole[2..], "learning_rate"));
        refused(run(&grown, "2", &["--resume"]), &["--epochs is 2", "has done 4", "at least 4", "--overwrite"]);
        // A kill after the state and before the checkpoint leaves the earlier one, which is this run's.
        let state = fs::read(grown.with_extension("state")).unwrap();
        done(run(&grown, "2", &["--overwrite"]));
        fs::write(grown.with_extension("state"), state).unwrap();
        done(run(&grown, "4", &["--resume"]));
        assert!(Checkpoint::load(&grown).unwrap() == networks[1]);
        refused(run(&grown, "5", &["--resume", "--seed", "7"]), &["seed is 7"]);
        let kept = Checkpoint::load(&folder.path().join("grown.epoch-2.safetensors")).unwrap();
        done(run(&grown, "2", &["--overwrite"]));
        assert!(Checkpoint::load(&grown).unwrap() == kept, "the finished network was not kept");
        // Without the flag a run keeps its epochs.
        let flags = ["--schedule", schedule, "--ema", "0.9", "--resume"];
        done(train(&set, &grown, &flags));
        assert_eq!(lines(&grown).len(), 2);
    }
}

#[cfg(unix)]
#[test]
fn a_run_can_be_given_fewer_epochs_than_it_had_if_not_more_are_done() {
    let folder = tempfile::tempdir().unwrap();
    let set = pictures(folder.path());
    let out = folder.path().join("run.safetensors");
    let mut child = until(&set, &out, &["--epochs", "4000"], 1);
    assert!(child.terminate().success());
    let exported = fold(&["export", out.to_str().unwrap(), "--out", folder.path().join("m/1").to_str().unwrap()]);
    assert!(text(&exported.stderr).contains("of 4000 epochs: finish it with"), "{}", text(&exported.stderr));
    done(exported);
    let epochs = || fs::read_to_string(out.with_extension("metrics.jsonl")).unwrap().lines().count();
    let few = epochs().to_string();
    let output = train(&set, &out, &["--epochs", &few, "--resume"]);
    match progress(&out)["step"].as_u64().unwrap() {
        // It ended between two epochs.
        0 => done(output),
        _ => refused(output, &[&format!("--epochs is {few}"), "has begun epoch", "at least"]),
    }
    let enough = (epochs() + 2).to_string();
    let output = train(&set, &out, &["--epochs", &enough, "--resume"]);
    assert!(text(&output.stderr).contains(&format!("shorter     {enough} epochs instead of 4000")));
    done(output);
    assert_eq!(epochs().to_string(), enough);
    let exported =
        fold(&["export", out.to_str().unwrap(), "--force", "--out", folder.path().join("m/1").to_str().unwrap()]);
    assert!(!text(&exported.stderr).contains("warning"), "{}", text(&exported.stderr));
}

#[test]
fn a_run_that_is_cut_to_what_is_done_has_ended_there() {
    let folder = tempfile::tempdir().unwrap();
    let set = pictures(folder.path());
    let out = folder.path().join("run.safetensors");
    let mut child = until(&set, &out, &["--epochs", "4000"], 2);
    child.kill().unwrap();
    child.wait().unwrap();
    let done_epochs = progress(&out)["epoch"].clone();
    done(train(&set, &out, &["--epochs", &done_epochs.to_string(), "--resume"]));
    assert_eq!(progress(&out)["recipe"]["epochs"], done_epochs);
    let output = train(&set, &out, &["--resume"]);
    assert!(text(&output.stderr).contains("which are all: give more --epochs"), "{}", text(&output.stderr));
    done(output);
}

#[test]
fn steps_that_lie_behind_are_said_to_when_a_run_gets_more_epochs() {
    let folder = tempfile::tempdir().unwrap();
    let set = pictures(folder.path());
    let out = folder.path().join("run.safetensors");
    done(train(&set, &out, &["--recipe", "thorough", "--epochs", "1"]));
    let output = train(&set, &out, &["--epochs", "3", "--resume"]);
    assert!(text(&output.stderr).contains("all steps of its schedule lie behind"), "{}", text(&output.stderr));
    done(output);
}

/// As on a full disk, in a closed window, or with `tee` gone.
#[cfg(target_os = "linux")]
#[test]
fn a_run_goes_on_where_nobody_reads_what_it_says() {
    let folder = tempfile::tempdir().unwrap();
    let set = pictures(folder.path());
    let full = || fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let run = |name: &str, stdout: Stdio, stderr: Stdio| {
        let out = folder.path().join(name);
        let mut command = Command::new(env!("CARGO_BIN_EXE_fold"));
        command.args(arguments(&set, &out, &["--epochs", "3"])).stdout(stdout).stderr(stderr);
        let output = command.output().unwrap();
        assert_eq!(fs::read_to_string(out.with_extension("metrics.jsonl")).unwrap().lines().count(), 3);
        Checkpoint::load(&out).unwrap();
        output
    };
    done(run("err.safetensors", Stdio::piped(), full().into()));
    // That the name was not written is said.
    refused(run("out.safetensors", full().into(), Stdio::piped()), &["standard output cannot be written"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    done(run("gone.safetensors", writer.into(), Stdio::piped()));
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    done(run("log.safetensors", Stdio::piped(), writer.into()));
}

#[cfg(target_os = "linux")]
#[test]
fn a_run_ends_with_its_terminal_unless_it_ignores_that() {
    let folder = tempfile::tempdir().unwrap();
    let set = pictures(folder.path());
    let epochs =
        |out: &Path| fs::read_to_string(out.with_extension("metrics.jsonl")).unwrap_or_default().lines().count();
    let begin = |out: &Path, hangup: &str| {
        let mut command = Command::new("env");
        command.args([hangup, env!("CARGO_BIN_EXE_fold")]).args(arguments(&set, out, &["--epochs", "4000"]));
        begun(&mut command, out, 1)
    };
    let out = folder.path().join("ends.safetensors");
    let mut child = begin(&out, "--default-signal=HUP");
    // The shell says it, and the system does.
    child.signal("HUP");
    child.signal("HUP");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let out = folder.path().join("goes-on.safetensors");
    let mut child = begin(&out, "--ignore-signal=HUP");
    child.signal("HUP");
    let done = epochs(&out);
    while epochs(&out) < done + 3 {
        assert!(child.try_wait().unwrap().is_none(), "it ended");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(child.terminate().success());
}

#[test]
fn a_file_of_pixels_that_changed_is_another_set() {
    let folder = tempfile::tempdir().unwrap();
    let (file, out) = (folder.path().join("train.bin"), folder.path().join("run.safetensors"));
    let mut random = fastrand::Rng::with_seed(5);
    let records = (0..20u8).flat_map(|n| [vec![n % 2], (0..3072).map(|_| random.u8(..)).collect()].concat());
    let mut bytes: Vec<u8> = records.collect();
    fs::write(&file, &bytes).unwrap();
    let names = folder.path().join("names.txt");
    fs::write(&names, "a\nb\n").unwrap();
    let flags = ["--epochs", "1", "--classes", names.to_str().unwrap(), "--input-size", "32"];
    done(train(&file, &out, &flags));
    bytes[100] ^= 1;
    fs::write(&file, &bytes).unwrap();
    let resumed = train(&file, &out, &[&flags[..], &["--resume"]].concat());
    refused(resumed, &["run.training.json lists are others now", "what is in the file has changed", "--overwrite"]);
}

#[test]
fn a_run_goes_on_only_as_it_was_begun() {
    let folder = tempfile::tempdir().unwrap();
    let set = pictures(folder.path());
    let out = folder.path().join("run.safetensors");
    done(train(&set, &out, &["--epochs", "1"]));
    let trained = Checkpoint::load(&out).unwrap();
    fs::remove_file(&out).unwrap();
    done(train(&set, &out, &["--epochs", "1", "--resume"]));
    assert!(Checkpoint::load(&out).unwrap() == trained, "the checkpoint of a finished run came back otherwise");
    let before = fs::read(&out).unwrap();
    refused(train(&set, &out, &["--epochs", "1"]), &["already exists", "--resume", "--overwrite"]);
    refused(
        train(&set, &out, &["--epochs", "1", "--arch", "resnet8_w8", "--resume"]),
        &["cifar_resnet8_w8", "was cifar_resnet8_w4"],
    );
    fs::create_dir(set.join("white")).unwrap();
    fs::copy(set.join("red/00.png"), set.join("white/00.png")).unwrap();
    refused(
        train(&set, &out, &["--epochs", "1", "--resume"]),
        &["it trains on 39 images of", "white/00.png is new among them"],
    );
    fs::remove_dir_all(set.join("white")).unwrap();
    fs::remove_file(set.join("red/00.png")).unwrap();
    refused(
        train(&set, &out, &["--epochs", "1", "--resume"]),
        &["it trains on 37 images of", "and did on 38 images of", "is no longer among"],
    );
    fs::write(out.with_extension("state"), b"half a file").unwrap();
    refused(train(&set, &out, &["--epochs", "1", "--resume"]), &["not the state of this run", "--overwrite"]);
    fs::remove_file(out.with_extension("state")).unwrap();
    refused(train(&set, &out, &["--epochs", "1", "--resume"]), &["run.state", "is missing", "--overwrite"]);
    let lists = || ["training.json", "calibration.json"].map(|ending| fs::read(out.with_extension(ending)).unwrap());
    let listed = lists();
    let other = ["--overwrite", "--seed", "1", "--nbn-layers", "layer9.0.bn2"];
    refused(train(&set, &out, &other), &["layer9.0.bn2"]);
    assert!(listed == lists(), "a refused run left its lists beside another's checkpoint");
    assert_eq!(before, fs::read(&out).unwrap(), "the checkpoint was touched");
    done(train(&set, &out, &["--epochs", "1", "--overwrite", "--seed", "1"]));
    assert!(before != fs::read(&out).unwrap() && listed != lists());
}

#[test]
fn a_run_that_cannot_be_saved_leaves_the_one_that_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let set = pictures(folder.path());
    let out = folder.path().join("run.safetensors");
    done(train(&set, &out, &["--epochs", "1"]));
    let files = || {
        ["safetensors", "state", "metrics.jsonl", "training.json", "calibration.json"]
            .map(|ending| fs::read(out.with_extension(ending)).unwrap())
    };
    let before = files();
    // A folder in the place of a draft fails as a full disk does, after the state and the checkpoint were written.
    let taken = folder.path().join(".run.training.json.partial");
    fs::create_dir(&taken).unwrap();
    let overwrite = ["--epochs", "1", "--overwrite", "--seed", "1"];
    refused(train(&set, &out, &overwrite), &["run.training.json", "the earlier run is unchanged"]);
    assert!(files() == before, "the old run was touched");
    assert!(!folder.path().join(".run.state.next").exists() && !folder.path().join(".run.safetensors.next").exists());
    fs::remove_dir(&taken).unwrap();
    done(train(&set, &out, &["--epochs", "1", "--resume"]));
    done(train(&set, &out, &overwrite));
    assert!(files().iter().zip(&before).all(|(new, old)| new != old));
}

/// The safetensors file at `path` with `change` made to the JSON under `key` of its metadata.
fn with_metadata(path: &Path, key: &str, change: impl Fn(&mut Value)) {
    let bytes = fs::read(path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let mut metadata = header.metadata().clone().unwrap();
    let mut value: Value = serde_json::from_str(&metadata[key]).unwrap();
    change(&mut value);
    metadata.insert(key.into(), value.to_string());
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let changed = safetensors::serialize(file.tensors(), Some(metadata)).unwrap();
    fs::write(path, changed).unwrap();
}

#[test]
fn a_state_is_not_taken_for_that_of_another_runs_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let set = pictures(folder.path());
    let (out, other) = (folder.path().join("run.safetensors"), folder.path().join("other.safetensors"));
    done(train(&set, &out, &["--epochs", "1"]));
    done(train(&set, &other, &["--epochs", "1", "--seed", "1"]));
    fs::copy(&other, &out).unwrap();
    let before = fs::read(&out).unwrap();
    refused(
        train(&set, &out, &["--epochs", "1", "--resume"]),
        &["run.safetensors belongs to another run", "run.state"],
    );
    assert_eq!(before, fs::read(&out).unwrap(), "the other run's checkpoint was overwritten");
}

#[test]
fn every_number_of_a_state_is_checked_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let set = pictures(folder.path());
    let out = folder.path().join("run.safetensors");
    done(train(&set, &out, &["--epochs", "1"]));
    let state = out.with_extension("state");
    let whole = fs::read(&state).unwrap();
    for (key, value, words) in [
        ("epoch", serde_json::json!(2), "its epoch is 2; in this run it can be at most 1"),
        ("step", serde_json::json!(u64::MAX), "its step is 18446744073709551615"),
        ("seen", serde_json::json!(1_000_000), "its seen is 1000000"),
        ("right", serde_json::json!(1), "its right is 1; in this run it can be at most 0"),
        ("loss", serde_json::json!(-1.0), "its loss is -1"),
        ("seconds", serde_json::json!(1e308), "its seconds is 1000"),
    ] {
        fs::write(&state, &whole).unwrap();
        with_metadata(&state, "nbn.progress", |progress| progress[key] = value.clone());
        refused(train(&set, &out, &["--epochs", "1", "--resume"]), &["run.state", words, "--overwrite"]);
    }
    let mut broken = whole.clone();
    let end = broken.len() - 4;
    broken[end..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&state, broken).unwrap();
    refused(train(&set, &out, &["--epochs", "1", "--resume"]), &["run.state", "holds NaN", "--overwrite"]);
}

#[test]
fn classes_of_other_names_are_another_run() {
    let folder = tempfile::tempdir().unwrap();
    pictures(folder.path());
    let list = folder.path().join("list.txt");
    let lines: String = (0..6).map(|n| format!("set/red/0{n}.png 0\nset/blue/0{n}.png 1\n")).collect();
    fs::write(&list, lines).unwrap();
    let names = folder.path().join("names.txt");
    fs::write(&names, "red\nblue\n").unwrap();
    let out = folder.path().join("run.safetensors");
    done(train(&list, &out, &["--epochs", "1", "--classes", names.to_str().unwrap()]));
    refused(train(&list, &out, &["--epochs", "1", "--resume"]), &["class 0 is \"class 0\", was \"red\""]);
}

#[test]
fn one_process_trains_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let set = pictures(folder.path());
    let out = folder.path().join("run.safetensors");
    let mut child = until(&set, &out, &["--epochs", "400"], 1);
    let second = train(&set, &out, &["--epochs", "400", "--resume"]);
    child.kill().unwrap();
    child.wait().unwrap();
    refused(second, &["another process is training", "run.safetensors", "another --out"]);
}

#[test]
fn test_pictures_are_looked_at_before_anything_is_trained() {
    let folder = tempfile::tempdir().unwrap();
    let set = pictures(folder.path());
    let test = folder.path().join("test");
    for class in ["blue", "green", "red"] {
        fs::create_dir_all(test.join(class)).unwrap();
        fs::copy(set.join(class).join("00.png"), test.join(class).join("00.png")).unwrap();
    }
    fs::write(test.join("red/00.png"), b"no picture").unwrap();
    let out = folder.path().join("run.safetensors");
    let flags = ["--epochs", "2", "--test", test.to_str().unwrap(), "--resume"];
    refused(train(&set, &out, &flags), &["1 of 3 test images cannot be decoded", "red/00.png"]);
    assert!(!out.exists());
    let without = train(&set, &out, &[&flags[..], &["--skip-broken"]].concat());
    let told = text(&without.stderr).to_owned();
    done(without);
    for words in
        ["left out    1 of 3 test images", "measured    on 2 images", "test images have the pixels of one that is"]
    {
        assert!(told.contains(words), "{words}: {told}");
    }
    fs::copy(set.join("red/00.png"), test.join("red/00.png")).unwrap();
    let output = train(&set, &out, &flags);
    assert!(text(&output.stderr).contains("resumed     after 2 epochs, which are all"), "{}", text(&output.stderr));
    done(output);
}

#[test]
fn the_running_mean_forgets_the_random_start() {
    assert_eq!(ema_decay(0.999, 0), 0.1);
    assert_eq!(ema_decay(0.999, 8990), 0.999);
    // What is left of the start after 480 steps.
    let start: f64 = (0..480).map(|step| ema_decay(0.999, step)).product();
    assert!(start < 1e-12, "{start}");
}

#[test]
fn a_diverging_run_says_where_and_keeps_the_last_good_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let set = pictures(folder.path());
    let out = folder.path().join("run.safetensors");
    let wild = ["--epochs", "50", "--lr", "1e8", "--warm-up", "2", "--norm", "bn", "--head", "linear"];
    refused(train(&set, &out, &wild), &["diverged", "step", "--clip 1", "Largest norms"]);
}
