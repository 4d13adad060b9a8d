//! What the hub says, byte for byte, to a client that knows nothing.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use mlx_quant_hub_fixture::{Fault, Hub, Kind, Server};

struct Reply {
    status: u16,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

impl Reply {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).expect("the answer is JSON")
    }
}

/// One request on one connection, read until its end.
fn ask(method: &str, url: &str, headers: &[&str], body: &[u8]) -> Reply {
    let rest = url.strip_prefix("http://").expect("an address begins with its scheme");
    let (host, path) = rest.split_once('/').expect("an address has a path");
    let mut stream = TcpStream::connect(host).expect("the hub listens");
    stream.set_read_timeout(Some(Duration::from_millis(1500))).expect("a timeout can be set");
    let mut head = format!("{method} /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n");
    for header in headers {
        head.push_str(header);
        head.push_str("\r\n");
    }
    let _ = write!(head, "Content-Length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).expect("the hub reads");
    let mut bytes = Vec::new();
    // A connection that is cut or silent ends the reading as well; what came is kept.
    let _ = stream.read_to_end(&mut bytes);
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").expect("the answer has a head");
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|code| code.parse().ok());
    let headers = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
        .collect();
    Reply { status: status.expect("the answer has a status"), headers, body: bytes[end + 4..].to_vec() }
}

fn get(url: &str, headers: &[&str]) -> Reply {
    ask("GET", url, headers, b"")
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 7 % 251) as u8).collect()
}

fn hub() -> (Hub, String) {
    let hub = Hub::start();
    let files = vec![
        ("config.json".to_owned(), b"{\"a\": 1}\n".to_vec()),
        ("sub/model.safetensors".to_owned(), bytes(1000)),
    ];
    let sha = hub.add(Kind::Model, "org/name", files);
    (hub, sha)
}

fn location(hub: &Hub) -> String {
    let reply = get(&format!("{}/org/name/resolve/main/sub/model.safetensors", hub.endpoint()), &[]);
    assert_eq!(reply.status, 302);
    reply.header("location").to_owned()
}

#[test]
fn a_plain_file_is_served_by_the_hub() {
    let (hub, sha) = hub();
    let url = format!("{}/org/name/resolve/main/config.json", hub.endpoint());
    let head = ask("HEAD", &url, &[], b"");
    assert_eq!((head.status, head.header("content-length"), head.body.len()), (200, "9", 0));
    assert_eq!(head.header("x-repo-commit"), sha);
    let etag = head.header("etag").to_owned();
    assert_eq!(etag.len(), 42);
    assert_eq!(get(&url, &[]).body, b"{\"a\": 1}\n");
    let part = get(&url, &["Range: bytes=1-3"]);
    assert_eq!((part.status, part.header("content-range")), (206, "bytes 1-3/9"));
    assert_eq!(part.body, b"\"a\"");
    let past = get(&url, &["Range: bytes=9-"]);
    assert_eq!((past.status, past.header("content-range")), (416, "bytes */9"));
    let same = get(&url, &[&format!("If-None-Match: {etag}")]);
    assert_eq!((same.status, same.body.len()), (304, 0));
    let sent: Vec<u64> = hub.requests().iter().map(|request| request.sent).collect();
    assert_eq!(sent, [0, 9, 3, 0, 0]);
}

#[test]
fn a_large_file_is_served_by_the_cdn() {
    let (hub, sha) = hub();
    let url = format!("{}/org/name/resolve/{sha}/sub/model.safetensors", hub.endpoint());
    let head = ask("HEAD", &url, &[], b"");
    assert_eq!((head.status, head.header("x-linked-size")), (302, "1000"));
    assert_eq!((head.header("x-linked-etag").len(), head.header("x-xet-hash").len()), (66, 64));
    let location = head.header("location");
    assert!(!location.starts_with(hub.endpoint()));
    let all = get(location, &[]);
    assert_eq!((all.status, all.header("accept-ranges")), (200, "bytes"));
    assert_eq!(all.body, bytes(1000));
    let part = get(location, &["Range: bytes=990-"]);
    assert_eq!((part.status, part.body), (206, bytes(1000)[990..].to_vec()));
    assert_eq!(get(location, &["Authorization: Bearer leaked"]).status, 400);
    let last = hub.requests().pop().expect("requests are recorded");
    assert_eq!((last.server, last.authorization, last.token), (Server::Cdn, true, false));
    hub.offer_xet(false);
    assert_eq!(ask("HEAD", &url, &[], b"").header("x-xet-hash"), "");
}

