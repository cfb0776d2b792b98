//! Pages of other sites change nothing; programs that are no browsers are not looked at.

use std::sync::Arc;

use nbn::bundle::sha256_hex;
use nbn::registry::Registry;
use nbn::serve::{self, Keys, Listeners, ServeOptions};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::support::{Faulty, model, shipped};

/// Where models are controlled.
#[derive(Clone, Copy)]
enum At {
    Main,
    Admin,
}

/// A server with the model `test`, and the address at which it may be controlled.
struct Site {
    address: String,
    registry: Arc<Registry>,
    _stop: watch::Sender<bool>,
}

type Headers<'a> = &'a [(&'static str, &'a str)];

impl Site {
    async fn start(at: At, options: ServeOptions) -> Self {
        let bind = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
        let served = model(Arc::new(shipped().manifest), Faulty(|| Ok(vec![0.0; 10])), 4);
        let registry = Arc::new(Registry::new(vec![served], None).unwrap());
        let main = bind().await;
        let admin = match at {
            At::Main => None,
            At::Admin => Some(bind().await),
        };
        let address = admin.as_ref().unwrap_or(&main).local_addr().unwrap().to_string();
        let (_stop, stopped) = watch::channel(false);
        let listeners = Listeners { main, grpc: None, admin, tls: None };
        tokio::spawn(serve::run(listeners, registry.clone(), ServeOptions { control: true, ..options }, stopped));
        Self { address, registry, _stop }
    }

