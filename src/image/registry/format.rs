//! What of an image lies in a registry: one manifest, `image.toml` as its config, and the pieces of its files as layers.
//!
//! | layer's annotation | |
//! | --- | --- |
//! | `org.dayfly.file` | of which file it is a piece |
//! | `org.dayfly.offset` | where it begins in that |
//! | `org.dayfly.bytes` | how long its content is |
//! | `org.dayfly.sha256` | and its digest; the layer's own is that of the compressed form |
//!
//! Between the pieces of a file are holes. The same image makes the same manifest, wherever it is made.

use super::RegistryError;
use super::reference::is_digest;
use crate::image::manifest::Manifest;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// A manifest of the OCI image specification, version 1.
pub const MANIFEST_MEDIA: &str = "application/vnd.oci.image.manifest.v1+json";
/// A list of manifests, one for each kind of machine.
pub const INDEX_MEDIA: &str = "application/vnd.oci.image.index.v1+json";
/// Docker's names for both.
pub const DOCKER_MANIFEST_MEDIA: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// See [`DOCKER_MANIFEST_MEDIA`].
pub const DOCKER_INDEX_MEDIA: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// What we ask for.
pub const MANIFESTS_ACCEPTED: &str = "application/vnd.oci.image.manifest.v1+json, \
     application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.v2+json, \
     application/vnd.docker.distribution.manifest.list.v2+json";

/// What kind of thing a manifest of ours describes.
pub const ARTIFACT: &str = "application/vnd.dayfly.image.v1";
/// `image.toml`.
pub const CONFIG_MEDIA: &str = "application/vnd.dayfly.image.config.v1+toml";
/// One piece of a file.
pub const PIECE_MEDIA: &str = "application/vnd.dayfly.image.piece.v1+zstd";

const FILE: &str = "org.dayfly.file";
const OFFSET: &str = "org.dayfly.offset";
const BYTES: &str = "org.dayfly.bytes";
const SHA256: &str = "org.dayfly.sha256";

/// Bytes of a file in one piece: what is fetched again at worst, and held in memory.
pub const PIECE_BYTES: u64 = 64 << 20;

/// What does not compress grows by less than this.
pub const PACKED_BYTES_MAX: u64 = PIECE_BYTES + (1 << 20);

/// Bytes of a manifest at most: what registries take. Of ours, it is some 10,000 pieces, 600 GiB.
pub const MANIFEST_BYTES_MAX: usize = 4 << 20;

/// A thing in a registry, by its digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    pub media_type: String,
    /// `sha256:…`.
    pub digest: String,
    /// Its length.
    pub size: u64,
    /// What else is said of it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// In lists: for which machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
}

/// For which machine one of a list is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// In Go's words: `amd64`.
    #[serde(default)]
    pub architecture: String,
    /// `linux`.
    #[serde(default)]
    pub os: String,
}

/// One manifest, ours or a container image's.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OciManifest {
    /// 2.
    pub schema_version: u32,
    /// What it is; some leave it out.
    #[serde(default)]
    pub media_type: Option<String>,
    /// [`ARTIFACT`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// `image.toml`, or a container image's.
    pub config: Descriptor,
    /// Pieces, or a container image's layers.
    pub layers: Vec<Descriptor>,
}

/// A list of them.
#[derive(Clone, Debug, Deserialize)]
pub struct Index {
    /// One for each kind of machine.
    pub manifests: Vec<Descriptor>,
}

/// One piece of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Of which file.
    pub file: String,
    /// Where it begins.
    pub offset: u64,
    /// Bytes of its content.
    pub bytes: u64,
    /// Digest of its content, hex.
    pub sha256: String,
    /// Digest of its compressed form: `sha256:…`.
    pub digest: String,
    /// Bytes of that.
    pub packed: u64,
}

impl Piece {
    /// As a layer.
    #[must_use]
    pub fn descriptor(&self) -> Descriptor {
        let annotations = [
            (FILE, self.file.clone()),
            (OFFSET, self.offset.to_string()),
            (BYTES, self.bytes.to_string()),
            (SHA256, self.sha256.clone()),
        ];
        Descriptor {
            media_type: PIECE_MEDIA.into(),
            digest: self.digest.clone(),
            size: self.packed,
            annotations: annotations.map(|(key, value)| (key.to_owned(), value)).into(),
            platform: None,
        }
    }

