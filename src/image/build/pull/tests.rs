//! An image goes to a registry and comes from there; a registry that lies leaves nothing of it.

use super::*;
use crate::image::manifest::MANIFEST_FILE;
use crate::image::qcow2::tests::header;
use crate::image::registry::format::{ARTIFACT, MANIFEST_MEDIA, PIECE_BYTES};
use crate::image::registry::push;
use crate::image::registry::tests::{Asked, FakeRegistry, Frames, answer, breaking, leading_to, part_of};
use crate::image::store::tests::write_image;
use crate::image::store::{Image, digest};
use bytes::Bytes;
use http::{Method, Response};
use http_body_util::BodyExt as _;
use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::sync::{Arc, Mutex};

const PLACE: &str = "oci://r.example/images/shell:1";

struct Hosts {
    dir: tempfile::TempDir,
    here: ImageStore,
    registry: FakeRegistry,
}

impl Hosts {
    /// A host with an image whose disk has three pieces, the second of which is a hole, and another host.
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let here = ImageStore::new(dir.path().join("here"));
        let staged = write_image(&here.directory().join(".staging-1"), "shell", b"kernel");
        let disk = staged.join("disk.qcow2");
        let file = fs::OpenOptions::new().write(true).open(&disk).unwrap();
        file.write_all_at(&header(4 << 30), 0).unwrap();
        file.write_all_at(&noise(300_000), 1 << 20).unwrap();
        file.write_all_at(&noise(50_000), 2 * PIECE_BYTES + 4096).unwrap();
        file.set_len(2 * PIECE_BYTES + (1 << 20) + 7).unwrap();
        let mut manifest = Manifest::parse(&fs::read_to_string(staged.join(MANIFEST_FILE)).unwrap()).unwrap();
        manifest.disk.bytes = 2 * PIECE_BYTES + (1 << 20) + 7;
        manifest.disk.sha256 = digest(&disk).unwrap();
        fs::write(staged.join(MANIFEST_FILE), manifest.to_text()).unwrap();
        here.promote(&staged, "shell").unwrap();
        let hosts = Self { dir, here, registry: FakeRegistry::default() };
        push(&mut hosts.registry.client(PLACE), &hosts.image(), &mut |_| ()).await.unwrap();
        hosts.registry.forget_asked();
        hosts
    }

    fn image(&self) -> Image {
        self.here.get("shell").unwrap()
    }

    fn there(&self) -> ImageStore {
        ImageStore::new(self.dir.path().join("there"))
    }

    async fn pull(&self) -> Result<Image, BuildError> {
        let there = self.there();
        let staged = pull(&mut self.registry.client(PLACE), &there, None, &mut |_| ()).await?;
        staged.promote()
    }

    /// Names in the other host's directory, but for the lock's.
    fn left(&self) -> Vec<String> {
        let entries = fs::read_dir(self.there().directory()).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
        names.retain(|name| !name.ends_with(".lock"));
        names.sort();
        names
    }

    /// Why it is refused. Nothing is left of it, and the truth is taken afterwards.
    async fn refused(
        &self,
        lie: impl FnMut(&Asked) -> Option<Response<crate::gitlab::Body>> + Send + 'static,
    ) -> String {
        self.registry.lie(lie);
        let error = crate::telemetry::chain(&self.pull().await.unwrap_err());
        assert_eq!(self.left(), [""; 0], "{error}");
        self.registry.tell_the_truth();
        error
    }

    /// The disk's first piece.
    fn first_piece(&self) -> String {
        let oci: OciManifest = serde_json::from_slice(&self.registry.manifest("1").unwrap()).unwrap();
        oci.layers[0].digest.clone()
    }
}

/// What no compressor makes less of.
fn noise(bytes: u32) -> Vec<u8> {
    (0..bytes / 4).flat_map(|n| n.wrapping_mul(2_654_435_761).rotate_left(n % 31).to_be_bytes()).collect()
}

fn is_get(asked: &Asked, digest: &str) -> bool {
    asked.method == Method::GET && asked.url.ends_with(digest)
}

#[tokio::test]
async fn an_image_goes_out_and_comes_in_the_same_and_holes_stay_holes() {
    let hosts = Hosts::new().await;
    let image = hosts.image();
    // Kernel, initrd, two pieces of the disk, image.toml: the hole is not among them.
    assert_eq!(hosts.registry.blobs().len(), 5);
    let sent: usize = hosts.registry.blobs().values().map(Bytes::len).sum();
    assert!(sent < 500_000, "{sent} bytes");
    let pulled = hosts.pull().await.unwrap();
    assert_eq!(pulled.digest(), image.digest());
    assert_eq!(pulled.manifest.info, None, "only a boot can tell");
    hosts.there().verify(&pulled).unwrap();
    let found = fs::metadata(&pulled.disk).unwrap();
    assert!(found.blocks() * 512 < 2 << 20, "{} of {} bytes", found.blocks() * 512, found.len());
    assert!(hosts.left().iter().all(|name| name.starts_with("shell")), "{:?}", hosts.left());
    let named = pull(&mut hosts.registry.client(PLACE), &hosts.there(), Some("other"), &mut |_| ()).await.unwrap();
    assert_eq!(named.promote().unwrap().name, "other");
}

