//! `nbn demo`: serves what comes inside the program, shows an answer, and opens the page.

use std::io::{self, IsTerminal, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use clap::{Args, Parser};
use nbn::shipped::Shipped;
use nbn::tell;
use serde_json::Value;

use crate::address::address;
use crate::health::is_ready;
use crate::{Cli, DEFAULT_ADDR, serve};

/// The picture that is posted.
const PICTURE: &str = "ship.jpg";
/// What a start may take.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Args)]
#[command(after_help = "Examples:\n  nbn demo\n  nbn demo --no-browser --addr 127.0.0.1:9000")]
pub(crate) struct Demo {
    /// Address to listen on [default: 127.0.0.1:8080, or any free port if that one is taken]
    #[arg(long, value_name = "HOST:PORT", value_parser = address)]
    addr: Option<SocketAddr>,
    /// Do not open the page in a browser
    #[arg(long)]
    no_browser: bool,
}

pub(crate) fn demo(args: Demo) -> anyhow::Result<ExitCode> {
    let shipped = Shipped::place().context("the model cannot be written to the cache folder")?;
    let addr = free_address(args.addr)?;
    let models = shipped.models();
    let words = ["nbn".into(), "serve".into(), "--addr".into(), addr.to_string().into(), "--models".into()];
    let command = Cli::try_parse_from(words.into_iter().chain([models.into_os_string()]))?.command;
    let crate::Command::Serve(options) = command else { return Err(anyhow!("the options of serve cannot be parsed")) };
    let browser = !args.no_browser && io::stdout().is_terminal();
    thread::spawn(move || {
        let shown = greet(addr, &shipped, browser);
        if let Err(error) = shown {
            tell!("nbn: {error:#}");
        }
    });
    serve::run(*options, tracing::Level::WARN)
}

/// `wanted`, or the usual address; with a port that nobody uses where that is left open, or the usual one is taken.
fn free_address(wanted: Option<SocketAddr>) -> anyhow::Result<SocketAddr> {
    let usual: SocketAddr = DEFAULT_ADDR.parse()?;
    let listener = match wanted {
        Some(addr) => {
            TcpListener::bind(addr).with_context(|| format!("cannot listen on {addr}: choose another --addr"))?
        }
        None => TcpListener::bind(usual).or_else(|_| TcpListener::bind((usual.ip(), 0)))?,
    };
    Ok(listener.local_addr()?)
}

/// Waits for the server, posts a picture to it, and says what can be done next.
fn greet(addr: SocketAddr, shipped: &Shipped, browser: bool) -> anyhow::Result<()> {
    let began = Instant::now();
    while !is_ready(addr) {
        ensure!(began.elapsed() < PATIENCE, "the server at {addr} is not ready after {} s", PATIENCE.as_secs());
        thread::sleep(Duration::from_millis(20));
    }
    let picture = shipped.pictures().join(PICTURE);
    let (status, body) = classify(addr, &std::fs::read(&picture)?)?;
    let answer: Value = serde_json::from_slice(&body).context("the answer is not JSON")?;
    ensure!(status == 200, "the server answered {status}: {}", answer["detail"]);
    let mut out = io::stdout().lock();
    writeln!(out, "Scores for {}, a picture of a ship:", picture.display())?;
    for prediction in answer["results"][0]["predictions"].as_array().into_iter().flatten() {
        let percent = 100.0 * prediction["score"].as_f64().unwrap_or_default();
        writeln!(out, "  {percent:5.1} %  {}", prediction["label"].as_str().unwrap_or_default())?;
    }
    let name = answer["model"].as_str().unwrap_or_default();
    writeln!(
        out,
        "These are calibrated probabilities, if all ten classes of this small model are equally frequent.\n\n\
         Web page: http://{addr}/\n\
         Request:  curl -H 'content-type: image/jpeg' --data-binary @{picture} 'http://{addr}/v1/classify?top_k=3'\n\
         Files:    nbn score --model {model} {pictures}\n\
         Your own: nbn serve --models FOLDER\n\n\
         Press Ctrl-C to stop.",
        picture = picture.display(),
        model = shipped.models().join(name).display(),
        pictures = shipped.pictures().display(),
    )?;
    out.flush()?;
    if browser {
        open(&format!("http://{addr}/"));
    }
    Ok(())
}

/// Posts a picture over a connection of its own: status and body of the answer.
fn classify(addr: SocketAddr, picture: &[u8]) -> anyhow::Result<(u16, Vec<u8>)> {
    let mut stream = TcpStream::connect_timeout(&addr, Duration::from_secs(1))?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let head = format!(
        "POST /v1/classify?top_k=3 HTTP/1.0\r\nhost: {addr}\r\ncontent-type: image/jpeg\r\ncontent-length: {}\r\n\r\n",
        picture.len()
    );
    stream.write_all(&[head.as_bytes(), picture].concat())?;
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply)?;
    let end = reply.windows(4).position(|four| four == b"\r\n\r\n").context("the answer has no head")?;
    let head = String::from_utf8_lossy(&reply[..end]).into_owned();
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("the answer has no status")?;
    Ok((status, reply.split_off(end + 4)))
}

/// Opens `url` in the user's browser, where there is one; the printed address does where not.
fn open(url: &str) {
    let words: &[&str] = if cfg!(target_os = "macos") {
        &["open"]
    } else if cfg!(windows) {
        &["cmd", "/c", "start", ""]
    } else if std::env::var_os("DISPLAY").or_else(|| std::env::var_os("WAYLAND_DISPLAY")).is_some() {
        &["xdg-open"]
    } else {
        return;
    };
    let quiet = || Stdio::null();
    let mut command = Command::new(words[0]);
    let _ = command.args(&words[1..]).arg(url).stdin(quiet()).stdout(quiet()).stderr(quiet()).spawn();
}
