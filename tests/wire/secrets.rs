//! The daemon's own secrets on the real wire: what it shows GitLab goes nowhere else.

use crate::gitlab_tls_server::{Ca, server_config};
use crate::support::canary::Search;
use crate::support::world::World;
use dayfly::files::Files as _;
use dayfly::gitlab::{ProxyEnvironment, RealLimits, RealOpenTransport};
use dayfly_doubles::fake::Timing;
use dayfly_exec::standin::{JobState, serve};
use rcgen::ExtendedKeyUsagePurpose;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};

/// Longest wait, in real time; a job takes about a second.
const LIMIT: Duration = Duration::from_secs(60);

/// The 32 bytes of a P-256 key that are the secret, out of its PKCS#8.
fn scalar(key: &[u8]) -> &[u8] {
    let at = key.windows(2).position(|window| window == [4, 32]).expect("an octet string of 32 bytes");
    &key[at + 2..at + 34]
}

/// T1: a client certificate's key and the runner token are in no byte for a machine, no file, no line of the log
/// at its most talkative, whether GitLab accepts them or not.
#[tokio::test]
async fn a_client_key_is_used_for_gitlab_and_seen_nowhere() {
    let (ca, clients, strangers) = (Ca::new("site CA"), Ca::new("client CA"), Ca::new("other clients"));
    let client = clients.sign(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]);
    let (der, pem) = (client.key.serialize_der(), client.key.serialize_pem());
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path
    };
    let mut world = World::new(1);
    world.expect_trouble(&["GitLab has not answered"]);
    world.spy.look_for("the client key", Search::of_bytes(scalar(&der)));
    // What its file holds, line by line: the first of two is the longer one.
    let line = pem.lines().nth(1).unwrap();
    world.spy.look_for("a line of the client key's file", Search::new(line));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let runner = &mut world.config.runner[0];
    runner.url = format!("https://localhost:{}", address.port()).parse().unwrap();
    runner.tls_ca_file = Some(write("ca.pem", &ca.pem));
    runner.tls_cert_file = Some(write("client.pem", &client.pem));
    runner.tls_key_file = Some(write("client.key", &pem));
    // The guests' copy of it comes through the file layer, which is the world's own.
    world.files.create_dir(directory.path()).await.unwrap();
    world.files.write_at(&directory.path().join("ca.pem"), 0, ca.pem.clone().into()).await.unwrap();
    world.transport = Some(Arc::new(RealOpenTransport::new(RealLimits::default(), ProxyEnvironment::default())));
    let at_once = Duration::ZERO;
    world.hypervisor.set_timing(Timing { boot: at_once, overlay: at_once, start: at_once, ..Timing::default() });

    // First a GitLab that wants other clients: refusals are where errors are put together.
    let refusing = serve(world.standin.clone(), listener, Some(Arc::new(server_config(&ca.good(), Some(&strangers)))));
    let job = world.job(&["print hello", "upload 1000"]);
    world.start().await.unwrap();
    let refused = async {
        while !world.log.text().contains("no answer to a poll") {
            sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(timeout(LIMIT, refused).await.is_ok(), "{}", world.histories());
    drop(refusing);
    let listener = timeout(LIMIT, async {
        loop {
            match TcpListener::bind(address).await {
                Ok(listener) => break listener,
                Err(_) => sleep(Duration::from_millis(20)).await,
            }
        }
    });
    let _served = serve(
        world.standin.clone(),
        listener.await.unwrap(),
        Some(Arc::new(server_config(&ca.good(), Some(&clients)))),
    );
    assert!(timeout(LIMIT, world.until(job, JobState::Success)).await.is_ok(), "{}", world.histories());
    world.files.remove(directory.path()).await.unwrap();
    world.assert_clean().await;
    // The search would have found it.
    tracing::info!(?pem, scalar = ?scalar(&der), "what should not be said");
    let leaks = world.leaks();
    assert_eq!(leaks, ["the log: the client key, list of numbers", "the log: a line of the client key's file, raw"]);
}
