use std::sync::{Arc, mpsc};
use std::time::Duration;

use image::ImageFormat;
use nbn::bundle::Bundle;
use nbn::engine::Budget;
use nbn::registry::ServedModel;
use nbn::runtime::RuntimeError;
use nbn::serve::{Ended, RequestLimits};
use serde_json::{Value, json};

use crate::support::{Faulty, Gated, Owned, Server, library, model_options, nbn, picture, root, text};

const JPEG: &str = "image/jpeg";

fn base64(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

#[test]
fn openapi_yaml_is_the_document_that_the_code_generates() {
    let file = std::fs::read_to_string(root().join("openapi.yaml")).unwrap();
    let document = nbn::serve::generate::yaml();
    let differs = file.lines().zip(document.lines()).find(|(a, b)| a != b);
    let command = "cargo run --features openapi -- openapi";
    assert!(file == document, "run: {command} > openapi.yaml; the first lines that differ: {differs:?}");
    assert!(file.starts_with("openapi: 3.1"));
    let file = std::fs::read_to_string(root().join("openapi.json")).unwrap();
    assert!(file == nbn::serve::generate::json(), "run: {command} --format json > openapi.json");
}

#[tokio::test]
async fn large_pictures_are_read_from_multipart_as_from_a_body_of_their_own() {
    let server = Server::shipped().await;
    // 3 MB each, beyond what axum takes by itself.
    let large = picture(1000, 1000, ImageFormat::Bmp);
    let own = server.post("/v1/classify", "image/bmp", large.clone()).await.json();
    let parts = vec![("image", "a", large.clone()), ("image", "b", large)];
    let answer = server.multipart("/v1/classify", parts).await;
    assert_eq!(answer.status, 200, "{}", text(&answer.body));
    for result in answer.json()["results"].as_array().unwrap() {
        assert_eq!(result["predictions"][0]["label"], own["results"][0]["predictions"][0]["label"]);
    }
}

#[tokio::test]
async fn a_posted_image_is_answered_with_the_best_classes() {
    let server = Server::shipped().await;
    for (format, content_type) in [
        (ImageFormat::Jpeg, "image/jpeg"),
        (ImageFormat::Png, "image/png"),
        (ImageFormat::WebP, "image/webp"),
        (ImageFormat::Gif, "image/gif"),
        (ImageFormat::Bmp, "image/bmp"),
        (ImageFormat::Tiff, "image/tiff"),
        (ImageFormat::Png, "application/octet-stream"),
    ] {
        let body = picture(50, 40, format);
        let answer = server.post("/v1/classify?top_k=3&include=logits,timings", content_type, body).await;
        assert_eq!(answer.status, 200, "{content_type}: {}", text(&answer.body));
        let reply = answer.json();
        assert_eq!(
            (&reply["model"], &reply["version"], &reply["scale"]),
            (&json!("cifar10-lt"), &json!("2"), &json!("calibrated"))
        );
        let result = &reply["results"][0];
        let scores: Vec<f64> =
            result["predictions"].as_array().unwrap().iter().map(|p| p["score"].as_f64().unwrap()).collect();
        assert_eq!(scores.len(), 3);
        assert!(scores.is_sorted_by(|a, b| a >= b));
        assert_eq!(result["logits"].as_array().unwrap().len(), 10);
        assert!(result["timings"]["infer_ms"].as_f64().unwrap() > 0.0);
    }
}

#[tokio::test]
async fn every_way_of_posting_gives_the_same_answer_in_order() {
    let server = Server::shipped().await;
    let (first, second) = (picture(40, 30, ImageFormat::Png), picture(9, 70, ImageFormat::Jpeg));
    let one = server.post("/v1/classify", "image/png", first.clone()).await.json()["results"][0].clone();
    let two = server.post("/v1/models/cifar10-lt/classify", JPEG, second.clone()).await.json()["results"][0].clone();
    let form = server
        .multipart(
            "/v1/models/cifar10-lt/versions/2/classify",
            vec![("image", "a.png", first.clone()), ("image", "b.jpg", second.clone())],
        )
        .await
        .json();
    assert_eq!(form["results"][0]["predictions"], one["predictions"]);
    assert_eq!(form["results"][1]["predictions"], two["predictions"]);
    assert_eq!(form["results"][1]["id"], "b.jpg");
    let body =
        json!({"images": [{"b64": base64(&second), "id": "x"}, {"b64": base64(&first)}], "options": {"top_k": 2}});
    let reply = server.post("/v1/classify?top_k=9", "application/json", body.to_string()).await.json();
    assert_eq!(reply["results"][0]["id"], "x");
    assert_eq!(reply["results"][0]["predictions"].as_array().unwrap()[..], two["predictions"].as_array().unwrap()[..2]);
    assert_eq!(reply["results"][1]["predictions"].as_array().unwrap()[..], one["predictions"].as_array().unwrap()[..2]);
}

#[tokio::test]
async fn one_bad_image_among_several_leaves_the_others_whole() {
    let server = Server::shipped().await;
    let good = picture(32, 32, ImageFormat::Png);
    let reply = server
        .multipart(
            "/v1/classify",
            vec![("image", "a", good.clone()), ("image", "b", b"no image".to_vec()), ("image", "c", good.clone())],
        )
        .await
        .json();
    assert_eq!(reply["results"][1]["error"]["code"], "unknown_format");
    assert_eq!(reply["results"][0]["predictions"], reply["results"][2]["predictions"]);
    let body = json!({"images": [{"b64": "***"}, {"b64": base64(&good)}]});
    let reply = server.post("/v1/classify", "application/json", body.to_string()).await.json();
    assert_eq!(reply["results"][0]["error"]["code"], "bad_base64");
    assert!(reply["results"][1]["predictions"].is_array());
}

#[tokio::test]
async fn bad_requests_are_problems_that_name_the_thing_and_the_way_out() {
    let limits = RequestLimits { max_body_bytes: 100_000, max_images: 2, ..RequestLimits::default() };
    let (_gate, receiver) = mpsc::channel();
    let server = Server::with_runner(Gated { gate: receiver, entered: mpsc::channel().0 }, 8, limits).await;
    let jpeg = picture(200, 200, ImageFormat::Jpeg);
    let half = jpeg[..jpeg.len() / 2].to_vec();
    let tall = picture(1, 1, ImageFormat::Png);
    let overriding =
        json!({"images": [{"b64": "UDYgMSAxIDI1NQr/gAA="}], "options": {"top_k": 2, "min_score": 0, "alpha": 0.1}});
    let overriding = overriding.to_string().into_bytes();
    let cases: Vec<(&str, &str, Vec<u8>, u16, &str, &str)> = vec![
        ("/v1/classify", JPEG, vec![], 400, "empty_image", "0 bytes"),
        ("/v1/classify", JPEG, b"just words".to_vec(), 422, "unknown_format", "JPEG, PNG"),
        ("/v1/classify", JPEG, half, 422, "damaged_image", "cut short"),
        (
            "/v1/classify",
            "image/png",
            bomb(30_000, 30_000),
            422,
            "too_many_pixels",
            "30000×30000 (900.0 MP); the limit is 40000000 pixels (40.0 MP)",
        ),
        ("/v1/classify", "text/plain", tall.clone(), 415, "media_type", "text/plain"),
        ("/v1/classify", JPEG, vec![0; 100_001], 413, "body_too_large", "100000"),
        ("/v1/classify?top_k=0", JPEG, tall.clone(), 400, "bad_option", "top_k is 0"),
        ("/v1/classify?top_k=x", JPEG, tall.clone(), 400, "bad_option", "top_k=\"x\""),
        ("/v1/classify?topk=3", JPEG, tall.clone(), 400, "bad_option", "topk"),
        ("/v1/classify?prior=train", JPEG, tall.clone(), 400, "bad_option", "nbn fold calibrate"),
        ("/v1/classify?prior=mine", JPEG, tall.clone(), 400, "bad_option", "uniform or train"),
        ("/v1/classify?max_set_size=2", JPEG, tall.clone(), 400, "bad_option", "alpha"),
        ("/v1/classify?alpha=0.1", JPEG, tall.clone(), 400, "bad_option", "calibrated"),
        ("/v1/classify?min_score=2", JPEG, tall.clone(), 400, "bad_option", "min_score is 2"),
        // A wrong value in the query is one even where the body has another.
        ("/v1/classify?top_k=0", "application/json", overriding.clone(), 400, "bad_option", "top_k is 0"),
        ("/v1/classify?min_score=2", "application/json", overriding.clone(), 400, "bad_option", "min_score is 2"),
        ("/v1/classify?alpha=2", "application/json", overriding.clone(), 400, "bad_option", "alpha is 2"),
        ("/v1/classify", "application/json", b"{".to_vec(), 400, "bad_json", "JSON"),
        ("/v1/classify", "application/json", b"[[{\"b64\":\"\"}]]".to_vec(), 400, "bad_json", "an object"),
        ("/v1/classify", "application/json", b"{\"images\":[[\"\"]]}".to_vec(), 400, "bad_json", "an object"),
        ("/v1/classify", "application/json", b"{\"images\":[],\"options\":[]}".to_vec(), 400, "bad_json", "an object"),
        ("/v1/classify", "application/json", b"{\"images\":[]}".to_vec(), 400, "no_images", "images"),
        ("/v1/classify", "application/json", b"{\"images\":[{\"b64\":\"!\"}]}".to_vec(), 400, "bad_base64", "base64"),
        ("/v1/classify", "application/json", b"{\"imagez\":[]}".to_vec(), 400, "bad_json", "imagez"),
        ("/v1/classify", "multipart/form-data", vec![], 400, "bad_multipart", "boundary"),
        ("/v1/models/nobody/classify", JPEG, tall.clone(), 404, "no_such_model", "nobody"),
        (
            "/v1/models/test/versions/9/classify",
            JPEG,
            tall.clone(),
            404,
            "no_such_version",
            "the versions served are 1",
        ),
        ("/v3/nothing", JPEG, tall.clone(), 404, "not_found", "openapi.yaml"),
        ("/v1/models", JPEG, tall.clone(), 405, "method_not_allowed", "Allow"),
    ];
    for (path, content_type, body, status, code, words) in cases {
        let answer = server.post(path, content_type, body).await;
        let problem = answer.json();
        assert_eq!(
            (answer.status, problem["code"].as_str().unwrap()),
            (status, code),
            "{path} {content_type}: {problem}"
        );
        assert!(problem["detail"].as_str().unwrap().contains(words), "{problem}");
        assert_eq!(problem["instance"], path.split('?').next().unwrap());
        assert_eq!(problem["request_id"], answer.header("x-request-id"));
    }
    let three = vec![("image", "a", tall.clone()), ("image", "b", tall.clone()), ("image", "c", tall)];
    let answer = server.multipart("/v1/classify", three).await;
    assert_eq!((answer.status, &answer.json()["limit"]), (413, &json!(2)));
}

/// A PNG whose header announces `width` × `height` and which holds almost nothing.
fn bomb(width: u32, height: u32) -> Vec<u8> {
    let mut png = picture(1, 1, ImageFormat::Png);
    png[16..20].copy_from_slice(&width.to_be_bytes());
    png[20..24].copy_from_slice(&height.to_be_bytes());
    let crc = crc32(&png[12..29]);
    png[29..33].copy_from_slice(&crc.to_be_bytes());
    png
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |c, _| if c & 1 == 1 { (c >> 1) ^ 0xEDB8_8320 } else { c >> 1 })
    })
}

