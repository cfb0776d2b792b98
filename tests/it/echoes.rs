//! However long a value is that a client sends, the answer to it is short.

use image::ImageFormat;
use nbn::serve::ServeOptions;
use reqwest::header::{HeaderName, HeaderValue};
use serde_json::{Value, json};

use crate::support::{Server, picture, repository};

/// Bytes of a value in a body, and of one in the request's head, which may have 64 KiB.
const LONG: usize = 1 << 20;
const LONG_IN_HEAD: usize = 50_000;
/// Bytes of an answer with its head.
const SHORT: usize = 8 << 10;
/// What a place in a body holds until a long value takes it.
const HERE: &str = "here";

const GRPC: &str = "/inference.GRPCInferenceService";

async fn server(folder: &tempfile::TempDir) -> Server {
    Server::over(&repository(folder.path()), ServeOptions { control: true, ..ServeOptions::default() }).await
}

/// Sends the request, whose answer must be short; the status and the answer's body.
async fn short(request: reqwest::RequestBuilder, what: &str) -> (u16, String) {
    let answer = request.send().await.unwrap_or_else(|error| panic!("{what}: {error:?}"));
    let status = answer.status().as_u16();
    let message = answer.headers().get("grpc-message").map_or("", |v| v.to_str().unwrap()).to_owned();
    let head: usize = answer.headers().iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    let body = answer.text().await.unwrap();
    assert!(head + body.len() < SHORT, "{what}: {status} with {} bytes", head + body.len());
    assert!(status == 200 || (400..500).contains(&status), "{what}: {status} {body}");
    (status, if message.is_empty() { body } else { message })
}

#[tokio::test]
async fn long_names_in_every_path_and_long_queries_get_short_answers() {
    let folder = tempfile::tempdir().unwrap();
    let server = server(&folder).await;
    let document: Value = serde_json::from_str(nbn::serve::OPENAPI_JSON).unwrap();
    let long = "x".repeat(LONG_IN_HEAD);
    let mut asked = 0;
    for (template, operations) in document["paths"].as_object().unwrap() {
        let named = |model: &str, version: &str| template.replace("{model}", model).replace("{version}", version);
        let plain = named("cifar10-lt", "1");
        let paths = [
            named(&long, "1"),
            named("cifar10-lt", &long),
            format!("{plain}/{long}"),
            format!("{plain}?{long}=1"),
            format!("{plain}?top_k={long}"),
        ];
        for path in paths.iter().filter(|path| path.len() > LONG_IN_HEAD) {
            for method in operations.as_object().unwrap().keys() {
                let method = method.to_uppercase().parse().unwrap();
                let what = format!("{method} {template}");
                let request = server.client.request(method, format!("http://{}{path}", server.address));
                let documents = ["/openapi.yaml", "/metrics", "/v1/models/{model}"];
                if !(documents.contains(&template.as_str()) && path.contains('?')) {
                    short(request.header("content-type", "image/png"), &what).await;
                    asked += 1;
                }
            }
        }
    }
    assert!(asked > 60, "{asked} requests");
    let method = reqwest::Method::from_bytes("M".repeat(LONG_IN_HEAD).as_bytes()).unwrap();
    short(server.client.request(method, format!("http://{}/v1/models", server.address)), "a long method").await;
    for path in ["nothing", "inference.GRPCInferenceService", "grpc.health.v1.Health"] {
        let request = server.client.post(format!("http://{}/{path}/{long}", server.address));
        short(request.header("content-type", "application/grpc").body(&b"\0\0\0\0\0"[..]), path).await;
    }
}

