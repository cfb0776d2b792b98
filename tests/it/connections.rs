//! How long a connection may keep the server waiting.

use std::time::{Duration, Instant};

use nbn::registry::{Registry, RequestStats, ServedModel};
use nbn::serve::{ConnectionLimits, RequestLimits, ServeOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{Faulty, Process, Server, ask, model, progressive_jpeg, request, shipped};

const HEAD: Duration = Duration::from_millis(300);
const IDLE: Duration = Duration::from_millis(900);
const ANSWER: Duration = Duration::from_millis(600);
/// Longer than any of them: a connection that stays open so long fails the test.
const NEVER: Duration = Duration::from_secs(30);

const GET: &[u8] = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n";

fn served() -> ServedModel {
    let served = model(std::sync::Arc::new(shipped().manifest), Faulty(|| Ok(vec![0.0; 10])), 8);
    ServedModel { requests: RequestStats::default(), ..served }
}

async fn server() -> Server {
    let options = ServeOptions {
        limits: RequestLimits { timeout: ANSWER, ..RequestLimits::default() },
        connections: ConnectionLimits { header_timeout: HEAD, idle_timeout: IDLE, ..ConnectionLimits::default() },
        drain_timeout: Duration::from_secs(20),
        ..ServeOptions::default()
    };
    Server::with(Registry::new(vec![served()], None).unwrap(), options).await
}

/// Reads until the server closes; gives what came and how long that took.
async fn until_closed(stream: &mut TcpStream) -> (Vec<u8>, Duration) {
    let (began, mut read) = (Instant::now(), Vec::new());
    // A reset is an end, too.
    let _ = tokio::time::timeout(NEVER, stream.read_to_end(&mut read)).await.unwrap();
    (read, began.elapsed())
}

async fn answer(stream: &mut TcpStream) {
    stream.write_all(GET).await.unwrap();
    let mut read = Vec::new();
    while !read.ends_with(b"ok\n") {
        let n = stream.read_buf(&mut read).await.unwrap();
        assert!(n > 0, "closed after {:?}", String::from_utf8_lossy(&read));
    }
}

#[tokio::test]
async fn a_connection_stays_between_requests_for_longer_than_a_head_may_take() {
    let server = server().await;
    let mut stream = TcpStream::connect(&server.address).await.unwrap();
    answer(&mut stream).await;
    // Some clients end a body with an empty line too many.
    stream.write_all(b"\r\n").await.unwrap();
    tokio::time::sleep(2 * HEAD).await;
    answer(&mut stream).await;
    let (rest, took) = until_closed(&mut stream).await;
    assert!(rest.is_empty() && took >= IDLE - HEAD, "{took:?}");
}

#[tokio::test]
async fn a_head_that_does_not_arrive_ends_the_connection_the_first_and_later_ones() {
    let server = server().await;
    for before in [0, 1] {
        for sent in [&GET[..0], &GET[..9], &GET[..GET.len() - 1]] {
            let mut stream = TcpStream::connect(&server.address).await.unwrap();
            for _ in 0..before {
                answer(&mut stream).await;
            }
            stream.write_all(sent).await.unwrap();
            let (read, took) = until_closed(&mut stream).await;
            assert!(!read.starts_with(b"HTTP/1.1 200"), "{read:?}");
            // Nothing sent after an answer is an idle connection.
            let idle = before == 1 && sent.is_empty();
            assert!(took >= if idle { IDLE - HEAD } else { HEAD - Duration::from_millis(50) }, "{sent:?}: {took:?}");
            assert!(idle || took < IDLE, "{sent:?} after {before}: {took:?}");
        }
    }
}

#[tokio::test]
async fn an_idle_http_2_connection_is_closed_whatever_it_pings() {
    let server = server().await;
    let stream = TcpStream::connect(&server.address).await.unwrap();
    let (mut requests, mut connection) = h2::client::handshake(stream).await.unwrap();
    let mut pings = connection.ping_pong().unwrap();
    let ended = tokio::spawn(connection);
    let request = http_get(&server, "/livez");
    let (response, _) = requests.send_request(request, true).unwrap();
    assert_eq!(response.await.unwrap().status(), 200);
    let pinging = tokio::spawn(async move { while pings.ping(h2::Ping::opaque()).await.is_ok() {} });
    tokio::time::timeout(NEVER, ended).await.unwrap().unwrap().unwrap();
    pinging.await.unwrap();
    assert!(requests.ready().await.is_err());
}

/// A connection that takes in what the server sends at four megabytes a second, as a line does.
async fn slow_line(address: &str) -> tokio::io::DuplexStream {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(64 << 10).unwrap();
    let (mut from_server, mut to_server) = socket.connect(address.parse().unwrap()).await.unwrap().into_split();
    let (client, line) = tokio::io::duplex(1 << 20);
    let (mut from_client, mut to_client) = tokio::io::split(line);
    tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
    tokio::spawn(async move {
        let mut piece = vec![0; 32 << 10];
        while let Ok(n @ 1..) = from_server.read(&mut piece).await {
            if to_client.write_all(&piece[..n]).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_nanos(250 * n as u64)).await;
        }
        // The server has closed, or the client has gone.
        let _ = to_client.shutdown().await;
    });
    client
}

