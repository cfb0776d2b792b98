//! What an operator does: keys, TLS, configuration, reloading, watching.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};

use nbn::bundle::sha256_hex;
use nbn::registry::Registry;
use nbn::serve::{self, Keys, Listeners, RequestLimits, ServeOptions, Tls};
use serde_json::{Value, json};

use crate::support::{Gated, Owned, Process, Server, model, nbn, picture, repository, root, shipped, text};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_swaps_under_load_fail_no_request() {
    let folder = tempfile::tempdir().unwrap();
    let options = ServeOptions { control: true, ..ServeOptions::default() };
    let server = Arc::new(Server::over(&repository(folder.path()), options).await);
    let done = Arc::new(AtomicBool::new(false));
    let answered = Arc::new(AtomicUsize::new(0));
    let mut clients = Vec::new();
    for _ in 0..4 {
        let (server, done, answered) = (server.clone(), done.clone(), answered.clone());
        clients.push(tokio::spawn(async move {
            let png = picture(40, 40, image::ImageFormat::Png);
            while !done.load(Ordering::Relaxed) {
                let answer = server.post("/v1/classify", "image/png", png.clone()).await;
                assert_eq!(answer.status, 200, "{}", text(&answer.body));
                answered.fetch_add(1, Ordering::Relaxed);
            }
        }));
    }
    for _ in 0..100 {
        let answer = server.post("/v2/repository/models/cifar10-lt/load", "application/json", "{}").await;
        assert_eq!(answer.status, 200, "{}", text(&answer.body));
    }
    done.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    assert!(answered.load(Ordering::Relaxed) > 100);
    assert_eq!(server.registry.loads(), (101, 0));
}

#[tokio::test]
async fn a_broken_version_leaves_the_old_serving_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let repository = repository(folder.path());
    let server = Server::over(&repository, ServeOptions { control: true, ..ServeOptions::default() }).await;
    let second = repository.join("cifar10-lt/2");
    std::fs::create_dir(&second).unwrap();
    std::fs::write(second.join("manifest.json"), "{}").unwrap();
    let answer = server.post("/v2/repository/models/cifar10-lt/load", "application/json", "{}").await;
    assert_eq!(answer.status, 400);
    assert!(answer.json()["error"].as_str().unwrap().contains("/v2/repository/index"));
    let index = server.post("/v2/repository/index", "application/json", "").await.json();
    assert_eq!((&index[0]["version"], &index[0]["state"]), (&json!("1"), &json!("READY")));
    assert_eq!((&index[1]["version"], &index[1]["state"]), (&json!("2"), &json!("UNAVAILABLE")));
    let reason = index[1]["reason"].as_str().unwrap();
    assert!(reason.starts_with("cifar10-lt/2/manifest.json: not a manifest"), "{reason}");
    let png = picture(32, 32, image::ImageFormat::Png);
    let reply = server.post("/v1/classify", "image/png", png.clone()).await.json();
    assert_eq!(reply["version"], "1");
    // Mended, it takes over, and version 1 is no longer wanted.
    for name in ["manifest.json", "model.onnx", "familiarity.safetensors", "calibration.json", "evaluation.json"] {
        std::fs::copy(repository.join("cifar10-lt/1").join(name), second.join(name)).unwrap();
    }
    server.registry.refresh();
    let reply = server.post("/v1/classify", "image/png", png.clone()).await.json();
    assert_eq!(reply["version"], "2");
    let gone = server.post("/v1/models/cifar10-lt/versions/1/classify", "image/png", png.clone()).await;
    assert_eq!((gone.status, &gone.json()["code"]), (404, &json!("no_such_version")));
    assert_eq!(server.post("/v2/repository/models/cifar10-lt/unload", "application/json", "{}").await.status, 200);
    assert_eq!(server.post("/v1/classify", "image/png", png).await.status, 404);
    for name in ["nobody", "..", "%2e%2e%2fmodels"] {
        let path = format!("/v2/repository/models/{name}/load");
        let answer = server.post(&path, "application/json", "{}").await;
        assert!(answer.status == 404, "{path}: {}", text(&answer.body));
    }
}