/// The same image is the same manifest, so what a registry has is not sent again.
#[tokio::test]
async fn what_the_registry_has_is_not_sent_again() {
    let hosts = Hosts::new().await;
    let before = hosts.registry.manifest("1").unwrap();
    push(&mut hosts.registry.client(PLACE), &hosts.image(), &mut |_| ()).await.unwrap();
    let sent: Vec<String> = hosts
        .registry
        .asked()
        .into_iter()
        .filter(|asked| asked.method != Method::HEAD)
        .map(|asked| asked.url)
        .collect();
    assert_eq!(sent, ["https://r.example/v2/images/shell/manifests/1"]);
    assert_eq!(hosts.registry.manifest("1").unwrap(), before);
    let by_digest = format!("oci://r.example/images/shell@sha256:{}", "0".repeat(64));
    assert!(push(&mut hosts.registry.client(&by_digest), &hosts.image(), &mut |_| ()).await.is_err());
}

/// A push that fails leaves the tag where it led.
#[tokio::test]
async fn a_push_that_breaks_off_moves_no_tag() {
    let hosts = Hosts::new().await;
    let place = "oci://r.example/images/new:1";
    let fresh = FakeRegistry::default();
    let mut puts = 0;
    fresh.lie(move |asked| {
        puts += u32::from(asked.method == Method::PUT);
        (puts > 2).then(|| answer(500, ""))
    });
    let error = push(&mut fresh.client(place), &hosts.image(), &mut |_| ()).await.unwrap_err();
    assert!(error.is_transient() && fresh.manifest("1").is_none() && fresh.blobs().len() == 2, "{error}");
    fresh.tell_the_truth();
    fresh.forget_asked();
    push(&mut fresh.client(place), &hosts.image(), &mut |_| ()).await.unwrap();
    assert_eq!(fresh.asked().iter().filter(|asked| asked.method == Method::PUT).count(), 3 + 1, "what was there stays");
}

/// Broken off in the middle of a piece, a pull goes on there: within a command, and in the next one.
#[tokio::test]
async fn a_pull_goes_on_where_it_was_broken_off() {
    let hosts = Hosts::new().await;
    let (piece, blobs) = (hosts.first_piece(), hosts.registry.blobs());
    let content = blobs[&piece].clone();
    // Each answer breaks off after a third of what is left, for ever.
    let (broken, all) = (piece.clone(), content.clone());
    let third = move |asked: &Asked| {
        let from = asked.range.as_deref().map_or(0, |range| range[6..range.len() - 1].parse::<usize>().unwrap());
        is_get(asked, &broken).then(|| {
            let count = (all.len() - from) / 3;
            let (parts, _) = part_of(&all, asked).into_parts();
            let mut cut = breaking(parts.status.as_u16(), all.slice(from..from + count));
            *cut.headers_mut() = parts.headers;
            cut
        })
    };
    hosts.registry.lie(third);
    let error = hosts.pull().await.unwrap_err();
    assert!(matches!(&error, BuildError::Registry(RegistryError::BrokeOff { .. })), "{error}");
    let left = hosts.left();
    assert!(left.len() == 1 && left[0].starts_with(".pull-"), "only what came stays: {left:?}");
    let ranges: Vec<_> =
        hosts.registry.asked().into_iter().filter(|asked| is_get(asked, &piece)).map(|asked| asked.range).collect();
    assert_eq!(ranges[0], None);
    assert!(ranges.len() == 3 && ranges[1..].iter().all(Option::is_some), "{ranges:?}");
    // The next command.
    hosts.registry.tell_the_truth();
    hosts.registry.forget_asked();
    hosts.pull().await.unwrap();
    let asked: Vec<_> = hosts.registry.asked().into_iter().filter(|asked| is_get(asked, &piece)).collect();
    let from: usize = asked[0].range.as_deref().unwrap()[6..].trim_end_matches('-').parse().unwrap();
    assert!(asked.len() == 1 && from > content.len() / 2, "{asked:?}");
    assert!(hosts.left().iter().all(|name| !name.starts_with(".pull-")), "{:?}", hosts.left());
}