#[test]
fn connections_break_on_request() {
    let (hub, _) = hub();
    let location = location(&hub);
    hub.fault("cdn GET", 1, Fault::Drop { after: 300 });
    let reply = get(&location, &[]);
    assert_eq!((reply.status, reply.header("content-length"), reply.body.len()), (200, "1000", 300));
    hub.fault("cdn GET", 1, Fault::Drop { after: 0 });
    assert_eq!(get(&location, &[]).body.len(), 0);
    hub.fault("model.safetensors", 1, Fault::Stall { after: 10 });
    let start = Instant::now();
    assert_eq!(get(&location, &["Range: bytes=500-"]).body, bytes(1000)[500..510]);
    assert!(start.elapsed() >= Duration::from_secs(1));
    assert_eq!(get(&location, &[]).body.len(), 1000);
    let sent: Vec<(u16, u64)> =
        hub.requests().iter().skip(1).map(|request| (request.status, request.sent)).collect();
    assert_eq!(sent, [(200, 300), (200, 0), (206, 10), (200, 1000)]);
}

#[test]
fn answers_are_wrong_on_request() {
    let (hub, _) = hub();
    let location = location(&hub);
    let plan = |fault| hub.fault("/xet-bridge/", 1, fault);
    plan(Fault::Short { by: 100 });
    let reply = get(&location, &[]);
    assert_eq!((reply.header("content-length"), reply.body.len()), ("900", 900));
    plan(Fault::Flip { at: 5 });
    let reply = get(&location, &[]).body;
    let wrong: Vec<usize> = (0..1000).filter(|&at| reply[at] != bytes(1000)[at]).collect();
    assert_eq!(wrong, [5]);
    plan(Fault::IgnoreRange);
    let reply = get(&location, &["Range: bytes=10-"]);
    assert_eq!((reply.status, reply.body.len()), (200, 1000));
    plan(Fault::NotSatisfiable);
    assert_eq!(get(&location, &["Range: bytes=10-"]).status, 416);
    plan(Fault::Html);
    assert!(get(&location, &[]).header("content-type").starts_with("text/html"));
    plan(Fault::Status { code: 503, retry_after: Some(7), body: "busy".to_owned() });
    let reply = get(&location, &[]);
    assert_eq!((reply.status, reply.header("retry-after"), &reply.body[..]), (503, "7", &b"busy"[..]));
    plan(Fault::Slow { bytes_per_second: 2000 });
    let start = Instant::now();
    assert_eq!(get(&location, &[]).body.len(), 1000);
    assert!(start.elapsed() >= Duration::from_millis(400));
}

#[test]
fn a_renamed_repository_redirects() {
    let (hub, sha) = hub();
    hub.rename("org/name", "org/other");
    for (path, new) in [
        ("/api/models/org/name/revision/main?x=1", "/api/models/org/other/revision/main?x=1"),
        ("/org/name/resolve/main/config.json", "/org/other/resolve/main/config.json"),
    ] {
        let reply = get(&format!("{}{path}", hub.endpoint()), &[]);
        assert_eq!((reply.status, reply.header("location")), (307, new));
    }
    let info = get(&format!("{}/api/models/org/other", hub.endpoint()), &[]).json();
    assert_eq!((info["id"].as_str(), info["sha"].as_str()), (Some("org/other"), Some(sha.as_str())));
}

#[test]
fn pages_are_turned() {
    let hub = Hub::start();
    let files = (0..120).map(|at| (format!("d/{at:03}.txt"), vec![b'x'; at])).collect();
    hub.add(Kind::Dataset, "name", files);
    let mut url = format!("{}/api/datasets/name/tree/main?recursive=true", hub.endpoint());
    let mut counts = Vec::new();
    loop {
        let reply = get(&url, &[]);
        counts.push(reply.json().as_array().expect("a page is a list").len());
        let Some((next, _)) = reply.header("link").trim_start_matches('<').split_once('>') else { break };
        next.clone_into(&mut url);
    }
    assert_eq!(counts, [50, 50, 21]);
    let top = get(&format!("{}/api/datasets/name/tree/main", hub.endpoint()), &[]).json();
    assert_eq!((top.as_array().map(Vec::len), top[0]["type"].as_str()), (Some(1), Some("directory")));
}