#[tokio::test]
async fn control_needs_to_be_allowed() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::over(&repository(folder.path()), ServeOptions::default()).await;
    for action in ["load", "unload"] {
        let answer = server.post(&format!("/v2/repository/models/cifar10-lt/{action}"), "application/json", "{}").await;
        assert_eq!(answer.status, 403);
        assert!(answer.json()["error"].as_str().unwrap().contains("--control"));
    }
}

/// A gRPC call over HTTP/1.1, which shows what is refused: its status stands in the head.
async fn grpc(address: &str, path: &str, message: &[u8]) -> reqwest::Response {
    let framed = [&[0][..], &(message.len() as u32).to_be_bytes(), message].concat();
    let request = reqwest::Client::new().post(format!("http://{address}/{path}"));
    request.header("content-type", "application/grpc").body(framed).send().await.unwrap()
}

fn grpc_status(response: &reqwest::Response) -> &str {
    response.headers().get("grpc-status").map_or("0", |v| v.to_str().unwrap())
}

#[tokio::test]
async fn with_an_admin_listener_the_repository_is_spoken_of_there_and_only_there() {
    let folder = tempfile::tempdir().unwrap();
    let bind = || tokio::net::TcpListener::bind("127.0.0.1:0");
    let (main, admin) = (bind().await.unwrap(), bind().await.unwrap());
    let (main_address, admin_address) = (main.local_addr().unwrap(), admin.local_addr().unwrap());
    let (_stop, stopped) = tokio::sync::watch::channel(false);
    let keys = Arc::new(Keys::parse(&format!("root {} admin\n", sha256_hex(b"key")), 0).unwrap());
    let registry = Server::over(&repository(folder.path()), ServeOptions::default()).await.registry.clone();
    let listeners = Listeners { main, grpc: None, admin: Some(admin), tls: None };
    let options = ServeOptions { keys, ..ServeOptions::default() };
    tokio::spawn(serve::run(listeners, registry.clone(), options, stopped));
    let call = async |address: std::net::SocketAddr, method: &str| {
        let request = reqwest::Client::new().post(format!("http://{address}/inference.GRPCInferenceService/{method}"));
        // The name "cifar10-lt" in field 2.
        let message = [&[0x12, 10][..], b"cifar10-lt"].concat();
        let framed = [&[0, 0, 0, 0, 12][..], &message].concat();
        let request = request.header("content-type", "application/grpc").header("x-api-key", "key").body(framed);
        grpc_status(&request.send().await.unwrap()).to_owned()
    };
    for method in ["RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"] {
        // PERMISSION_DENIED
        assert_eq!(call(main_address, method).await, "7", "{method}");
    }
    assert_eq!(registry.names(), ["cifar10-lt"]);
    assert_eq!(call(admin_address, "RepositoryModelUnload").await, "0");
    assert!(registry.names().is_empty());
    // NOT_FOUND
    assert_eq!(call(admin_address, "RepositoryModelUnload").await, "5");
    assert_eq!(call(admin_address, "RepositoryModelLoad").await, "0");
    assert_eq!(registry.names(), ["cifar10-lt"]);
    // Whoever has no key learns no name, and holds little memory.
    let health = grpc(&main_address.to_string(), "grpc.health.v1.Health/Check", b"\x0A\x01x").await;
    let message = health.headers()["grpc-message"].to_str().unwrap().to_owned();
    assert!(grpc_status(&health) == "5" && !message.contains("cifar10-lt"), "{message}");
    let large = grpc(&main_address.to_string(), "grpc.health.v1.Health/Check", &[0; 5000]).await;
    // OUT_OF_RANGE
    assert_eq!(grpc_status(&large), "11");
    // UNIMPLEMENTED
    assert_eq!(grpc_status(&grpc(&main_address.to_string(), "grpc.health.v1.Health/List", b"").await), "12");
    // In field 7, a question for the services.
    let reflection = "grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
    let services = grpc(&main_address.to_string(), reflection, b"\x3A\x00").await.bytes().await.unwrap();
    let services = String::from_utf8_lossy(&services);
    for service in ["inference.GRPCInferenceService", "grpc.health.v1.Health"] {
        assert!(services.contains(service), "{services}");
    }
}