#[tokio::test]
async fn a_client_that_reads_slowly_but_steadily_gets_the_whole_of_large_answers() {
    let server = server().await;
    let (requests, connection) = h2::client::Builder::new()
        .initial_window_size(16 << 20)
        .initial_connection_window_size(64 << 20)
        .handshake::<_, bytes::Bytes>(slow_line(&server.address).await)
        .await
        .unwrap();
    tokio::spawn(connection);
    let mut requests = requests.ready().await.unwrap();
    // Eight times more than a megabyte: seconds, where a head may take 0.3 and an answer that nobody takes 0.6.
    let whole = server.get_whole("/docs/swagger-ui-bundle.js").await.len();
    assert!(whole > 1 << 20, "{whole}");
    let mut answers = Vec::new();
    for _ in 0..8 {
        answers.push(requests.send_request(http_get(&server, "/docs/swagger-ui-bundle.js"), true).unwrap().0);
    }
    let began = Instant::now();
    for answer in answers {
        let mut body = answer.await.unwrap().into_body();
        let mut taken = 0;
        while let Some(piece) = body.data().await {
            taken += piece.unwrap().len();
        }
        assert_eq!(taken, whole);
    }
    assert!(began.elapsed() > 2 * ANSWER, "too fast to show anything: {:?}", began.elapsed());
}

#[tokio::test]
async fn an_answer_that_flow_control_holds_back_ends_the_connection() {
    let server = server().await;
    let stream = TcpStream::connect(&server.address).await.unwrap();
    // No room for a single byte of any answer.
    let (requests, connection) =
        h2::client::Builder::new().initial_window_size(0).handshake::<_, bytes::Bytes>(stream).await.unwrap();
    let ended = tokio::spawn(connection);
    let mut requests = requests.ready().await.unwrap();
    let (response, _) = requests.send_request(http_get(&server, "/v1/models"), true).unwrap();
    let (began, response) = (Instant::now(), response.await.unwrap());
    assert_eq!(response.status(), 200);
    let _ = tokio::time::timeout(NEVER, ended).await.unwrap();
    assert!(began.elapsed() >= ANSWER - Duration::from_millis(50));
    // The server's own place is free again.
    let metrics = server.get("/metrics").await;
    assert!(crate::support::text(&metrics.body).contains("nbn_connections 1\n"), "the connection still counts");
}

#[tokio::test]
async fn a_head_that_cannot_be_read_is_refused_with_a_word() {
    let server = server().await;
    let long = |n: usize| "a".repeat(n);
    let cases = [
        ("GET / HTTP/1.1\r\nbroken header\r\n\r\n".to_owned(), 400, "not valid HTTP/1.1"),
        ("nonsense\r\n\r\n".into(), 400, "not valid HTTP/1.1"),
        // TLS on a plain port.
        ("\u{16}\u{3}\u{1}\u{2}\0\u{1}\0\u{1}\u{3}\r\n\r\n".into(), 400, "meant to be HTTP"),
        (format!("GET / HTTP/1.1\r\nhost: x\r\nlong: {}\r\n\r\n", long(300 << 10)), 431, "65536 bytes"),
        (format!("GET / HTTP/1.1\r\nhost: x\r\n{}\r\n", "a: b\r\n".repeat(101)), 431, "100 headers"),
    ];
    for (request, status, wanted) in cases {
        let mut stream = TcpStream::connect(&server.address).await.unwrap();
        // After an answer of the usual kind, too.
        answer(&mut stream).await;
        // The server may close before it has read all.
        let _ = stream.write_all(request.as_bytes()).await;
        let (read, _) = until_closed(&mut stream).await;
        let text = String::from_utf8(read).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{wanted}: {text:?}"));
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{wanted}: {head}");
        assert!(
            head.contains("content-type: application/problem+json") && head.contains("connection: close"),
            "{head}"
        );
        assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{head}");
        let problem: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(problem["status"], status);
        assert!(problem["detail"].as_str().unwrap().contains(wanted), "{problem}");
        assert!(head.contains(&format!("x-request-id: {}", problem["request_id"].as_str().unwrap())), "{head}");
    }
}

