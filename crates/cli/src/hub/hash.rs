//! The hashes by which the hub knows contents.
//!
//! The listing has git's hash of each file. Of a large one that is only the hash of its pointer, and what hf-hub 1.0 has beyond it is
//! lost (it reads `lfs.sha256` where the hub writes `lfs.oid`, and asks for metadata through redirects, behind which it is gone). So the
//! hub is asked as huggingface_hub does it (`file_download.py`, `get_hf_file_metadata`): a HEAD that stops at the redirect to the CDN.

use hf_hub::HFError;
use mlx_quant::Observer;
use reqwest::redirect::Policy;
use reqwest::{Client, Url};

use super::explain::Trouble;
use super::{Hub, Kind, RemoteFile, Snapshot, is_hash};

/// A client that stays on the host that it asks: it follows renames there, but not to the CDN.
pub(super) fn client(user_agent: &str) -> reqwest::Result<Client> {
    let policy = Policy::custom(|attempt| {
        let origin = attempt.previous().last().map(Url::origin);
        if origin == Some(attempt.url().origin()) && attempt.previous().len() < 10 {
            attempt.follow()
        } else {
            attempt.stop()
        }
    });
    Client::builder().user_agent(user_agent).redirect(policy).build()
}

impl Hub {
    /// The hash of a file's content, which is its ETag and the name of its blob in the cache: SHA-256 of large files, git's SHA-1
    /// of others.
    pub(super) fn hash(
        &self,
        snapshot: &Snapshot,
        file: &RemoteFile,
        observer: &dyn Observer,
    ) -> Result<String, Trouble> {
        if !file.large {
            return Ok(file.id.clone());
        }
        let (hash, size) =
            self.ask(&snapshot.address, observer, || self.wait(self.linked(snapshot, &file.path)))?;
        if !is_hash(&hash) || size.is_some_and(|size| size != file.size) {
            return Err(Trouble::Failed(format!(
                "{}/{}: the hub contradicts itself on its size or hash; hint: try again later, or tell the repository's owner",
                snapshot.address.id(),
                file.path
            )));
        }
        Ok(hash)
    }

    /// Hash and size of a large file.
    async fn linked(&self, snapshot: &Snapshot, path: &str) -> Result<(String, Option<u64>), HFError> {
        let mut url = Url::parse(self.client.endpoint())?;
        let malformed = |what: &str| HFError::malformed_response(format!("{what} for {path}"));
        url.path_segments_mut().map_err(|()| malformed("no address"))?.pop_if_empty().extend(
            (snapshot.kind == Kind::Dataset)
                .then_some("datasets")
                .into_iter()
                .chain([&*snapshot.address.owner, &*snapshot.address.name, "resolve", &*snapshot.commit])
                .chain(path.split('/')),
        );
        let mut request = self.direct.head(url);
        if let Some(token) = &self.speaker.secret {
            request = request.bearer_auth(token);
        }
        let answer = request.send().await?;
        if !answer.status().is_success() && !answer.status().is_redirection() {
            // Says the same in hf-hub's words.
            snapshot.repository.look(&snapshot.commit, path).await?;
            return Err(HFError::Other(format!("the hub answered {} for {path}", answer.status())));
        }
        let header = |name: &str| answer.headers().get(name).and_then(|value| value.to_str().ok());
        let tag = header("x-linked-etag").or_else(|| header("etag")).ok_or_else(|| malformed("no ETag"))?;
        let size = header("x-linked-size").and_then(|size| size.parse().ok());
        Ok((tag.trim_start_matches("W/").trim_matches('"').to_owned(), size))
    }
}
