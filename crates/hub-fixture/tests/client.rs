//! The hub as the crate hf-hub sees it.

use std::fs;
use std::path::Path;

use hf_hub::{HFClient, HFError, RepoTypeModel};
use mlx_quant_hub_fixture::{Fault, Hub, Kind, Server};
use tokio::runtime::Runtime;

fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..length).map(|_| next()).collect()
}

fn client(hub: &Hub, cache: &Path, token: &str) -> HFClient {
    let builder = HFClient::builder().endpoint(hub.endpoint()).cache_dir(cache).token(token);
    builder.build().expect("a client can be built")
}

#[test]
fn files_go_up_and_come_down() {
    let hub = Hub::start();
    hub.accept("right");
    let directory = tempfile::tempdir().expect("a directory can be made");
    let folder = directory.path().join("upload");
    let weights = noise(3_000_000);
    fs::create_dir_all(folder.join("sub")).expect("a directory can be made");
    fs::write(folder.join("config.json"), b"{}").expect("a file can be written");
    fs::write(folder.join("sub/model.safetensors"), &weights).expect("a file can be written");

    let client = client(&hub, &directory.path().join("cache"), "right");
    Runtime::new().expect("a runtime can be started").block_on(async {
        client
            .create_repository()
            .repo_id("org/new")
            .repo_type(RepoTypeModel)
            .send()
            .await
            .expect("it is made");
        let model = client.model("org", "new");
        let info = model
            .upload_folder()
            .folder_path(&folder)
            .commit_message("Quantized")
            .send()
            .await
            .expect("the folder goes up");
        let commits = hub.commits("org/new");
        assert_eq!(commits.len(), 2);
        assert_eq!(
            (commits[1].title.as_str(), Some(&commits[1].sha)),
            ("Quantized", info.commit_oid.as_ref())
        );
        let mut paths = commits[1].paths.clone();
        paths.sort();
        assert_eq!(paths, ["config.json", "sub/model.safetensors"]);
        assert!(hub.files("org/new", "main")["sub/model.safetensors"] == weights);

        for path in ["config.json", "sub/model.safetensors"] {
            let file = model.download_file().filename(path).send().await.expect("it comes down");
            assert!(fs::read(file).expect("it is a file") == hub.files("org/new", "main")[path]);
        }
    });
    let leaked = hub.requests().into_iter().find(|request| request.server != Server::Hub && request.token);
    assert_eq!(leaked, None);
    assert!(hub.requests().iter().any(|request| request.server == Server::Xet && request.method == "POST"));
}

#[test]
fn what_was_added_comes_down_by_either_way() {
    let hub = Hub::start();
    let weights = noise(2_000_000);
    let files = vec![("model.safetensors".to_owned(), weights.clone())];
    hub.add(Kind::Model, "org/name", files);
    hub.rename("org/name", "org/other");
    let runtime = Runtime::new().expect("a runtime can be started");
    for xet in [true, false] {
        hub.offer_xet(xet);
        let directory = tempfile::tempdir().expect("a directory can be made");
        let builder = HFClient::builder().endpoint(hub.endpoint()).cache_dir(directory.path());
        let client = builder.build().expect("a client can be built");
        let path = runtime.block_on(async {
            client.model("org", "name").download_file().filename("model.safetensors").send().await
        });
        assert!(fs::read(path.expect("it comes down")).expect("it is a file") == weights);
        let last = hub.requests().pop().expect("requests are recorded");
        assert_eq!(last.server, if xet { Server::Xet } else { Server::Cdn });
    }
}

#[test]
fn faults_reach_the_client() {
    let hub = Hub::start();
    hub.add(Kind::Model, "org/name", vec![("model.safetensors".to_owned(), noise(200_000))]);
    hub.offer_xet(false);
    let directory = tempfile::tempdir().expect("a directory can be made");
    let client = HFClient::builder().endpoint(hub.endpoint()).cache_dir(directory.path()).build();
    let client = client.expect("a client can be built");
    hub.fault("cdn GET", 1, Fault::Drop { after: 100_000 });
    let result = Runtime::new().expect("a runtime can be started").block_on(async {
        client.model("org", "name").download_file().filename("model.safetensors").send().await
    });
    assert!(matches!(result, Err(HFError::Request { .. })), "{result:?}");
}

#[test]
fn the_xet_store_fails_on_request() {
    let hub = Hub::start();
    let weights = noise(150_000);
    hub.add(Kind::Model, "org/name", vec![("model.safetensors".to_owned(), weights.clone())]);
    hub.fault("xet GET /v1/fetch_term", 1, Fault::Drop { after: 1000 });
    let directory = tempfile::tempdir().expect("a directory can be made");
    let client = HFClient::builder().endpoint(hub.endpoint()).cache_dir(directory.path()).build();
    let client = client.expect("a client can be built");
    let path = Runtime::new().expect("a runtime can be started").block_on(async {
        client.model("org", "name").download_file().filename("model.safetensors").send().await
    });
    assert!(fs::read(path.expect("it comes down")).expect("it is a file") == weights);
    let requests = hub.requests();
    let fetches: Vec<u64> = requests
        .iter()
        .filter(|request| request.path.starts_with("/v1/fetch_term"))
        .map(|request| request.sent)
        .collect();
    assert_eq!((fetches.len(), fetches[0]), (2, 1000), "{requests:?}");
}

#[test]
fn a_hub_lives_within_a_runtime() {
    Runtime::new().expect("a runtime can be started").block_on(async {
        let hub = Hub::start();
        hub.add(Kind::Dataset, "org/data", vec![("a.parquet".to_owned(), noise(1000))]);
        let directory = tempfile::tempdir().expect("a directory can be made");
        let client = HFClient::builder().endpoint(hub.endpoint()).cache_dir(directory.path()).build();
        let client = client.expect("a client can be built");
        let file = client.dataset("org", "data").download_file().filename("a.parquet").send().await;
        assert!(fs::read(file.expect("it comes down")).expect("it is a file") == noise(1000));
    });
}
