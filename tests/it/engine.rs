//! The engine under batches, cancellations and faults.

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use nbn::classify::{Classifier, ClassifyError, Executor, Input, Network, Prepare, Preparer, StageTimes};
use nbn::engine::{Budget, Crew, Engine, Refused};
use nbn::pixels::{DecodeLimits, Picture, TensorBatch, TensorLength};
use nbn::runtime::{NetworkCache, Outputs, Runner, RuntimeError, SessionOptions};
use nbn::stop::Stop;
use ndarray::{Array2, ArrayView4};
use serde_json::json;

use crate::accelerator::Accelerator;
use crate::support::{Endless, Server, library, model_of, picture, shipped};

/// Gives each picture's first value back as its first logit and its only feature.
struct Marking {
    random: fastrand::Rng,
}

impl Runner for Marking {
    fn run(&mut self, pictures: ArrayView4<'_, f32>, stop: &Stop) -> Result<Outputs, RuntimeError> {
        std::thread::sleep(Duration::from_micros(self.random.u64(0..400)));
        if stop.asked() {
            return Err(RuntimeError::Stopped);
        }
        if pictures.shape()[0] > 1 && self.random.u8(0..20) == 0 {
            // Its pictures must then be tried one by one.
            return Err(RuntimeError::Run("on purpose".into()));
        }
        let mark = |n: usize| pictures[[n, 0, 0, 0]];
        let logits = |(n, k)| if k == 0 { mark(n) } else { 0.0 };
        Ok(Outputs {
            logits: Array2::from_shape_fn((pictures.shape()[0], 10), logits),
            features: Some(Array2::from_shape_fn((pictures.shape()[0], 1), |(n, _)| mark(n))),
        })
    }
}

fn marked(mark: f32) -> Input {
    let mut values = vec![0.0f32; 3 * 32 * 32];
    values[0] = mark;
    Input::Pixels(values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>().into())
}

/// Decodes a mark, and sometimes takes its time.
struct Marks {
    random: std::sync::Mutex<fastrand::Rng>,
}

impl Marks {
    fn boxed(seed: u64) -> Box<Self> {
        Box::new(Self { random: std::sync::Mutex::new(fastrand::Rng::with_seed(seed)) })
    }
}

impl Prepare for Marks {
    fn shape(&self) -> [usize; 3] {
        [3, 32, 32]
    }

    fn normalize_into(&self, _: &Picture, _: &mut TensorBatch) -> Result<(), TensorLength> {
        Ok(())
    }

    fn prepare_into(&self, bytes: &[u8], stop: &Stop, batch: &mut TensorBatch) -> Result<StageTimes, ClassifyError> {
        std::thread::sleep(Duration::from_micros(self.random.lock().unwrap().u64(0..300)));
        if stop.asked() {
            return Err(ClassifyError::Deadline);
        }
        let Input::Pixels(tensor) = marked(f32::from_le_bytes(bytes.try_into().unwrap())) else { unreachable!() };
        batch.push_bytes(&tensor)?;
        Ok(StageTimes::default())
    }
}

