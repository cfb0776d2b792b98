//! In place of `tls` in builds without that feature.

use std::path::Path;
use std::time::Duration;

use tokio::net::TcpStream;

use crate::features::{Feature, Missing};

/// TLS, which this build does not have.
pub enum Tls {}

/// Why TLS cannot be had.
pub type TlsError = Missing;

impl Tls {
    /// Fails.
    ///
    /// # Errors
    /// Always.
    pub fn load(_: &Path, _: &Path) -> Result<Self, TlsError> {
        Err(Feature::Tls.missing("--tls-cert"))
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn reload(&self) -> Result<(), TlsError> {
        match *self {}
    }

    pub(super) async fn accept(&self, _: TcpStream, _: Duration) -> Option<TcpStream> {
        match *self {}
    }
}