#[tokio::test]
async fn long_headers_get_short_answers() {
    let folder = tempfile::tempdir().unwrap();
    let server = server(&folder).await;
    let long = "x".repeat(LONG_IN_HEAD);
    for path in ["v1/classify", "v2/models/cifar10-lt/infer", "v2/repository/models/cifar10-lt/load", &GRPC[1..]] {
        for name in [
            "content-type",
            "content-encoding",
            "inference-header-content-length",
            "x-request-id",
            "traceparent",
            "grpc-timeout",
            "grpc-encoding",
            "authorization",
            "origin",
            "sec-fetch-site",
            "host",
            "accept",
        ] {
            let request = server.client.post(format!("http://{}/{path}", server.address));
            let name_and_value = (HeaderName::from_static(name), HeaderValue::from_str(&long).unwrap());
            let mut headers = reqwest::header::HeaderMap::from_iter([name_and_value]);
            headers.entry("content-type").or_insert(HeaderValue::from_static("application/json"));
            short(request.headers(headers).body("{}"), &format!("{path} {name}")).await;
        }
    }
}

/// `value` with a long key in each of its objects, and with [`HERE`] in each of its places, one at a time.
fn variants(value: &Value) -> Vec<(String, Value)> {
    let mut all = vec![("itself".to_owned(), json!(HERE))];
    match value {
        Value::Object(fields) => {
            let mut more = fields.clone();
            more.insert("k".repeat(LONG), json!(1));
            all.push(("a long key".into(), more.into()));
            for (name, field) in fields {
                for (place, changed) in variants(field) {
                    let mut fields = fields.clone();
                    fields.insert(name.clone(), changed);
                    all.push((format!("{name}, {place}"), fields.into()));
                }
            }
        }
        Value::Array(elements) => {
            for (at, element) in elements.iter().enumerate() {
                for (place, changed) in variants(element) {
                    let mut elements = elements.clone();
                    elements[at] = changed;
                    all.push((format!("{at}, {place}"), elements.into()));
                }
            }
        }
        _ => {}
    }
    all
}

/// Posts `base` with each of its values made long, as a text, as a number and as a list.
async fn post_variants(server: &Server, path: &str, base: &Value) {
    let long =
        ["x".repeat(LONG), "\\u0001\\\"`".repeat(LONG / 8), "ü".repeat(LONG / 2)].map(|text| format!("\"{text}\""));
    let long = long.into_iter().chain(["7".repeat(LONG), format!("[{}1]", "1,".repeat(LONG / 2))]);
    for value in long {
        for (place, body) in variants(base) {
            let body = body.to_string().replace(&format!("{HERE:?}"), &value);
            let request = server.client.post(format!("http://{}{path}", server.address));
            let what = format!("{path}, {place}: {}", value.chars().take(8).collect::<String>());
            short(request.header("content-type", "application/json").body(body), &what).await;
        }
    }
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

#[tokio::test]
async fn long_values_and_keys_in_json_get_short_answers() {
    let folder = tempfile::tempdir().unwrap();
    let server = server(&folder).await;
    let png = base64(&picture(8, 8, ImageFormat::Png));
    let options = json!({
        "top_k": 1, "min_score": 0.5, "prior": {"cat": 1.0}, "alpha": 0.5, "set_score": "pas", "set_rung": "group",
        "max_set_size": 3, "abstain_prior_only": true, "include": ["logits"]
    });
    let native = json!({"images": [{"b64": png, "id": "a"}, {"b64": png}], "options": options});
    post_variants(&server, "/v1/classify", &native).await;
    let parameters = json!({
        "timeout": 1_000_000, "nbn_top_k": 1, "nbn_alpha": 0.5, "nbn_prior": {"cat": 1.0}, "binary_data_output": false,
        "unknown": 1
    });
    let v2 = json!({
        "id": "a", "parameters": parameters,
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [png],
            "parameters": {"binary_data_size": 1}}],
        "outputs": [{"name": "logits", "parameters": {"classification": 1, "binary_data": false}}]
    });
    post_variants(&server, "/v2/models/cifar10-lt/infer", &v2).await;
    let named = json!({"nbn_prior": format!("{{\"{}\": 1}}", "x".repeat(LONG)), "nbn_top_k": "x".repeat(LONG)});
    let named = json!({"parameters": named, "inputs": v2["inputs"]});
    let request = server.client.post(format!("http://{}/v2/models/cifar10-lt/infer", server.address));
    short(request.json(&named), "a prior in a text").await;
    for path in ["/v2/repository/index", "/v2/repository/models/cifar10-lt/load"] {
        post_variants(&server, path, &json!({"ready": true, "parameters": {"a": 1}})).await;
    }
}