#[test]
fn who_may_not_is_told_so() {
    let (hub, sha) = hub();
    hub.accept("right");
    let (info, file) = ("/api/models/org/name", "/org/name/resolve/main/config.json");
    let code = |path: &str, token: &str| {
        let header = format!("Authorization: Bearer {token}");
        let headers: &[&str] = if token.is_empty() { &[] } else { &[&header] };
        let reply = get(&format!("{}{path}", hub.endpoint()), headers);
        (reply.status, reply.header("x-error-code").to_owned())
    };
    let error = |status: u16, code: &str| (status, code.to_owned());
    assert_eq!(code("/api/models/no/such", ""), error(401, "RepoNotFound"));
    assert_eq!(code("/api/models/no/such", "right"), error(404, "RepoNotFound"));
    assert_eq!(code("/api/models/org/name/revision/none", ""), error(404, "RevisionNotFound"));
    assert_eq!(code("/org/name/resolve/main/none", ""), error(404, "EntryNotFound"));
    assert_eq!(code(info, "wrong"), error(401, ""));
    assert_eq!(code("/api/whoami-v2", "right"), error(200, ""));
    hub.gate("org/name");
    assert_eq!(code(info, ""), error(200, ""));
    assert_eq!(code("/api/models/org/name/tree/main", ""), error(200, ""));
    assert_eq!(code(file, ""), error(401, "GatedRepo"));
    assert_eq!(code(file, "right"), error(403, "GatedRepo"));
    hub.hide("org/name");
    assert_eq!(code(info, ""), error(401, "RepoNotFound"));
    assert_eq!(code(info, "right"), error(200, ""));
    hub.branch("org/name", "feature/x", &sha);
    assert_eq!(code("/api/models/org/name/revision/feature%2Fx", "right"), error(200, ""));
    for odd in [
        "/",
        "//",
        "/api",
        "/api/models",
        "/api/models/%00%ff/%0a",
        "/%0d%0aX: y/a/resolve/b/c",
        "/a/resolve",
    ] {
        let status = code(&odd.replace(' ', "%20"), "").0;
        assert!(matches!(status, 401 | 404), "{odd}: {status}");
    }
}

#[test]
fn a_file_comes_in_by_the_basic_transfer() {
    let hub = Hub::start();
    hub.accept("right");
    let token = "Authorization: Bearer right";
    let root = hub.endpoint();
    let body = br#"{"name": "new", "organization": "org", "type": "dataset"}"#;
    assert_eq!(ask("POST", &format!("{root}/api/repos/create"), &[], body).status, 401);
    assert_eq!(ask("POST", &format!("{root}/api/repos/create"), &[token], body).status, 200);
    assert_eq!(ask("POST", &format!("{root}/api/repos/create"), &[token], body).status, 409);
    let oid = "315f5bdb76d078c43b8ac0064e4a0164612b1fce77c869345bfc94c75894edd3";
    let body = format!(r#"{{"transfers": ["basic"], "objects": [{{"oid": "{oid}", "size": 13}}]}}"#);
    let batch = format!("{root}/datasets/org/new.git/info/lfs/objects/batch");
    let reply = ask("POST", &batch, &[token], body.as_bytes()).json();
    assert_eq!(reply["transfer"], "basic");
    let lines = format!(
        "{}\n{}\n{}\n",
        r#"{"key": "header", "value": {"summary": "Two files"}}"#,
        r#"{"key": "file", "value": {"path": "a.txt", "content": "aGVsbG8=", "encoding": "base64"}}"#,
        format_args!(
            r#"{{"key": "lfsFile", "value": {{"path": "b.bin", "algo": "sha256", "oid": "{oid}", "size": 13}}}}"#
        ),
    );
    let commit = format!("{root}/api/datasets/org/new/commit/main");
    assert_eq!(ask("POST", &commit, &[token], lines.as_bytes()).status, 422);
    let upload = reply["objects"][0]["actions"]["upload"]["href"].as_str().expect("there is an address");
    assert_eq!(ask("PUT", upload, &[], b"Hello, world!").status, 200);
    let reply = ask("POST", &commit, &[token], lines.as_bytes());
    assert_eq!(reply.status, 200);
    let commits = hub.commits("org/new");
    assert_eq!(commits.len(), 2);
    assert_eq!(reply.json()["commitOid"], commits[1].sha.as_str());
    assert_eq!((commits[1].title.as_str(), commits[1].paths.len()), ("Two files", 2));
    let files = hub.files("datasets/org/new", "main");
    assert_eq!(
        (files["a.txt"].as_slice(), files["b.bin"].as_slice()),
        (&b"hello"[..], &b"Hello, world!"[..])
    );
}
