//! What a repository holds, in the hub's JSON.

use std::collections::BTreeMap;

use axum::http::header::LINK;
use bytes::Bytes;
use serde_json::{Value, json};

use crate::answer::Answer;
use crate::call::{Access, Call, no_revision, object};
use crate::encoding::{encode, pairs, parameter, sha1};
use crate::repository::{Blob, Commit, DATE, Files, MAIN, Snapshot};
use crate::state::Shared;

/// The entries of one page of a tree. Far fewer than the hub's, so that pages are turned in tests.
const PAGE: usize = 50;

pub(crate) fn info(shared: &Shared, call: &Call, revision: Option<&str>) -> Result<Answer, Answer> {
    let mut store = shared.store();
    let repository = call.open(&mut store, Access::Read)?;
    let snapshot = repository.snapshot(revision.unwrap_or(MAIN));
    if let (None, Some(revision)) = (snapshot, revision) {
        return Err(no_revision(revision));
    }
    let blobs = parameter(call.parts.uri.query(), "blobs").is_some_and(|value| value != "false");
    let siblings: Vec<Value> = snapshot
        .iter()
        .flat_map(|snapshot| &snapshot.files)
        .map(|(path, blob)| sibling(path, blob, blobs))
        .collect();
    let mut info = json!({
        "_id": &sha1(call.id.as_bytes())[..24],
        "id": repository.id,
        "author": repository.id.split_once('/').map(|(author, _)| author),
        "sha": snapshot.map(|snapshot| &snapshot.commit.sha),
        "lastModified": DATE,
        "createdAt": DATE,
        "private": repository.private,
        "gated": if repository.gated { json!("manual") } else { json!(false) },
        "disabled": false,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": siblings,
    });
    if call.kind.prefix().is_empty() {
        info["modelId"] = json!(repository.id);
    }
    Ok(Answer::json(&info))
}

fn sibling(path: &str, blob: &Blob, blobs: bool) -> Value {
    let mut value = json!({ "rfilename": path });
    if blobs {
        value["size"] = json!(blob.bytes.len());
        value["blobId"] = json!(blob.git);
        if let Some(pointer) = &blob.pointer {
            value["lfs"] =
                json!({ "sha256": blob.sha256, "size": blob.bytes.len(), "pointerSize": pointer.len() });
        }
    }
    value
}

pub(crate) fn refs(shared: &Shared, call: &Call) -> Result<Answer, Answer> {
    let mut store = shared.store();
    let repository = call.open(&mut store, Access::Read)?;
    let branch = |(name, sha): (&String, &String)| json!({ "name": name, "ref": format!("refs/heads/{name}"), "targetCommit": sha });
    let branches: Vec<Value> = repository.branches.iter().map(branch).collect();
    Ok(Answer::json(&json!({ "branches": branches, "converts": [], "tags": [] })))
}

pub(crate) fn commits(shared: &Shared, call: &Call, revision: &str) -> Result<Answer, Answer> {
    let mut store = shared.store();
    let repository = call.open(&mut store, Access::Read)?;
    let head = repository.snapshot(revision).ok_or_else(|| no_revision(revision))?.commit.sha.clone();
    let end = repository.snapshots.iter().position(|snapshot| snapshot.commit.sha == head);
    let commit = |snapshot: &Snapshot| {
        let commit = &snapshot.commit;
        json!({ "id": commit.sha, "title": commit.title, "message": "", "authors": [], "date": DATE })
    };
    let commits: Vec<Value> =
        repository.snapshots.iter().take(end.map_or(0, |end| end + 1)).rev().map(commit).collect();
    Ok(Answer::json(&json!(commits)))
}

pub(crate) fn tree(shared: &Shared, call: &Call, revision: &str, path: &str) -> Result<Answer, Answer> {
    let query = call.parts.uri.query();
    let flag = |name: &str| {
        parameter(query, name).is_some_and(|value| matches!(value.to_lowercase().as_str(), "true" | "1"))
    };
    let (recursive, expand) = (flag("recursive"), flag("expand"));
    let number = |name: &str| parameter(query, name).and_then(|value| value.parse::<usize>().ok());
    let mut store = shared.store();
    let xet = !store.without_xet;
    let (most, link) =
        store.pages.clone().unwrap_or_else(|| (PAGE, "<{hub}{path}?{query}>; rel=\"next\"".to_owned()));
    let repository = call.open(&mut store, Access::Read)?;
    let snapshot = repository.snapshot(revision).ok_or_else(|| no_revision(revision))?;
    let path = path.trim_matches('/');
    let directory = if path.is_empty() { String::new() } else { format!("{path}/") };
    let entries = entries(snapshot, &directory, recursive, expand, xet);
    if entries.is_empty() && !directory.is_empty() {
        return Err(Answer::error(404, "EntryNotFound", &format!("{path} does not exist on {revision}"))
            .with("X-Repo-Commit", &snapshot.commit.sha));
    }
    let first = number("cursor").unwrap_or(0).min(entries.len());
    let last = (first + number("limit").unwrap_or(most).clamp(1, most)).min(entries.len());
    let answer = Answer::json(&json!(entries[first..last])).with("X-Repo-Commit", &snapshot.commit.sha);
    if last == entries.len() {
        return Ok(answer);
    }
    let query = format!("recursive={recursive}&expand={expand}&limit={}&cursor={last}", last - first);
    let next = link
        .replace("{hub}", &shared.addresses.hub)
        .replace("{elsewhere}", &shared.addresses.elsewhere)
        .replace("{path}", call.parts.uri.path())
        .replace("{query}", &query);
    Ok(answer.with(LINK.as_str(), &next))
}