#[tokio::test]
async fn a_long_value_is_cut_where_it_is_quoted_and_what_was_expected_stays() {
    let folder = tempfile::tempdir().unwrap();
    let server = server(&folder).await;
    let (x, cut) = ("x".repeat(LONG), format!("{}\"… (cut: it has {LONG} bytes)", "x".repeat(100)));
    let message = format!("{}… (cut: it has {LONG} bytes)", "x".repeat(100));
    let answer = server.post("/v1/classify", "application/json", json!({"images": x}).to_string()).await;
    let detail = answer.json()["detail"].as_str().unwrap().to_owned();
    let start = format!("the JSON body is not valid: invalid type: string \"{message}\", expected a list of objects");
    assert!(detail.starts_with(&start), "{detail}");
    let body = json!({"images": [], "options": {x.clone(): 1}});
    let answer = server.post("/v1/classify", "application/json", body.to_string()).await;
    let detail = answer.json()["detail"].as_str().unwrap().to_owned();
    assert!(detail.contains(&format!("unknown field `{message}`, expected one of `top_k`")), "{detail}");
    let png = base64(&picture(8, 8, ImageFormat::Png));
    let body = json!({"images": [{"b64": png}], "options": {"prior": {x.clone(): 1}}});
    let answer = server.post("/v1/classify", "application/json", body.to_string()).await;
    let detail = answer.json()["detail"].as_str().unwrap().to_owned();
    assert!(detail.ends_with(&format!("names \"{message}\", which is not a class of this model")), "{detail}");
    let input = json!({"name": "image", "datatype": x, "shape": [1], "data": [png]});
    let body = json!({"inputs": [input]}).to_string();
    let answer = server.post("/v2/models/cifar10-lt/infer", "application/json", body).await;
    let error = answer.json()["error"].as_str().unwrap().to_owned();
    assert_eq!(error, format!("input image has datatype \"{cut}; expected BYTES"));
}

#[tokio::test]
async fn ids_that_are_repeated_have_at_most_1024_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let server = server(&folder).await;
    let png = picture(8, 8, ImageFormat::Png);
    for (bytes, status) in [(1024, 200), (1025, 400)] {
        let id = "i".repeat(bytes);
        let native = json!({"images": [{"b64": base64(&png), "id": id}]});
        let native = server.post("/v1/classify", "application/json", native.to_string()).await;
        let input = json!({"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64(&png)]});
        let v2 = json!({"id": id, "inputs": [input]}).to_string();
        let v2 = server.post("/v2/models/cifar10-lt/infer", "application/json", v2).await;
        let part = reqwest::multipart::Part::bytes(png.clone()).file_name(id.clone());
        let form = reqwest::multipart::Form::new().part("image", part);
        let form = server.client.post(format!("http://{}/v1/classify", server.address)).multipart(form);
        let form = form.send().await.unwrap();
        assert_eq!((native.status, v2.status, form.status().as_u16()), (status, status, status));
        let (native, v2, form) = (native.json(), v2.json(), form.json::<Value>().await.unwrap());
        if status == 200 {
            let ids = [&native["results"][0]["id"], &v2["id"], &form["results"][0]["id"]];
            assert_eq!(ids, [id.as_str(); 3]);
        } else {
            for reason in [&native["detail"], &v2["error"], &form["detail"]] {
                assert!(
                    reason.as_str().unwrap().contains("has 1025 bytes; this server accepts up to 1024"),
                    "{reason}"
                );
            }
        }
    }
}

#[tokio::test]
async fn long_names_in_multipart_bodies_get_short_answers() {
    let folder = tempfile::tempdir().unwrap();
    let server = server(&folder).await;
    let long = "x".repeat(LONG);
    let heads = [
        format!("content-disposition: form-data; name=\"{long}\""),
        format!("content-disposition: form-data; name=\"image\"; filename=\"{long}\""),
        format!("content-disposition: form-data; name=\"image\"\r\ncontent-type: {long}"),
        format!("content-disposition: form-data; name=\"image\"\r\n{long}: 1"),
        format!("content-disposition: {long}; name=\"image\""),
        long.clone(),
    ];
    for head in heads {
        let body = format!("--b\r\n{head}\r\n\r\ncontent\r\n--b--\r\n");
        let request = server.client.post(format!("http://{}/v1/classify", server.address));
        let request = request.header("content-type", "multipart/form-data; boundary=b").body(body);
        let (status, answer) = short(request, &head[..60]).await;
        assert!(status >= 400, "{answer}");
    }
}

/// A field of a message, with a length.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number << 3 | 2];
    let mut length = content.len();
    while length >= 0x80 {
        bytes.push(length as u8 | 0x80);
        length >>= 7;
    }
    bytes.push(length as u8);
    bytes.extend_from_slice(content);
    bytes
}