#[cfg(unix)]
#[tokio::test]
async fn a_version_that_is_a_link_is_served_as_the_repository_calls_it() {
    let folder = tempfile::tempdir().unwrap();
    let repository = repository(folder.path());
    let artifact = folder.path().join("artifacts/abc");
    std::fs::create_dir_all(artifact.parent().unwrap()).unwrap();
    std::fs::rename(repository.join("cifar10-lt/1"), &artifact).unwrap();
    std::os::unix::fs::symlink(&artifact, repository.join("cifar10-lt/2")).unwrap();
    std::fs::create_dir(repository.join("lost+found")).unwrap();
    let server = Server::over(&repository, ServeOptions::default()).await;
    let answer = server.get("/v2/models/cifar10-lt/versions/2").await;
    assert_eq!((answer.status, &answer.json()["versions"]), (200, &json!(["2"])));
    let png = picture(8, 8, image::ImageFormat::Png);
    let answer = server.post("/v1/models/cifar10-lt/versions/2/classify", "image/png", png).await;
    assert_eq!(answer.json()["version"], "2");
}

#[tokio::test]
async fn a_folder_without_versions_is_left_out_and_one_with_a_number_in_another_form_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let repository = repository(folder.path());
    std::fs::create_dir_all(repository.join("notes/drafts")).unwrap();
    let server = Server::over(&repository, ServeOptions::default()).await;
    let models = server.get("/v1/models").await.json();
    assert_eq!(models["models"].as_array().unwrap().len(), 1, "{models}");
    // By itself it is an error, as is a version in another form.
    let serve = |repository: &std::path::Path| {
        let out = nbn(&["serve", "--addr", "127.0.0.1:0", "--models", repository.to_str().unwrap()]);
        assert_eq!(out.status.code(), Some(1));
        text(&out.stderr)
    };
    std::fs::rename(repository.join("cifar10-lt/1"), repository.join("cifar10-lt/01")).unwrap();
    let error = serve(&repository);
    assert!(
        error.contains("cifar10-lt/01: a version's folder is named by its number alone: rename it to 1"),
        "{error}"
    );
    std::fs::remove_dir_all(repository.join("cifar10-lt")).unwrap();
    assert!(serve(&repository).contains("notes: no version found"));
}

#[tokio::test]
async fn browsers_may_send_a_key_across_origins() {
    let options = ServeOptions { cors_origins: vec!["https://a.example".into()], ..ServeOptions::default() };
    let server = Server::with(Registry::new(Vec::new(), None).unwrap(), options).await;
    let request = server.client.request(reqwest::Method::OPTIONS, format!("http://{}/v1/classify", server.address));
    let request = request.header("origin", "https://a.example").header("access-control-request-method", "POST");
    let answer = request.header("access-control-request-headers", "authorization").send().await.unwrap();
    assert_eq!(answer.headers()["access-control-allow-headers"], "authorization");
}