/// The structure of an engine, and the devices that it can lose.
fn crew(random: &mut fastrand::Rng, seed: u64, apart: bool) -> (Crew, Vec<Accelerator>) {
    let (workers, max_batch) = (random.usize(1..4), random.usize(1..12));
    let manifest = Arc::new(shipped().manifest);
    if !apart {
        let classifier = |n| {
            let runner = Marking { random: fastrand::Rng::with_seed(seed * 10 + n as u64) };
            let classifier = Classifier::with_parts(manifest.clone(), Marks::boxed(seed + n as u64), Box::new(runner));
            classifier.with_max_batch(max_batch)
        };
        return (Crew::Together((0..workers).map(classifier).collect()), Vec::new());
    }
    let time = |random: &mut fastrand::Rng, most| Duration::from_micros(random.u64(0..most));
    let devices: Vec<Accelerator> = (0..random.u32(1..4))
        .map(|n| Accelerator::new(n, time(random, 600), time(random, 60), 10))
        .inspect(|device| device.fail(50))
        .collect();
    let executors = |device: &Accelerator| {
        let executor =
            || Executor::new(Network::new(manifest.clone(), device.handle()).with_max_batch(max_batch).with_features());
        std::iter::repeat_with(executor).take(2).collect()
    };
    let named = devices.iter().enumerate().map(|(n, device)| (n.to_string(), executors(device))).collect();
    let preparers = (0..workers).map(|n| Preparer::new(Marks::boxed(seed + n as u64))).collect();
    (Crew::Apart { preparers, devices: named }, devices)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_reply_belongs_to_its_own_picture_under_random_batches_cancellations_and_lost_devices() {
    for (seed, apart) in (0..32).map(|seed| (seed, seed % 2 == 1)) {
        let mut random = fastrand::Rng::with_seed(seed);
        let (crew, mut devices) = crew(&mut random, seed, apart);
        let budget = Arc::new(Budget::new(random.usize(1..4)));
        let engine = Engine::start(crew, 64, budget.clone()).unwrap();
        // All but the last, or all of them.
        let all = random.bool();
        let mut losses: Vec<u32> = devices.iter().map(|_| random.u32(20..120)).collect();
        let (mut answered, mut left, mut refused, mut without) = (0, 0, 0, 0);
        let mut open = Vec::new();
        for request in 0..120u32 {
            if let Some(at) = losses.iter().position(|&when| when <= request)
                && (all || devices.len() > 1)
            {
                devices.swap_remove(at).lose();
                losses.swap_remove(at);
            }
            let marks: Vec<f32> = (0..random.u32(1..9)).map(|n| (request * 16 + n) as f32).collect();
            let deadline = (random.u8(0..8) == 0).then(|| Instant::now() + Duration::from_micros(random.u64(0..3000)));
            let mut input = |mark: f32| match random.bool() {
                true => marked(mark),
                false => Input::Encoded(mark.to_le_bytes().to_vec().into()),
            };
            match engine.submit(marks.iter().map(|&m| input(m)).collect(), deadline) {
                Ok(tickets) => open.extend(tickets.into_iter().zip(marks)),
                Err(Refused::Full { retry_after } | Refused::TooSlow { retry_after }) => {
                    assert!(retry_after >= Duration::from_secs(1));
                    refused += 1;
                }
                Err(Refused::Late) => refused += 1,
                Err(Refused::NoDevice) if devices.is_empty() && apart => without += 1,
                Err(error) => panic!("{error}"),
            }
            while open.len() > random.usize(0..80) {
                let (ticket, mark) = open.swap_remove(random.usize(0..open.len()));
                if random.u8(0..3) == 0 {
                    left += 1;
                    drop(ticket);
                    continue;
                }
                match ticket.await.expect("an answer") {
                    Ok(prediction) => {
                        assert_eq!(prediction.logits.values()[0], mark, "seed {seed}");
                        assert_eq!(prediction.features, Some(vec![mark]), "seed {seed}");
                    }
                    Err(ClassifyError::Deadline) => {}
                    Err(ClassifyError::Runtime(RuntimeError::Lost { .. })) if devices.is_empty() && apart => {
                        without += 1
                    }
                    Err(error) => panic!("seed {seed}, mark {mark}: {error}"),
                }
                answered += 1;
            }
        }
        // Some are closed with pictures left, of which some are given up.
        let mut engine = Some(engine);
        if random.bool() {
            engine = None;
            open.retain(|_| random.u8(0..3) > 0);
        }
        for (ticket, mark) in open {
            match ticket.await.expect("an answer") {
                Ok(prediction) => assert_eq!(prediction.logits.values()[0], mark, "seed {seed}"),
                Err(ClassifyError::Deadline) => {}
                Err(ClassifyError::Runtime(RuntimeError::Lost { .. })) if devices.is_empty() && apart => without += 1,
                Err(error) => panic!("seed {seed}, mark {mark}: {error}"),
            }
        }
        assert!(
            answered + without > 20 && left + without > 20,
            "seed {seed}: {answered} answered, {left} left, {refused} refused"
        );
        if let Some(engine) = engine {
            let deadline = Instant::now() + Duration::from_secs(5);
            while engine.queued() + engine.running() > 0 {
                assert!(Instant::now() < deadline, "seed {seed}: {} queued", engine.queued());
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let stats = engine.stats();
            let images: u64 = stats.devices.iter().map(|device| device.images).sum();
            assert_eq!(images, if apart { stats.succeeded } else { 0 });
            let lost = apart && stats.devices.iter().all(|device| device.lost);
            assert_eq!(budget.lost().borrow().is_some(), lost);
            assert!(lost || without == 0, "seed {seed}: {without} without a device");
        }
        assert!(budget.wait_for_workers(Instant::now() + Duration::from_secs(5)), "seed {seed}: threads are left");
    }
}

/// An engine over one slow device that takes few pictures at a time.
fn slow_device(preparers: usize, max_batch: usize, capacity: usize) -> (Engine, Arc<Budget>) {
    let manifest = Arc::new(shipped().manifest);
    let device = Accelerator::new(0, Duration::from_millis(10), Duration::ZERO, 10);
    let executor = || Executor::new(Network::new(manifest.clone(), device.handle()).with_max_batch(max_batch));
    let crew = Crew::Apart {
        preparers: (0..preparers).map(|n| Preparer::new(Marks::boxed(n as u64))).collect(),
        devices: vec![("cuda:0".into(), vec![executor(), executor()])],
    };
    let budget = Arc::new(Budget::new(preparers));
    (Engine::start(crew, capacity, budget.clone()).unwrap(), budget)
}

fn encoded(mark: f32) -> Input {
    Input::Encoded(mark.to_le_bytes().to_vec().into())
}

#[test]
fn pictures_behind_those_that_were_given_up_are_prepared() {
    for pause in [0, 1, 3, 8] {
        let (engine, budget) = slow_device(2, 1, 64);
        let given_up = engine.submit((0..40).map(|n| encoded(n as f32)).collect(), None).unwrap();
        let kept = engine.submit((40..64).map(|n| encoded(n as f32)).collect(), None).unwrap();
        std::thread::sleep(Duration::from_millis(pause));
        drop(given_up);
        for (ticket, mark) in kept.into_iter().zip(40..) {
            assert_eq!(ticket.wait().unwrap().unwrap().logits.values()[0], mark as f32);
        }
        // Closed with pictures that are given up meanwhile.
        let left = engine.submit((0..30).map(|n| encoded(n as f32)).collect(), None).unwrap();
        drop(engine);
        std::thread::sleep(Duration::from_millis(pause));
        drop(left);
        assert!(budget.wait_for_workers(Instant::now() + Duration::from_secs(5)), "threads are left");
    }
}

#[test]
fn who_waits_for_room_gets_it_when_all_others_give_up() {
    let (engine, _budget) = slow_device(1, 1, 8);
    let given_up = engine.submit((0..8).map(|n| encoded(n as f32)).collect(), None).unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| engine.submit_waiting(encoded(9.0)).unwrap().wait().unwrap().unwrap());
        std::thread::sleep(Duration::from_millis(2));
        drop(given_up);
        assert_eq!(waiting.join().unwrap().logits.values()[0], 9.0);
    });
}

