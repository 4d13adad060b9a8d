//! Files: what they are, and where they come from.

use axum::http::header::{ETAG, IF_NONE_MATCH, LINK, LOCATION};

use crate::answer::Answer;
use crate::call::{Access, Call, no_revision};
use crate::cdn;
use crate::encoding::encode;
use crate::state::Shared;

/// The answer to a caller who has not been given access to a gated repository.
pub(crate) fn refused(call: &Call) -> Answer {
    let kind = if call.kind.prefix().is_empty() { "model" } else { "dataset" };
    let id = &call.id;
    if call.signed {
        let message = format!(
            "Access to {kind} {id} is restricted and you are not in the authorized list. \
             Visit https://huggingface.co/{}{id} to ask for access.",
            call.kind.prefix()
        );
        return Answer::error(403, "GatedRepo", &message);
    }
    let message = format!(
        "Access to {kind} {id} is restricted. You must have access to it and be authenticated to access it. \
         Please log in."
    );
    Answer::error(401, "GatedRepo", &message)
}

pub(crate) fn file(shared: &Shared, call: &Call, revision: &str, path: &str) -> Result<Answer, Answer> {
    let mut store = shared.store();
    let xet = !store.without_xet;
    let repository = call.open(&mut store, Access::Read)?;
    if repository.gated {
        return Err(refused(call));
    }
    let snapshot = repository.snapshot(revision).ok_or_else(|| no_revision(revision))?;
    let sha = &snapshot.commit.sha;
    let Some(blob) = snapshot.files.get(path) else {
        return Err(Answer::error(404, "EntryNotFound", "Entry not found").with("X-Repo-Commit", sha));
    };
    let etag = blob.etag();
    let quoted = format!("\"{etag}\"");
    let label = |answer: Answer| answer.with("X-Repo-Commit", sha).with(ETAG.as_str(), &quoted);
    let asked = call.parts.headers.get(IF_NONE_MATCH).and_then(|value| value.to_str().ok()).unwrap_or("");
    if asked.split(',').any(|tag| tag.trim().trim_start_matches("W/").trim_matches('"') == etag) {
        return Ok(label(Answer::new(304)));
    }
    if blob.pointer.is_none() {
        return Ok(label(Answer::content(&blob.bytes, &call.parts.headers)));
    }
    let location = cdn::download(shared, &call.id, path, &blob.sha256);
    let answer = label(Answer::text(302, "text/plain", format!("Found. Redirecting to {location}")))
        .with(LOCATION.as_str(), &location)
        .with("X-Linked-Etag", &quoted)
        .with("X-Linked-Size", &blob.bytes.len().to_string())
        .with("Accept-Ranges", "bytes");
    let (true, Some(hash)) = (xet, &blob.xet) else { return Ok(answer) };
    let (hub, store) = (&shared.addresses.hub, &shared.addresses.xet);
    let links = format!(
        "<{hub}/api/{}/{}/xet-read-token/{sha}>; rel=\"xet-auth\", \
         <{store}/v1/reconstructions/{hash}>; rel=\"xet-reconstruction-info\"",
        call.kind.plural(),
        encode(&call.id),
    );
    Ok(answer.with("X-Xet-Hash", hash).with(LINK.as_str(), &links))
}
