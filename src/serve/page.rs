//! The page at `/`, and the interface's documentation at `/docs`. Both are part of the program and load nothing from elsewhere.

use axum::Router;
use axum::extract::Path;
use axum::http::{HeaderValue, header};
#[cfg(feature = "swagger-ui")]
use axum::response::Redirect;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tower_http::set_header::SetResponseHeaderLayer;

use super::{App, handlers};
use crate::shipped::PICTURES;

/// Own files only, and pictures that the page itself made.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; \
                      connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
/// Swagger UI sets styles of its own, and shows the document from data.
const DOCS_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; \
                           connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'";

pub(super) fn routes() -> Router<App> {
    let page = Router::new()
        .route("/", get(|| file("text/html; charset=utf-8", include_str!("page/index.html"))))
        .route("/page.css", get(|| file("text/css; charset=utf-8", include_str!("page/page.css"))))
        .route("/page.js", get(|| file("text/javascript; charset=utf-8", include_str!("page/page.js"))))
        .route("/pictures/{name}", get(picture))
        .layer(policy(POLICY));
    page.merge(docs().layer(policy(DOCS_POLICY)))
        .layer(SetResponseHeaderLayer::overriding(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")))
        .layer(SetResponseHeaderLayer::overriding(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")))
}

#[cfg(feature = "swagger-ui")]
fn docs() -> Router<App> {
    /// A file of Swagger UI, which build.rs places.
    macro_rules! placed {
        ($content_type:literal, $name:literal) => {
            get(|| file($content_type, include_str!(concat!(env!("OUT_DIR"), "/", $name))))
        };
    }
    Router::new()
        .route("/docs", get(|| async { Redirect::permanent("/docs/") }))
        .route("/docs/", get(|| file("text/html; charset=utf-8", include_str!("page/docs.html"))))
        .route("/docs/docs.js", get(|| file("text/javascript; charset=utf-8", include_str!("page/docs.js"))))
        .route("/docs/swagger-ui.css", placed!("text/css; charset=utf-8", "swagger-ui.css"))
        .route("/docs/swagger-ui-bundle.js", placed!("text/javascript; charset=utf-8", "swagger-ui-bundle.js"))
}

#[cfg(not(feature = "swagger-ui"))]
fn docs() -> Router<App> {
    use super::problem::Problem;
    use crate::features::Feature;
    async fn missing() -> Problem {
        Problem::missing(&Feature::SwaggerUi.missing("the page /docs, which shows what /openapi.yaml describes,"))
    }
    Router::new().route("/docs", get(missing)).route("/docs/{*rest}", get(missing))
}

fn policy(policy: &'static str) -> SetResponseHeaderLayer<HeaderValue> {
    SetResponseHeaderLayer::overriding(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy))
}

/// A picture to try, by its file name.
async fn picture(Path(name): Path<String>) -> Response {
    match PICTURES.iter().find(|(known, _)| *known == name) {
        Some((_, content)) => {
            ([(header::CONTENT_TYPE, "image/jpeg"), (header::CACHE_CONTROL, "no-cache")], *content).into_response()
        }
        None => handlers::not_found().await.into_response(),
    }
}

async fn file(content_type: &'static str, content: &'static str) -> Response {
    ([(header::CONTENT_TYPE, content_type), (header::CACHE_CONTROL, "no-cache")], content).into_response()
}
