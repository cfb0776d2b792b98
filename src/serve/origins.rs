//! Refuses requests that a browser sends for a page of another site. Clients that are no browsers send neither `Origin`
//! nor `Sec-Fetch-Site`, and are not looked at.

use std::net::IpAddr;

use axum::http::{HeaderMap, Uri, header};

use super::code::Code;
use super::cut::quoted;
use super::problem::Problem;

const SEC_FETCH_SITE: &str = "sec-fetch-site";

/// Where a page comes from.
#[derive(Debug, PartialEq, Eq)]
struct Origin {
    scheme: String,
    /// In lower case, without the scheme's own port.
    authority: String,
}

impl Origin {
    fn parse(text: &str) -> Option<Self> {
        let (scheme, authority) = text.split_once("://")?;
        let scheme = scheme.to_ascii_lowercase();
        let authority = plain_authority(authority, &scheme);
        (!authority.is_empty()).then_some(Self { scheme, authority })
    }

    /// Whether the page was loaded from the server that a request for `host` reaches.
    fn is_at(&self, host: &str) -> bool {
        self.authority == plain_authority(host, &self.scheme)
    }
}

/// `host[:port]` in lower case, without the port that the scheme implies.
fn plain_authority(authority: &str, scheme: &str) -> String {
    let authority = authority.to_ascii_lowercase();
    let implied = match scheme {
        "http" => ":80",
        "https" => ":443",
        _ => return authority,
    };
    authority.strip_suffix(implied).map(str::to_owned).unwrap_or(authority)
}

/// The host of `host[:port]`; an IPv6 address without its brackets.
fn host_of(authority: &str) -> &str {
    if let Some((address, _)) = authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return address;
    }
    authority.split_once(':').map_or(authority, |(host, _)| host)
}

/// The origins that `--cors-origin` names. `*` names none: it lets every page read answers, not change what is served.
pub(crate) struct Origins(Vec<Origin>);

impl Origins {
    pub(crate) fn named(cors_origins: &[String]) -> Self {
        Self(cors_origins.iter().filter_map(|origin| Origin::parse(origin)).collect())
    }

    /// Lets a request pass that no browser sent, that a page of a named origin sent, or that a page of this server's
    /// own sent. Without keys the host of such a page must be an IP address, localhost or a named origin's: another
    /// name may belong to somebody who pointed it at this server after the page was loaded (DNS rebinding).
    ///
    /// # Errors
    /// 403, which says what was seen.
    pub(crate) fn check(&self, headers: &HeaderMap, uri: &Uri, keyless: bool) -> Result<(), Problem> {
        let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap_or_default());
        let (origin, site) = (text(header::ORIGIN.as_str()), text(SEC_FETCH_SITE));
        if origin.is_none() && site.is_none() {
            return Ok(());
        }
        let page = origin.and_then(Origin::parse);
        if page.as_ref().is_some_and(|page| self.0.contains(page)) {
            return Ok(());
        }
        if let Some(site) = site.filter(|site| !["same-origin", "none"].contains(site)) {
            return Err(foreign(&format!("Sec-Fetch-Site is {}", quoted(site))));
        }
        // In HTTP/2 the request's target has the host.
        let host = uri.authority().map(|authority| authority.as_str()).or_else(|| text(header::HOST.as_str()));
        let host = host.unwrap_or_default();
        if let Some(origin) = origin.filter(|_| !page.is_some_and(|page| page.is_at(host))) {
            return Err(foreign(&format!("Origin is {} and Host {}", quoted(origin), quoted(host))));
        }
        if keyless && !self.is_known(host) {
            let detail = format!(
                "the browser's request is for the host {}, and without API keys this server accepts changes from \
                 browsers only at an IP address, at localhost or at the host of a --cors-origin: use one of these, or \
                 set --api-keys-file",
                quoted(host)
            );
            return Err(Problem::new(Code::CrossSite, detail));
        }
        Ok(())
    }

    fn is_known(&self, authority: &str) -> bool {
        let host = host_of(authority);
        host.parse::<IpAddr>().is_ok()
            || host.eq_ignore_ascii_case("localhost")
            || self.0.iter().any(|named| host_of(&named.authority).eq_ignore_ascii_case(host))
    }
}

fn foreign(seen: &str) -> Problem {
    let detail = format!(
        "pages of other sites may not change what is served: {seen}; send the request from a program other than a \
         browser, or allow the page's origin with --cors-origin"
    );
    Problem::new(Code::CrossSite, detail)
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn passes(cors: &[&str], keyless: bool, headers: &[(&'static str, &str)]) -> bool {
        let cors: Vec<String> = cors.iter().map(|&origin| origin.to_owned()).collect();
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, HeaderValue::from_str(value).unwrap());
        }
        Origins::named(&cors).check(&map, &Uri::from_static("/path"), keyless).is_ok()
    }

    #[test]
    fn a_schemes_own_port_may_be_left_out_and_case_does_not_matter() {
        for (origin, host) in [
            ("http://127.0.0.1", "127.0.0.1:80"),
            ("http://127.0.0.1:80", "127.0.0.1"),
            ("https://LOCALHOST:443", "localhost"),
            ("http://[::1]:8080", "[::1]:8080"),
            ("http://LocalHost:8080", "localhost:8080"),
        ] {
            assert!(passes(&[], true, &[("origin", origin), ("host", host)]), "{origin} {host}");
        }
        for (origin, host) in [
            ("http://127.0.0.1:443", "127.0.0.1"),
            ("https://127.0.0.1:80", "127.0.0.1"),
            ("http://127.0.0.1:8080", "127.0.0.1:8081"),
            ("http://", ""),
            ("127.0.0.1", "127.0.0.1"),
        ] {
            assert!(!passes(&[], true, &[("origin", origin), ("host", host)]), "{origin} {host}");
        }
    }

    #[test]
    fn the_targets_host_counts_before_the_header() {
        let mut headers = HeaderMap::new();
        headers.insert("origin", HeaderValue::from_static("http://127.0.0.1:8080"));
        headers.insert("host", HeaderValue::from_static("127.0.0.1:8080"));
        let check = |uri| Origins::named(&[]).check(&headers, &Uri::from_static(uri), true);
        assert!(check("http://127.0.0.1:8080/path").is_ok());
        assert!(check("http://127.0.0.1:8081/path").is_err());
    }

    #[test]
    fn a_name_is_trusted_with_keys_or_when_an_origin_of_it_is_named() {
        let same = [("origin", "http://gpu.example:8080"), ("host", "gpu.example:8080")];
        assert!(!passes(&[], true, &same));
        assert!(!passes(&["*"], true, &same));
        assert!(passes(&[], false, &same));
        assert!(passes(&["http://gpu.example:8080"], true, &same));
        assert!(passes(&["https://gpu.example"], true, &same));
    }
}
