//! In place of `grpc` in builds without that feature: calls are told so in gRPC's form.

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use axum::routing::post;

use super::{App, Problem};
use crate::features::Feature;

/// The code UNIMPLEMENTED.
const UNIMPLEMENTED: HeaderValue = HeaderValue::from_static("12");

/// Every call is refused for the same reason.
pub(crate) fn refusal(_: &Problem) -> Response {
    let mut response = Response::new(Body::empty());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert("grpc-status", UNIMPLEMENTED);
    // The sentence has none of the characters that gRPC encodes.
    if let Ok(reason) = HeaderValue::from_str(&missing().to_string()) {
        headers.insert("grpc-message", reason);
    }
    response
}

pub(crate) async fn method() -> Problem {
    Problem::missing(&missing())
}

/// The one service of which clients ask before any other.
pub(crate) fn services(_: &App) -> Router<App> {
    Router::new().route("/grpc.health.v1.Health/{method}", post(method))
}

fn missing() -> crate::features::Missing {
    Feature::Grpc.missing("gRPC")
}
