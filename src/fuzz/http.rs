//! A server on a port of its own with one small model, and a client that knows as much of HTTP/1.1 as its answers need.

use std::cell::RefCell;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;

use super::models;
use crate::registry::Registry;
use crate::serve::{self, Listeners, ServeOptions};

/// What any answer may take: far more than it does, far less than for ever.
const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes of an error, which quotes at most a hundred characters of what was sent in a few places.
const LONGEST_ERROR: usize = 2500;

/// An answer, whatever its protocol.
#[derive(Default)]
pub(super) struct Answer {
    pub(super) status: u16,
    /// In lower case, with gRPC's trailers.
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// Panics unless this is what a server may say to anybody: no failure of its own, and no error without bound.
    pub(super) fn check(&self) {
        let error = self.header("grpc-message").map_or(&self.body[..], str::as_bytes);
        let text = String::from_utf8_lossy(&error[..error.len().min(LONGEST_ERROR)]);
        // 504 is what a request that asks for less time than it takes gets.
        assert!(self.status < 500 || self.status == 504, "status {}: {text}", self.status);
        // Broken messages are "internal" to tonic; the server's own failures say so in these words.
        assert!(!text.starts_with("the%20server%20"), "gRPC: {text}");
        let refused = self.status != 200 || self.header("grpc-message").is_some();
        assert!(!refused || error.len() <= LONGEST_ERROR, "an error of {} bytes begins with {text}", error.len());
    }
}

/// Posts `body` over a connection that is kept open for the next one. Panics when no whole answer comes.
pub(super) fn post(path: &str, headers: &[&str], body: &[u8]) -> Answer {
    thread_local! {
        static CONNECTION: RefCell<Option<BufReader<TcpStream>>> = const { RefCell::new(None) };
    }
    let mut request = format!("POST {path} HTTP/1.1\r\nhost: fuzz\r\ncontent-length: {}\r\n", body.len()).into_bytes();
    headers.iter().for_each(|header| request.extend([header.as_bytes(), b"\r\n"].concat()));
    request.extend([b"\r\n", body].concat());
    CONNECTION.with_borrow_mut(|kept| {
        // The server may have closed a kept connection meanwhile.
        if let Some(mut connection) = kept.take()
            && let Ok(answer) = exchange(&mut connection, &request)
        {
            *kept = Some(connection).filter(|_| stays_open(&answer));
            return answer;
        }
        let mut connection = connect().expect("the server accepts connections");
        let answer = exchange(&mut connection, &request).expect("the server answers");
        *kept = Some(connection).filter(|_| stays_open(&answer));
        answer
    })
}

fn stays_open(answer: &Answer) -> bool {
    answer.header("connection") != Some("close")
}

fn connect() -> io::Result<BufReader<TcpStream>> {
    let stream = TcpStream::connect(address())?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(BufReader::new(stream))
}

/// Where the server listens, which the first call starts.
fn address() -> SocketAddr {
    static ADDRESS: OnceLock<SocketAddr> = OnceLock::new();
    *ADDRESS.get_or_init(|| {
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("tokio starts");
            runtime.block_on(async {
                let main = TcpListener::bind("127.0.0.1:0").await.expect("there is a free port");
                // The test that asks for it is gone only with the process.
                let _ = sender.send(main.local_addr().expect("a listener has an address"));
                let registry = Registry::new(vec![models::served()], None).expect("it has one model");
                let listeners = Listeners { main, grpc: None, admin: None, tls: None };
                let (_never, stop) = watch::channel(false);
                serve::run(listeners, Arc::new(registry), ServeOptions::default(), stop).await;
            });
        });
        receiver.recv().expect("the server starts")
    })
}

fn exchange(connection: &mut BufReader<TcpStream>, request: &[u8]) -> io::Result<Answer> {
    // A server that refuses a body need not read all of it: its answer counts.
    let sent = connection.get_mut().write_all(request);
    let line = line(connection).map_err(|error| sent.err().unwrap_or(error))?;
    let status = line.split(' ').nth(1).and_then(|word| word.parse().ok()).ok_or(io::ErrorKind::InvalidData)?;
    let mut answer = Answer { status, headers: headers(connection)?, body: Vec::new() };
    if answer.header("transfer-encoding") == Some("chunked") {
        loop {
            let length = self::line(connection)?;
            let length = usize::from_str_radix(&length, 16).map_err(|_| io::ErrorKind::InvalidData)?;
            if length == 0 {
                break;
            }
            read_more(connection, length, &mut answer.body)?;
            self::line(connection)?;
        }
        answer.headers.extend(headers(connection)?);
    } else {
        let length = answer.header("content-length").and_then(|value| value.parse().ok()).unwrap_or(0);
        read_more(connection, length, &mut answer.body)?;
    }
    Ok(answer)
}

fn line(connection: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    match connection.read_line(&mut line)? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(line.trim_end().to_owned()),
    }
}

/// Up to the empty line.
fn headers(connection: &mut impl BufRead) -> io::Result<Vec<(String, String)>> {
    let mut headers = Vec::new();
    loop {
        match line(connection)?.split_once(':') {
            Some((name, value)) => headers.push((name.to_ascii_lowercase(), value.trim().to_owned())),
            None => return Ok(headers),
        }
    }
}

fn read_more(connection: &mut impl Read, length: usize, body: &mut Vec<u8>) -> io::Result<()> {
    let before = body.len();
    body.resize(before + length, 0);
    connection.read_exact(&mut body[before..])
}