#[tokio::test]
async fn an_image_of_100000_by_1_pixels_is_answered() {
    let server = Server::shipped().await;
    for (width, height) in [(100_000, 1), (1, 100_000)] {
        let answer = server.post("/v1/classify", "image/png", picture(width, height, ImageFormat::Png)).await;
        assert_eq!(answer.status, 200);
    }
}

#[tokio::test]
async fn the_model_card_shows_classes_proof_calibration_and_measured_figures() {
    let server = Server::shipped().await;
    let list = server.get("/v1/models").await.json();
    assert_eq!(list["models"][0]["name"], "cifar10-lt");
    assert_eq!(list["models"][0]["default"], true);
    let card = server.get("/v1/models/cifar10-lt").await.json();
    assert_eq!(card["scale"], "calibrated");
    assert_eq!(card["calibration"]["fit"]["training_overlap"], "none");
    assert_eq!(card["calibration"]["classes"][9], json!({"label": "truck", "support": 5, "status": "pooled"}));
    assert!(card["evaluation"]["figures"]["uniform"]["calibrated"]["overall"]["nll"].as_f64().unwrap() > 0.0);
    assert_eq!(card["manifest"]["classes"].as_array().unwrap().len(), 10);
    assert!(card["manifest"]["fold"]["proof"]["outputs"][0]["max_relative"].as_f64().unwrap() < 1e-4);
    assert!(card["evaluation"]["figures"]["uniform"]["softmax"]["overall"]["top1"].as_f64().unwrap() > 0.7);
    // Figures that were given to `nbn fold export`.
    let first = Bundle::load(&root().join("models/cifar10-lt/1")).unwrap();
    let first = ServedModel::start(first, library(), &model_options(), Arc::new(Budget::new(2))).unwrap();
    let first = Server::of(vec![first], RequestLimits::default()).await;
    let card = first.get("/v1/models/cifar10-lt").await.json();
    assert!(card["manifest"]["evaluation"]["overall"].as_f64().unwrap() > 0.5);
    assert_eq!(server.get("/v1/models/nobody").await.status, 404);
    for path in ["/livez", "/readyz", "/openapi.yaml"] {
        assert_eq!(server.get(path).await.status, 200);
    }
}

