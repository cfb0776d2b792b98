//! Request bodies: the image itself, multipart, or JSON with base64.

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Multipart, Request};
use axum::http::{HeaderMap, header};
use tokio::time::Instant;

use super::App;
use super::base64;
use super::body::{self, Held};
use super::code::Code;
use super::cut::{self, quoted};
use super::objects;
use super::options::RequestOptions;
use super::problem::Problem;
use super::wire::{ClassifyRequest, ClientId};

const IMAGE_TYPES: [&str; 7] =
    ["image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", "image/tiff", "application/octet-stream"];
/// Other names of these. What an image is, its bytes say.
const OTHER_NAMES: [&str; 13] = [
    "image/jpg",
    "image/pjpeg",
    "image/x-png",
    "image/x-ms-bmp",
    "image/x-bmp",
    "image/x-windows-bmp",
    "image/tiff-fx",
    "image/x-portable-anymap",
    "image/x-portable-bitmap",
    "image/x-portable-graymap",
    "image/x-portable-pixmap",
    "binary/octet-stream",
    "application/x-binary",
];

/// The images of a request, and how many there may be.
pub(crate) struct Images {
    /// Id and encoded bytes, in order; not empty. A part that could not be read is its own problem.
    pub(crate) items: Items,
    /// From the query and the JSON body.
    pub(crate) options: RequestOptions,
    /// The body that the images lie in.
    pub(crate) held: Held,
}

type Items = Vec<(Option<ClientId>, Result<Bytes, Problem>)>;

/// Reads a body within the limits.
pub(crate) async fn read(app: &App, request: Request, deadline: Instant) -> Result<Images, Problem> {
    let limits = &app.limits;
    let query = RequestOptions::from_query(request.uri().query())?;
    let media_type = media_type(request.headers())?;
    let (parts, body) = request.into_parts();
    let held = body::receive(app, body, &parts.headers, deadline).await?;
    let size = held.bytes.len();
    let (items, options, held) = match media_type.as_str() {
        "application/json" => {
            let parsed = async move {
                let (items, options) = json(&held.bytes, query)?;
                Ok((items, options, held))
            };
            body::parse(app, size, deadline, parsed).await?
        }
        "multipart/form-data" => {
            let request = Request::from_parts(parts, Body::from(held.bytes.clone()));
            let parsed = async move { Ok((multipart(request).await?, query.or(RequestOptions::default())?, held)) };
            body::parse(app, size, deadline, parsed).await?
        }
        _ => (vec![(None, Ok(held.bytes.clone()))], query.or(RequestOptions::default())?, held),
    };
    if items.len() > limits.max_images {
        let detail = format!(
            "{} images in one request; this server accepts up to {}: send several requests, or raise --max-images",
            items.len(),
            limits.max_images
        );
        let problem = Problem::new(Code::TooManyImages, detail);
        return Err(problem.with_limit(limits.max_images as u64));
    }
    Ok(Images { items, options, held })
}

/// The body's media type in lower case, if it is one that can be read.
fn media_type(headers: &HeaderMap) -> Result<String, Problem> {
    let accepted = || format!("send {}, multipart/form-data or application/json", IMAGE_TYPES.join(", "));
    let Some(value) = headers.get(header::CONTENT_TYPE) else {
        let detail = format!("the request has no content-type: {}", accepted());
        return Err(Problem::new(Code::MediaType, detail));
    };
    let text = value.to_str().unwrap_or_default();
    let essence = text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let is_image = [&IMAGE_TYPES[..], &OTHER_NAMES].concat().contains(&essence.as_str());
    if is_image || essence == "application/json" || essence == "multipart/form-data" {
        return Ok(essence);
    }
    let detail = format!("content-type {} is not accepted: {}", quoted(text), accepted());
    Err(Problem::new(Code::MediaType, detail))
}

fn json(bytes: &[u8], query: RequestOptions) -> Result<(Items, RequestOptions), Problem> {
    let request: ClassifyRequest = objects::from_slice(bytes).map_err(|error| {
        Problem::new(Code::BadJson, format!("the JSON body is not valid: {}", objects::reason(&error)))
    })?;
    if request.images.is_empty() {
        return Err(Problem::new(Code::NoImages, "the list `images` is empty: send at least one"));
    }
    let decode = |b64: &str| {
        base64::decode(b64).map_err(|reason| Problem::new(Code::BadBase64, format!("`b64` is not base64: {reason}")))
    };
    let items = request.images.into_iter().map(|image| (image.id, decode(&image.b64))).collect();
    Ok((items, request.options.or(query)?))
}

async fn multipart(request: Request) -> Result<Items, Problem> {
    let broken = |reason: String| {
        let reason = cut::sentence(&reason);
        Problem::new(Code::BadMultipart, format!("the multipart body is not valid: {reason}"))
    };
    let mut request = request;
    // The body's size was checked when it was read.
    axum::extract::DefaultBodyLimit::disable().apply(&mut request);
    let mut parts = Multipart::from_request(request, &()).await.map_err(|error| broken(error.body_text()))?;
    let mut items = Vec::new();
    while let Some(part) = parts.next_field().await.map_err(|error| broken(error.body_text()))? {
        if part.name() != Some("image") {
            let name = quoted(part.name().unwrap_or_default());
            let detail = format!("multipart part {name} is unknown: name every part `image`");
            return Err(Problem::new(Code::BadMultipart, detail));
        }
        let id = part.file_name().map(|name| ClientId::try_new(name.to_owned())).transpose()?;
        let bytes = part.bytes().await.map_err(|error| broken(error.body_text()))?;
        items.push((id, Ok(bytes)));
    }
    if items.is_empty() {
        return Err(Problem::new(Code::NoImages, "the multipart body has no part named `image`"));
    }
    Ok(items)
}