#[tokio::test]
async fn keys_are_asked_for_and_bounded() {
    let keys = format!(
        "# comment\nalice {} concurrency=1\n\nroot {} admin\n",
        sha256_hex(b"alice's key"),
        sha256_hex(b"root's key")
    );
    let keys = Arc::new(Keys::parse(&keys, 0).unwrap());
    let (gate, receiver) = mpsc::channel();
    let (entered, inside) = mpsc::channel();
    let served = model(Arc::new(shipped().manifest), Gated { gate: receiver, entered }, 8);
    let options = ServeOptions { keys, ..ServeOptions::default() };
    let server = Arc::new(Server::with(Registry::new(vec![served], None).unwrap(), options).await);
    let png = picture(8, 8, image::ImageFormat::Png);
    let post = |header: &'static str, value: &'static str| {
        let (server, png) = (server.clone(), png.clone());
        async move {
            let request = server.client.post(format!("http://{}/v1/classify", server.address));
            let answer =
                request.header("content-type", "image/png").header(header, value).body(png).send().await.unwrap();
            let retry = answer.headers().get("retry-after").is_some();
            (answer.status().as_u16(), retry, answer.json::<Value>().await.unwrap()["code"].clone())
        }
    };
    for (header, value, code) in [
        ("x-other", "x", "key_missing"),
        ("x-api-key", "wrong", "key_unknown"),
        ("authorization", "Basic x", "key_missing"),
    ] {
        assert_eq!(post(header, value).await, (401, false, json!(code)));
    }
    assert_eq!(server.get("/v1/models").await.status, 401);
    assert_eq!(server.get("/v2/models/test").await.status, 401);
    assert_eq!(server.get("/metrics").await.status, 401);
    for path in ["/livez", "/readyz", "/v2/health/ready", "/openapi.yaml"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
    let first = tokio::spawn(post("authorization", "Bearer alice's key"));
    tokio::task::spawn_blocking(move || {
        inside.recv().unwrap();
        std::mem::forget(inside);
    })
    .await
    .unwrap();
    assert_eq!(post("x-api-key", "alice's key").await, (429, true, json!("key_concurrency")));
    gate.send(vec![0.0; 10]).unwrap();
    assert_eq!(first.await.unwrap().0, 200);
    gate.send(vec![0.0; 10]).unwrap();
    assert_eq!(post("x-api-key", "alice's key").await.0, 200);
    for (line, words) in [
        ("alice 12", "64 hexadecimal digits"),
        ("", "no key"),
        ("a 0000000000000000000000000000000000000000000000000000000000000000 root", "\"root\""),
    ] {
        assert!(Keys::parse(line, 0).err().unwrap().contains(words), "{line}");
    }
}

#[tokio::test]
async fn metrics_on_the_dashboard_and_in_the_alerts_exist() {
    let folder = tempfile::tempdir().unwrap();
    let server =
        Server::over(&repository(folder.path()), ServeOptions { control: true, ..ServeOptions::default() }).await;
    let png = picture(32, 32, image::ImageFormat::Png);
    assert_eq!(server.post("/v1/classify?alpha=0.2", "image/png", png).await.status, 200);
    let limit = RequestLimits::default().max_images;
    let many = vec![("image", "x", b"x".to_vec()); limit + 1];
    assert_eq!(server.multipart("/v1/classify", many).await.status, 413);
    let metrics = text(&server.get("/metrics").await.body);
    let known: BTreeSet<&str> =
        metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    let mut checked = 0;
    for file in ["deploy/grafana/nbn.json", "deploy/prometheus/alerts.yml"] {
        let content = std::fs::read_to_string(root().join(file)).unwrap();
        for name in content.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':')) {
            if !name.starts_with("nbn_") || name.contains(':') {
                continue;
            }
            let base = ["_bucket", "_sum", "_count", "_total", "_info"].iter().find_map(|end| name.strip_suffix(end));
            let exists = known.contains(name) || base.is_some_and(|base| known.contains(base));
            assert!(exists, "{file}: {name} is not among {known:?}");
            checked += 1;
        }
    }
    assert!(checked > 20, "{checked} names were found");
    // A client's string is no label.
    assert_eq!(server.post("/v1/models/client-made-this-up/classify", "image/png", "x").await.status, 404);
    assert!(!text(&server.get("/metrics").await.body).contains("client-made-this-up"));
}

#[tokio::test]
async fn a_trace_is_continued_and_timings_are_told() {
    let server = Server::shipped().await;
    let png = picture(32, 32, image::ImageFormat::Png);
    let request = server.client.post(format!("http://{}/v1/classify", server.address));
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let request = request.header("content-type", "image/png").header("traceparent", parent).body(png);
    let answer = request.send().await.unwrap();
    let header = |name: &str| answer.headers()[name].to_str().unwrap().to_owned();
    assert!(header("traceparent").starts_with("00-0af7651916cd43dd8448eb211c80319c-"));
    assert!(header("traceparent").ends_with("-01"));
    assert_ne!(header("traceparent"), parent);
    for stage in ["queue", "decode", "preprocess", "infer", "calibrate"] {
        assert!(header("server-timing").contains(&format!("{stage};dur=")));
    }
    assert!(server.get("/livez").await.header("traceparent").starts_with("00-"));
}

