//! What went wrong between here and the hub, in words that say what to do next, and without the token.

use std::time::Duration;

use hf_hub::HFError;

use super::id::Address;

/// Why something of the hub is not here.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// What was asked for cannot be had: nothing was done.
    Refused(String),
    /// The hub cannot be reached.
    Unreachable(String),
    /// It went wrong on the way.
    Failed(String),
    /// The user asked to stop.
    Interrupted,
}

impl From<Trouble> for anyhow::Error {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Refused(text) => crate::refusal::Refusal(text).into(),
            Trouble::Unreachable(text) | Trouble::Failed(text) => Self::msg(text),
            Trouble::Interrupted => mlx_quant::Error::Interrupted.into(),
        }
    }
}

impl From<Trouble> for mlx_quant::Error {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Refused(text) | Trouble::Unreachable(text) | Trouble::Failed(text) => Self::Fetch(text),
            Trouble::Interrupted => Self::Interrupted,
        }
    }
}

/// Why a request gave nothing.
#[derive(Debug)]
pub(super) enum Problem {
    /// In the words of hf-hub, and of connections.
    Hub(HFError),
    /// An answer to a request of our own.
    Answer(Box<Answered>),
}

/// An answer that is no success.
#[derive(Debug)]
pub(super) struct Answered {
    pub(super) status: reqwest::StatusCode,
    /// The hub's word for the error.
    pub(super) code: Option<String>,
    pub(super) message: Option<String>,
    pub(super) retry_after: Option<Duration>,
    /// The host that a redirect leads to.
    pub(super) elsewhere: Option<String>,
}

impl Problem {
    pub(super) fn malformed(what: impl Into<String>) -> Self {
        Self::Hub(HFError::malformed_response(what))
    }

    pub(super) fn other(what: impl Into<String>) -> Self {
        Self::Hub(HFError::Other(what.into()))
    }

    /// The status of an answer that nobody has a better word for.
    pub(super) fn status(&self) -> Option<u16> {
        match self {
            Self::Hub(HFError::Http { context }) => Some(context.status.as_u16()),
            Self::Hub(_) => None,
            Self::Answer(answer) => Some(answer.status.as_u16()),
        }
    }
}

impl From<HFError> for Problem {
    fn from(error: HFError) -> Self {
        Self::Hub(error)
    }
}

impl From<reqwest::Error> for Problem {
    fn from(error: reqwest::Error) -> Self {
        Self::Hub(error.into())
    }
}

impl From<serde_json::Error> for Problem {
    fn from(error: serde_json::Error) -> Self {
        Self::Hub(error.into())
    }
}

/// The hub as it is named in messages, and what must not be in them.
#[derive(Clone, Debug)]
pub(super) struct Speaker {
    pub(super) endpoint: String,
    pub(super) secret: Option<String>,
}

impl Speaker {
    /// Takes the token out of a text: a server may repeat what it was sent.
    pub(super) fn scrub(&self, text: &str) -> String {
        match &self.secret {
            Some(secret) if !secret.is_empty() => text.replace(secret.as_str(), "(token)"),
            _ => text.to_owned(),
        }
    }