#[tokio::test]
async fn a_full_queue_answers_503_with_retry_after() {
    let (gate, receiver) = mpsc::channel();
    let (entered, inside) = mpsc::channel();
    let server = Server::with_runner(Gated { gate: receiver, entered }, 1, RequestLimits::default()).await;
    let png = picture(8, 8, ImageFormat::Png);
    let url = format!("http://{}/v1/classify", server.address);
    let post = |body: Vec<u8>| {
        let url = url.clone();
        tokio::spawn(async move {
            reqwest::Client::new()
                .post(url)
                .header("content-type", "image/png")
                .body(body)
                .send()
                .await
                .unwrap()
                .status()
        })
    };
    let running = post(png.clone());
    let inside = tokio::task::spawn_blocking(move || {
        inside.recv().unwrap();
        inside
    })
    .await
    .unwrap();
    let waiting = post(png.clone());
    // The second request takes the queue's one place; until it has, a third one may get it instead.
    let refused = loop {
        let body = reqwest::Client::new().post(&url).header("content-type", "image/png").body(png.clone());
        match tokio::time::timeout(Duration::from_millis(300), body.send()).await {
            Ok(answer) => break answer.unwrap(),
            Err(_) => continue,
        }
    };
    assert_eq!(refused.status(), 503);
    // Over gRPC, too, and it is counted: model "test", an input of one picture.
    let input = b"\x0A\x05image\x12\x05BYTES\x1A\x01\x01\x2A\x0A\x42\x08no image";
    let message = [&b"\x0A\x04test\x2A"[..], &[input.len() as u8], input].concat();
    let framed = [&[0, 0, 0, 0, message.len() as u8][..], &message].concat();
    let call =
        reqwest::Client::new().post(format!("http://{}/inference.GRPCInferenceService/ModelInfer", server.address));
    let call = call.header("content-type", "application/grpc").body(framed).send().await.unwrap();
    // UNAVAILABLE
    assert_eq!(
        (&call.headers()["grpc-status"], call.headers().contains_key("retry-after")),
        (&"14".parse().unwrap(), true)
    );
    let counted = text(&server.get("/metrics").await.body);
    let counted =
        counted.lines().find(|line| line.contains("reason=\"queue_full\"")).unwrap().rsplit_once(' ').unwrap().1;
    assert!(counted.parse::<u64>().unwrap() >= 2);
    assert!(refused.headers()["retry-after"].to_str().unwrap().parse::<u64>().unwrap() >= 1);
    for _ in 0..10 {
        gate.send(vec![0.0; 10]).unwrap();
    }
    assert_eq!(running.await.unwrap(), 200);
    assert_eq!(waiting.await.unwrap(), 200);
    drop(inside);
}