#[tokio::test]
async fn tls_serves_and_takes_a_new_certificate_without_a_restart() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let folder = tempfile::tempdir().unwrap();
    let (cert, key) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
    let write = || {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
        std::fs::write(&cert, made.cert.pem()).unwrap();
        std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        made.cert.der().clone()
    };
    let first = write();
    let tls = Arc::new(Tls::load(&cert, &key).unwrap());
    let main = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = main.local_addr().unwrap();
    let (_stop, stopped) = tokio::sync::watch::channel(false);
    let listeners = Listeners { main, grpc: None, admin: None, tls: Some(tls.clone()) };
    let registry = Arc::new(Registry::new(Vec::new(), None).unwrap());
    tokio::spawn(serve::run(listeners, registry, ServeOptions::default(), stopped));
    let ask = async |trusted: rustls::pki_types::CertificateDer<'static>| {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(trusted).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();
        let mut stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
        stream.write_all(b"GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await?;
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await?;
        Ok::<_, std::io::Error>(reply)
    };
    assert!(ask(first.clone()).await.unwrap().starts_with("HTTP/1.1 200"));
    let health = move || nbn(&["health", "--addr", &address.to_string()]);
    let health = tokio::task::spawn_blocking(health).await.unwrap();
    assert!(health.status.success(), "{}", text(&health.stderr));
    let second = write();
    tls.reload().unwrap();
    assert!(ask(second.clone()).await.unwrap().starts_with("HTTP/1.1 200"));
    assert!(ask(first).await.is_err());
    std::fs::write(&cert, "no certificate").unwrap();
    assert!(tls.reload().unwrap_err().to_string().contains("holds no certificate"));
    assert!(ask(second).await.unwrap().starts_with("HTTP/1.1 200"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_under_load_cuts_no_answer() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let server = Server::shipped().await;
    let png = picture(40, 40, image::ImageFormat::Png);
    let head = format!(
        "POST /v1/classify HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: image/png\r\ncontent-length: {}\r\n\r\n",
        png.len()
    );
    let request: Arc<[u8]> = [head.as_bytes(), &png].concat().into();
    let whole = Arc::new(AtomicUsize::new(0));
    let mut clients = Vec::new();
    for _ in 0..8 {
        let (address, request, whole) = (server.address.clone(), request.clone(), whole.clone());
        clients.push(tokio::spawn(async move {
            loop {
                let Ok(mut stream) = tokio::net::TcpStream::connect(&address).await else { return };
                let mut answer = Vec::new();
                let sent = stream.write_all(&request).await.is_ok();
                let read = stream.read_to_end(&mut answer).await.is_ok();
                if answer.is_empty() {
                    // It was never accepted.
                    return;
                }
                let text = text(&answer);
                let (head, body) = text.split_once("\r\n\r\n").expect("a whole head");
                let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
                assert!(sent && read && body.len() == length.parse::<usize>().unwrap(), "cut: {text}");
                assert!(head.starts_with("HTTP/1.1 200") || head.starts_with("HTTP/1.1 503"), "{head}");
                whole.fetch_add(1, Ordering::Relaxed);
            }
        }));
    }
    while whole.load(Ordering::Relaxed) < 100 {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    server.stop();
    for client in clients {
        client.await.unwrap();
    }
    assert_eq!(server.ended().await, serve::Ended::Drained);
}

#[tokio::test]
async fn a_connection_that_never_begins_a_request_is_closed() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let header_timeout = std::time::Duration::from_millis(300);
    let connections = serve::ConnectionLimits { header_timeout, ..Default::default() };
    let registry = Registry::new(Vec::new(), None).unwrap();
    let server = Server::with(registry, ServeOptions { connections, ..ServeOptions::default() }).await;
    let starts: [&[u8]; 4] = [b"", b"PRI", b"GET / HTTP/1.1\r\nhost:", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"];
    for start in starts {
        let mut stream = tokio::net::TcpStream::connect(&server.address).await.unwrap();
        stream.write_all(start).await.unwrap();
        let mut rest = Vec::new();
        let end = stream.read_to_end(&mut rest);
        let ended = tokio::time::timeout(std::time::Duration::from_secs(10), end).await;
        assert!(ended.is_ok(), "{}: still open", text(start));
    }
    let mut stream = tokio::net::TcpStream::connect(&server.address).await.unwrap();
    for _ in 0..4 {
        // A connection in use outlives the limit.
        stream.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut start = [0; 12];
        stream.read_exact(&mut start).await.unwrap();
        assert_eq!(&start, b"HTTP/1.1 200");
        while stream.read_u8().await.unwrap() != b'k' {}
        stream.read_u8().await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(150)).await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_its_answers_unread_is_let_go() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let limits = RequestLimits { timeout: std::time::Duration::from_secs(1), ..RequestLimits::default() };
    let server = Server::of(Vec::new(), limits).await;
    let document = server.get("/openapi.yaml").await.body.len();
    let mut stream = tokio::net::TcpStream::connect(&server.address).await.unwrap();
    // More than the system keeps for a connection.
    let requests = (64 << 20) / document;
    let asked = "GET /openapi.yaml HTTP/1.1\r\nhost: x\r\n\r\n".repeat(requests);
    let write = tokio::time::timeout(std::time::Duration::from_secs(20), stream.write_all(asked.as_bytes()));
    // It may be let go before it has asked for all.
    let _ = write.await.expect("the server goes on reading, or lets go");
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    let mut rest = Vec::new();
    let end = tokio::time::timeout(std::time::Duration::from_secs(20), stream.read_to_end(&mut rest)).await;
    // A reset ends it as well as a close.
    let _ = end.expect("the connection ends");
    assert!(rest.len() < requests * document, "everything was kept for it");
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn traces_reach_a_collector() {
    use http_body_util::{BodyExt, Empty};
    use std::io::BufRead;
    let collector = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", collector.local_addr().unwrap());
    let (sender, mut spans) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((stream, _)) = collector.accept().await {
            let sender = sender.clone();
            tokio::spawn(async move {
                let service = hyper::service::service_fn(|request: hyper::Request<hyper::body::Incoming>| {
                    let sender = sender.clone();
                    async move {
                        let path = request.uri().path().to_owned();
                        let body = request.into_body().collect().await?.to_bytes();
                        let _ = sender.send((path, body));
                        let answer = hyper::Response::builder();
                        let answer = answer.header("content-type", "application/grpc").header("grpc-status", "0");
                        Ok::<_, hyper::Error>(answer.body(Empty::<bytes::Bytes>::new()).unwrap())
                    }
                });
                let stream = hyper_util::rt::TokioIo::new(stream);
                let executor = hyper_util::rt::TokioExecutor::new();
                let _ = hyper_util::server::conn::auto::Builder::new(executor).serve_connection(stream, service).await;
            });
        }
    });
    let mut child = Owned::begin(
        Command::new(env!("CARGO_BIN_EXE_nbn"))
            .current_dir(root())
            .args(["serve", "--addr", "127.0.0.1:0", "--access-log", "--otlp", &endpoint])
            .env_remove("RUST_LOG")
            .stderr(std::process::Stdio::piped()),
    );
    let mut lines = std::io::BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    let mut address = String::new();
    for line in lines.by_ref() {
        let line: Value = serde_json::from_str(&line).unwrap();
        address = line["addr"].as_str().map_or(address, str::to_owned);
        if line["message"] == "ready" {
            break;
        }
    }
    let client = reqwest::Client::new();
    let mut ask = async |path: &str, parent: Option<&str>| {
        let mut request = client.get(format!("http://{address}{path}"));
        if let Some(parent) = parent {
            request = request.header("traceparent", parent);
        }
        let answer = request.send().await.unwrap();
        let told = answer.headers()["traceparent"].to_str().unwrap().to_owned();
        let logged: Value = serde_json::from_str(&lines.next().unwrap()).unwrap();
        // The log names the trace that the answer does.
        assert_eq!(logged["span"]["trace_id"], told[3..35], "{logged}");
        told
    };
    let probe = ask("/readyz", None).await;
    assert!(probe.ends_with("-00"), "nobody records it: {probe}");
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let own = ask("/v1/models", Some(parent)).await[36..52].to_owned();
    let fresh = ask("/v1/models/none", None).await;
    assert!(fresh.ends_with("-01"), "it is recorded: {fresh}");
    child.signal("TERM");
    let (path, body) = spans.recv().await.unwrap();
    assert_eq!(path, "/opentelemetry.proto.collector.trace.v1.TraceService/Export");
    let hex = |text: &str| -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    };
    let holds = |part: &[u8]| body.windows(part.len()).any(|window| window == part);
    assert!(holds(b"nbn") && holds(b"/v1/models") && !holds(b"/readyz"));
    assert!(holds(&hex(&fresh[3..35])) && holds(&hex(&fresh[36..52])));
    // An attribute's key, and its value as a whole number: 404.
    assert!(holds(&[b"\x0a\x19http.response.status_code\x12\x03\x18".as_slice(), &[0x94, 0x03]].concat()));
    assert!(holds(&hex("0af7651916cd43dd8448eb211c80319c")) && holds(&hex("b7ad6b7169203331")) && holds(&hex(&own)));
    assert!(child.wait().unwrap().success());
}

