//! What comes before a commit: the repository, how each file is to be sent, and where to.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde_json::{Value, json};

use crate::answer::Answer;
use crate::call::{Access, Call, anonymous, no_revision, object};
use crate::cas::Cas;
use crate::cdn;
use crate::encoding::encode;
use crate::repository::{Blob, Files, Kind, Place, is_large};
use crate::resolve::refused;
use crate::state::Shared;

/// Whose the token is.
pub(crate) const USER: &str = "tester";

/// What the hub puts into a new repository.
const ATTRIBUTES: &str = "*.bin filter=lfs diff=lfs merge=lfs -text\n\
                          *.parquet filter=lfs diff=lfs merge=lfs -text\n\
                          *.safetensors filter=lfs diff=lfs merge=lfs -text\n";

pub(crate) fn create(shared: &Shared, signed: bool, body: &Bytes) -> Result<Answer, Answer> {
    if !signed {
        return Err(anonymous());
    }
    let body = object(body)?;
    let text = |key: &str| body[key].as_str().filter(|text| !text.is_empty());
    let kind = match text("type") {
        None | Some("model") => Kind::Model,
        Some("dataset") => Kind::Dataset,
        Some(other) => {
            return Err(Answer::error(400, "", &format!("Repositories of type {other} are not here")));
        }
    };
    let name = text("name").ok_or_else(|| Answer::error(400, "", "A repository needs a name"))?;
    let id = format!("{}/{name}", text("organization").unwrap_or(USER));
    let private = body["private"].as_bool().unwrap_or(text("visibility") == Some("private"));
    let url = format!("{}/{}{}", shared.addresses.hub, kind.prefix(), encode(&id));
    let mut store = shared.store();
    if !matches!(store.place(kind, &id), Place::Nowhere) {
        let message = format!("You already created this {} repo", kind.plural().trim_end_matches('s'));
        let mut answer = Answer::error(409, "", &message);
        answer.body = Bytes::from(json!({ "error": message, "url": url }).to_string());
        return Err(answer);
    }
    let attributes = Blob::plain(Bytes::from_static(ATTRIBUTES.as_bytes()));
    let repository = store.make(kind, &id);
    repository.private = private;
    repository.replace("initial commit", Files::from([(".gitattributes".to_owned(), Arc::new(attributes))]));
    Ok(Answer::json(&json!({ "url": url, "name": id, "id": id, "private": private })))
}

pub(crate) fn branch(shared: &Shared, call: &Call, name: &str, body: &Bytes) -> Result<Answer, Answer> {
    let body = object(body).unwrap_or_default();
    let start = body["startingPoint"].as_str().unwrap_or("main");
    let mut store = shared.store();
    let repository = call.open(&mut store, Access::Write)?;
    if repository.branches.contains_key(name) {
        return Err(Answer::error(409, "", &format!("Reference already exists: {name}")));
    }
    let sha = repository.snapshot(start).ok_or_else(|| no_revision(start))?.commit.sha.clone();
    repository.branches.insert(name.to_owned(), sha);
    Ok(Answer::json(&json!({})))
}

/// How each file is to be sent, and what the branch has under its name.
pub(crate) fn modes(shared: &Shared, call: &Call, revision: &str, body: &Bytes) -> Result<Answer, Answer> {
    let body = object(body)?;
    let mut store = shared.store();
    let repository = call.open(&mut store, Access::Write)?;
    let snapshot = repository.snapshot(revision).ok_or_else(|| no_revision(revision))?;
    let file = |file: &Value| {
        let path = file["path"].as_str().unwrap_or("");
        let large = is_large(path, file["size"].as_u64().unwrap_or(0));
        json!({
            "path": path,
            "uploadMode": if large { "lfs" } else { "regular" },
            "shouldIgnore": false,
            "oid": snapshot.files.get(path).map(|blob| blob.etag()),
        })
    };
    let files: Vec<Value> = body["files"].as_array().into_iter().flatten().map(file).collect();
    Ok(Answer::json(&json!({ "files": files, "commitOid": snapshot.commit.sha })))
}

/// Where large files are to be sent: to the xet store if the client knows it, or else to the CDN.
pub(crate) fn batch(shared: &Shared, call: &Call, body: &Bytes) -> Result<Answer, Answer> {
    let body = object(body)?;
    let mut store = shared.store();
    call.open(&mut store, Access::Write)?;
    let offered = body["transfers"].as_array().is_some_and(|names| names.contains(&json!("xet")));
    let xet = offered && !store.without_xet;
    let hub = &shared.addresses.hub;
    let root = format!("{hub}/{}{}.git/info/lfs", call.kind.prefix(), encode(&call.id));
    let object = |object: &Value| {
        let (oid, size) = (object["oid"].as_str().unwrap_or(""), object["size"].as_u64().unwrap_or(0));
        let mut answer = json!({ "oid": oid, "size": size, "authenticated": true });
        if xet {
            let href = format!("{hub}/api/{}/{}/xet-write-token/main", call.kind.plural(), encode(&call.id));
            answer["actions"] = json!({ "upload": { "href": href } });
        } else if store.large(oid).is_none() && !store.uploads.contains_key(oid) {
            answer["actions"] = json!({
                "upload": { "href": cdn::upload(shared, oid) },
                "verify": { "href": format!("{root}/verify") },
            });
        }
        answer
    };
    let objects: Vec<Value> = body["objects"].as_array().into_iter().flatten().map(object).collect();
    let transfer = if xet { "xet" } else { "basic" };
    let answer = json!({ "transfer": transfer, "objects": objects, "hash_algo": "sha256" });
    Ok(Answer::text(200, "application/vnd.git-lfs+json", answer.to_string()))
}

pub(crate) fn verify(shared: &Shared, call: &Call, body: &Bytes) -> Result<Answer, Answer> {
    let body = object(body)?;
    let mut store = shared.store();
    call.open(&mut store, Access::Write)?;
    let size = store.uploads.get(body["oid"].as_str().unwrap_or("")).map(|bytes| bytes.len() as u64);
    if size.is_some() && size == body["size"].as_u64() {
        return Ok(Answer::json(&json!({})));
    }
    Err(Answer::error(404, "", "Object does not exist"))
}

/// A token for the xet store, in JSON and again in headers: clients differ in where they look.
pub(crate) fn token(shared: &Shared, call: &Call, revision: &str, access: Access) -> Result<Answer, Answer> {
    let mut store = shared.store();
    if store.without_xet {
        return Err(Answer::error(404, "", "Sorry, we can't find the page you are looking for."));
    }
    let repository = call.open(&mut store, access)?;
    if repository.gated && access == Access::Read {
        return Err(refused(call));
    }
    repository.snapshot(revision).ok_or_else(|| no_revision(revision))?;
    let token = Cas::token(if access == Access::Read { "read" } else { "write" });
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (expiry, url) = (now + 3600, &shared.addresses.xet);
    let answer = Answer::json(&json!({ "accessToken": token, "exp": expiry, "casUrl": url }));
    Ok(answer
        .with("X-Xet-Access-Token", &token)
        .with("X-Xet-Token-Expiration", &expiry.to_string())
        .with("X-Xet-Cas-Url", url))
}
