//! `nbn health`.

#[cfg(feature = "tls")]
mod tls;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Args;
use nbn::show;

use crate::DEFAULT_ADDR;
use crate::address::address;

const TIMEOUT: Duration = Duration::from_secs(3);
/// More than a head with a status takes.
const MOST: u64 = 4096;

#[derive(Args)]
#[command(after_help = "Examples:\n  nbn health\n  nbn health --addr 127.0.0.1:9000")]
pub(crate) struct Health {
    /// Address of the server, with or without TLS; its certificate is not checked
    #[arg(long, env = "NBN_ADDR", default_value = DEFAULT_ADDR, value_parser = address)]
    addr: SocketAddr,
}

pub(crate) fn health(args: &Health) -> anyhow::Result<ExitCode> {
    let mut target = args.addr;
    if target.ip().is_unspecified() {
        target.set_ip(if target.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() });
    }
    let reply = match ask(connect(target)?, target) {
        Ok(reply) if reply.starts_with("HTTP/") => reply,
        // A listener with TLS hangs up on anything else.
        plain => over_tls(target).or(plain).with_context(|| format!("the server at {target} does not answer"))?,
    };
    let status = reply.split_whitespace().nth(1).unwrap_or("nothing");
    ensure!(status == "200", "the server at {target} is not ready: it answered {status}");
    show!("ready")?;
    Ok(ExitCode::SUCCESS)
}

/// Whether a server without TLS at `target` answers that it is ready.
pub(crate) fn is_ready(target: SocketAddr) -> bool {
    let reply = connect(target).and_then(|stream| ask(stream, target));
    reply.is_ok_and(|reply| reply.split_whitespace().nth(1) == Some("200"))
}

fn connect(target: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, TIMEOUT).with_context(|| format!("no server at {target}"))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    Ok(stream)
}

#[cfg(feature = "tls")]
fn over_tls(target: SocketAddr) -> anyhow::Result<String> {
    ask(tls::stream(connect(target)?, target)?, target)
}

#[cfg(not(feature = "tls"))]
fn over_tls(_: SocketAddr) -> anyhow::Result<String> {
    Err(nbn::features::Feature::Tls.missing("a server with TLS").into())
}

fn ask(mut stream: impl Read + Write, target: SocketAddr) -> anyhow::Result<String> {
    write!(stream, "GET /readyz HTTP/1.1\r\nhost: {target}\r\nconnection: close\r\n\r\n")?;
    let mut reply = Vec::new();
    stream.take(MOST).read_to_end(&mut reply)?;
    Ok(String::from_utf8_lossy(&reply).into_owned())
}
