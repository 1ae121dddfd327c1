//! `dayfly image import` of somebody else's cloud image.

use super::build::test_and_take_in;
use super::say;
use crate::cli::Interrupted;
use crate::config::{Config, Span};
use crate::image::build::{
    CLOUD_DEADLINE, CloudRequest, DiskFormat, FetchedDisk, RUNNER_DOWNLOADS, Release, RunnerSource, fetch_disk,
    find_guest_program, name_of, opener, take_in,
};
use crate::image::store::ImageStore;
use crate::rng::Rng;
use crate::vm::proof::{self, Subject};
use crate::vm::{AccelChoice, VmId};
use anyhow::{Context as _, bail};
use sha2::{Digest as _, Sha256};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use url::Url;

/// Where what is fetched lies meanwhile, as the files of a build do.
const DOWNLOADS: &str = "/var/tmp";

#[derive(Debug, clap::Args)]
pub(super) struct Cloud {
    /// SHA-256 that the cloud image must have
    #[arg(long, value_name = "DIGEST")]
    sha256: Option<String>,
    /// Format of the cloud image
    #[arg(long, value_enum, default_value_t)]
    format: DiskFormat,
    /// gitlab-runner to put into the cloud image; else $DAYFLY_GITLAB_RUNNER, else the host's, else the stand-in
    #[arg(long, value_name = "FILE")]
    runner: Option<PathBuf>,
    /// Fetch this release of the official gitlab-runner (like 19.3.0) and put that into the cloud image
    #[arg(long, value_name = "VERSION", conflicts_with = "runner")]
    runner_download: Option<String>,
    /// Where releases are: GitLab's own place, or a mirror of the same layout
    #[arg(long, value_name = "URL", env = "DAYFLY_RUNNER_DOWNLOAD_URL", default_value = RUNNER_DOWNLOADS)]
    runner_download_url: Url,
    /// Install this package in the cloud image, from its own sources; may be given several times
    #[arg(long, value_name = "NAME")]
    package: Vec<String>,
    /// Certificates (PEM) that machines of the cloud image shall trust
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// How long the cloud image may take to make itself ready and power off [default: 15m]
    #[arg(long, value_name = "DURATION", value_parser = |text: &str| Span::try_from(text.to_owned()))]
    within: Option<Span>,
}

/// Whether this is somebody else's disk, and no image that `export` has made: that is a directory, or a tar archive.
pub(super) fn is_cloud_image(from: &str) -> io::Result<bool> {
    if is_address(from) {
        return Ok(true);
    }
    let path = Path::new(from);
    if path.is_dir() {
        return Ok(false);
    }
    let mut head = Vec::new();
    crate::files::plain::open_chosen(path)?.take(512).read_to_end(&mut head)?;
    Ok(head.get(257..262) != Some(b"ustar"))
}

fn is_address(from: &str) -> bool {
    from.starts_with("https://") || from.starts_with("http://")
}

/// Takes a cloud image in, boot-tests it, and puts it into use.
pub(super) async fn import(
    config: &Config,
    store: ImageStore,
    from: &str,
    name: Option<String>,
    keep_aside: bool,
    args: Cloud,
) -> anyhow::Result<()> {
    let mut progress = say;
    let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
    let address = is_address(from).then(|| Url::parse(from)).transpose().context("read the address")?;
    let file = address.as_ref().map_or_else(|| PathBuf::from(from), |url| PathBuf::from(url.path()));
    let Some(name) = name.or_else(|| name_of(&file)) else {
        bail!("call an image by the name of {}: it can be none; give one by --name", file.display());
    };
    let guest_program = find_guest_program("dayfly-guest")?;
    let url = args.runner_download_url;
    let release = args.runner_download.map(|version| Release::new(&version, url, None)).transpose()?;
    let open = opener();
    let fetched: (Option<_>, Option<FetchedDisk>) = tokio::select! {
        biased;
        // Dropping it removes what has come.
        fetched = async {
            let runner = match &release {
                Some(release) => Some(release.fetch(&*open, Path::new(DOWNLOADS), &mut progress).await?),
                None => None,
            };
            let disk = match &address {
                Some(url) => {
                    Some(fetch_disk(url, args.sha256.as_deref(), &*open, Path::new(DOWNLOADS), &mut progress).await?)
                }
                None => None,
            };
            anyhow::Ok((runner, disk))
        } => fetched?,
        _ = &mut interrupted => return Err(Interrupted.into()),
    };
    let (runner, fetched) = fetched;
    if let (None, Some(expected)) = (&fetched, &args.sha256) {
        let found = digest(file.clone()).await.with_context(|| format!("read {}", file.display()))?;
        if !expected.trim().eq_ignore_ascii_case(&found) {
            bail!("believe {}: its SHA-256 is {found}, and not {}; it is not used", file.display(), expected.trim());
        }
    }
    let request = CloudRequest {
        disk: fetched.as_ref().map_or(file, |disk| disk.path.clone()),
        format: args.format,
        name,
        store,
        runner: match &runner {
            Some(downloaded) => downloaded.runner.clone(),
            None => RunnerSource::find(args.runner)?,
        },
        guest_program,
        ca: args.ca,
        packages: args.package,
        is_kvm: is_kvm(config).await?,
        within: args.within.map_or(CLOUD_DEADLINE, Span::get),
    };
    // What is done is done. Dropping it ends its machine and removes its files.
    let staged = tokio::select! {
        biased;
        staged = take_in(&request, &mut progress) => staged?,
        _ = &mut interrupted => return Err(Interrupted.into()),
    };
    test_and_take_in(config, staged, keep_aside, interrupted).await
}

/// SHA-256 of the operator's file, on a blocking thread.
async fn digest(path: PathBuf) -> io::Result<String> {
    let digest = tokio::task::spawn_blocking(move || {
        let mut hasher = Sha256::new();
        io::copy(&mut crate::files::plain::open_chosen(&path)?, &mut hasher)?;
        Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    });
    digest.await.map_err(io::Error::other)?
}

/// How guests run here, proven by a boot if nobody has said it.
async fn is_kvm(config: &Config) -> anyhow::Result<bool> {
    match config.hypervisor.accel {
        AccelChoice::Kvm => Ok(true),
        AccelChoice::Tcg => Ok(false),
        AccelChoice::Auto => {
            let own = tempfile::Builder::new().prefix("dayfly-").tempdir_in("/tmp")?;
            let host = config.hypervisor.host(own.path());
            host.prepare(own.path(), own.path()).await?;
            let rng = Rng::system();
            let places = proof::Places { disks: own.path(), sockets: own.path() };
            let proven = proof::prove_kvm(&host, &Subject::Sector, places, &VmId::random(&rng), &rng).await;
            proven.context("prove KVM by a boot (`--accel tcg` does without, for a trial)")?;
            Ok(true)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_export_has_made_is_told_from_a_cloud_image() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let is_cloud = |text: &str| is_cloud_image(text).unwrap();
        assert!(is_cloud("https://cloud.example/debian.qcow2") && is_cloud("http://mirror.example/x"));
        assert!(!is_cloud(dir.path().to_str().unwrap()));
        std::fs::write(&path, "QFI\u{fb}").unwrap();
        assert!(is_cloud(path.to_str().unwrap()));
        let mut tar = vec![0; 512];
        tar[257..262].copy_from_slice(b"ustar");
        std::fs::write(&path, tar).unwrap();
        assert!(!is_cloud(path.to_str().unwrap()));
        assert!(is_cloud_image("/no/such/file").is_err());
    }
}