fn entries(snapshot: &Snapshot, directory: &str, recursive: bool, expand: bool, xet: bool) -> Vec<Value> {
    let mut entries = BTreeMap::new();
    for (path, blob) in &snapshot.files {
        let Some(rest) = path.strip_prefix(directory) else { continue };
        let slashes: Vec<usize> = rest.match_indices('/').map(|(at, _)| directory.len() + at).collect();
        let shown = if recursive { slashes.len() } else { slashes.len().min(1) };
        for &at in &slashes[..shown] {
            let folder = &path[..at];
            entries
                .entry(folder.to_owned())
                .or_insert_with(|| folder_entry(folder, &snapshot.commit, expand));
        }
        if recursive || slashes.is_empty() {
            entries.insert(path.clone(), file_entry(path, blob, &snapshot.commit, expand, xet));
        }
    }
    entries.into_values().collect()
}

fn folder_entry(path: &str, commit: &Commit, expand: bool) -> Value {
    let mut value = json!({ "type": "directory", "oid": sha1(path.as_bytes()), "size": 0, "path": path });
    if expand {
        value["lastCommit"] = last(commit);
    }
    value
}

fn file_entry(path: &str, blob: &Blob, commit: &Commit, expand: bool, xet: bool) -> Value {
    let mut value = json!({ "type": "file", "oid": blob.git, "size": blob.bytes.len(), "path": path });
    if let Some(pointer) = &blob.pointer {
        value["lfs"] = json!({ "oid": blob.sha256, "size": blob.bytes.len(), "pointerSize": pointer.len() });
    }
    if let (true, Some(hash)) = (xet, &blob.xet) {
        value["xetHash"] = json!(hash);
    }
    if expand {
        value["lastCommit"] = last(commit);
        value["securityFileStatus"] = json!({ "status": "safe", "avScan": null, "pickleImportScan": null });
    }
    value
}

fn last(commit: &Commit) -> Value {
    json!({ "id": commit.sha, "title": commit.title, "date": DATE })
}

/// The entries of named paths; Rust asks with JSON and Python with a form.
pub(crate) fn paths(shared: &Shared, call: &Call, revision: &str, body: &Bytes) -> Result<Answer, Answer> {
    let (paths, expand) = if body.trim_ascii_start().starts_with(b"{") {
        let body = object(body)?;
        let paths = body["paths"].as_array().into_iter().flatten();
        let paths: Vec<String> = paths.filter_map(|path| path.as_str().map(str::to_owned)).collect();
        (paths, body["expand"].as_bool().unwrap_or(false))
    } else {
        let form = pairs(&String::from_utf8_lossy(body));
        let expand = form.iter().any(|(key, value)| key == "expand" && value.eq_ignore_ascii_case("true"));
        (form.into_iter().filter(|(key, _)| key == "paths").map(|(_, path)| path).collect(), expand)
    };
    let mut store = shared.store();
    let xet = !store.without_xet;
    let repository = call.open(&mut store, Access::Read)?;
    let snapshot = repository.snapshot(revision).ok_or_else(|| no_revision(revision))?;
    let entry = |path: &String| match snapshot.files.get(path) {
        Some(blob) => Some(file_entry(path, blob, &snapshot.commit, expand, xet)),
        None => holds(&snapshot.files, path).then(|| folder_entry(path, &snapshot.commit, expand)),
    };
    let entries: Vec<Value> = paths.iter().filter_map(entry).collect();
    Ok(Answer::json(&json!(entries)))
}

fn holds(files: &Files, folder: &str) -> bool {
    let folder = format!("{folder}/");
    files.keys().any(|path| path.starts_with(&folder))
}

/// The address of a commit's page.
pub(crate) fn page(shared: &Shared, call: &Call, sha: &str) -> String {
    format!("{}/{}{}/commit/{sha}", shared.addresses.hub, call.kind.prefix(), encode(&call.id))
}
