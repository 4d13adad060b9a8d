//! Commits that clients make.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::answer::Answer;
use crate::call::{Access, Call, no_revision};
use crate::card;
use crate::encoding::{base64, parameter};
use crate::listing::page;
use crate::repository::Blob;
use crate::state::Shared;

enum Change {
    Write(String, Arc<Blob>),
    Delete(String),
    DeleteFolder(String),
}

/// Makes a commit out of lines of JSON: a header, then one line for each change.
pub(crate) async fn commit(
    shared: &Shared,
    call: &Call<'_>,
    revision: &str,
    body: &Bytes,
) -> Result<Answer, Answer> {
    // Before anything is looked up: who may not write learns nothing about what is there.
    call.open(&mut shared.store(), Access::Write)?;
    if parameter(call.parts.uri.query(), "create_pr").is_some() {
        return Err(Answer::error(403, "", "Pull requests are not part of this hub"));
    }
    let mut header = Value::Null;
    let mut changes = Vec::new();
    for line in body.split(|&byte| byte == b'\n').filter(|line| !line.trim_ascii().is_empty()) {
        let line: Value = serde_json::from_slice(line)
            .map_err(|error| Answer::error(400, "", &format!("Invalid JSON: {error}")))?;
        let value = &line["value"];
        if line["key"] == "header" {
            header = value.clone();
            continue;
        }
        changes.push(change(shared, line["key"].as_str().unwrap_or(""), value).await?);
    }
    let title = header["summary"].as_str().filter(|title| !title.is_empty());
    let title = title.ok_or_else(|| Answer::error(400, "", "\"summary\" is required"))?;
    let mut store = shared.store();
    let repository = call.open(&mut store, Access::Write)?;
    let branch = revision.strip_prefix("refs/heads/").unwrap_or(revision);
    let Some(head) = repository.branches.get(branch) else { return Err(no_revision(revision)) };
    if header["parentCommit"].as_str().is_some_and(|parent| parent != head) {
        let message = "A commit has happened since. Please refresh and try again.";
        return Err(Answer::error(412, "", message));
    }
    let mut files = repository.snapshot(branch).ok_or_else(|| no_revision(revision))?.files.clone();
    let mut paths = Vec::new();
    for change in changes {
        match change {
            Change::Write(path, blob) => {
                paths.push(path.clone());
                files.insert(path, blob);
            }
            Change::Delete(path) => {
                if files.remove(&path).is_none() {
                    let message = format!("A file with the name \"{path}\" does not exist");
                    return Err(Answer::error(404, "EntryNotFound", &message));
                }
                paths.push(path);
            }
            Change::DeleteFolder(folder) => {
                let folder = format!("{}/", folder.trim_end_matches('/'));
                paths.extend(files.keys().filter(|path| path.starts_with(&folder)).cloned());
                files.retain(|path, _| !path.starts_with(&folder));
            }
        }
    }
    let sha = repository.commit(branch, title, paths, files);
    Ok(Answer::json(&json!({
        "success": true,
        "commitUrl": page(shared, call, &sha),
        "commitOid": sha,
        "commitMessage": title,
        "hookOutput": "",
    })))
}

async fn change(shared: &Shared, key: &str, value: &Value) -> Result<Change, Answer> {
    let path = value["path"].as_str().unwrap_or("").to_owned();
    let odd = path.split('/').any(|part| matches!(part, "" | "." | "..")) && key != "deletedFolder";
    if odd {
        return Err(Answer::error(400, "", &format!("Invalid path: {path}")));
    }
    match key {
        "file" => {
            let content = value["content"].as_str().unwrap_or("");
            let bytes = match value["encoding"].as_str() {
                Some("base64") => base64(content)
                    .ok_or_else(|| Answer::error(400, "", &format!("The content of {path} is not base64")))?,
                _ => content.as_bytes().to_vec(),
            };
            card::check(&shared.cards, &path, &bytes)?;
            Ok(Change::Write(path, Arc::new(Blob::plain(Bytes::from(bytes)))))
        }
        "lfsFile" => {
            let digest = value["oid"].as_str().unwrap_or("");
            let blob = large(shared, digest).await.ok_or_else(|| {
                let message = format!("The LFS pointer of {path} points to {digest}, which was not uploaded");
                Answer::error(422, "", &message)
            })?;
            if value["size"].as_u64().is_some_and(|size| size != blob.bytes.len() as u64) {
                return Err(Answer::error(422, "", &format!("The size of {path} is not that of {digest}")));
            }
            Ok(Change::Write(path, blob))
        }
        "deletedFile" => Ok(Change::Delete(path)),
        "deletedFolder" => Ok(Change::DeleteFolder(path)),
        other => Err(Answer::error(400, "", &format!("Unknown operation: {other}"))),
    }
}

/// The content with this SHA-256, by whichever way it came.
async fn large(shared: &Shared, digest: &str) -> Option<Arc<Blob>> {
    let (known, upload) = {
        let store = shared.store();
        (store.large(digest), store.uploads.get(digest).cloned())
    };
    if known.is_some() {
        return known;
    }
    if let Some(bytes) = upload {
        // The hub moves such files into the xet store, too.
        let hash = shared.cas.put(bytes.clone()).await.ok();
        return Some(Arc::new(Blob::large(bytes, hash)));
    }
    let (bytes, hash) = shared.cas.find(digest).await?;
    Some(Arc::new(Blob::large(bytes, Some(hash))))
}