/// A registry that does not know ranges gives the whole again, and that is taken.
#[tokio::test]
async fn a_registry_without_ranges_will_do() {
    let hosts = Hosts::new().await;
    let piece = hosts.first_piece();
    let content = hosts.registry.blobs()[&piece].clone();
    let mut first = true;
    hosts.registry.lie(move |asked| {
        is_get(asked, &piece).then(|| {
            if std::mem::take(&mut first) { breaking(200, content.slice(..1000)) } else { answer(200, content.clone()) }
        })
    });
    hosts.pull().await.unwrap();
}

/// What came before and was changed since is fetched again.
#[tokio::test]
async fn what_was_kept_is_believed_by_its_digest_only() {
    let hosts = Hosts::new().await;
    let last = hosts.registry.blobs().keys().next().unwrap().clone();
    let oci: OciManifest = serde_json::from_slice(&hosts.registry.manifest("1").unwrap()).unwrap();
    let last_piece = oci.layers.last().unwrap().digest.clone();
    assert!(last.len() == last_piece.len());
    hosts.registry.lie(move |asked| is_get(asked, &last_piece).then(|| answer(503, "")));
    hosts.pull().await.unwrap_err();
    let area = hosts.there().directory().join(&hosts.left()[0]);
    for entry in fs::read_dir(&area).unwrap().flatten() {
        let length = entry.metadata().unwrap().len();
        fs::write(entry.path(), vec![b'x'; usize::try_from(length).unwrap()]).unwrap();
    }
    hosts.registry.tell_the_truth();
    let pulled = hosts.pull().await.unwrap();
    hosts.there().verify(&pulled).unwrap();
}

/// A registry that lies: each lie has its sentence, and nothing of the image is here.
#[tokio::test]
async fn a_registry_that_lies_leaves_nothing() {
    let hosts = Hosts::new().await;
    let piece = hosts.first_piece();
    let content = hosts.registry.blobs()[&piece].clone();
    let other = {
        let mut other = content.to_vec();
        other[5000] ^= 1;
        Bytes::from(other)
    };
    let of = |answer: Arc<dyn Fn() -> Response<crate::gitlab::Body> + Send + Sync>| {
        let piece = piece.clone();
        move |asked: &Asked| is_get(asked, &piece).then(|| answer())
    };
    let wrong = hosts.refused(of(Arc::new(move || answer(200, other.clone())))).await;
    assert!(wrong.contains("its SHA-256 is ") && wrong.contains("nothing of it is used"), "{wrong}");
    let long = content.clone();
    let too_long = hosts.refused(of(Arc::new(move || answer(200, [&long[..], b"x"].concat())))).await;
    assert!(too_long.contains("longer than the"), "{too_long}");
    // Ten gigabytes of zeros, of which no more is read than was said.
    let pieces_read = Arc::new(Mutex::new(0_u32));
    let read = Arc::clone(&pieces_read);
    let zeros = hosts
        .refused(of(Arc::new(move || {
            *read.lock().unwrap() += 1;
            let mib = Bytes::from(vec![0; 1 << 20]);
            let frames = (0..10 * 1024).map(|_| Ok(http_body::Frame::data(mib.clone()))).collect();
            Response::new(Frames(frames).boxed_unsync())
        })))
        .await;
    assert!(zeros.contains("longer than the") && *pieces_read.lock().unwrap() == 1, "{zeros}");
    let gone = hosts.refused(of(Arc::new(|| answer(404, "")))).await;
    assert!(gone.contains("has none of this name"), "{gone}");
    let elsewhere = hosts.refused(of(Arc::new(|| leading_to(302, "http://elsewhere.example/x")))).await;
    assert!(elsewhere.contains("sends us to http://elsewhere.example/x"), "{elsewhere}");
    let half = content.slice(content.len() / 2..);
    let other_part = hosts
        .refused(of(Arc::new(move || {
            let mut odd = answer(206, half.clone());
            odd.headers_mut().insert("content-range", "bytes 17-20/30".parse().unwrap());
            odd
        })))
        .await;
    assert!(other_part.contains("another part"), "{other_part}");
    // Short, and down: what came is kept for the next try, and no image is there.
    for lie in [answer(200, content.slice(..content.len() - 1)), answer(500, "")].map(|lie| Mutex::new(Some(lie))) {
        let (piece, lie) = (piece.clone(), Arc::new(lie));
        hosts.registry.lie(move |asked| {
            is_get(asked, &piece).then(|| lie.lock().unwrap().take().unwrap_or_else(|| answer(500, "")))
        });
        assert!(may_help(&hosts.pull().await.unwrap_err()));
        assert!(hosts.left().iter().all(|name| name.starts_with(".pull-")), "{:?}", hosts.left());
    }
    hosts.registry.tell_the_truth();
    hosts.pull().await.unwrap();
}

