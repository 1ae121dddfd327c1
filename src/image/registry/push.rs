//! An image into a registry: its files in pieces, what the registry has already left out, the manifest last.
//!
//! Until the manifest is there the tag leads where it led before; a push that was broken off is done the rest of when it is
//! made again, for the same pieces have the same digests.

use super::RegistryError;
use super::client::Registry;
use super::format::{CONFIG_MEDIA, Descriptor, PIECE_BYTES, Piece, manifest_of};
use crate::files::plain;
use crate::image::manifest::{ImageFile, Manifest};
use crate::image::store::Image;
use bytes::Bytes;
use dayfly_pieces::{digest_of, is_hole, pack};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

/// A piece with its content, compressed.
type Packed = (Piece, Bytes);

/// Puts an image there, under the reference's tag; says the manifest's digest. `image`: its files are those that were
/// built (`ImageStore::verify`).
///
/// # Errors
/// [`RegistryError`]; the tag then leads where it led.
///
/// # Cancel safety
/// Safe: what the registry has is left out the next time.
pub async fn push(
    registry: &mut Registry,
    image: &Image,
    progress: &mut (dyn FnMut(&str) + Send),
) -> Result<String, RegistryError> {
    if registry.reference().digest().is_some() {
        let text = registry.reference().to_string();
        return Err(RegistryError::Reference { text, why: "an image is put under a tag, not under a digest" });
    }
    let mut pieces = Vec::new();
    for file in image.manifest.files() {
        let count = file.bytes.div_ceil(PIECE_BYTES);
        for n in 0..count {
            let path = image.dir.join(&file.file);
            let Some((piece, packed)) = read(path, file.clone(), n * PIECE_BYTES).await? else { continue };
            let said = format!("{}: piece {} of {count}", file.file, n + 1);
            if registry.has_blob(&piece.digest).await? {
                progress(&format!("{said} is there"));
            } else {
                progress(&format!("{said}, {} MiB", packed.len() >> 20));
                registry.put_blob(&piece.digest, packed).await?;
            }
            pieces.push(piece);
        }
    }
    // What its runner says of itself, each host finds out.
    let config = Manifest { info: None, ..image.manifest.clone() }.to_text();
    let config_digest = digest_of(config.as_bytes());
    let descriptor = Descriptor {
        media_type: CONFIG_MEDIA.into(),
        digest: config_digest.clone(),
        size: config.len() as u64,
        annotations: [].into(),
        platform: None,
    };
    if !registry.has_blob(&config_digest).await? {
        registry.put_blob(&config_digest, config.into()).await?;
    }
    let manifest = manifest_of(descriptor, &pieces);
    let digest = digest_of(&manifest);
    let tag = registry.reference().version().to_owned();
    registry.put_manifest(&tag, manifest).await?;
    Ok(digest)
}

/// One piece of a file, on a blocking thread; `None`: it is a hole.
async fn read(path: PathBuf, file: ImageFile, offset: u64) -> Result<Option<Packed>, RegistryError> {
    let failed = |source| RegistryError::File { path: path.clone(), source };
    let at = path.clone();
    let read = tokio::task::spawn_blocking(move || piece(&at, &file, offset));
    read.await.map_err(io::Error::other).and_then(|piece| piece).map_err(failed)
}

fn piece(path: &Path, file: &ImageFile, offset: u64) -> io::Result<Option<Packed>> {
    let mut from = plain::open_chosen(path)?;
    io::Seek::seek(&mut from, io::SeekFrom::Start(offset))?;
    let bytes = PIECE_BYTES.min(file.bytes - offset);
    let mut content = Vec::new();
    from.take(bytes).read_to_end(&mut content)?;
    if content.len() as u64 != bytes {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if is_hole(&content) {
        return Ok(None);
    }
    let packed = pack(&content);
    let piece = Piece {
        file: file.file.clone(),
        offset,
        bytes,
        sha256: dayfly_pieces::sha256(&content),
        digest: digest_of(&packed),
        packed: packed.len() as u64,
    };
    Ok(Some((piece, packed.into())))
}
