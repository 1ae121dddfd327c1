//! How does an image come from a registry? Its manifest says of which pieces; each is fetched, believed by its digests
//! only, and written where it belongs.
//!
//! ```text
//! manifest ─► image.toml ─► room? ─► pieces ─► .pull-…/ (compressed, kept) ─► .staging-…/ (files, whole) ─► Staged
//! ```
//!
//! What was fetched stays while the registry fails or the command is interrupted, so that the next one goes on in the
//! middle of a piece; it goes with a pull that ends well, with one of something else, or when the registry has lied.

use super::staging::{PullArea, Staging};
use super::{BuildError, Progress, Staged, file_error};
use crate::image::manifest::{ImageFile, Manifest};
use crate::image::registry::format::{
    CONFIG_MEDIA, DOCKER_INDEX_MEDIA, INDEX_MEDIA, Index, OciManifest, Piece, for_this_host, packed_bytes, pieces_of,
};
use crate::image::registry::{Registry, RegistryError};
use crate::image::store::{ImageError, ImageStore, MANIFEST_BYTES_MAX, digest_of, valid};
use std::fs::File;
use std::io::{self, Seek as _};
use std::path::Path;
use tokio::io::{AsyncSeekExt as _, AsyncWriteExt as _};

/// Takes an image in, under its own name or another one.
///
/// # Errors
/// [`BuildError`]: nothing is left of it but, where trying again may help, what came of its pieces.
///
/// # Cancel safety
/// Safe: as an error that trying again may help.
pub async fn pull(
    registry: &mut Registry,
    store: &ImageStore,
    name: Option<&str>,
    progress: &mut Progress<'_>,
) -> Result<Staged, BuildError> {
    if let Some(name) = name {
        valid(name)?;
    }
    let what = registry.reference().to_string();
    let (digest, oci) = manifest(registry).await?;
    if oci.config.media_type != CONFIG_MEDIA {
        let why = format!(
            "it is something else than an image that `dayfly image export` has put there (its config is `{}`)",
            oci.config.media_type.escape_debug()
        );
        return Err(RegistryError::Unfit { what, why }.into());
    }
    let most = usize::try_from(MANIFEST_BYTES_MAX).unwrap_or(usize::MAX);
    let config = registry.small_blob(&oci.config.digest, oci.config.size, most).await?;
    let mut image = Manifest::parse(&String::from_utf8_lossy(&config)).map_err(|source| ImageError::Manifest {
        name: what.clone(),
        path: what.clone().into(),
        source,
    })?;
    let by_file = pieces_of(&what, &oci, &image)?;
    let staging = Staging::new(store.directory())?;
    let area =
        PullArea::new(store.directory(), &digest).map_err(file_error("make a directory in", store.directory()))?;
    super::import::has_room(store.directory(), &image, Path::new(&what), packed_bytes(&by_file))?;
    let filled = fill(registry, &staging, &area, &image, &by_file, progress).await;
    if filled.as_ref().err().is_none_or(|error| !may_help(error)) {
        area.remove();
    }
    filled?;
    if let Some(name) = name {
        name.clone_into(&mut image.name);
    }
    valid(&image.name)?;
    image.info = None;
    let staged = Staged { store: store.clone(), directory: staging, manifest: image };
    staged.write()?;
    staged.image()?;
    Ok(staged)
}

/// Whether what came may be of use to the next try.
fn may_help(error: &BuildError) -> bool {
    matches!(error, BuildError::Registry(error) if error.is_transient())
}

/// The manifest, or of a list of them the one for this kind of host; with its digest.
async fn manifest(registry: &mut Registry) -> Result<(String, OciManifest), RegistryError> {
    let what = registry.reference().to_string();
    let unfit = |why: String| RegistryError::Unfit { what: what.clone(), why };
    let no_json = |error: serde_json::Error| unfit(format!("what lies there is no manifest ({error})"));
    let mut found = registry.manifest(registry.reference().version().to_owned().as_str()).await?;
    if [INDEX_MEDIA, DOCKER_INDEX_MEDIA].contains(&found.media_type.as_str()) {
        let index: Index = serde_json::from_slice(&found.bytes).map_err(no_json)?;
        let Some(one) = for_this_host(&index) else {
            return Err(unfit(format!("there is none for {} in it", std::env::consts::ARCH)));
        };
        found = registry.manifest(&one.digest.clone()).await?;
    }
    let oci = serde_json::from_slice(&found.bytes).map_err(no_json)?;
    Ok((found.digest, oci))
}