/// A manifest that lies.
#[tokio::test]
async fn a_manifest_that_does_not_go_together_is_refused_before_anything_is_fetched() {
    let hosts = Hosts::new().await;
    let good: serde_json::Value = serde_json::from_slice(&hosts.registry.manifest("1").unwrap()).unwrap();
    assert_eq!((good["artifactType"].as_str(), good["mediaType"].as_str()), (Some(ARTIFACT), Some(MANIFEST_MEDIA)));
    let spoilt = async |why: &str, spoil: &dyn Fn(&mut serde_json::Value)| {
        let mut manifest = good.clone();
        spoil(&mut manifest);
        hosts.registry.put_manifest("1", serde_json::to_vec(&manifest).unwrap());
        hosts.registry.forget_asked();
        let error = crate::telemetry::chain(&hosts.pull().await.unwrap_err());
        assert!(error.contains(why), "{why}: {error}");
        assert_eq!(hosts.left(), [""; 0], "{error}");
        let layers: Vec<&str> =
            good["layers"].as_array().unwrap().iter().map(|layer| layer["digest"].as_str().unwrap()).collect();
        assert!(
            hosts.registry.asked().iter().all(|asked| !layers.iter().any(|layer| asked.url.ends_with(layer))),
            "{why}"
        );
    };
    spoilt("knows no file `../x`", &|m| m["layers"][0]["annotations"]["org.dayfly.file"] = "../x".into()).await;
    spoilt("overlap, or lie beyond", &|m| m["layers"][1]["annotations"]["org.dayfly.offset"] = "4096".into()).await;
    spoilt("overlap, or lie beyond", &|m| {
        m["layers"][1]["annotations"]["org.dayfly.offset"] = u64::MAX.to_string().into()
    })
    .await;
    spoilt("larger than pieces are", &|m| m["layers"][0]["annotations"]["org.dayfly.bytes"] = "10737418240".into())
        .await;
    spoilt("larger than pieces are", &|m| m["layers"][0]["size"] = 10_737_418_240_u64.into()).await;
    spoilt("does not say which piece", &|m| m["layers"][0]["annotations"]["org.dayfly.offset"] = "-1".into()).await;
    spoilt("is no SHA-256", &|m| m["layers"][0]["digest"] = "sha256:../../x".into()).await;
    spoilt("is no piece", &|m| m["layers"][0]["mediaType"] = "application/vnd.oci.image.layer.v1.tar+gzip".into())
        .await;
    spoilt("something else than an image", &|m| {
        m["config"]["mediaType"] = "application/vnd.oci.image.config.v1+json".into()
    })
    .await;
    spoilt("it has ", &|m| m["config"]["size"] = 5.into()).await;
    let future = String::from_utf8_lossy(&hosts.registry.blobs()[good["config"]["digest"].as_str().unwrap()])
        .replace("format_version = 1", "format_version = 9");
    let digest = hosts.registry.put_blob(future.clone());
    spoilt("has format version 9", &|m| {
        m["config"]["digest"] = digest.as_str().into();
        m["config"]["size"] = future.len().into();
    })
    .await;
    hosts.registry.put_manifest("1", "no json");
    assert!(crate::telemetry::chain(&hosts.pull().await.unwrap_err()).contains("is no manifest"));
    // Changed content with digests of its own: the image.toml knows better.
    let zeros = dayfly_pieces::pack(&[0; 6]);
    let swapped = hosts.registry.put_blob(zeros.clone());
    let kernel = good["layers"]
        .as_array()
        .unwrap()
        .iter()
        .position(|layer| layer["annotations"]["org.dayfly.file"] == "vmlinuz")
        .unwrap();
    let mut manifest = good.clone();
    manifest["layers"][kernel]["digest"] = swapped.into();
    manifest["layers"][kernel]["size"] = zeros.len().into();
    manifest["layers"][kernel]["annotations"]["org.dayfly.sha256"] = dayfly_pieces::digest_of(&[0; 6])[7..].into();
    hosts.registry.put_manifest("1", serde_json::to_vec(&manifest).unwrap());
    let error = crate::telemetry::chain(&hosts.pull().await.unwrap_err());
    assert!(error.contains("as its image.toml says"), "{error}");
    assert_eq!(hosts.left(), [""; 0]);
}

/// A reference by digest is that manifest and no other.
#[tokio::test]
async fn a_digest_is_what_it_says() {
    let hosts = Hosts::new().await;
    let manifest = hosts.registry.manifest("1").unwrap();
    let digest = dayfly_pieces::digest_of(&manifest);
    let place = format!("oci://r.example/images/shell@{digest}");
    let there = hosts.there();
    pull(&mut hosts.registry.client(&place), &there, None, &mut |_| ()).await.unwrap();
    hosts.registry.lie(move |asked| asked.url.contains("/manifests/").then(|| answer(200, "{}")));
    let error = pull(&mut hosts.registry.client(&place), &there, None, &mut |_| ()).await.map(drop).unwrap_err();
    assert!(error.to_string().contains("its digest is sha256:"), "{error}");
}
