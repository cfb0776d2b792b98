//! Addresses on the command line.

use std::net::{SocketAddr, ToSocketAddrs};

/// `HOST:PORT`, the host an IP address or a name; of a name's addresses the first of IPv4, else the first.
pub(crate) fn address(text: &str) -> Result<SocketAddr, String> {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    let expected = "expected HOST:PORT, such as 127.0.0.1:8080, 0.0.0.0:8080 for every interface, or [::1]:8080";
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {}
        _ => return Err(expected.into()),
    }
    let found: Vec<SocketAddr> = match text.to_socket_addrs() {
        Ok(found) => found.collect(),
        Err(error) => return Err(format!("the host name cannot be resolved ({error}); {expected}")),
    };
    let first = found.iter().find(|address| address.is_ipv4()).or(found.first());
    first.copied().ok_or_else(|| format!("the host has no address; {expected}"))
}
