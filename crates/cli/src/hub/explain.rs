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
            Trouble::Refused(text) => crate::Refusal(text).into(),
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
                "make room, or set HF_HOME to a larger disk; `convert --stream` needs room for the output and two shards only"
            }
            _ => "is the cache directory (HF_HOME, HF_HUB_CACHE) writable?",
        };
        Trouble::Failed(self.scrub(&format!("{error}; hint: {hint}")))
    }

    /// What an error of the hub means for `address`.
    pub(super) fn explain(&self, error: &HFError, address: &Address) -> Trouble {
        let (id, endpoint) = (address.id(), &self.endpoint);
        let known = self.secret.is_some();
        let gated = || {
            let then = if known {
                "with the account of your token, and wait until access is granted"
            } else {
                "then log in with `hf auth login` or set HF_TOKEN"
            };
            format!("{id} is gated; hint: accept its terms at {endpoint}/{id}, {then}")
        };
        let missing = || {
            let hint = if known {
                "may your token read it?"
            } else {
                "if it is private, log in with `hf auth login` or set HF_TOKEN"
            };
            format!("{endpoint} has no repository {id}, or it is private; hint: check the spelling; {hint}")
        };
        let refused = match error {
            HFError::AuthRequired { context }
            | HFError::Forbidden { context }
            | HFError::Http { context }
                if context.error_code.as_deref() == Some("GatedRepo") =>
            {
                Some(gated())
            }
            HFError::AuthRequired { context }
                if context.error_code.as_deref() == Some("RepoNotFound") || !known =>
            {
                Some(missing())
            }
            HFError::AuthRequired { .. } => Some(format!(
                "{endpoint} does not accept the token (HF_TOKEN, or the file that `hf auth login` wrote); hint: log in again"
            )),
            HFError::Forbidden { context } => Some(format!(
                "{endpoint} forbids that with this token{}; hint: does it have write access to {id}?",
                said(context.server_message.as_deref())
            )),
            HFError::RepoNotFound { context, .. } | HFError::RevisionNotFound { context, .. }
                if context.as_ref().and_then(|context| context.error_code.as_deref())
                    == Some("RepoNotFound") =>
            {
                Some(missing())
            }
            HFError::RepoNotFound { context: Some(context), .. }
                if context.error_code.as_deref() == Some("RevisionNotFound") =>
            {
                Some(no_revision(&id, address.revision()))
            }
            HFError::RepoNotFound { .. } => Some(missing()),
            HFError::RevisionNotFound { revision, .. } => Some(no_revision(&id, revision)),
            HFError::EntryNotFound { path, .. } => {
                Some(format!("{id} has no file {path} at this revision; hint: check the name and --revision"))
            }
            HFError::InvalidParameter(what) => Some(format!("{id}: {what}; hint: check the id")),
            HFError::Url(error) => {
                Some(format!("HF_ENDPOINT {endpoint:?} is no address: {error}; hint: unset it"))
            }
            _ => None,
        };
        if let Some(text) = refused {
            return Trouble::Refused(self.scrub(&text));
        }
        let text = match error {
            HFError::RateLimited { retry_after, .. } => format!(
                "{endpoint} takes no more requests for now{}; hint: try again later, with a token (`hf auth login`) the limit is higher",
                retry_after.map_or_else(String::new, |wait| format!(" (for {} s)", wait.as_secs()))
            ),
            HFError::Http { context } | HFError::Conflict { context } => format!(
                "{endpoint} answered {}{}; hint: repeat the command, it goes on where it stopped",
                context.status,
                said(context.server_message.as_deref())
            ),
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
            HFError::Request { source, .. } => format!(
                "the connection to {endpoint} broke: {}; hint: repeat the command, it goes on where it stopped",
                innermost(source)
            ),
            HFError::Io(error) => return self.local(error),
            other => format!("{id}: {other}; hint: repeat the command, it goes on where it stopped"),
        };
        Trouble::Failed(self.scrub(&text))
    }
}

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
pub(super) fn pause(error: &HFError, tries: u32) -> Option<Duration> {
    const TRIES: u32 = 4;
    /// What the hub asks for may be long; beyond this it is better said than waited for.
    const LONGEST: Duration = Duration::from_secs(300);
    let usual = Duration::from_millis(250) * 2u32.pow(tries.min(TRIES));
    if tries >= TRIES {
        return None;
    }
    match error {
        HFError::RateLimited { retry_after, .. } => {
            let wait = retry_after.unwrap_or(usual * 8);
            (wait <= LONGEST).then_some(wait)
        }
        HFError::Http { context } => {
            matches!(context.status.as_u16(), 408 | 500 | 502 | 503 | 504).then_some(usual)
        }
        HFError::Request { source, .. } => {
            let lasting = source.is_builder() || source.is_status() || source.is_redirect();
            (!lasting && !is_unreadable(error)).then_some(usual)
        }
        // Silence, which hf-hub has no word for. (Xet has its own tries.)
        HFError::Other(_) => Some(usual),
        _ => None,
    }
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
