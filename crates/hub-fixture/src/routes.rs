//! Which request means what, and who may make it.
//!
//! Paths are taken apart by hand: an id has one segment or two, and anything may stand in it.

use axum::http::request::Parts;
use axum::http::{HeaderMap, Method};
use bytes::Bytes;
use serde_json::json;

use crate::answer::Answer;
use crate::call::{Access, Call, anonymous, bearer};
use crate::encoding::decode;
use crate::repository::Kind;
use crate::state::Shared;
use crate::{card, commit, listing, resolve, upload};

/// What a repository is asked for, after its id.
const VERBS: &[&str] = &[
    "branch",
    "commit",
    "commits",
    "paths-info",
    "preupload",
    "refs",
    "revision",
    "tree",
    "xet-read-token",
    "xet-write-token",
];

fn signed(shared: &Shared, headers: &HeaderMap) -> Result<bool, Answer> {
    let Some(token) = bearer(headers) else { return Ok(false) };
    if shared.store().token.as_deref() == Some(token) {
        return Ok(true);
    }
    Err(Answer::error(401, "", "Invalid credentials in Authorization header"))
}

pub(crate) async fn answer(shared: &Shared, parts: &Parts, body: &Bytes) -> Answer {
    dispatch(shared, parts, body).await.unwrap_or_else(|answer| answer)
}

async fn dispatch(shared: &Shared, parts: &Parts, body: &Bytes) -> Result<Answer, Answer> {
    let signed = signed(shared, &parts.headers)?;
    let segments: Vec<String> = parts.uri.path().split('/').skip(1).map(decode).collect();
    let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
    let reads = matches!(parts.method, Method::GET | Method::HEAD);
    let posts = parts.method == Method::POST;
    match segments.as_slice() {
        ["api", "whoami-v2"] if reads => whoami(signed),
        ["api", "repos", "create"] if posts => upload::create(shared, signed, body),
        ["api", "validate-yaml"] if posts => card::validate(&shared.cards, body),
        ["api", "models", rest @ ..] => api(shared, (Kind::Model, rest), parts, signed, body).await,
        ["api", "datasets", rest @ ..] => api(shared, (Kind::Dataset, rest), parts, signed, body).await,
        ["api", ..] => Err(Answer::error(404, "", "Sorry, we can't find the page you are looking for.")),
        ["datasets", rest @ ..] => files(shared, (Kind::Dataset, rest), parts, signed, body),
        rest => files(shared, (Kind::Model, rest), parts, signed, body),
    }
}

fn whoami(signed: bool) -> Result<Answer, Answer> {
    if !signed {
        return Err(anonymous());
    }
    Ok(Answer::json(&json!({
        "type": "user",
        "id": "64b000000000000000000001",
        "name": upload::USER,
        "fullname": "A Tester",
        "email": "tester@example.com",
        "emailVerified": true,
        "canPay": false,
        "isPro": false,
        "avatarUrl": "/avatars/tester.svg",
        "orgs": [],
        "auth": { "type": "access_token", "accessToken": { "displayName": "test", "role": "write" } },
    })))
}

async fn api(
    shared: &Shared,
    (kind, rest): (Kind, &[&str]),
    parts: &Parts,
    signed: bool,
    body: &Bytes,
) -> Result<Answer, Answer> {
    let at = [2, 1].into_iter().find(|&at| rest.get(at).is_some_and(|verb| VERBS.contains(verb)));
    let id = rest[..at.unwrap_or(rest.len())].join("/");
    let call = Call { kind, id, parts, signed };
    let reads = matches!(parts.method, Method::GET | Method::HEAD);
    let posts = parts.method == Method::POST;
    match at.map_or(&[][..], |at| &rest[at..]) {
        [] if reads => listing::info(shared, &call, None),
        ["revision", revision @ ..] if reads => listing::info(shared, &call, Some(&revision.join("/"))),
        ["refs"] if reads => listing::refs(shared, &call),
        ["commits", revision] if reads => listing::commits(shared, &call, revision),
        ["tree", revision, path @ ..] if reads => listing::tree(shared, &call, revision, &path.join("/")),
        ["paths-info", revision] if posts => listing::paths(shared, &call, revision, body),
        ["xet-read-token", revision] if reads => upload::token(shared, &call, revision, Access::Read),
        ["xet-write-token", revision] if reads => upload::token(shared, &call, revision, Access::Write),
        ["branch", name] if posts => upload::branch(shared, &call, name, body),
        ["preupload", revision] if posts => upload::modes(shared, &call, revision, body),
        ["commit", revision] if posts => commit::commit(shared, &call, revision, body).await,
        _ => Err(Answer::error(404, "", "Sorry, we can't find the page you are looking for.")),
    }
}

fn files(
    shared: &Shared,
    (kind, rest): (Kind, &[&str]),
    parts: &Parts,
    signed: bool,
    body: &Bytes,
) -> Result<Answer, Answer> {
    let reads = matches!(parts.method, Method::GET | Method::HEAD);
    let posts = parts.method == Method::POST;
    let nothing = || Answer::error(404, "", "Sorry, we can't find the page you are looking for.");
    for at in [2, 1] {
        let Some((id, tail)) = rest.split_at_checked(at) else { continue };
        let id = id.join("/");
        let git = id.strip_suffix(".git").map(str::to_owned);
        match (tail, git) {
            (["resolve", revision, path @ ..], _) if reads => {
                let call = Call { kind, id, parts, signed };
                return resolve::file(shared, &call, revision, &path.join("/"));
            }
            (["info", "lfs", "objects", "batch"], Some(id)) if posts => {
                return upload::batch(shared, &Call { kind, id, parts, signed }, body);
            }
            (["info", "lfs", "verify"], Some(id)) if posts => {
                return upload::verify(shared, &Call { kind, id, parts, signed }, body);
            }
            _ => {}
        }
    }
    Err(nothing())
}