#[test]
fn tensors_and_pictures_are_run_in_the_order_in_which_they_came() {
    let (engine, _budget) = slow_device(1, 2, 200);
    let before = engine.submit((0..40).map(|n| marked(n as f32)).collect(), None).unwrap();
    let between = engine.submit(vec![encoded(100.0)], None).unwrap();
    let after = engine.submit((0..100).map(|n| marked(n as f32)).collect(), None).unwrap();
    assert!(between.into_iter().all(|ticket| ticket.wait().unwrap().is_ok()));
    assert!(engine.queued() > 60, "{} of 141 wait", engine.queued());
    drop((before, after));
}

#[test]
fn what_was_on_a_device_that_is_lost_under_load_is_answered_by_another_and_without_any_told_so() {
    let manifest = Arc::new(shipped().manifest);
    let devices: Vec<Accelerator> =
        (0..2).map(|n| Accelerator::new(n, Duration::from_millis(2), Duration::from_micros(100), 10)).collect();
    let executors = |device: &Accelerator| {
        let executor = || Executor::new(Network::new(manifest.clone(), device.handle()).with_max_batch(8));
        std::iter::repeat_with(executor).take(2).collect()
    };
    let crew = Crew::Apart {
        preparers: vec![Preparer::new(Marks::boxed(1))],
        devices: devices.iter().enumerate().map(|(n, device)| (format!("cuda:{n}"), executors(device))).collect(),
    };
    let budget = Arc::new(Budget::new(1));
    let engine = Engine::start(crew, 400, budget.clone()).unwrap();
    let ask = |marks: std::ops::Range<u32>| -> Vec<_> {
        let inputs = marks.clone().map(|mark| match mark % 2 {
            0 => marked(mark as f32),
            _ => Input::Encoded((mark as f32).to_le_bytes().to_vec().into()),
        });
        engine.submit(inputs.collect(), None).unwrap().into_iter().zip(marks).collect()
    };
    let both = ask(0..200);
    std::thread::sleep(Duration::from_millis(10));
    devices[0].lose();
    for (ticket, mark) in both.into_iter().chain(ask(200..400)) {
        assert_eq!(ticket.wait().unwrap().unwrap().logits.values()[0], mark as f32);
    }
    let stats = engine.stats();
    let lost: Vec<bool> = stats.devices.iter().map(|device| device.lost).collect();
    assert_eq!((lost, stats.succeeded), (vec![true, false], 400));
    assert!(stats.devices.iter().all(|device| device.images > 0), "{stats:?}");
    assert!(budget.lost().borrow().is_none());
    let last = ask(400..600);
    devices[1].lose();
    let mut refused = 0;
    for (ticket, mark) in last {
        match ticket.wait().unwrap() {
            Ok(prediction) => assert_eq!(prediction.logits.values()[0], mark as f32),
            Err(ClassifyError::Runtime(RuntimeError::Lost { .. })) => refused += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(refused > 0);
    assert!(matches!(engine.submit(vec![marked(1.0)], None), Err(Refused::NoDevice)));
    assert!(matches!(engine.submit_waiting(marked(1.0)), Err(Refused::NoDevice)));
    assert!(
        budget.lost().borrow().as_deref().is_some_and(|reason| reason.contains("cuda:1")),
        "{:?}",
        *budget.lost().borrow()
    );
    drop(engine);
    assert!(budget.wait_for_workers(Instant::now() + Duration::from_secs(5)));
}

#[tokio::test]
async fn a_server_that_has_lost_its_device_says_so_to_everybody() {
    let manifest = Arc::new(shipped().manifest);
    let device = Accelerator::new(3, Duration::from_millis(1), Duration::ZERO, 10);
    let crew = Crew::Apart {
        preparers: vec![Preparer::new(Box::new(Trap))],
        devices: vec![("cuda:3".into(), vec![Executor::new(Network::new(manifest.clone(), device.handle()))])],
    };
    let engine = Engine::start(crew, 64, Arc::new(Budget::new(1))).unwrap();
    let model = crate::support::model_over(engine, manifest, 1);
    let server = Server::of(vec![model], nbn::serve::RequestLimits::default()).await;
    assert_eq!(server.post("/v1/classify", "image/png", "a").await.status, 200);
    let metrics = async || String::from_utf8(server.get("/metrics").await.body).unwrap();
    let of_device = r#"{model="test",version="1",device="cuda:3""#;
    let told = metrics().await;
    for line in [
        format!("nbn_device_images_total{of_device}}} 1"),
        format!(r#"nbn_device_runs_total{of_device},images="1"}} 1"#),
        format!("nbn_device_lost{of_device}}} 0"),
    ] {
        assert!(told.lines().any(|found| found == line), "no {line} in {told}");
    }
    assert!(told.contains("nbn_device_waiting_seconds_total{") && told.contains("nbn_device_network_seconds_total{"));
    device.lose();
    for _ in 0..2 {
        let answer = server.post("/v1/classify", "image/png", "a").await;
        assert_eq!((answer.status, &answer.json()["code"]), (503, &json!("no_device")));
        assert!(answer.headers.contains_key("retry-after"));
    }
    assert!(metrics().await.contains(&format!("nbn_device_lost{of_device}}} 1")));
}

#[test]
fn a_picture_that_cannot_be_prepared_or_is_of_another_size_costs_no_other() {
    let manifest = Arc::new(shipped().manifest);
    let device = Accelerator::new(0, Duration::from_millis(1), Duration::ZERO, 10);
    let executor = || Executor::new(Network::new(manifest.clone(), device.handle()).with_max_batch(8));
    let crew = Crew::Apart {
        preparers: vec![Preparer::new(Box::new(Trap)), Preparer::new(Box::new(Trap))],
        devices: vec![("cuda:0".into(), vec![executor(), executor()])],
    };
    let engine = Engine::start(crew, 64, Arc::new(Budget::new(2))).unwrap();
    let inputs = [
        Input::Encoded(b"a"[..].into()),
        Input::Encoded(b"!"[..].into()),
        marked(7.0),
        Input::Pixels(vec![0; 100].into()),
        Input::Encoded(b"b"[..].into()),
    ];
    let replies: Vec<_> =
        engine.submit(inputs.into(), None).unwrap().into_iter().map(|ticket| ticket.wait().unwrap()).collect();
    let first = |n: usize| replies[n].as_ref().map(|prediction| prediction.logits.values()[0]).ok();
    assert_eq!([0, 1, 2, 3, 4].map(first), [Some(0.5), None, Some(7.0), None, Some(0.5)]);
    assert!(matches!(replies[1], Err(ClassifyError::Panic(_))) && matches!(replies[3], Err(ClassifyError::Tensor(_))));
    assert_eq!((engine.queued(), engine.running()), (0, 0));
}

#[tokio::test]
async fn what_other_models_take_of_the_processors_counts_in_when_an_answer_can_come() {
    let budget = Arc::new(Budget::new(1));
    let runner = Marking { random: fastrand::Rng::with_seed(1) };
    let classifier = Classifier::new(Arc::new(shipped().manifest), DecodeLimits::default(), Box::new(runner));
    let engine = Engine::start(Crew::Together(vec![classifier]), 64, budget.clone()).unwrap();
    for picture in 0..8 {
        let another_model = budget.take();
        let ticket = engine.submit(vec![marked(1.0)], None).unwrap().remove(0);
        // After few pictures nobody is refused for what they took.
        let hasty = engine.submit(vec![marked(2.0)], Some(Instant::now() + Duration::from_millis(20)));
        assert!(hasty.is_ok(), "after {picture}: {hasty:?}", hasty = hasty.err());
        std::thread::sleep(Duration::from_millis(100));
        drop(another_model);
        assert!(ticket.await.unwrap().is_ok());
    }
    // A picture took 100 ms, if little of that was its own: eight take longer than half a second.
    let _another_model = budget.take();
    let waiting = engine.submit((0..8).map(|n| marked(n as f32)).collect(), None).unwrap();
    let deadline = Some(Instant::now() + Duration::from_millis(500));
    let refused = engine.submit(vec![marked(9.0)], deadline).err();
    assert!(matches!(refused, Some(Refused::TooSlow { .. })), "{refused:?}");
    drop(waiting);
}

#[tokio::test]
async fn a_killed_client_ends_its_batch_and_frees_its_place() {
    let (entered, inside) = mpsc::channel();
    let server = Server::with_runner(Endless { entered }, 4, nbn::serve::RequestLimits::default()).await;
    let url = format!("http://{}/v1/classify", server.address);
    let body = picture(8, 8, image::ImageFormat::Png);
    let client = tokio::spawn(async move {
        let _ = reqwest::Client::new().post(url).header("content-type", "image/png").body(body).send().await;
    });
    tokio::task::spawn_blocking(move || {
        inside.recv().unwrap();
        inside
    })
    .await
    .unwrap();
    let text = async |name: &str| {
        let text = String::from_utf8(server.get("/metrics").await.body).unwrap();
        let line = text.lines().find(|line| line.starts_with(name)).map(str::to_owned);
        line.unwrap_or_else(|| panic!("no {name} in {text}")).rsplit(' ').next().unwrap().to_owned()
    };
    assert_eq!(text("nbn_running_images").await, "1");
    client.abort();
    let deadline = Instant::now() + Duration::from_secs(5);
    while text("nbn_running_images").await != "0" || text("nbn_requests_in_flight").await != "1" {
        assert!(Instant::now() < deadline, "the place was not freed");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(text("nbn_queue_images").await, "0");
}

/// A decoder that panics on pictures that begin with a `!`.
struct Trap;

impl Prepare for Trap {
    fn shape(&self) -> [usize; 3] {
        [3, 32, 32]
    }

    fn normalize_into(&self, _: &Picture, _: &mut TensorBatch) -> Result<(), TensorLength> {
        Ok(())
    }

    fn prepare_into(&self, bytes: &[u8], _: &Stop, batch: &mut TensorBatch) -> Result<StageTimes, ClassifyError> {
        assert!(bytes[0] != b'!', "on purpose");
        let tensor = [0.5f32; 3 * 32 * 32];
        batch.push_bytes(&tensor.map(f32::to_le_bytes).concat())?;
        Ok(StageTimes::default())
    }
}

#[tokio::test]
async fn a_panic_in_a_decoder_costs_one_500_and_not_its_neighbours() {
    let manifest = Arc::new(shipped().manifest);
    let runner = Marking { random: fastrand::Rng::with_seed(7) };
    let classifier = Classifier::with_parts(manifest.clone(), Box::new(Trap), Box::new(runner)).with_max_batch(8);
    let server = Server::of(vec![model_of(classifier, manifest, 64)], nbn::serve::RequestLimits::default()).await;
    let answer = server.post("/v1/classify", "image/png", "!").await;
    assert_eq!((answer.status, &answer.json()["code"]), (500, &json!("internal")));
    assert_eq!(server.post("/v1/classify", "image/png", "a").await.status, 200);
    let parts = ["a", "!", "b", "c"].map(|content| ("image", "x", content.as_bytes().to_vec()));
    let reply = server.multipart("/v1/classify", parts.into()).await.json();
    let failed = |n: usize| reply["results"][n]["error"]["code"] == "internal";
    assert_eq!([0, 1, 2, 3].map(failed), [false, true, false, false], "{reply}");
}

/// Pushes a tensor of the last picture and then fails, panics or adds another.
struct Sloppy;

impl Prepare for Sloppy {
    fn shape(&self) -> [usize; 3] {
        [3, 32, 32]
    }

    fn normalize_into(&self, _: &Picture, _: &mut TensorBatch) -> Result<(), TensorLength> {
        Ok(())
    }

    fn prepare_into(&self, bytes: &[u8], _: &Stop, batch: &mut TensorBatch) -> Result<StageTimes, ClassifyError> {
        let mark = f32::from(bytes[1]);
        let tensor = [mark; 3 * 32 * 32].map(f32::to_le_bytes).concat();
        match bytes[0] {
            b'0' => return Ok(StageTimes::default()),
            b'2' => batch.push_bytes(&tensor)?,
            b'!' => {
                batch.push_bytes(&tensor)?;
                panic!("on purpose");
            }
            b'?' => {
                batch.push_bytes(&tensor)?;
                batch.push_bytes(&tensor[1..])?;
            }
            _ => {}
        }
        batch.push_bytes(&tensor)?;
        Ok(StageTimes::default())
    }
}

#[test]
fn a_picture_that_was_not_written_whole_leaves_nothing_in_the_batch() {
    let manifest = Arc::new(shipped().manifest);
    let runner = Marking { random: fastrand::Rng::with_seed(3) };
    let mut classifier = Classifier::with_parts(manifest, Box::new(Sloppy), Box::new(runner)).with_max_batch(8);
    let stop = Stop::default();
    let inputs: Vec<Input> = [b"1\x05", b"0\x06", b"2\x07", b"!\x08", b"1\x09", b"?\x0a", b"1\x0b"]
        .map(|b| Input::Encoded(b.to_vec().into()))
        .into();
    for _ in 0..3 {
        let pictures: Vec<(&Input, &Stop)> = inputs.iter().map(|input| (input, &stop)).collect();
        let outcomes = classifier.classify(&pictures, &stop);
        let marks: Vec<Option<f32>> = outcomes.iter().map(|o| o.as_ref().ok().map(|p| p.logits.values()[0])).collect();
        assert_eq!(marks, [Some(5.0), None, None, None, Some(9.0), None, Some(11.0)]);
    }
}

/// Bytes whose last owner panics, as no code here does: outside of what guards a picture.
struct Grenade(&'static [u8]);

impl AsRef<[u8]> for Grenade {
    fn as_ref(&self) -> &[u8] {
        self.0
    }
}

impl Drop for Grenade {
    fn drop(&mut self) {
        panic!("on purpose");
    }
}

#[test]
fn a_worker_that_panics_between_pictures_is_counted_and_goes_on() {
    let manifest = Arc::new(shipped().manifest);
    let runner = Marking { random: fastrand::Rng::with_seed(5) };
    let classifier = Classifier::new(manifest, DecodeLimits::default(), Box::new(runner));
    let budget = Arc::new(Budget::new(1));
    let engine = Engine::start(Crew::Together(vec![classifier]), 8, budget.clone()).unwrap();
    for panics in 1..=3 {
        let grenade = Input::Encoded(bytes::Bytes::from_owner(Grenade(b"no picture")));
        let ticket = engine.submit_waiting(grenade).unwrap();
        // Its answer was lost or not, according to when the bytes were dropped.
        let _ = ticket.wait();
        let next = engine.submit_waiting(marked(panics as f32)).unwrap().wait().unwrap().unwrap();
        assert_eq!(next.logits.values()[0], panics as f32);
        assert_eq!((budget.panics(), engine.running()), (panics, 0));
    }
    drop(engine);
    assert!(budget.wait_for_workers(Instant::now() + Duration::from_secs(20)));
}

/// A progressive JPEG of many scans, none of which says anything: 36 megapixels, in a few kilobytes.
fn scans(width: u16, height: u16, scans: usize) -> Vec<u8> {
    crate::support::progressive_jpeg(width, height, scans)
}

#[test]
fn decoding_ends_when_its_caller_goes_and_when_its_deadline_passes() {
    let manifest = Arc::new(shipped().manifest);
    let runner = Marking { random: fastrand::Rng::with_seed(5) };
    let classifier = Classifier::new(manifest, DecodeLimits::default(), Box::new(runner));
    let engine = Engine::start(Crew::Together(vec![classifier]), 8, Arc::new(Budget::new(1))).unwrap();
    let slow: bytes::Bytes = scans(6000, 6000, 64).into();
    // Whole, it takes a worker several hundred milliseconds in any build.
    let began = Instant::now();
    let whole = engine.submit_waiting(Input::Encoded(slow.clone())).unwrap().wait().unwrap();
    let whole = (whole.is_ok(), began.elapsed());
    assert!(whole.0);
    let deadline = Instant::now() + whole.1 / 20;
    let late = engine.submit(vec![Input::Encoded(slow.clone())], Some(deadline)).unwrap().remove(0);
    let reply = late.wait().unwrap();
    assert!(matches!(reply, Err(ClassifyError::Deadline)), "{reply:?}");
    let left = engine.submit(vec![Input::Encoded(slow)], None).unwrap().remove(0);
    while engine.running() == 0 {
        std::thread::yield_now();
    }
    drop(left);
    let began = Instant::now();
    engine.submit_waiting(marked(1.0)).unwrap().wait().unwrap().unwrap();
    assert!(began.elapsed() < whole.1 / 2, "{:?} of {:?}", began.elapsed(), whole.1);
}

#[test]
fn the_kept_network_gives_the_same_logits_and_survives_what_happens_to_the_cache() {
    let folder = tempfile::tempdir().unwrap();
    let cache = NetworkCache::at(folder.path().join("deep/networks"));
    let bundle = shipped();
    let png = picture(50, 40, image::ImageFormat::Png);
    let logits = |cache: &NetworkCache| {
        let options = SessionOptions::default();
        let mut classifiers =
            Classifier::open_many(&bundle, library(), options, DecodeLimits::default(), cache, 2).unwrap();
        let one = |c: &mut Classifier| {
            let outcome =
                c.classify(&[(&Input::Encoded(png.clone().into()), &Stop::default())], &Stop::default()).remove(0);
            outcome.unwrap().logits.values().to_vec()
        };
        let (a, b) = (one(&mut classifiers[0]), one(&mut classifiers[1]));
        assert_eq!(a, b);
        a
    };
    let plain = logits(&NetworkCache::none());
    // Made by several at once, then read.
    std::thread::scope(|scope| {
        let made: Vec<_> = (0..4).map(|_| scope.spawn(|| logits(&cache))).collect();
        made.into_iter().for_each(|made| assert_eq!(made.join().unwrap(), plain));
    });
    assert_eq!(logits(&cache), plain);
    let entries: Vec<_> =
        std::fs::read_dir(folder.path().join("deep/networks")).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(entries.len(), 1, "drafts are left: {entries:?}");
    // A damaged entry, and a folder that cannot be written, cost speed only.
    std::fs::write(entries[0].join("network.onnx"), b"no network").unwrap();
    assert_eq!(logits(&cache), plain);
    std::fs::remove_dir_all(&entries[0]).unwrap();
    assert_eq!(logits(&cache), plain);
    assert_eq!(logits(&NetworkCache::at(data_file_as_folder(folder.path()))), plain);
}

/// A file where the cache's folder should be.
fn data_file_as_folder(folder: &std::path::Path) -> std::path::PathBuf {
    let path = folder.join("file");
    std::fs::write(&path, b"").unwrap();
    path.join("networks")
}

#[test]
fn a_network_that_was_changed_is_refused_with_and_without_the_cache() {
    let folder = tempfile::tempdir().unwrap();
    let repository = crate::support::repository(folder.path());
    let cache = NetworkCache::at(folder.path().join("networks"));
    let open = || {
        let bundle = nbn::bundle::Bundle::open(&repository.join("cifar10-lt")).unwrap();
        let options = SessionOptions::default();
        Classifier::open_many(&bundle, library(), options, DecodeLimits::default(), &cache, 1).map(|_| ())
    };
    open().unwrap();
    let path = repository.join("cifar10-lt/1/model.onnx");
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 100;
    bytes[last] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert!(open().unwrap_err().to_string().contains("SHA-256"));
}
