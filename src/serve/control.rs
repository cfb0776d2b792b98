//! Who may change what is served. [`Models`] lets only a holder of [`Control`] load and unload, and only
//! [`Control::of`] makes one, so that no route can change anything without the checks.

use std::sync::Arc;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, Uri};

use super::App;
use super::code::Code;
use super::keys::Caller;
use super::problem::Problem;
use crate::registry::{IndexEntry, Registry, RegistryError, ServedModel};

/// A request may change what is served: its listener and its key allow it, and no page of another site sent it.
pub(crate) struct Control(());

impl Control {
    /// # Errors
    /// 403, which says what is missing.
    pub(crate) fn of(app: &App, caller: &Caller, headers: &HeaderMap, uri: &Uri) -> Result<Self, Problem> {
        app.origins.check(headers, uri, app.keys.is_empty())?;
        if app.administers && (caller.admin || (app.control && app.keys.is_empty())) {
            return Ok(Self(()));
        }
        let detail = if !app.administers || app.keys.is_empty() {
            "models can be loaded and unloaded on the admin listener (--admin-addr), or here with --control"
        } else {
            "loading and unloading models needs an admin key, which has the word admin in its line of the key file"
        };
        Err(Problem::new(Code::NotAdmin, detail))
    }
}

impl FromRequestParts<App> for Control {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        let caller = parts.extensions.get::<Arc<Caller>>().cloned().unwrap_or_default();
        Self::of(app, &caller, &parts.headers, &parts.uri)
    }
}

/// The registry: everybody may look, and who holds a [`Control`] may change it.
pub(crate) struct Models(Arc<Registry>);

impl Models {
    pub(crate) fn of(registry: Arc<Registry>) -> Self {
        Self(registry)
    }

    /// Loads or unloads, on a thread that may block.
    pub(crate) async fn change<F>(&self, _allowed: Control, work: F) -> Result<(), Problem>
    where
        F: FnOnce(&Registry) -> Result<(), RegistryError> + Send + 'static,
    {
        let registry = self.0.clone();
        let done = tokio::task::spawn_blocking(move || work(&registry)).await;
        let failed = |error| {
            tracing::error!(%error, "loading or unloading a model failed");
            Problem::new(Code::Internal, "the server failed to load the model")
        };
        done.map_err(failed)?.map_err(|error| Problem::from(&error))
    }

    pub(crate) fn get(&self, name: &str, version: Option<&str>) -> Option<Arc<ServedModel>> {
        self.0.get(name, version)
    }

    pub(crate) fn models(&self) -> Vec<Arc<ServedModel>> {
        self.0.models()
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.0.names()
    }

    pub(crate) fn default_model(&self) -> Option<Arc<ServedModel>> {
        self.0.default_model()
    }

    pub(crate) fn default_name(&self) -> Option<&str> {
        self.0.default_name()
    }

    pub(crate) fn index(&self) -> Vec<IndexEntry> {
        self.0.index()
    }

    pub(crate) fn is_filled(&self) -> bool {
        self.0.is_filled()
    }

    pub(crate) fn worker_panics(&self) -> u64 {
        self.0.worker_panics()
    }

    pub(crate) fn loads(&self) -> (u64, u64) {
        self.0.loads()
    }
}