    /// A file that cannot be read or written.
    pub(super) fn local(&self, error: &std::io::Error) -> Trouble {
        let hint = match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                "make room, or set HF_HOME to a larger disk; `convert --stream` needs room for the output and about two shards"
            }
            _ => "check that the file is there and may be read and written; the cache is where HF_HOME says",
        };
        Trouble::Failed(self.scrub(&format!("{error}; hint: {hint}")))
    }

    /// What an error of the hub means for `address`.
    pub(super) fn explain(&self, problem: &Problem, address: &Address) -> Trouble {
        let error = match problem {
            Problem::Hub(error) => error,
            Problem::Answer(answer) => return self.explain_answer(answer, address),
        };
        match self.refusal(error, address) {
            Some(text) => Trouble::Refused(self.scrub(&text)),
            None => self.failure(error, address),
        }
    }

    /// What an answer to a request of our own means.
    fn explain_answer(&self, answer: &Answered, address: &Address) -> Trouble {
        let (id, endpoint, message) = (address.id(), &self.endpoint, answer.message.as_deref());
        let code = answer.code.as_deref();
        if let Some(elsewhere) = &answer.elsewhere {
            return Trouble::Refused(self.scrub(&format!(
                "{endpoint} sends to {elsewhere}, which is not asked; hint: set HF_ENDPOINT to {elsewhere} if you trust it"
            )));
        }
        let text = match (answer.status.as_u16(), code) {
            (401 | 403, Some("GatedRepo")) => self.gated(&id),
            (401, code) if code == Some("RepoNotFound") || self.secret.is_none() => self.missing(&id),
            (401, _) => self.unaccepted(),
            (403, _) => self.forbidden(&id, message),
            (404, Some("RevisionNotFound")) => no_revision(&id, address.revision()),
            (404, _) => self.missing(&id),
            (429, _) => return Trouble::Failed(self.scrub(&self.crowded(answer.retry_after))),
            _ => {
                let text = self.scrub(&self.answered(answer.status, message));
                let server = answer.status.is_server_error();
                return if server { Trouble::Unreachable(text) } else { Trouble::Failed(text) };
            }
        };
        Trouble::Refused(self.scrub(&text))
    }

    fn unaccepted(&self) -> String {
        let endpoint = &self.endpoint;
        format!(
            "{endpoint} does not accept the token (HF_TOKEN, or the file that `hf auth login` wrote); hint: log in again"
        )
    }

    fn forbidden(&self, id: &str, message: Option<&str>) -> String {
        let (endpoint, said) = (&self.endpoint, said(message));
        format!("{endpoint} forbids that with this token{said}; hint: does it have write access to {id}?")
    }

    fn crowded(&self, retry_after: Option<Duration>) -> String {
        let wait = retry_after.map_or_else(String::new, |wait| format!(" (for {} s)", wait.as_secs()));
        format!("{} takes no more requests for now{wait}; hint: {MORE}", self.endpoint)
    }

    fn answered(&self, status: reqwest::StatusCode, message: Option<&str>) -> String {
        let (endpoint, said) = (&self.endpoint, said(message));
        format!("{endpoint} answered {status}{said}; hint: repeat the command, it goes on where it stopped")
    }

    fn gated(&self, id: &str) -> String {
        let then = if self.secret.is_some() {
            "with the account of your token, and wait until access is granted"
        } else {
            "then log in with `hf auth login` or set HF_TOKEN"
        };
        format!("{id} is gated; hint: accept its terms at {}/{id}, {then}", self.endpoint)
    }

    fn missing(&self, id: &str) -> String {
        let hint = if self.secret.is_some() {
            "may your token read it?"
        } else {
            "if it is private, log in with `hf auth login` or set HF_TOKEN"
        };
        let endpoint = &self.endpoint;
        format!("{endpoint} has no repository {id}, or it is private; hint: check the spelling; {hint}")
    }

    /// What cannot be had, however often it is asked for.
    fn refusal(&self, error: &HFError, address: &Address) -> Option<String> {
        let (id, endpoint) = (address.id(), &self.endpoint);
        Some(match error {
            HFError::AuthRequired { context }
            | HFError::Forbidden { context }
            | HFError::Http { context }
                if context.error_code.as_deref() == Some("GatedRepo") =>
            {
                self.gated(&id)
            }
            HFError::AuthRequired { context }
                if context.error_code.as_deref() == Some("RepoNotFound") || self.secret.is_none() =>
            {
                self.missing(&id)
            }
            HFError::AuthRequired { .. } => self.unaccepted(),
            HFError::Forbidden { context } => self.forbidden(&id, context.server_message.as_deref()),
            HFError::RepoNotFound { context, .. } | HFError::RevisionNotFound { context, .. }
                if context.as_ref().and_then(|context| context.error_code.as_deref())
                    == Some("RepoNotFound") =>
            {
                self.missing(&id)
            }
            HFError::RepoNotFound { context: Some(context), .. }
                if context.error_code.as_deref() == Some("RevisionNotFound") =>
            {
                no_revision(&id, address.revision())
            }
            HFError::RepoNotFound { .. } => self.missing(&id),
            HFError::RevisionNotFound { revision, .. } => no_revision(&id, revision),
            HFError::EntryNotFound { path, .. } => {
                format!("{id} has no file {path} at this revision; hint: check the name and --revision")
            }
            HFError::InvalidParameter(what) => format!("{id}: {what}; hint: check the id"),
            HFError::Url(error) => {
                format!("HF_ENDPOINT {endpoint:?} is no address: {error}; hint: unset it")
            }
            _ => return None,
        })
    }

    /// What went wrong on the way.
    fn failure(&self, error: &HFError, address: &Address) -> Trouble {
        let endpoint = &self.endpoint;
        let text = match error {
            HFError::RateLimited { retry_after, .. } => self.crowded(*retry_after),
            HFError::Http { context } if context.status.as_u16() == 429 => self.crowded(None),
            HFError::Http { context } if context.status.is_server_error() => {
                let text = self.answered(context.status, context.server_message.as_deref());
                return Trouble::Unreachable(self.scrub(&text));
            }
            HFError::Http { context } | HFError::Conflict { context } => {
                self.answered(context.status, context.server_message.as_deref())
            }
            HFError::Request { source, .. } if is_unreadable(error) => format!(
                "{endpoint} did not answer as the hub does ({}); hint: is HF_ENDPOINT right, or does a proxy or login page stand between?",
                innermost(source)
            ),
            HFError::Json(_) | HFError::MalformedResponse { .. } => format!(
                "{endpoint} did not answer as the hub does ({error}); hint: is HF_ENDPOINT right, or does a proxy or login page stand between?"
            ),
            HFError::Request { source, .. } if source.is_connect() => {
                return Trouble::Unreachable(self.scrub(&format!(
                    "cannot reach {endpoint}: {}; hint: check the network; HF_HUB_OFFLINE=1 uses only what is in the cache",
                    innermost(source)
                )));
            }
            HFError::Request { source, .. } if source.is_redirect() => format!(
                "{endpoint} redirects to where this does not follow: {}; hint: is HF_ENDPOINT right?",
                innermost(source)
            ),
            HFError::Request { source, .. } => format!(
                "the connection to {endpoint} broke: {}; hint: repeat the command, it goes on where it stopped",
                innermost(source)
            ),
            HFError::Io(error) => return self.local(error),
            HFError::Other(what) => {
                return Trouble::Unreachable(self.scrub(&format!(
                    "{endpoint}: {what}; hint: repeat the command, it goes on where it stopped"
                )));
            }
            other => {
                format!("{}: {other}; hint: repeat the command, it goes on where it stopped", address.id())
            }
        };
        Trouble::Failed(self.scrub(&text))
    }
}

