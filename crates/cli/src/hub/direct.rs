//! Requests of our own, for what hf-hub leaves out or does in another way: to the endpoint, and to nobody else.

use std::time::Duration;

use hf_hub::HFError;
use reqwest::header::{HeaderMap, LOCATION, RETRY_AFTER};
use reqwest::redirect::Policy;
use reqwest::{Client, RequestBuilder, Response, Url};

use super::explain::{Answered, Problem};
use super::{Hub, Kind, Snapshot, shown};

/// What is read of an answer that is an error.
const ERROR_BYTES: usize = 64 << 10;

/// A client that stays on the host that it asks: it follows renames there, but not to the CDN or to anybody else.
pub(super) fn client(user_agent: &str) -> reqwest::Result<Client> {
    let policy = Policy::custom(|attempt| {
        let origin = attempt.previous().last().map(Url::origin);
        if origin == Some(attempt.url().origin()) && attempt.previous().len() < 10 {
            attempt.follow()
        } else {
            attempt.stop()
        }
    });
    Client::builder().user_agent(user_agent).redirect(policy).build()
}

/// A client for hf-hub, which follows redirects to the CDN. reqwest takes the token out on the way to another host; at a further redirect
/// within that host it would put it in again (0.13, which starts each time from the headers of the first request), so there it ends.
pub(super) fn following_client(user_agent: &str) -> reqwest::Result<Client> {
    let policy = Policy::custom(|attempt| {
        let (next, previous) = (attempt.url(), attempt.previous());
        let mut all = previous.iter().map(Url::origin).chain([next.origin()]);
        let first = all.next();
        let home = all.all(|origin| Some(origin) == first);
        let taken_out = previous.last().is_some_and(|last| {
            last.host_str() != next.host_str() || last.port_or_known_default() != next.port_or_known_default()
        });
        if previous.len() >= 10 {
            attempt.error("it redirects without end")
        } else if home || taken_out {
            attempt.follow()
        } else {
            let host = next.host_str().unwrap_or_default().to_owned();
            attempt.error(format!("{host} redirects further, where the token would go along"))
        }
    });
    Client::builder().user_agent(user_agent).redirect(policy).build()
}

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
