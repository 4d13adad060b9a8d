//! The CDN: where the hub sends clients for the content of large files, and where they put it.
//!
//! Its addresses are signed, so it needs no token; and as in reality it refuses a request that brings one, since
//! a token that reaches another host than the hub is a leak.

use axum::http::Method;
use axum::http::header::{AUTHORIZATION, ETAG};
use axum::http::request::Parts;
use bytes::Bytes;

use crate::answer::Answer;
use crate::encoding::{encode, sha256};
use crate::state::Shared;

const DOWNLOADS: &str = "/xet-bridge/";
const UPLOADS: &str = "/lfs-uploads/";
const SIGNATURE: &str = "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Expires=3600&X-Amz-Signature=5f1d";

/// Where a file's content can be got.
pub(crate) fn download(shared: &Shared, id: &str, path: &str, digest: &str) -> String {
    let (cdn, id) = (&shared.addresses.cdn, encode(id));
    let name = encode(path.rsplit('/').next().unwrap_or(path));
    format!(
        "{cdn}{DOWNLOADS}{id}/{digest}?{SIGNATURE}\
         &response-content-disposition=inline%3B+filename%3D%22{name}%22%3B"
    )
}

/// Where content can be put.
pub(crate) fn upload(shared: &Shared, digest: &str) -> String {
    format!("{}{UPLOADS}{digest}?{SIGNATURE}", shared.addresses.cdn)
}

pub(crate) fn answer(shared: &Shared, parts: &Parts, body: Bytes) -> Answer {
    if parts.headers.contains_key(AUTHORIZATION) {
        let message =
            "<Error><Code>InvalidArgument</Code><Message>Only one auth mechanism allowed</Message></Error>";
        return Answer::text(400, "application/xml", message);
    }
    if parts.uri.query().is_none_or(|query| !query.contains("X-Amz-Signature=")) {
        return Answer::text(403, "application/xml", "<Error><Code>AccessDenied</Code></Error>");
    }
    let path = parts.uri.path();
    let digest = path.rsplit('/').next().unwrap_or("");
    if path.starts_with(UPLOADS) && parts.method == Method::PUT {
        if sha256(&body) != digest {
            return Answer::text(400, "application/xml", "<Error><Code>BadDigest</Code></Error>");
        }
        shared.store().uploads.insert(digest.to_owned(), body);
        return Answer::new(200).with(ETAG.as_str(), &format!("\"{digest}\""));
    }
    let reads = matches!(parts.method, Method::GET | Method::HEAD);
    match shared.store().large(digest) {
        Some(blob) if reads && path.starts_with(DOWNLOADS) => {
            Answer::content(&blob.bytes, &parts.headers).with(ETAG.as_str(), &format!("\"{digest}\""))
        }
        _ => Answer::text(404, "application/xml", "<Error><Code>NoSuchKey</Code></Error>"),
    }
}
