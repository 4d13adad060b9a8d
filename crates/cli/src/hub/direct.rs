//! Requests of our own, for what hf-hub leaves out or does in another way: to the endpoint, and to nobody else.

use std::time::Duration;

use hf_hub::HFError;
use reqwest::header::{HeaderMap, LOCATION, RETRY_AFTER};
use reqwest::{RequestBuilder, Response, Url};

use super::explain::{Answered, Problem};
use super::{Hub, Kind, Snapshot, shown};

/// What is read of an answer that is an error.
const ERROR_BYTES: usize = 64 << 10;

impl Hub {
    /// An address at the endpoint, with these parts at the end of its path.
    pub(super) fn url<'a>(&self, parts: impl IntoIterator<Item = &'a str>) -> Result<Url, Problem> {
        let mut url = Url::parse(self.client.endpoint()).map_err(HFError::from)?;
        let parts = parts.into_iter();
        url.path_segments_mut().map_err(|()| Problem::malformed("no address"))?.pop_if_empty().extend(parts);
        Ok(url)
    }

    /// An address of the API that is about the repository of a snapshot.
    pub(super) fn api_url(&self, snapshot: &Snapshot, parts: [&str; 2]) -> Result<Url, Problem> {
        let (kind, address) = (snapshot.kind.plural(), &snapshot.address);
        self.url(["api", kind, &address.owner, &address.name].into_iter().chain(parts))
    }

    /// An address of a file in a snapshot.
    pub(super) fn file_url(&self, snapshot: &Snapshot, path: &str) -> Result<Url, Problem> {
        let (dataset, address) = (snapshot.kind == Kind::Dataset, &snapshot.address);
        let start = dataset.then_some("datasets").into_iter();
        let parts = start.chain([&*address.owner, &*address.name, "resolve", &*snapshot.commit]);
        self.url(parts.chain(path.split('/')))
    }

    /// The answer to a request with the token, whatever it is.
    pub(super) fn ask_once(&self, request: RequestBuilder) -> Result<Response, Problem> {
        let request = match &self.speaker.secret {
            Some(token) => request.bearer_auth(token),
            None => request,
        };
        self.wait(request.send())
    }

    /// The answer to a request with the token; a problem if it is no success.
    pub(super) fn answer(&self, request: RequestBuilder) -> Result<Response, Problem> {
        let answer = self.ask_once(request)?;
        if answer.status().is_success() { Ok(answer) } else { Err(self.problem(answer)) }
    }

    /// What an answer that is no success means.
    pub(super) fn problem(&self, mut answer: Response) -> Problem {
        let body = self.body(&mut answer, ERROR_BYTES).unwrap_or_default();
        Problem::Answer(Box::new(status(&answer, &body)))
    }

    /// An answer's body, if it is not longer than `most` bytes.
    pub(super) fn body(&self, answer: &mut Response, most: usize) -> Result<Vec<u8>, Problem> {
        let mut body = Vec::new();
        while let Some(chunk) = self.wait(answer.chunk())? {
            if body.len() + chunk.len() > most {
                return Err(Problem::malformed(format!("an answer of more than {most} bytes")));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }
}

/// What an answer that is no success says of itself.
fn status(answer: &Response, body: &[u8]) -> Answered {
    let headers = answer.headers();
    let said = serde_json::from_slice::<serde_json::Value>(body).ok();
    let said = said.and_then(|body| body.get("error")?.as_str().map(str::to_owned));
    Answered {
        status: answer.status(),
        code: text(headers, "x-error-code"),
        message: text(headers, "x-error-message").or(said),
        retry_after: text(headers, RETRY_AFTER.as_str())
            .and_then(|seconds| seconds.trim().parse().ok())
            .map(Duration::from_secs),
        elsewhere: answer.status().is_redirection().then(|| elsewhere(answer)).flatten(),
    }
}

/// The host, without path or secrets, to which an answer redirects.
fn elsewhere(answer: &Response) -> Option<String> {
    let target = answer.url().join(&text(answer.headers(), LOCATION.as_str())?).ok()?;
    Some(shown(&target.origin().ascii_serialization()))
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    Some(String::from_utf8_lossy(headers.get(name)?.as_bytes()).into_owned())
}
