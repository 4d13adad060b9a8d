//! A request to one repository, and what everybody who answers one may say.

use axum::http::HeaderMap;
use axum::http::header::{AUTHORIZATION, LOCATION, WWW_AUTHENTICATE};
use axum::http::request::Parts;
use bytes::Bytes;
use serde_json::Value;

use crate::answer::Answer;
use crate::repository::{Kind, Place, Repository, Store};

/// A request to one repository.
pub(crate) struct Call<'a> {
    pub(crate) kind: Kind,
    pub(crate) id: String,
    pub(crate) parts: &'a Parts,
    /// Whether it brings the valid token.
    pub(crate) signed: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

impl Call<'_> {
    /// The repository, if the caller may see it, or may write it.
    pub(crate) fn open<'s>(
        &self,
        store: &'s mut Store,
        access: Access,
    ) -> Result<&'s mut Repository, Answer> {
        match store.place(self.kind, &self.id) {
            Place::Here(repository) if repository.private && !self.signed => Err(missing(false)),
            Place::Here(_) if access == Access::Write && !self.signed => Err(anonymous()),
            Place::Here(repository) => Ok(repository),
            Place::Moved(new) => Err(self.moved(&new)),
            Place::Nowhere => Err(missing(self.signed)),
        }
    }

    fn moved(&self, new: &str) -> Answer {
        let old = format!("/{}", self.id);
        let path = self.parts.uri.path_and_query().map_or("/", |path| path.as_str());
        let location = path.replacen(&old, &format!("/{new}"), 1);
        if location == path {
            return missing(self.signed);
        }
        Answer::text(307, "text/plain", format!("Temporary Redirect. Redirecting to {location}"))
            .with(LOCATION.as_str(), &location)
    }
}

/// A repository that is not there, or not for this caller: to strangers the hub does not tell which.
fn missing(signed: bool) -> Answer {
    if signed {
        return Answer::error(404, "RepoNotFound", "Repository not found");
    }
    Answer::error(401, "RepoNotFound", "Invalid username or password.")
        .with(WWW_AUTHENTICATE.as_str(), "Bearer realm=\"Authentication required\", charset=\"UTF-8\"")
}

/// Something that nobody may do without a token.
pub(crate) fn anonymous() -> Answer {
    Answer::error(401, "", "Invalid username or password.")
        .with(WWW_AUTHENTICATE.as_str(), "Bearer realm=\"Authentication required\", charset=\"UTF-8\"")
}

pub(crate) fn no_revision(revision: &str) -> Answer {
    Answer::error(404, "RevisionNotFound", &format!("Invalid rev id: {revision}"))
}

/// A request's body as JSON.
pub(crate) fn object(body: &Bytes) -> Result<Value, Answer> {
    serde_json::from_slice(body).map_err(|error| Answer::error(400, "", &format!("Invalid JSON: {error}")))
}

/// The token that a request brings.
pub(crate) fn bearer(headers: &HeaderMap) -> Option<&str> {
    headers.get(AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")
}
