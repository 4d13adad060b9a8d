//! What is in a snapshot, page by page.
//!
//! hf-hub goes wherever a page's `Link` leads, with the token, and ends where it cannot read one. Here only the query of the next
//! page is taken from it: the page is asked of the endpoint, whatever host, path or form the link has.

use std::collections::HashSet;

use mlx_quant::Observer;
use reqwest::Url;
use reqwest::header::{HeaderMap, LINK};
use serde::Deserialize;

use super::explain::{Problem, Trouble};
use super::{Hub, RemoteFile, Snapshot, id, is_hash};

/// The hub puts a thousand entries on a page, and advises against more than a hundred thousand files.
const MOST_PAGES: usize = 10_000;
/// A thousand entries take less than one.
const MOST_PAGE_BYTES: usize = 32 << 20;
const MOST_BYTES: usize = 1 << 30;

/// What a page says of a file or folder.
#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    oid: String,
    #[serde(default)]
    size: u64,
    lfs: Option<Large>,
}

/// What it says beyond that of a file of which only a pointer is in git.
#[derive(Deserialize)]
struct Large {
    size: Option<u64>,
}

/// One page.
struct Page {
    entries: Vec<Entry>,
    bytes: usize,
    /// The query of the next one.
    next: Option<String>,
}

impl Hub {
    /// All files of a snapshot that can be on this machine; hashes that are none are refused.
    pub(super) fn list(
        &self,
        snapshot: &Snapshot,
        observer: &dyn Observer,
    ) -> Result<Vec<RemoteFile>, Trouble> {
        let (mut files, mut bytes) = (Vec::new(), 0);
        let (mut query, mut seen) = (String::new(), HashSet::new());
        loop {
            let page = self.ask(&snapshot.address, observer, || self.page(snapshot, &query))?;
            for entry in page.entries {
                files.extend(self.file(snapshot, entry)?);
            }
            bytes += page.bytes;
            seen.insert(query);
            match page.next {
                None => break,
                Some(next) if seen.contains(&next) => return Err(self.endless(snapshot, "comes round again")),
                Some(_) if seen.len() >= MOST_PAGES || bytes > MOST_BYTES => {
                    return Err(self.endless(snapshot, "does not end"));
                }
                Some(next) => query = next,
            }
        }
        files.sort_by(|left: &RemoteFile, right| left.path.cmp(&right.path));
        files.dedup();
        match files.windows(2).find(|two| two[0].path == two[1].path) {
            Some(two) => Err(Trouble::Refused(format!(
                "{} lists two files {:?}; hint: do not use this repository",
                snapshot.address.id(),
                two[0].path
            ))),
            None => Ok(files),
        }
    }

    fn endless(&self, snapshot: &Snapshot, how: &str) -> Trouble {
        let (endpoint, id) = (&self.speaker.endpoint, snapshot.address.id());
        Trouble::Failed(format!("{endpoint}: the listing of {id} {how}; hint: is HF_ENDPOINT right?"))
    }

    /// One request.
    fn page(&self, snapshot: &Snapshot, query: &str) -> Result<Page, Problem> {
        let mut url = self.api_url(snapshot, ["tree", &snapshot.commit])?;
        let all =
            if query.is_empty() { "recursive=true".to_owned() } else { format!("recursive=true&{query}") };
        url.set_query(Some(&all));
        let mut answer = self.answer(self.direct.get(url))?;
        let next = next_query(answer.headers())?;
        let body = self.body(&mut answer, MOST_PAGE_BYTES)?;
        Ok(Page { entries: serde_json::from_slice(&body)?, bytes: body.len(), next })
    }

    fn file(&self, snapshot: &Snapshot, entry: Entry) -> Result<Option<RemoteFile>, Trouble> {
        // A name that cannot be on this machine is none of a file that is needed.
        if entry.kind != "file" || id::check_path(&entry.path).is_err() {
            return Ok(None);
        }
        if !is_hash(&entry.oid) {
            return Err(Trouble::Refused(self.speaker.scrub(&format!(
                "{} lists a file {:?} called {:?}, which cannot be; hint: do not use this repository",
                snapshot.address.id(),
                entry.path,
                entry.oid
            ))));
        }
        let (large, size) = (entry.lfs.is_some(), entry.lfs.and_then(|lfs| lfs.size).unwrap_or(entry.size));
        Ok(Some(RemoteFile { path: entry.path, size, id: entry.oid, large }))
    }
}

/// The query of the next page, without what is asked for anyway; nothing if this page is the last one.
fn next_query(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let mut links = headers.get_all(LINK).iter().map(|header| String::from_utf8_lossy(header.as_bytes()));
    let Some(target) = links.find_map(|header| next_target(&header).map(str::to_owned)) else {
        return Ok(None);
    };
    let whole = target.split('#').next().and_then(|target| target.split_once('?'));
    let query =
        whole.map_or("", |(_, query)| query).split('&').filter(|pair| !pair.is_empty() && !is_ours(pair));
    let query = query.collect::<Vec<_>>().join("&");
    if query.is_empty() {
        return Err(Problem::malformed("a next page that is the first one"));
    }
    Ok(Some(query))
}

