//! What is in an image, and what differs between two?

use super::{describe, say};
use crate::image::difference::differences_of;
use crate::image::manifest::Manifest;
use crate::image::store::{Image, ImageStore};

/// The name of its directory: `NAME@DIGITS`, or what an operator called it.
pub(super) fn version(image: &Image) -> String {
    image.dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Prints one image, or one version of it.
pub(super) fn inspect(store: &ImageStore, name: &str, json: bool) -> anyhow::Result<()> {
    let image = store.named(name)?;
    let versions = store.versions(&image.name)?;
    if json {
        let whole = serde_json::json!({
            "name": image.name, "version": version(&image), "digest": image.digest(), "directory": image.dir,
            "versions": versions, "manifest": image.manifest,
        });
        serde_json::to_string_pretty(&whole)?.lines().for_each(say);
        return Ok(());
    }
    let Manifest { build, disk, contract, networks, .. } = &image.manifest;
    say(&format!("{}  {}", version(&image), describe(&image)));
    say(&format!("digest     {}", image.digest()));
    say(&format!("directory  {}", image.dir.display()));
    say(&format!("made of    {}, kernel {}, {} packages", build.suite, build.kernel, build.packages.len()));
    say(&format!("disk       {} MiB in its file, {} GiB for a job at least", disk.bytes >> 20, image.disk_bytes >> 30));
    say(&format!("contract   {contract}"));
    if !networks.is_empty() {
        say(&format!("networks   {}", networks.join(", ")));
    }
    if let Some(docker) = &image.manifest.docker {
        let none = "none of its own";
        say(&format!(
            "helper     {}",
            docker.helper_image.as_deref().unwrap_or("none: each job's runner fetches its own")
        ));
        say(&format!("container  {} where a job names none", docker.container_image.as_deref().unwrap_or(none)));
        docker.images.iter().for_each(|name| say(&format!("has        {name}")));
    }
    for (at, version) in versions.iter().enumerate() {
        say(&format!("version    {version}{}", if at == 0 { " (in use)" } else { "" }));
    }
    Ok(())
}

/// Prints what differs between two images or versions.
pub(super) fn differences(store: &ImageStore, one: &str, other: &str) -> anyhow::Result<()> {
    let lines = differences_of(&store.named(one)?.manifest, &store.named(other)?.manifest);
    if lines.is_empty() {
        say("no difference in suite, kernel, runner and packages");
    }
    lines.iter().for_each(|line| say(line));
    Ok(())
}