fn serve_with(arguments: &[&str], environment: &[(&str, &str)]) -> (i32, String, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_nbn"))
        .current_dir(root())
        .arg("serve")
        .args(arguments)
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    (out.status.code().unwrap(), text(&out.stdout), text(&out.stderr))
}

#[test]
fn configuration_goes_flag_environment_file_default() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("nbn.toml");
    let path = file.to_str().unwrap();
    std::fs::write(
        &file,
        "queue = 7\ntimeout = 8\nprior = 'train'\ncontrol = true\ncors-origin = ['https://a.example']\n",
    )
    .unwrap();
    let arguments = ["--config", path, "--print-config", "--queue", "5"];
    let (code, out, error) = serve_with(&arguments, &[("NBN_TIMEOUT", "9"), ("NBN_API_KEYS", "alice topsecret")]);
    assert_eq!(code, 0, "{error}");
    for line in [
        "queue = 5 ",
        "timeout = 9  # environment",
        "prior = \"train\"",
        "control = true",
        "max-images = 32  # default",
    ] {
        assert!(out.contains(line), "{line} is not in {out}");
    }
    assert!(out.contains("https://a.example") && !out.contains("topsecret"), "{out}");
    // What is printed is a file that can be read.
    std::fs::write(&file, out.replace("api-keys = \"(hidden)\"  # environment\n", "")).unwrap();
    let (code, _, error) = serve_with(&["--config", path, "--print-config"], &[]);
    assert_eq!(code, 0, "{error}");
    for (content, words) in [
        ("queu = 7", "unknown key \"queu\"; did you mean \"queue\"?"),
        ("queue = 'many'", "--queue"),
        ("queue = 0", "0 is not in 1..=1000000"),
        ("control = 'yes'", "expected true or false"),
        ("queue 7", "not TOML"),
        ("tls-cert = 'x.pem'", "--tls-key"),
        ("tls-cert = 'x.pem'\ntls-key = 'y.pem'", "x.pem"),
        ("api-keys-file = 'none.txt'", "none.txt"),
        ("cors-origin = ['example.org']", "https://example.org"),
        ("max-body-mb = 600", "--max-body-mb 600 exceeds --max-buffered-mb 512"),
        ("otlp = 'collector'", "--otlp"),
    ] {
        std::fs::write(&file, content).unwrap();
        let (code, _, error) = serve_with(&["--config", path], &[]);
        assert_eq!(code, 78, "{content}: {error}");
        assert!(error.contains(words), "{content}: {error}");
        assert!(!error.contains("panicked"));
    }
    assert_eq!(serve_with(&["--queue", "0"], &[]).0, 2);
    assert_eq!(serve_with(&["--models", "nowhere", "--addr", "127.0.0.1:0"], &[]).0, 1);
}