#[tokio::test]
async fn a_v2_request_takes_no_more_memory_than_its_images_and_outputs_need() {
    let server = Server::shipped().await;
    let png = base64(&picture(8, 8, ImageFormat::Png));
    let ask = async |more: Value| {
        let mut body = json!({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [png]}]});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v2/models/cifar10-lt/infer", "application/json", body.to_string()).await
    };
    let logits = json!({"name": "logits"});
    assert_eq!(ask(json!({"outputs": [logits]})).await.status, 200);
    // What is not known is not kept.
    assert_eq!(ask(json!({"parameters": {"sequence": vec![0; 300_000]}})).await.status, 200);
    let strings = vec![""; 200_000];
    for (more, words) in [
        (json!({"outputs": [logits, logits]}), "the output logits is requested twice"),
        (json!({"parameters": {"nbn_prior": vec![1; 300_000]}}), "too many values"),
        (json!({"parameters": {"nbn_prior": vec![json!([]); 300_000]}}), "too many values"),
        (json!({"parameters": {"timeout": [1]}}), "too many values"),
        (json!({"outputs": [{"name": "logits", "parameters": {"classification": [1]}}]}), "too many values"),
        (
            json!({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": strings}]}),
            "more than 100000",
        ),
        (json!({"inputs": vec![json!({"name": "", "datatype": "", "shape": []}); 100_001]}), "more than 100000"),
    ] {
        let answer = ask(more).await;
        let error = answer.json()["error"].as_str().unwrap().to_owned();
        assert!(answer.status == 400 && error.contains(words), "{words}: {} {error}", answer.status);
    }
    let prior = format!("{{\"images\":[{{\"b64\":\"{png}\"}}],\"options\":{{\"prior\":{:?}}}}}", vec![1; 100_001]);
    let answer = server.post("/v1/classify", "application/json", prior).await;
    assert!(answer.status == 400 && answer.json()["detail"].as_str().unwrap().contains("more than 100000"));
}

#[tokio::test]
async fn others_are_answered_while_large_bodies_are_parsed() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    // This test, its server and its clients share one thread: whatever parses there lets none of them go on.
    let server = Server::with_runner(Faulty(|| Ok(vec![0.0; 10])), 4, RequestLimits::default()).await;
    let alive = async || assert_eq!(server.get("/livez").await.status, 200);
    let numbers = format!("[{}1]", "[1,2],".repeat(4 << 20));
    let v2 = format!(r#"{{"inputs":[{{"name":"images","datatype":"FP32","shape":[1,3,32,32],"data":{numbers}}}]}}"#);
    let v1 = format!(r#"{{"images":[],"options":{{"prior":"train","include":[{}"#, " ".repeat(24 << 20));
    for (path, body) in [("/v2/models/test/infer", v2), ("/v1/classify", v1)] {
        let (last, most) = body.as_bytes().split_last().unwrap();
        let mut stream = tokio::net::TcpStream::connect(&server.address).await.unwrap();
        let length = body.len();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(most).await.unwrap();
        // The server reads all but the last byte meanwhile.
        for _ in 0..50 {
            alive().await;
        }
        stream.write_all(&[*last]).await.unwrap();
        let mut answered_meanwhile = 0;
        let mut status = [0; 12];
        let mut answer = std::pin::pin!(stream.read_exact(&mut status));
        loop {
            tokio::select! {
                biased;
                read = &mut answer => { read.unwrap(); break }
                () = alive() => answered_meanwhile += 1,
            }
        }
        assert_eq!(text(&status), "HTTP/1.1 400", "{path}");
        assert!(answered_meanwhile >= 5, "{path}: {answered_meanwhile} others were answered");
    }
}

#[tokio::test]
async fn a_failing_network_costs_one_500_and_no_more() {
    let faults: [fn() -> Result<Vec<f32>, RuntimeError>; 4] = [
        || panic!("on purpose"),
        || Err(RuntimeError::Run("on purpose".into())),
        || Ok(vec![f32::NAN; 10]),
        || Ok(vec![0.0; 3]),
    ];
    for fault in faults {
        let server = Server::with_runner(Faulty(fault), 4, RequestLimits::default()).await;
        for _ in 0..2 {
            let answer = server.post("/v1/classify", "image/png", picture(8, 8, ImageFormat::Png)).await;
            assert_eq!((answer.status, &answer.json()["code"]), (500, &json!("internal")));
            assert!(!text(&answer.body).contains("on purpose"), "internals must stay in the log");
        }
        assert_eq!(server.get("/livez").await.status, 200);
    }
}

#[tokio::test]
async fn a_request_past_its_deadline_answers_504_and_a_slow_body_408() {
    let (_gate, receiver) = mpsc::channel();
    let limits = RequestLimits { timeout: Duration::from_millis(200), ..RequestLimits::default() };
    let server = Server::with_runner(Gated { gate: receiver, entered: mpsc::channel().0 }, 4, limits).await;
    // The runner fails at once when nobody listens at `entered`; that is a 500, so listen.
    let (gate, receiver) = mpsc::channel();
    let (entered, inside) = mpsc::channel();
    let slow = Server::with_runner(Gated { gate: receiver, entered }, 4, limits).await;
    let answer = slow.post("/v1/classify", "image/png", picture(8, 8, ImageFormat::Png)).await;
    assert_eq!((answer.status, &answer.json()["code"]), (504, &json!("deadline")));
    drop((gate, inside));
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(&server.address).await.unwrap();
    stream
        .write_all(
            b"POST /v1/classify HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\ncontent-length: 100\r\n\r\nabc",
        )
        .await
        .unwrap();
    let mut reply = vec![0; 12];
    stream.read_exact(&mut reply).await.unwrap();
    assert_eq!(text(&reply), "HTTP/1.1 408");
}

#[tokio::test]
async fn a_drain_answers_what_is_open_and_then_ends() {
    let (gate, receiver) = mpsc::channel();
    let (entered, inside) = mpsc::channel();
    let server = Server::with_runner(Gated { gate: receiver, entered }, 4, RequestLimits::default()).await;
    let url = format!("http://{}/v1/classify", server.address);
    let body = picture(8, 8, ImageFormat::Png);
    let open = tokio::spawn(async move {
        reqwest::Client::new().post(url).header("content-type", "image/png").body(body).send().await.unwrap().status()
    });
    tokio::task::spawn_blocking(move || inside.recv().unwrap()).await.unwrap();
    server.stop();
    gate.send(vec![0.0; 10]).unwrap();
    assert_eq!(open.await.unwrap(), 200);
    assert_eq!(server.ended().await, Ended::Drained);
}

#[cfg(unix)]
#[test]
fn the_demo_needs_no_other_file_and_names_a_ship() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    let folder = tempfile::tempdir().unwrap();
    let mut child = Owned::begin(
        Command::new(env!("CARGO_BIN_EXE_nbn"))
            .current_dir(folder.path())
            .args(["demo", "--no-browser", "--addr", "127.0.0.1:0"])
            .env("XDG_CACHE_HOME", folder.path())
            .stdout(Stdio::piped()),
    );
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let told: Vec<String> = lines.take_while(|line| line != "Press Ctrl-C to stop.").collect();
    let best = told[1].trim().split_once(" %  ").unwrap();
    assert_eq!(best.1, "ship", "{told:?}");
    assert!(best.0.parse::<f64>().unwrap() > 95.0, "{told:?}");
    let addr = told.iter().find_map(|line| line.strip_prefix("Web page: http://")?.strip_suffix('/')).unwrap();
    assert!(nbn(&["health", "--addr", addr]).status.success());
    let words: Vec<&str> =
        told.iter().find_map(|line| line.strip_prefix("Files:    nbn ")).unwrap().split(' ').collect();
    let scored = nbn(&words);
    assert!(scored.status.success(), "{}", text(&scored.stderr));
    for line in text(&scored.stdout).lines() {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        let label = row["predictions"][0]["label"].as_str().unwrap();
        assert!(row["path"].as_str().unwrap().ends_with(&format!("{label}.jpg")), "{row}");
    }
    assert!(child.terminate().success());
}

#[test]
fn the_program_serves_answers_health_and_drains_on_sigterm() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    let mut child = Owned::begin(
        Command::new(env!("CARGO_BIN_EXE_nbn"))
            .current_dir(root())
            .args(["serve", "--addr", "127.0.0.1:0"])
            .env_remove("RUST_LOG")
            .stderr(Stdio::piped()),
    );
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    let line = lines.find(|l| l.contains("listening")).unwrap();
    let log: serde_json::Value = serde_json::from_str(&line).unwrap();
    let addr = log["addr"].as_str().unwrap();
    lines.find(|l| l.contains("\"message\":\"ready\"")).unwrap();
    let health = nbn(&["health", "--addr", addr]);
    assert!(health.status.success(), "{}", text(&health.stderr));
    assert!(child.terminate().success());
    assert!(!nbn(&["health", "--addr", addr]).status.success());
}