/// The messages of a call's answer, one after the other: the number in field 1 of each.
async fn next_status(body: &mut h2::RecvStream) -> Option<u8> {
    let piece = tokio::time::timeout(NEVER, body.data()).await.unwrap()?.unwrap();
    let [0, 0, 0, 0, 2, 8, status] = piece[..] else { panic!("{piece:?}") };
    let _ = body.flow_control().release_capacity(piece.len());
    Some(status)
}

#[tokio::test]
async fn a_watch_of_the_health_stays_until_the_server_stops_and_is_told() {
    const SERVING: u8 = 1;
    const NOT_SERVING: u8 = 2;
    const SERVICE_UNKNOWN: u8 = 3;
    let server = server().await;
    let stream = TcpStream::connect(&server.address).await.unwrap();
    let (mut requests, connection) = h2::client::handshake(stream).await.unwrap();
    let ended = tokio::spawn(connection);
    let mut watch = async |message: &[u8]| {
        let request = axum::http::Request::post(format!("http://{}/grpc.health.v1.Health/Watch", server.address))
            .header("content-type", "application/grpc")
            .body(())
            .unwrap();
        let (response, mut body) = requests.send_request(request, false).unwrap();
        let framed = [&[0, 0, 0, 0, message.len() as u8][..], message].concat();
        body.send_data(bytes::Bytes::from(framed), true).unwrap();
        let response = response.await.unwrap();
        assert_eq!(response.status(), 200);
        response.into_body()
    };
    // Over HTTP/1, nobody would notice that the client has gone.
    let old = reqwest::Client::new().post(format!("http://{}/grpc.health.v1.Health/Watch", server.address));
    let old = old.header("content-type", "application/grpc").body(vec![0; 5]).send().await.unwrap();
    assert_eq!(old.headers()["grpc-status"], "3");
    let (mut whole, mut unknown) = (watch(b"").await, watch(b"\x0A\x01x").await);
    assert_eq!(next_status(&mut whole).await, Some(SERVING));
    assert_eq!(next_status(&mut unknown).await, Some(SERVICE_UNKNOWN));
    // Longer than anything else may stay open.
    tokio::time::sleep(2 * IDLE).await;
    assert!(!ended.is_finished());
    let stopped = Instant::now();
    server.stop();
    for body in [&mut whole, &mut unknown] {
        assert_eq!(next_status(body).await, Some(NOT_SERVING));
        assert_eq!(next_status(body).await, None);
        let trailers = body.trailers().await.unwrap().unwrap();
        assert_eq!(trailers["grpc-status"], "0");
    }
    drop(requests);
    tokio::time::timeout(NEVER, ended).await.unwrap().unwrap().unwrap();
    assert!(stopped.elapsed() < Duration::from_secs(5), "{:?}", stopped.elapsed());
}

fn http_get(server: &Server, path: &str) -> axum::http::Request<()> {
    axum::http::Request::get(format!("http://{}{path}", server.address)).body(()).unwrap()
}

#[test]
fn a_busy_worker_does_not_outlive_the_drain() {
    let drain = Duration::from_secs(2);
    let mut server = Process::serve(&["--workers", "1", "--timeout", "1", "--drain-timeout", "2"]);
    // Thirty-two pictures that take a worker much longer, all together, than requests and drain may.
    let slow = progressive_jpeg(6000, 6000, 64);
    let part =
        |n| format!("--x\r\ncontent-disposition: form-data; name=\"image\"; filename=\"{n}\"\r\n\r\n").into_bytes();
    let body = (0..32).flat_map(|n| [part(n), slow.clone(), b"\r\n".to_vec()].concat());
    let body: Vec<u8> = body.chain(*b"--x--\r\n").collect();
    let request = request(&server.address, "/v1/classify", "multipart/form-data; boundary=x", &body);
    let address = server.address.clone();
    let client = std::thread::spawn(move || ask(&address, &request));
    let busy = |text: &str| text.lines().any(|line| line.starts_with("nbn_running_images{") && !line.ends_with(" 0"));
    while !busy(&server.get("/metrics")) {
        assert!(server.child.try_wait().unwrap().is_none(), "the server ended");
        if client.is_finished() {
            panic!("no worker was busy: {}", client.join().unwrap());
        }
    }
    let stopped = Instant::now();
    let (status, log) = server.terminate();
    let took = stopped.elapsed();
    assert!(took < drain + Duration::from_secs(1), "{took:?}: {log:?}");
    assert_eq!(status.code(), Some(0), "{log:?}");
    assert!(client.join().unwrap().starts_with("HTTP/1.1 504 "));
}