#[test]
fn a_key_is_made_and_completions_are_printed() {
    let out = nbn(&["key", "alice", "--admin", "--concurrency", "4"]);
    let lines = text(&out.stdout);
    let (key, line) = lines.trim().split_once('\n').unwrap();
    assert_eq!(line, format!("alice {} concurrency=4 admin", sha256_hex(key.as_bytes())));
    assert!(key.len() == 68 && Keys::parse(line, 0).is_ok());
    assert!(!nbn(&["key", "not a name"]).status.success());
    assert!(text(&nbn(&["completions", "bash"]).stdout).contains("--max-batch"));
}

#[tokio::test]
async fn the_page_and_the_documentation_are_served_under_a_strict_policy() {
    let server = Server::shipped().await;
    for (path, content_type) in [
        ("/", "text/html"),
        ("/page.css", "text/css"),
        ("/page.js", "text/javascript"),
        ("/docs/", "text/html"),
        ("/docs/swagger-ui-bundle.js", "javascript"),
    ] {
        let answer = server.client.get(format!("http://{}{path}", server.address)).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{path}");
        assert!(answer.headers()["content-type"].to_str().unwrap().contains(content_type), "{path}");
        let policy = answer.headers()["content-security-policy"].to_str().unwrap();
        assert!(policy.starts_with("default-src 'none'; script-src 'self';"), "{path}: {policy}");
        let body = answer.text().await.unwrap();
        assert!(!body.contains("src=\"http") && !body.contains("href=\"http"), "{path} loads from elsewhere");
    }
}