/// Fetches and writes all files; each is the one that `image.toml` names.
async fn fill(
    registry: &mut Registry,
    staging: &Staging,
    area: &PullArea,
    image: &Manifest,
    by_file: &std::collections::BTreeMap<String, Vec<Piece>>,
    progress: &mut Progress<'_>,
) -> Result<(), BuildError> {
    for file in image.files() {
        let at = staging.path().join(&file.file);
        let mut into = staging.create(&file.file).map_err(file_error("write", &at))?;
        into.set_len(file.bytes).map_err(file_error("write", &at))?;
        let pieces = by_file.get(&file.file).map(Vec::as_slice).unwrap_or_default();
        for (n, piece) in pieces.iter().enumerate() {
            let said = format!("{}: piece {} of {}", file.file, n + 1, pieces.len());
            let packed = match area.kept(piece).map_err(file_error("read", &at))? {
                Some(kept) => {
                    progress(&format!("{said} was fetched before"));
                    kept
                }
                None => {
                    progress(&format!("{said}, {} MiB", piece.packed >> 20));
                    fetch(registry, area, piece).await?
                }
            };
            into = unpack(packed, into, piece.clone(), &at).await?;
        }
        is_right(into, file, &at, registry).await?;
    }
    Ok(())
}

/// One piece's compressed form, whole and right, at its beginning.
async fn fetch(registry: &mut Registry, area: &PullArea, piece: &Piece) -> Result<File, BuildError> {
    let failed = || file_error("keep a piece in", area.path());
    let mut part = tokio::fs::File::from_std(area.part(piece).map_err(failed())?);
    let mut tries = 0;
    loop {
        match fetch_once(registry, &mut part, piece).await {
            Ok(()) => break,
            Err(Failed::Registry(error)) => registry.again(error, &mut tries).await?,
            Err(Failed::Disk(error)) => return Err(failed()(error)),
        }
    }
    let mut whole = part.into_std().await;
    let digest = tokio::task::spawn_blocking(move || {
        whole.rewind()?;
        let digest = digest_of(&mut whole)?;
        whole.rewind()?;
        Ok::<_, io::Error>((whole, digest))
    });
    let (whole, digest) = digest.await.map_err(io::Error::other).and_then(|done| done).map_err(failed())?;
    if format!("sha256:{digest}") != piece.digest {
        let what = format!("a piece of `{}` from {}", piece.file, registry.reference());
        let why = format!("its SHA-256 is {digest}, and not {}", piece.digest);
        return Err(RegistryError::Lie { what, why }.into());
    }
    area.keep(piece).map_err(failed())?;
    Ok(whole)
}

enum Failed {
    Registry(RegistryError),
    Disk(io::Error),
}

impl From<RegistryError> for Failed {
    fn from(error: RegistryError) -> Self {
        Self::Registry(error)
    }
}

/// Goes on where the last one ended.
async fn fetch_once(registry: &mut Registry, part: &mut tokio::fs::File, piece: &Piece) -> Result<(), Failed> {
    let have = part.metadata().await.map_err(Failed::Disk)?.len();
    if have == piece.packed {
        return Ok(());
    }
    let mut blob = registry.blob(&piece.digest, if have < piece.packed { have } else { 0 }).await?;
    let mut end = blob.from;
    part.set_len(end).await.map_err(Failed::Disk)?;
    part.seek(io::SeekFrom::Start(end)).await.map_err(Failed::Disk)?;
    loop {
        let next = blob.next(end).await;
        // What has come counts, whatever comes of the rest.
        let data = match next {
            Ok(Some(data)) => data,
            Ok(None) => break,
            Err(error) => {
                part.flush().await.map_err(Failed::Disk)?;
                return Err(error.into());
            }
        };
        end += data.len() as u64;
        if end > piece.packed {
            part.set_len(0).await.map_err(Failed::Disk)?;
            let what = format!("a piece of `{}` from {}", piece.file, registry.reference());
            let why = format!("it is longer than the {} bytes that its manifest says", piece.packed);
            return Err(RegistryError::Lie { what, why }.into());
        }
        part.write_all(&data).await.map_err(Failed::Disk)?;
    }
    part.flush().await.map_err(Failed::Disk)?;
    if end < piece.packed {
        return Err(RegistryError::BrokeOff { url: registry.reference().to_string(), bytes: end }.into());
    }
    Ok(())
}

/// On a blocking thread; gives the file back.
async fn unpack(packed: File, into: File, piece: Piece, at: &Path) -> Result<File, BuildError> {
    let what = format!("a piece of `{}`", piece.file);
    let unpacked = tokio::task::spawn_blocking(move || {
        let packed = io::BufReader::new(packed);
        dayfly_pieces::unpack(packed, &into, piece.offset, piece.bytes, &piece.sha256).map(|()| into)
    });
    match unpacked.await.map_err(io::Error::other).and_then(|done| done) {
        Ok(into) => Ok(into),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            Err(RegistryError::Lie { what, why: error.to_string() }.into())
        }
        Err(error) => Err(file_error("write", at)(error)),
    }
}

/// The whole file is the one that was exported: its holes, too.
async fn is_right(mut file: File, wanted: &ImageFile, at: &Path, registry: &Registry) -> Result<(), BuildError> {
    let digest = tokio::task::spawn_blocking(move || {
        file.rewind()?;
        digest_of(&mut file)
    });
    let digest = digest.await.map_err(io::Error::other).and_then(|done| done).map_err(file_error("read", at))?;
    if digest != wanted.sha256 {
        let what = format!("`{}` from {}", wanted.file, registry.reference());
        let why = format!("its SHA-256 is {digest}, and not {} as its image.toml says", wanted.sha256);
        return Err(RegistryError::Lie { what, why }.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