    /// A form's post, as any page may send it; the status and the answer.
    async fn post(&self, path: &str, headers: Headers<'_>) -> (u16, String) {
        let mut request = reqwest::Client::new().post(format!("http://{}{path}", self.address)).body("{}");
        if !headers.iter().any(|(name, _)| *name == "content-type") {
            request = request.header("content-type", "text/plain");
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = request.send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    }

    /// A gRPC call over HTTP/1.1 for the model `test`; the HTTP and the gRPC status.
    async fn grpc(&self, method: &str, content_type: &str, headers: Headers<'_>) -> (u16, String) {
        let url = format!("http://{}/inference.GRPCInferenceService/{method}", self.address);
        // The name in field 2.
        let framed = b"\0\0\0\0\x06\x12\x04test".to_vec();
        let mut request = reqwest::Client::new().post(url).header("content-type", content_type).body(framed);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = request.send().await.unwrap();
        let status = answer.headers().get("grpc-status").map_or("", |v| v.to_str().unwrap()).to_owned();
        (answer.status().as_u16(), status)
    }

    async fn must_refuse(&self, headers: Headers<'_>, words: &str) {
        for action in ["load", "unload"] {
            let (status, answer) = self.post(&format!("/v2/repository/models/test/{action}"), headers).await;
            assert!(status == 403 && answer.contains(words), "{action} {headers:?}: {status} {answer}");
        }
        for method in ["RepositoryModelLoad", "RepositoryModelUnload"] {
            // PERMISSION_DENIED
            assert_eq!(self.grpc(method, "application/grpc", headers).await, (200, "7".into()), "{method} {headers:?}");
            assert_eq!(self.grpc(method, "text/plain", headers).await.0, 415, "{method} {headers:?}");
        }
        assert_eq!(self.registry.names(), ["test"], "{headers:?}");
    }

    /// The registry has no repository, so a load that is let through fails in its own way.
    async fn must_let_through(&self, headers: Headers<'_>) {
        let (status, answer) = self.post("/v2/repository/models/test/load", headers).await;
        assert!(status == 400 && answer.contains("cannot be loaded"), "{headers:?}: {status} {answer}");
        // INVALID_ARGUMENT
        let loaded = self.grpc("RepositoryModelLoad", "application/grpc", headers).await;
        assert_eq!(loaded, (200, "3".into()), "{headers:?}");
    }
}

#[tokio::test]
async fn pages_of_other_sites_load_and_unload_nothing() {
    for at in [At::Main, At::Admin] {
        let site = Site::start(at, ServeOptions::default()).await;
        let own = format!("http://{}", site.address);
        let other_port = "http://127.0.0.1:1";
        let cases: [(Headers<'_>, &str); 9] = [
            (&[("sec-fetch-site", "cross-site")], "Sec-Fetch-Site is \\\"cross-site\\\""),
            (&[("sec-fetch-site", "same-site"), ("origin", other_port)], "Sec-Fetch-Site is \\\"same-site\\\""),
            (&[("sec-fetch-site", "")], "Sec-Fetch-Site is \\\"\\\""),
            (&[("sec-fetch-site", "cross-site"), ("origin", &own)], "--cors-origin"),
            (&[("origin", "http://evil.example")], "Origin is \\\"http://evil.example\\\""),
            (&[("origin", other_port)], "Origin is"),
            (&[("origin", "null")], "Origin is \\\"null\\\""),
            // A name that was pointed at this server after the page was loaded.
            (
                &[("sec-fetch-site", "same-origin"), ("origin", "http://evil.example"), ("host", "evil.example")],
                "the host \\\"evil.example\\\"",
            ),
            (&[("sec-fetch-site", "same-origin"), ("host", "evil.example:8080")], "--api-keys-file"),
        ];
        for (headers, words) in cases {
            site.must_refuse(headers, words).await;
        }
    }
}

#[tokio::test]
async fn the_servers_own_pages_and_programs_that_are_no_browsers_load_and_unload() {
    for at in [At::Main, At::Admin] {
        let site = Site::start(at, ServeOptions::default()).await;
        let (_, port) = site.address.split_once(':').unwrap();
        let own = format!("http://{}", site.address);
        let (localhost, origin) = (format!("localhost:{port}"), format!("http://localhost:{port}"));
        let cases: [Headers<'_>; 5] = [
            &[],
            &[("host", "gpu.example")],
            &[("sec-fetch-site", "same-origin"), ("origin", &own)],
            &[("sec-fetch-site", "none")],
            &[("sec-fetch-site", "same-origin"), ("origin", &origin), ("host", &localhost)],
        ];
        for headers in cases {
            site.must_let_through(headers).await;
        }
        let (status, answer) = site.post("/v2/repository/models/test/unload", &[]).await;
        assert!(status == 200 && site.registry.names().is_empty(), "{status} {answer}");
    }
}

#[tokio::test]
async fn a_page_whose_origin_is_named_may_control_and_one_that_a_star_covers_may_not() {
    let page: Headers<'_> = &[("sec-fetch-site", "cross-site"), ("origin", "https://a.example")];
    let named = vec!["*".into(), "https://a.example".into()];
    let site = Site::start(At::Main, ServeOptions { cors_origins: named, ..ServeOptions::default() }).await;
    site.must_let_through(page).await;
    site.must_let_through(&[("origin", "http://a.example:81"), ("host", "a.example:81")]).await;
    site.must_refuse(&[("sec-fetch-site", "cross-site"), ("origin", "https://b.example")], "cross-site").await;
    site.must_refuse(&[("sec-fetch-site", "cross-site"), ("origin", "http://a.example")], "cross-site").await;
    let star = ServeOptions { cors_origins: vec!["*".into()], ..ServeOptions::default() };
    Site::start(At::Main, star).await.must_refuse(page, "cross-site").await;
}

#[tokio::test]
async fn with_keys_a_page_needs_one_and_comes_from_this_site() {
    for at in [At::Main, At::Admin] {
        let keys = Arc::new(Keys::parse(&format!("root {} admin\n", sha256_hex(b"key")), 0).unwrap());
        let site = Site::start(at, ServeOptions { keys, ..ServeOptions::default() }).await;
        let same = [("origin", "http://gpu.example"), ("host", "gpu.example")];
        assert_eq!(site.post("/v2/repository/models/test/load", &same).await.0, 401);
        // Another site's page cannot know the key, so whoever has one may use any name of the server.
        site.must_let_through(&[&same[..], &[("x-api-key", "key")]].concat()).await;
        site.must_refuse(&[("origin", "http://evil.example"), ("x-api-key", "key")], "evil.example").await;
    }
}

#[tokio::test]
async fn a_call_that_does_not_say_that_it_is_grpc_is_refused() {
    let site = Site::start(At::Main, ServeOptions::default()).await;
    for path in ["/inference.GRPCInferenceService/RepositoryModelUnload", "/grpc.health.v1.Health/Check"] {
        for content_type in ["text/plain", "application/json", "application/x-www-form-urlencoded"] {
            let (status, answer) = site.post(path, &[("content-type", content_type)]).await;
            assert!(status == 415 && answer.contains(content_type), "{path}: {status} {answer}");
        }
    }
    assert_eq!(site.registry.names(), ["test"]);
    assert_eq!(site.grpc("ModelReady", "application/grpc+proto", &[]).await.0, 200);
}
