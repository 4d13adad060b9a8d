//! The xet store: content that is kept in chunks, by their hashes.
//!
//! The store itself is the simulation that comes with xet's client crate; a second implementation of its
//! protocol would only be tested against itself. It listens on a port that nobody is told, and the listener that
//! clients know passes requests on to it, so that they can be recorded and made to fail. The `Host` header goes
//! through unchanged, from which the simulation makes the addresses of chunks: those lead through here as well.

use std::collections::HashMap;
use std::net::TcpListener;
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::{Body, to_bytes};
use axum::extract::Request;
use bytes::Bytes;
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, TRANSFER_ENCODING};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use xet_client::cas_client::{
    Client, DeletionControlableClient, DirectAccessClient, LocalServer, MemoryClient,
};
use xet_core_structures::merklehash::{MerkleHash, file_hash};
use xet_core_structures::metadata_shard::file_structs::{
    FileDataSequenceEntry, FileDataSequenceHeader, MDBFileInfo,
};
use xet_core_structures::metadata_shard::shard_in_memory::MDBInMemoryShard;
use xet_core_structures::xorb_object::{CompressionScheme, RawXorbData, SerializedXorbObject};
use xet_data::deduplication::Chunker;
use xet_runtime::core::XetContext;

use crate::answer::Answer;
use crate::encoding::sha256;

/// The chunks of one object of the store: with chunks of 128 KiB at most, half of what an object may hold.
const CHUNKS: usize = 256;
const PREFIX: &str = "xet-";

type Failure = Box<dyn std::error::Error + Send + Sync>;

pub(crate) struct Cas {
    client: Arc<MemoryClient>,
    address: String,
    digests: Mutex<HashMap<MerkleHash, String>>,
}

impl Cas {
    /// Starts the simulation; to be called within a runtime.
    pub(crate) fn start(listener: TcpListener, stopped: oneshot::Receiver<()>) -> Self {
        let context = XetContext::default().expect("xet finds a runtime");
        let client = MemoryClient::new(context);
        let address = listener.local_addr().expect("a bound listener has an address");
        let server = LocalServer::from_client(
            client.clone(),
            Some(client.clone()),
            address.ip().to_string(),
            address.port(),
        );
        tokio::spawn(async move {
            if let Ok(listener) = tokio::net::TcpListener::from_std(listener) {
                let _ = server.serve_until_stopped(listener, stopped).await;
            }
        });
        Self { client, address: address.to_string(), digests: Mutex::default() }
    }

    /// A token for the store.
    pub(crate) fn token(access: &str) -> String {
        format!("{PREFIX}{access}-token")
    }

    /// Whether a token is one of the store's.
    pub(crate) fn issued(token: &str) -> bool {
        token.starts_with(PREFIX)
    }

    /// Puts a file in, cut as clients cut it, and gives its hash.
    pub(crate) async fn put(&self, bytes: Bytes) -> Result<String, Failure> {
        let digest = sha256(&bytes);
        let chunks = Chunker::default().next_block_bytes(&bytes, true);
        let lengths: Vec<_> = chunks.iter().map(|chunk| (chunk.hash, chunk.data.len() as u64)).collect();
        let hash = file_hash(&lengths);
        let mut shard = MDBInMemoryShard::default();
        let mut segments = Vec::new();
        for chunks in chunks.chunks(CHUNKS) {
            let xorb = RawXorbData::from_chunks(chunks, vec![0]);
            let (name, size) = (xorb.hash(), xorb.num_bytes());
            shard.add_xorb_block(xorb.xorb_info.clone())?;
            segments.push(FileDataSequenceEntry::new(name, size, 0, chunks.len()));
            let object =
                SerializedXorbObject::from_xorb_with_compression(xorb, CompressionScheme::None, false, 1)?;
            let permit = self.client.acquire_upload_permit().await?;
            self.client.upload_xorb("default", object, None, permit).await?;
        }
        shard.add_file_reconstruction_info(MDBFileInfo {
            metadata: FileDataSequenceHeader::new(hash, segments.len(), false, false),
            segments,
            verification: Vec::new(),
            metadata_ext: None,
        })?;
        let permit = self.client.acquire_upload_permit().await?;
        self.client.upload_shard(shard.to_bytes()?.into(), permit, None).await?;
        self.digests.lock().unwrap_or_else(PoisonError::into_inner).insert(hash, digest);
        Ok(hash.hex())
    }

    /// The file with this SHA-256, and its hash, among all that the store has got.
    ///
    /// The store does not know SHA-256, and what clients say it is need not be true: each file is read once.
    pub(crate) async fn find(&self, digest: &str) -> Option<(Bytes, String)> {
        for (hash, _) in self.client.list_file_shard_entries().await.ok()? {
            let known = self.digests.lock().unwrap_or_else(PoisonError::into_inner).get(&hash).cloned();
            if known.as_deref().is_some_and(|known| known != digest) {
                continue;
            }
            let Ok(bytes) = self.client.get_file_data(&hash, None).await else { continue };
            let found = known.unwrap_or_else(|| sha256(&bytes));
            let wanted = found == digest;
            self.digests.lock().unwrap_or_else(PoisonError::into_inner).insert(hash, found);
            if wanted {
                return Some((bytes, hash.hex()));
            }
        }
        None
    }

    /// Passes a request on to the simulation.
    pub(crate) async fn forward(&self, request: Request) -> Answer {
        self.exchange(request).await.unwrap_or_else(|error| Answer::error(502, "", &error.to_string()))
    }

    async fn exchange(&self, mut request: Request) -> Result<Answer, Failure> {
        let stream = TcpStream::connect(&self.address).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        request.headers_mut().remove(CONNECTION);
        request.headers_mut().remove(TRANSFER_ENCODING);
        let (parts, body) = sender.send_request(request).await?.into_parts();
        let body = to_bytes(Body::new(body), usize::MAX).await?;
        connection.abort();
        let mut headers = parts.headers;
        headers.remove(CONNECTION);
        headers.remove(TRANSFER_ENCODING);
        Ok(Answer { status: parts.status, headers, body })
    }
}