const MORE: &str = "try again later, with a token (`hf auth login`) the limit is higher";

fn no_revision(id: &str, revision: &str) -> String {
    format!("{id} has no revision {revision:?}; hint: give a branch, a tag or a commit that its page lists")
}

fn said(message: Option<&str>) -> String {
    let short = |message: &str| message.chars().take(300).collect::<String>();
    message.map_or_else(String::new, |message| format!(" ({})", short(message)))
}

/// The cause that says most.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

/// An answer that is no JSON where JSON belongs.
fn is_unreadable(error: &HFError) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error.downcast_ref::<serde_json::Error>().is_some_and(|error| !error.is_io()) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// How long to wait before the next of at most four further tries, where another try can help.
pub(super) fn pause(problem: &Problem, tries: u32) -> Option<Duration> {
    const TRIES: u32 = 4;
    let usual = Duration::from_millis(250) * 2u32.pow(tries.min(TRIES));
    if tries >= TRIES {
        return None;
    }
    match problem {
        Problem::Answer(answer) if answer.status.as_u16() == 429 => asked_for(answer.retry_after, usual),
        Problem::Hub(HFError::RateLimited { retry_after, .. }) => asked_for(*retry_after, usual),
        Problem::Hub(HFError::Http { .. }) | Problem::Answer(_) => match problem.status() {
            // hf-hub forgets for how long.
            Some(429) => asked_for(None, usual),
            status => matches!(status, Some(408 | 500 | 502 | 503 | 504)).then_some(usual),
        },
        Problem::Hub(error @ HFError::Request { source, .. }) => {
            let lasting = source.is_builder() || source.is_status() || source.is_redirect();
            (!lasting && !is_unreadable(error)).then_some(usual)
        }
        // Silence, which hf-hub has no word for, and large files that broke.
        Problem::Hub(HFError::Other(_) | HFError::Xet { .. }) => Some(usual),
        Problem::Hub(_) => None,
    }
}

/// What the hub asks to be waited for.
fn asked_for(retry_after: Option<Duration>, usual: Duration) -> Option<Duration> {
    /// It may be long; beyond this it is better said than waited for.
    const LONGEST: Duration = Duration::from_secs(300);
    let wait = retry_after.unwrap_or(usual * 8);
    (wait <= LONGEST).then_some(wait)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_is_taken_out() {
        let speaker = Speaker { endpoint: "http://x".to_owned(), secret: Some("hf_secret".to_owned()) };
        assert_eq!(speaker.scrub("Bearer hf_secret, again hf_secret"), "Bearer (token), again (token)");
    }
}
