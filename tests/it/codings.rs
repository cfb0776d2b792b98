//! What clients that exist send and ask for: compressed bodies and answers, other names of media types, base64 in other
//! forms, metrics in two formats.

use std::io::{Read, Write};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::{GzEncoder, ZlibEncoder};
use serde_json::{Value, json};

use crate::support::{Answer, Server, ask, picture, text};

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

fn zlib(content: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

async fn coded(server: &Server, path: &str, content_type: &str, coding: &str, body: Vec<u8>) -> Answer {
    let headers = [("content-type", content_type), ("content-encoding", coding)];
    server.post_with(path, &headers, body).await
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_may_be_compressed_within_bounds() {
    let server = Server::shipped().await;
    let bmp = picture(50, 40, image::ImageFormat::Bmp);
    let expected = server.post("/v1/classify", "image/bmp", bmp.clone()).await.json()["results"].clone();
    for (coding, body) in
        [("gzip", gzip(&bmp)), ("GZIP", gzip(&bmp)), ("Deflate", zlib(&bmp)), ("identity", bmp.clone())]
    {
        let answer = coded(&server, "/v1/classify", "image/bmp", coding, body).await;
        assert_eq!((answer.status, &answer.json()["results"]), (200, &expected), "{coding}");
    }
    let request = json!({"images": [{"b64": STANDARD.encode(&bmp)}]}).to_string();
    let answer = coded(&server, "/v1/classify", "application/json", "gzip", gzip(request.as_bytes())).await;
    assert_eq!(answer.json()["results"], expected);
    let request = json!({
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [STANDARD.encode(&bmp)]}],
        "outputs": [{"name": "logits"}],
    });
    let infer = "/v2/models/cifar10-lt/infer";
    let answer = coded(&server, infer, "application/json", "gzip", gzip(request.to_string().as_bytes())).await;
    assert_eq!(answer.status, 200, "{}", text(&answer.body));

    // Refused in the words of each protocol, with the way out.
    for (path, content_type) in [("/v1/classify", "image/bmp"), (infer, "application/json")] {
        let answer = coded(&server, path, content_type, "br", bmp.clone()).await;
        assert_eq!((answer.status, answer.header("accept-encoding")), (415, "gzip, deflate, zstd"), "{path}");
        assert!(text(&answer.body).contains("send the body with one of gzip, deflate, zstd"), "{path}");
        let answer = coded(&server, path, content_type, "gzip", bmp.clone()).await;
        assert_eq!(answer.status, 400, "{path}");
        assert!(text(&answer.body).contains("the body is no gzip that can be unpacked"), "{}", text(&answer.body));
        let bomb = gzip(&vec![0; 30 << 20]);
        let answer = coded(&server, path, content_type, "gzip", bomb).await;
        assert_eq!(answer.status, 413, "{path}");
        assert!(text(&answer.body).contains("unpack to more than 200 times as many"), "{}", text(&answer.body));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_compressed_when_that_is_asked_for() {
    let server = Server::shipped().await;
    for path in ["/metrics", "/", "/openapi.yaml", "/docs/swagger-ui.css"] {
        let plain = server.get_whole(path).await;
        let packed = server.get_with(path, &[("accept-encoding", "gzip")]).await;
        assert_eq!(packed.header("content-encoding"), "gzip", "{path}");
        assert!(packed.body.len() < plain.len() * 2 / 3, "{path}: {} of {}", packed.body.len(), plain.len());
        let mut unpacked = Vec::new();
        GzDecoder::new(&packed.body[..]).read_to_end(&mut unpacked).unwrap();
        assert!(path == "/metrics" || unpacked == plain, "{path}");
        assert_eq!(server.get_with(path, &[]).await.header("content-encoding"), "", "{path}");
    }
    // Small ones are not worth it.
    let small = server.get_with("/v2/health/live", &[("accept-encoding", "gzip")]).await;
    assert_eq!((small.header("content-encoding"), small.json()), ("", json!({"live": true})));
    let ready = server.get_with("/v2/health/ready", &[]).await;
    assert_eq!(ready.json(), json!({"live": true, "ready": true}));
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_known_by_other_names_and_in_other_forms_of_base64() {
    let server = Server::shipped().await;
    let png = picture(50, 40, image::ImageFormat::Png);
    let expected = server.post("/v1/classify", "image/png", png.clone()).await.json()["results"].clone();
    for name in ["image/jpg", "image/pjpeg", "Image/X-MS-BMP", "binary/octet-stream; charset=x"] {
        let answer = server.post("/v1/classify", name, png.clone()).await;
        assert_eq!((answer.status, &answer.json()["results"]), (200, &expected), "{name}");
    }
    let plain = STANDARD.encode(&png);
    let wrapped: Vec<&str> = plain.as_bytes().chunks(76).map(|line| std::str::from_utf8(line).unwrap()).collect();
    let forms = [URL_SAFE_NO_PAD.encode(&png), wrapped.join("\r\n"), format!("data:image/png;base64,{plain}")];
    for b64 in forms {
        let body = json!({"images": [{"b64": b64}]}).to_string();
        let answer = server.post("/v1/classify", "application/json", body).await;
        assert_eq!(answer.json()["results"], expected, "{}", &b64[..20]);
        let input = json!({"name": "image", "datatype": "BYTES", "shape": [1], "data": [b64]});
        let body = json!({"inputs": [input]}).to_string();
        let answer = server.post("/v2/models/cifar10-lt/infer", "application/json", body).await;
        assert_eq!(answer.status, 200, "{}", text(&answer.body));
    }
    let body = json!({"images": [{"b64": "https://a.example/b.png"}]}).to_string();
    let answer = server.post("/v1/classify", "application/json", body).await;
    assert!(text(&answer.body).contains("`b64` is not base64: its character 5 is ':'"), "{}", text(&answer.body));
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_come_in_the_form_that_is_asked_for() {
    let server = Server::shipped().await;
    server.post("/v1/classify", "image/png", picture(8, 8, image::ImageFormat::Png)).await;
    let of = async |accept: &str| {
        let answer = server.get_with("/metrics", &[("accept", accept)]).await;
        (answer.header("content-type").to_owned(), text(&answer.body))
    };
    for accept in ["text/plain", "*/*", "text/plain;version=0.0.4;q=0.9,application/openmetrics-text;q=0.1"] {
        let (content_type, told) = of(accept).await;
        assert_eq!(content_type, "text/plain; version=0.0.4; charset=utf-8", "{accept}");
        assert!(told.contains("# TYPE nbn_predictions_total counter\nnbn_predictions_total{"), "{told}");
        assert!(!told.contains("# EOF") && !told.contains("# UNIT"));
    }
    let (content_type, told) = of("application/openmetrics-text;version=1.0.0,text/plain;q=0.5").await;
    assert!(content_type.starts_with("application/openmetrics-text"));
    assert!(told.contains("# TYPE nbn_predictions counter\nnbn_predictions_total{") && told.ends_with("# EOF\n"));
    // A kind that readers of Prometheus' own format do not have.
    assert!(told.contains("# TYPE nbn_build_info gauge") && !told.contains(" info\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn shared_memory_and_requests_without_a_host_are_refused_by_name() {
    let server = Server::shipped().await;
    let region = json!({"shared_memory_region": "mine", "shared_memory_byte_size": 40});
    let image = json!({"name": "image", "datatype": "BYTES", "shape": [1], "data": [""]});
    let mut shared = image.clone();
    shared["parameters"] = region.clone();
    for (inputs, outputs, kind) in [
        (json!([image]), json!([{"name": "logits", "parameters": region}]), "output"),
        (json!([shared]), json!([]), "input"),
    ] {
        let body = json!({"inputs": inputs, "outputs": outputs}).to_string();
        let answer = server.post("/v2/models/cifar10-lt/infer", "application/json", body).await;
        let words = " asks for the shared memory \"mine\", which this server does not have";
        let error = answer.json()["error"].as_str().unwrap().to_owned();
        assert!(answer.status == 400 && error.starts_with(kind) && error.contains(words), "{error}");
    }
    let address = server.address.clone();
    let raw = async |request: &'static str| {
        let address = address.clone();
        tokio::task::spawn_blocking(move || ask(&address, request.as_bytes())).await.unwrap()
    };
    let refused = raw("GET /livez HTTP/1.1\r\nconnection: close\r\n\r\n").await;
    assert!(refused.starts_with("HTTP/1.1 400") && refused.contains("has the header `host`: send it"), "{refused}");
    assert!(raw("GET /livez HTTP/1.0\r\n\r\n").await.starts_with("HTTP/1.0 200"));
}

#[cfg(feature = "grpc")]
#[tokio::test(flavor = "multi_thread")]
async fn grpc_messages_may_be_compressed_by_gzip() {
    let server = Server::shipped().await;
    // The model's name in field 1.
    let message = [&[0x0A, 10][..], b"cifar10-lt"].concat();
    let call = async |coding: &str, flag: u8, message: &[u8]| {
        let framed = [&[flag][..], &(message.len() as u32).to_be_bytes(), message].concat();
        let headers = [("content-type", "application/grpc"), ("grpc-encoding", coding)];
        let answer = server.post_with("/inference.GRPCInferenceService/ModelReady", &headers, framed).await;
        assert_eq!(answer.header("grpc-accept-encoding"), "identity,gzip");
        (answer.header("grpc-status").to_owned(), answer.body)
    };
    let expected = call("identity", 0, &message).await;
    assert_eq!(expected.1[5..], [8, 1]);
    assert_eq!(call("gzip", 1, &gzip(&message)).await, expected);
    // A client that can compress need not.
    assert_eq!(call("gzip", 0, &message).await, expected);
    // UNIMPLEMENTED, INVALID_ARGUMENT, RESOURCE_EXHAUSTED
    assert_eq!(call("br", 1, &message).await.0, "12");
    assert_eq!(call("gzip", 1, &message).await.0, "3");
    assert_eq!(call("gzip", 1, &gzip(&vec![0; 30 << 20])).await.0, "8");
}

#[tokio::test(flavor = "multi_thread")]
async fn tritons_configuration_says_that_either_input_will_do() {
    let server = Server::shipped().await;
    let config = server.get("/v2/models/cifar10-lt/config").await.json();
    let inputs: Vec<(&str, &Value, &Value)> = config["input"]
        .as_array()
        .unwrap()
        .iter()
        .map(|i| (i["name"].as_str().unwrap(), &i["dims"], &i["optional"]))
        .collect();
    let yes = json!(true);
    assert_eq!(inputs, [("images", &json!([3, 32, 32]), &yes), ("image", &json!([1]), &yes)]);
    let metadata = server.get("/v2/models/cifar10-lt").await.json();
    assert_eq!(metadata["inputs"][1]["shape"], json!([-1, 1]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_has_closed_its_side_gets_its_answer() {
    let server = Server::shipped().await;
    let address = server.address.clone();
    let body = picture(50, 40, image::ImageFormat::Png);
    let request = crate::support::request(&address, "/v1/classify", "image/png", &body);
    let answer = tokio::task::spawn_blocking(move || {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        stream.write_all(&request).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        text(&answer)
    });
    let answer = answer.await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("predictions"), "{answer}");
}
