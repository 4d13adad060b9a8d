//! The hashes by which the hub knows contents.
//!
//! The listing has git's hash of each file, of a large one only the hash of its pointer. So the hub is asked as huggingface_hub does it
//! (`file_download.py`, `get_hf_file_metadata`): a HEAD that stops at the redirect to the CDN. (hf-hub 1.0 asks through redirects, behind
//! which the hash is gone.)

use mlx_quant::Observer;

use super::explain::{Problem, Trouble};
use super::{Hub, RemoteFile, Snapshot, is_hash};

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
        let (hash, size) = self.ask(&snapshot.address, observer, || self.linked(snapshot, &file.path))?;
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
    fn linked(&self, snapshot: &Snapshot, path: &str) -> Result<(String, Option<u64>), Problem> {
        let answer = self.ask_once(self.direct.head(self.file_url(snapshot, path)?))?;
        if !answer.status().is_success() && !answer.status().is_redirection() {
            // Says the same in hf-hub's words.
            self.wait(snapshot.repository.look(&snapshot.commit, path))?;
            return Err(Problem::other(format!("the hub answered {} for {path}", answer.status())));
        }
        let header = |name: &str| answer.headers().get(name).and_then(|value| value.to_str().ok());
        let tag = header("x-linked-etag").or_else(|| header("etag"));
        let tag = tag.ok_or_else(|| Problem::malformed(format!("no ETag for {path}")))?;
        let size = header("x-linked-size").and_then(|size| size.parse().ok());
        Ok((tag.trim_start_matches("W/").trim_matches('"').to_owned(), size))
    }
}
