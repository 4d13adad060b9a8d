//! Answers: how they are made, and how they go out, rightly or with a fault.
//!
//! An answer is whole in memory until it is sent. That makes every fault the same few lines for each of the
//! the servers: cut the bytes, change one, or stop in the middle.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::header::{
    ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE, RETRY_AFTER,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream;
use serde_json::{Value, json};

use crate::fault::Fault;
use crate::record::Entry;

/// How long a silent connection stays open.
const SILENCE: Duration = Duration::from_secs(120);
/// What the connection gets to send what it was given, before it is cut.
const FLUSH: Duration = Duration::from_millis(50);
const PIECE: usize = 64 * 1024;

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn new(status: u16) -> Self {
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self { status, headers: HeaderMap::new(), body: Bytes::new() }
    }

    /// With a header; characters that a header cannot hold are left out.
    pub(crate) fn with(mut self, name: &str, value: &str) -> Self {
        let value: String = value.chars().filter(|c| matches!(c, ' '..='~')).collect();
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            self.headers.append(name, value);
        }
        self
    }

    pub(crate) fn text(status: u16, kind: &str, body: impl Into<Bytes>) -> Self {
        let mut answer = Self::new(status).with(CONTENT_TYPE.as_str(), kind);
        answer.body = body.into();
        answer
    }

    pub(crate) fn json(body: &Value) -> Self {
        Self::text(200, "application/json; charset=utf-8", body.to_string())
    }

    /// An error as the hub words it: in two headers and in the body.
    pub(crate) fn error(status: u16, code: &str, message: &str) -> Self {
        let mut answer = Self::json(&json!({ "error": message })).with("X-Error-Message", message);
        answer.status = Self::new(status).status;
        if code.is_empty() { answer } else { answer.with("X-Error-Code", code) }
    }

    /// A file's content, or the part of it that was asked for.
    pub(crate) fn content(bytes: &Bytes, request: &HeaderMap) -> Self {
        let size = bytes.len() as u64;
        let kind = "application/octet-stream";
        let asked = request.get(RANGE).and_then(|value| value.to_str().ok()).and_then(range);
        let answer = match asked.map(|asked| bounds(asked, size)) {
            None => Self::text(200, kind, bytes.clone()),
            Some(None) => Self::new(416).with(CONTENT_RANGE.as_str(), &format!("bytes */{size}")),
            Some(Some((first, last))) => Self::text(206, kind, bytes.slice(first as usize..=last as usize))
                .with(CONTENT_RANGE.as_str(), &format!("bytes {first}-{last}/{size}")),
        };
        answer.with(ACCEPT_RANGES.as_str(), "bytes")
    }

    /// What is answered instead of what was asked, for a fault that lets nothing happen.
    pub(crate) fn instead(fault: &Fault) -> Option<Self> {
        match fault {
            Fault::Status { code, retry_after, body } => {
                let answer = Self::text(*code, "text/plain; charset=utf-8", body.clone());
                Some(match retry_after {
                    Some(seconds) => answer.with(RETRY_AFTER.as_str(), &seconds.to_string()),
                    None => answer,
                })
            }
            Fault::Html => {
                let page = "<!DOCTYPE html><html><body>Please log in to this network.</body></html>";
                Some(Self::text(200, "text/html; charset=utf-8", page))
            }
            Fault::NotSatisfiable => Some(Self::new(416)),
            Fault::Redirect { code, location } => {
                let text = format!("Redirecting to {location}");
                Some(Self::text(*code, "text/plain; charset=utf-8", text).with(LOCATION.as_str(), location))
            }
            _ => None,
        }
    }

    /// Sends it.
    pub(crate) fn send(mut self, head: bool, fault: Option<&Fault>, entry: Arc<Entry>) -> Response {
        entry.answered(self.status.as_u16());
        match fault {
            Some(Fault::Flip { at }) if !self.body.is_empty() => {
                let mut bytes = self.body.to_vec();
                let at = (*at as usize).min(bytes.len() - 1);
                bytes[at] ^= 0xff;
                self.body = Bytes::from(bytes);
            }
            Some(Fault::Short { by }) => {
                self.body.truncate(self.body.len().saturating_sub(*by as usize));
            }
            _ => {}
        }
        let bodiless = matches!(self.status.as_u16(), 204 | 304);
        let mut response = Response::new(Body::empty());
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers;
        response.headers_mut().remove(CONTENT_LENGTH);
        if !bodiless {
            response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(self.body.len()));
        }
        if !head && !bodiless {
            *response.body_mut() = body(self.body, fault, entry);
        }
        response
    }
}

fn body(bytes: Bytes, fault: Option<&Fault>, entry: Arc<Entry>) -> Body {
    let (limit, silence) = match fault {
        Some(Fault::Drop { after }) => (Some(*after), FLUSH),
        Some(Fault::Stall { after }) => (Some(*after), SILENCE),
        _ => (None, FLUSH),
    };
    let (piece, pause) = match fault {
        Some(Fault::Slow { bytes_per_second }) => {
            (((bytes_per_second / 10) as usize).max(1), Some(Duration::from_millis(100)))
        }
        _ => (PIECE, None),
    };
    let cut = limit.is_some();
    let mut rest = bytes;
    if let Some(limit) = limit {
        rest.truncate(limit as usize);
    }
    Body::from_stream(stream::unfold(Some(rest), move |rest| {
        let entry = Arc::clone(&entry);
        async move {
            let mut rest = rest?;
            if rest.is_empty() {
                if !cut {
                    return None;
                }
                tokio::time::sleep(silence).await;
                return Some((Err(io::Error::from(io::ErrorKind::ConnectionAborted)), None));
            }
            if let Some(pause) = pause {
                tokio::time::sleep(pause).await;
            }
            let next = rest.split_to(piece.min(rest.len()));
            entry.sent(next.len());
            Some((Ok(next), Some(rest)))
        }
    }))
}

/// A `Range` header with one range: its first and last byte, or only how many at the end.
fn range(header: &str) -> Option<(Option<u64>, Option<u64>)> {
    let (first, last) = header.strip_prefix("bytes=")?.split_once('-')?;
    let number = |text: &str| match text.trim() {
        "" => Some(None),
        digits => digits.parse().ok().map(Some),
    };
    match (number(first)?, number(last)?) {
        (None, None) => None,
        (Some(first), Some(last)) if first > last => None,
        range => Some(range),
    }
}

/// Its first and last byte in a file of this size, if there is any.
fn bounds(range: (Option<u64>, Option<u64>), size: u64) -> Option<(u64, u64)> {
    let end = size.checked_sub(1)?;
    match range {
        (Some(first), last) => (first <= end).then(|| (first, last.unwrap_or(end).min(end))),
        (None, Some(0) | None) => None,
        (None, Some(count)) => Some((size.saturating_sub(count), end)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_in_http() {
        let read = |header: &str, size| range(header).map(|range| bounds(range, size));
        assert_eq!(read("bytes=0-3", 10), Some(Some((0, 3))));
        assert_eq!(read("bytes=7-", 10), Some(Some((7, 9))));
        assert_eq!(read("bytes=7-99", 10), Some(Some((7, 9))));
        assert_eq!(read("bytes=-4", 10), Some(Some((6, 9))));
        assert_eq!(read("bytes=10-", 10), Some(None));
        assert_eq!(read("bytes=0-", 0), Some(None));
        assert_eq!(read("bytes=5-2", 10), None);
        assert_eq!(read("lines=1-2", 10), None);
    }
}