/// Whether a part of a query is the one that every page is asked for with.
fn is_ours(pair: &str) -> bool {
    let mut url = Url::parse("http://x").ok();
    url.as_mut().is_some_and(|url| {
        url.set_query(Some(pair));
        url.query_pairs().any(|(name, _)| name == "recursive")
    })
}

/// The target of the first link in a `Link` header (RFC 8288) whose relation is `next`.
fn next_target(header: &str) -> Option<&str> {
    let mut rest = header;
    loop {
        let (_, after) = rest.split_once('<')?;
        let (target, after) = after.split_once('>')?;
        let (parameters, after) = until(after, ',');
        if relation(parameters).is_some_and(|relation| is_next(&relation)) {
            return Some(target.trim());
        }
        rest = after;
    }
}

/// Relations are several words, in any case.
fn is_next(relation: &str) -> bool {
    relation.split_whitespace().any(|word| word.eq_ignore_ascii_case("next"))
}

/// The value of the first parameter `rel`.
fn relation(parameters: &str) -> Option<String> {
    let mut rest = parameters;
    while !rest.is_empty() {
        let (parameter, after) = until(rest, ';');
        rest = after;
        let Some((name, value)) = parameter.split_once('=') else { continue };
        if name.trim().eq_ignore_ascii_case("rel") {
            let value = value.trim();
            let quoted = value.strip_prefix('"').map(|value| value.strip_suffix('"').unwrap_or(value));
            return Some(quoted.unwrap_or(value.trim_matches('\'')).replace('\\', ""));
        }
    }
    None
}

/// What comes before a sign that is not in quotes, and what comes after it.
fn until(text: &str, sign: char) -> (&str, &str) {
    let (mut quoted, mut escaped) = (false, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            c if c == sign && !quoted => return (&text[..at], &text[at + sign.len_utf8()..]),
            _ => {}
        }
    }
    (text, "")
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test panics to fail")]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    fn next(links: &[&str]) -> Result<Option<String>, Problem> {
        let mut headers = HeaderMap::new();
        for link in links {
            headers.append(LINK, HeaderValue::from_bytes(link.as_bytes()).unwrap());
        }
        next_query(&headers)
    }

    /// Whatever the form of the link and wherever it leads, only the query counts.
    #[test]
    fn the_next_page_is_found_in_links_of_any_form() {
        for link in [
            r#"<https://huggingface.co/api/models/a/b/tree/c?recursive=true&cursor=x%3D&limit=5>; rel="next""#,
            r#"<https://evil.example/?cursor=x%3D&limit=5>; rel="next""#,
            r#"<https://user:password@evil.example/?cursor=x%3D&limit=5>; rel="next""#,
            r#"<//evil.example/a?cursor=x%3D&limit=5>; rel="next""#,
            r"</api/models/a/b/tree/c?cursor=x%3D&limit=5>; rel=next",
            r"<tree/c?cursor=x%3D&limit=5&recursive=false> ; Rel = NEXT",
            r"<?cursor=x%3D&limit=5#top>;rel='next'",
            r#"<?cursor=x%3D&&limit=5&%72ecursive=0>; title="a, b; rel=\"prev\""; rel="start next""#,
            r#"<?cursor=p>; rel="prev", <?cursor=x%3D&limit=5>; rel="next", <?cursor=l>; rel=last"#,
            r"<http://a/?x=1,2;3>; rel=prev,<?cursor=x%3D&limit=5>; hreflang=de; rel=next; rel=prev",
        ] {
            assert_eq!(next(&[link]).unwrap().as_deref(), Some("cursor=x%3D&limit=5"), "{link}");
        }
        let two = ["<?cursor=p>; rel=prev", "<?cursor=x%3D&limit=5>; rel=next"];
        assert_eq!(next(&two).unwrap().as_deref(), Some("cursor=x%3D&limit=5"));
    }

    #[test]
    fn the_last_page_has_no_next_one() {
        for links in [
            &[][..],
            &[r#"<?cursor=x>; rel="prev""#],
            &[r#"<?cursor=x>; rel="nextish""#],
            &[r#"<?cursor=x>; title="rel=next""#],
            &[r"<?cursor=x>; rel=prev; rel=next"],
            &["?cursor=x; rel=next", "<?cursor=x"],
            &["<?cursor=x>"],
        ] {
            assert_eq!(next(links).unwrap(), None, "{links:?}");
        }
    }

    #[test]
    fn a_next_page_without_a_name_is_an_error() {
        for link in
            ["<>; rel=next", "<https://evil.example/a>; rel=next", "</x?recursive=true#cursor=y>; rel=next"]
        {
            assert!(next(&[link]).is_err(), "{link}");
        }
    }
}
