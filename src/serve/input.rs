//! Request bodies: the image itself, multipart, or JSON with base64.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Multipart, Request};
use axum::http::{HeaderMap, StatusCode, header};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::RequestLimits;
use super::options::Options;
use super::problem::Problem;
use super::wire::ClassifyRequest;
use crate::engine::EncodedImage;

const IMAGE_TYPES: [&str; 7] =
    ["image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", "image/tiff", "application/octet-stream"];

/// The images of a request, and how many there may be.
pub(crate) struct Images {
    /// Id and encoded bytes, in order; not empty. A part that could not be read is its own problem.
    pub(crate) items: Vec<(Option<String>, Result<EncodedImage, Problem>)>,
    /// From the query and the JSON body.
    pub(crate) options: Options,
}

/// Reads a body within `limits`.
pub(crate) async fn read(request: Request, limits: &RequestLimits) -> Result<Images, Problem> {
    let query = Options::from_query(request.uri().query())?;
    let media_type = media_type(request.headers())?;
    let (parts, body) = request.into_parts();
    let bytes = body_bytes(body, &parts.headers, limits).await?;
    let images = match media_type.as_str() {
        "application/json" => json(&bytes, query)?,
        "multipart/form-data" => {
            let request = Request::from_parts(parts, Body::from(bytes));
            Images { items: multipart(request).await?, options: query.or(Options::default())? }
        }
        _ => Images { items: vec![(None, Ok(bytes[..].into()))], options: query.or(Options::default())? },
    };
    if images.items.len() > limits.max_images {
        let detail = format!(
            "{} images in one request; this server accepts up to {}: send several requests, or raise --max-images",
            images.items.len(),
            limits.max_images
        );
        let problem = Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "too_many_images", detail);
        return Err(problem.with_limit(limits.max_images as u64));
    }
    Ok(images)
}

/// The body's media type in lower case, if it is one that can be read.
fn media_type(headers: &HeaderMap) -> Result<String, Problem> {
    let accepted = || format!("send {}, multipart/form-data or application/json", IMAGE_TYPES.join(", "));
    let Some(value) = headers.get(header::CONTENT_TYPE) else {
        let detail = format!("the request has no content-type: {}", accepted());
        return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "media_type", detail));
    };
    let text = value.to_str().unwrap_or_default();
    let essence = text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if IMAGE_TYPES.contains(&essence.as_str()) || essence == "application/json" || essence == "multipart/form-data" {
        return Ok(essence);
    }
    let detail = format!("content-type {text:?} is not accepted: {}", accepted());
    Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "media_type", detail))
}

async fn body_bytes(body: Body, headers: &HeaderMap, limits: &RequestLimits) -> Result<Bytes, Problem> {
    let limit = limits.max_body_bytes;
    let announced =
        headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|v| v.parse::<u64>().ok());
    let too_large = |size: &str| {
        let detail =
            format!("the body is {size}; this server accepts up to {limit} bytes: send less, or raise --max-body-mb");
        Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", detail).with_limit(limit as u64)
    };
    if let Some(size) = announced.filter(|&size| size > limit as u64) {
        return Err(too_large(&format!("{size} bytes")));
    }
    match tokio::time::timeout(limits.timeout, axum::body::to_bytes(body, limit)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) if std::error::Error::source(&error).is_some_and(|s| s.to_string().contains("length limit")) => {
            Err(too_large(&format!("longer than {limit} bytes")))
        }
        Ok(Err(_)) => Err(Problem::bad_request("body_broken", "the body ended before its announced length")),
        Err(_) => Err(slow(limits.timeout)),
    }
}

fn slow(limit: Duration) -> Problem {
    let detail = format!("the body did not arrive within {} s", limit.as_secs_f64());
    Problem::new(StatusCode::REQUEST_TIMEOUT, "slow_body", detail).with_limit(limit.as_secs())
}

fn json(bytes: &[u8], query: Options) -> Result<Images, Problem> {
    let request: ClassifyRequest = serde_json::from_slice(bytes)
        .map_err(|error| Problem::bad_request("bad_json", format!("the JSON body does not fit: {error}")))?;
    if request.images.is_empty() {
        return Err(Problem::bad_request("no_images", "the list `images` is empty: send at least one"));
    }
    let decode = |b64: &str| match STANDARD.decode(b64) {
        Ok(bytes) => Ok(EncodedImage::from(bytes)),
        Err(error) => Err(Problem::bad_request("bad_base64", format!("`b64` is not standard base64: {error}"))),
    };
    let items = request.images.into_iter().map(|image| (image.id, decode(&image.b64))).collect();
    Ok(Images { items, options: request.options.or(query)? })
}

async fn multipart(request: Request) -> Result<Vec<(Option<String>, Result<EncodedImage, Problem>)>, Problem> {
    let broken =
        |reason: String| Problem::bad_request("bad_multipart", format!("the multipart body does not fit: {reason}"));
    let mut request = request;
    // The body's size was checked when it was read.
    request.extensions_mut().insert(axum::extract::DefaultBodyLimit::disable());
    let mut parts = Multipart::from_request(request, &()).await.map_err(|error| broken(error.body_text()))?;
    let mut items = Vec::new();
    while let Some(part) = parts.next_field().await.map_err(|error| broken(error.body_text()))? {
        if part.name() != Some("image") {
            let name = part.name().unwrap_or_default().to_owned();
            let detail = format!("multipart part {name:?} is not known: name every part `image`");
            return Err(Problem::bad_request("bad_multipart", detail));
        }
        let id = part.file_name().map(str::to_owned);
        let bytes = part.bytes().await.map_err(|error| broken(error.body_text()))?;
        items.push((id, Ok(bytes[..].into())));
    }
    if items.is_empty() {
        return Err(Problem::bad_request("no_images", "the multipart body has no part named `image`"));
    }
    Ok(items)
}
