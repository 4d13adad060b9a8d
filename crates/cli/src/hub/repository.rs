//! A model's or a dataset's repository, as hf-hub types them. (Its type for either, `RepoTypeAny`, asks for the files of datasets
//! as if they were models', in 1.0.)

use bytes::Bytes;
use futures_util::Stream;
use hf_hub::progress::Progress;
use hf_hub::repository::{CommitInfo, CommitOperation, RepoTypeDataset, RepoTypeModel};
use hf_hub::{HFClient, HFError, HFRepository};

use super::id::Address;
use super::kind::Kind;

/// Contents as they come.
pub(super) type ByteStream = Box<dyn Stream<Item = Result<Bytes, HFError>> + Send + Unpin>;

/// A repository.
#[derive(Clone)]
pub(super) enum Repository {
    Model(HFRepository<RepoTypeModel>),
    Dataset(HFRepository<RepoTypeDataset>),
}

/// The same call of either type.
macro_rules! either {
    ($repository:expr, $name:ident => $call:expr) => {
        match $repository {
            Repository::Model($name) => $call,
            Repository::Dataset($name) => $call,
        }
    };
}

impl Repository {
    pub(super) fn new(client: &HFClient, kind: Kind, address: &Address) -> Self {
        let (owner, name) = (address.owner.clone(), address.name.clone());
        match kind {
            Kind::Model => Self::Model(client.model(owner, name)),
            Kind::Dataset => Self::Dataset(client.dataset(owner, name)),
        }
    }

    /// The commit of a revision, and the id under which the hub knows the repository now.
    pub(super) async fn commit_of(&self, revision: &str) -> Result<(String, String), HFError> {
        let (commit, id) = match self {
            Self::Model(repository) => {
                let info = repository.info().revision(revision).send().await?;
                (info.sha, info.id)
            }
            Self::Dataset(repository) => {
                let info = repository.info().revision(revision).send().await?;
                (info.sha, info.id)
            }
        };
        let missing = || HFError::malformed_response("the answer names no commit");
        Ok((commit.ok_or_else(missing)?, id))
    }

    /// Bytes `range` of a file, or all of it, as they come.
    pub(super) async fn stream(
        &self,
        commit: &str,
        path: &str,
        range: Option<std::ops::Range<u64>>,
    ) -> Result<ByteStream, HFError> {
        let (_, stream) = either!(self, repository => {
            let stream = repository.download_file_stream().filename(path).revision(commit);
            stream.maybe_range(range).send().await?
        });
        Ok(stream)
    }

    /// Whether there is such a file, in the hub's words.
    pub(super) async fn look(&self, commit: &str, path: &str) -> Result<(), HFError> {
        either!(self, repository => repository.get_file_metadata().filepath(path).revision(commit).send().await?);
        Ok(())
    }

    pub(super) async fn commit(
        &self,
        operations: Vec<CommitOperation>,
        message: String,
        parent: String,
        progress: Progress,
    ) -> Result<CommitInfo, HFError> {
        either!(self, repository => {
            let commit = repository.create_commit().operations(operations).commit_message(message);
            commit.parent_commit(parent).progress(progress).send().await
        })
    }
}