#[tokio::test]
async fn long_values_in_every_grpc_message_get_short_answers() {
    let folder = tempfile::tempdir().unwrap();
    let server = server(&folder).await;
    let (name, long) = (field(1, b"cifar10-lt"), vec![b'x'; LONG]);
    let input = |fields: &[Vec<u8>]| [name.clone(), field(5, &fields.concat())].concat();
    let image = [field(1, b"image"), field(2, b"BYTES"), field(3, &[1]), field(5, &field(8, b"no picture"))];
    let text = |name: &[u8], value: &[u8]| [field(1, name), field(2, &field(3, value))].concat();
    let calls = [
        ("ModelReady", field(1, &long)),
        ("ModelReady", [name.clone(), field(2, &long)].concat()),
        ("ModelMetadata", field(1, &long)),
        ("ModelMetadata", [name.clone(), field(2, &long)].concat()),
        ("ModelConfig", field(1, &long)),
        ("ModelStatistics", field(1, &long)),
        ("RepositoryIndex", field(1, &long)),
        ("RepositoryModelLoad", field(2, &long)),
        ("RepositoryModelLoad", [field(2, b"cifar10-lt"), field(3, &field(1, &long))].concat()),
        ("RepositoryModelUnload", field(2, &long)),
        ("ServerLive", field(9, &long)),
        ("ServerMetadata", long.clone()),
        ("ModelInfer", field(1, &long)),
        ("ModelInfer", [name.clone(), field(2, &long)].concat()),
        ("ModelInfer", [input(&image), field(3, &long)].concat()),
        ("ModelInfer", [input(&image), field(4, &text(&long, b"1"))].concat()),
        ("ModelInfer", [input(&image), field(4, &text(b"timeout", &long))].concat()),
        ("ModelInfer", [input(&image), field(4, &text(b"nbn_prior", &long))].concat()),
        ("ModelInfer", [input(&image), field(4, &text(b"nbn_alpha", &long))].concat()),
        ("ModelInfer", [input(&image), field(4, &text(b"nbn_top_k", &long))].concat()),
        ("ModelInfer", input(&[field(1, &long)])),
        ("ModelInfer", input(&[field(1, &long), field(5, &[])])),
        ("ModelInfer", input(&[field(1, b"image"), field(2, &long), field(5, &[])])),
        ("ModelInfer", input(&[field(1, b"image"), field(2, b"BYTES"), field(3, &[1; 1000]), field(5, &[])])),
        ("ModelInfer", [input(&image), field(6, &field(1, &long))].concat()),
        (
            "ModelInfer",
            [input(&image), field(6, &[field(1, b"logits"), field(2, &text(b"classification", &long))].concat())]
                .concat(),
        ),
        ("ModelInfer", long.clone()),
    ];
    for (method, message) in calls {
        let framed = [&[0][..], &(message.len() as u32).to_be_bytes(), &message].concat();
        let request = server.client.post(format!("http://{}{GRPC}/{method}", server.address));
        let request = request.header("content-type", "application/grpc").body(framed);
        let (status, message) = short(request, method).await;
        assert!(status == 200 && !message.contains(&"x".repeat(150)), "{method}: {status} {message}");
    }
}