#[test]
fn answers_rows_and_cards_say_when_not_all_pixels_are_decoded() {
    let folder = tempfile::tempdir().unwrap();
    let large = folder.path().join("large.jpg");
    image::RgbImage::from_fn(640, 480, |x, y| image::Rgb([(x / 3) as u8, (y / 2) as u8, 90])).save(&large).unwrap();
    let bytes = fs::read(&large).unwrap();
    let rows = |flags: &[&str]| {
        let fixed = ["score", "--model", "models/cifar10-lt", large.to_str().unwrap()];
        let done = nbn(&[&fixed, flags].concat());
        assert!(done.status.success(), "{}", text(&done.stderr));
        text(&done.stdout)
    };
    let (exact, fast) = (rows(&[]), rows(&["--pixels", "fast"]));
    assert!(!exact.contains("pixels") && fast.contains(r#""pixels":"fast""#), "{fast}");
    let csv = rows(&["--pixels", "fast", "--format", "csv"]);
    assert!(
        csv.lines().next().unwrap().ends_with(",pixels") && csv.lines().nth(1).unwrap().ends_with(",fast"),
        "{csv}"
    );
    for (flags, expected) in [
        (&["--pixels", "fast"][..], "fast"),
        (&["--pixels", "cifar10-lt=fast"], "fast"),
        (&["--pixels", "fast,cifar10-lt=exact"], "exact"),
        (&[], "exact"),
    ] {
        let server = Process::serve(flags);
        let card = server.get("/v1/models/cifar10-lt");
        assert!(
            card.contains(&format!(r#""pixels":"{expected}""#)) && card.contains(r#""precision":"float32""#),
            "{card}"
        );
        let answer = server.post("/v1/classify", "image/jpeg", &bytes);
        assert_eq!(answer.contains(r#""pixels":"fast""#), expected == "fast", "{answer}");
        let metrics = server.get("/metrics");
        assert!(metrics.contains(r#"precision="float32""#) && metrics.contains("nbn_model_info{"), "{metrics}");
        server.terminate();
    }
    let refused = nbn(&["serve", "--pixels", "some"]);
    assert!(text(&refused.stderr).contains("expected exact or fast"), "{refused:?}");
}