    fn read(layer: &Descriptor) -> Result<Self, &'static str> {
        let said = |key: &str| layer.annotations.get(key);
        let number = |key: &str| said(key).and_then(|text| text.parse::<u64>().ok());
        let (Some(file), Some(offset), Some(bytes), Some(sha256)) =
            (said(FILE), number(OFFSET), number(BYTES), said(SHA256))
        else {
            return Err("a layer does not say which piece of which file it is");
        };
        if layer.media_type != PIECE_MEDIA {
            return Err("a layer of it is no piece of a file");
        }
        if bytes == 0 || bytes > PIECE_BYTES || layer.size > PACKED_BYTES_MAX {
            return Err("a piece of it is empty, or larger than pieces are");
        }
        if !is_digest(&layer.digest) || !is_digest(&format!("sha256:{sha256}")) {
            return Err("a digest of a piece is no SHA-256");
        }
        Ok(Self {
            file: file.clone(),
            offset,
            bytes,
            sha256: sha256.clone(),
            digest: layer.digest.clone(),
            packed: layer.size,
        })
    }
}

/// The manifest of an image of these pieces.
#[must_use]
pub fn manifest_of(config: Descriptor, pieces: &[Piece]) -> Vec<u8> {
    let manifest = OciManifest {
        schema_version: 2,
        media_type: Some(MANIFEST_MEDIA.into()),
        artifact_type: Some(ARTIFACT.into()),
        config,
        layers: pieces.iter().map(Piece::descriptor).collect(),
    };
    serde_json::to_vec(&manifest).expect("texts and numbers always serialise")
}

/// The pieces of an image's files, each file's in their order: what is between them is zeros.
///
/// # Errors
/// [`RegistryError::Unfit`]: they do not fit into the files that `image.toml` names.
pub fn pieces_of(
    what: &str,
    oci: &OciManifest,
    image: &Manifest,
) -> Result<BTreeMap<String, Vec<Piece>>, RegistryError> {
    let unfit = |why: String| RegistryError::Unfit { what: what.to_owned(), why };
    let mut by_file: BTreeMap<String, Vec<Piece>> = image.files().map(|file| (file.file.clone(), Vec::new())).collect();
    if by_file.len() != image.files().count() {
        return Err(unfit("its image.toml names a file twice".into()));
    }
    for layer in &oci.layers {
        let piece = Piece::read(layer).map_err(|why| unfit(why.to_owned()))?;
        let Some(pieces) = by_file.get_mut(&piece.file) else {
            return Err(unfit(format!("its image.toml knows no file `{}`", piece.file.escape_debug())));
        };
        pieces.push(piece);
    }
    for file in image.files() {
        let pieces = by_file.get_mut(&file.file).expect("each has its list");
        pieces.sort_by_key(|piece| piece.offset);
        let mut end = 0;
        for piece in pieces {
            let next = piece.offset.checked_add(piece.bytes).filter(|next| *next <= file.bytes);
            match next {
                Some(next) if piece.offset >= end => end = next,
                _ => return Err(unfit(format!("pieces of `{}` overlap, or lie beyond its end", file.file))),
            }
        }
    }
    Ok(by_file)
}

/// The digest of a list's manifest for this kind of machine.
#[must_use]
pub fn for_this_host(index: &Index) -> Option<&Descriptor> {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let fits = |one: &&Descriptor| {
        one.platform.as_ref().is_some_and(|platform| platform.architecture == architecture && platform.os == "linux")
    };
    index.manifests.iter().find(fits)
}

/// Bytes that are fetched of an image: each blob once.
#[must_use]
pub fn packed_bytes(pieces: &BTreeMap<String, Vec<Piece>>) -> u64 {
    let blobs: BTreeSet<(&str, u64)> =
        pieces.values().flatten().map(|piece| (piece.digest.as_str(), piece.packed)).collect();
    blobs.iter().fold(0, |sum, (_, bytes)| sum.saturating_add(*bytes))
}
