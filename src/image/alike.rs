//! What do the images that jobs of one runner may get have in common? One poll tells GitLab one set of features.
//!
//! GitLab fails a job for which a feature is missing, and an extra one breaks the guest (decision D10). So all of them
//! must have the same executor, and have learnt the same features; of their versions GitLab is told the oldest.

use super::store::Image;
use crate::gitlab::RunnerInfo;
use serde_json::Value;

/// What GitLab is told for all of them; the first one's name is that of the class's own image.
///
/// # Errors
/// The words for an operator: one was never boot-tested, or which two differ, in what, and what to do.
pub fn told(images: &[Image]) -> Result<RunnerInfo, String> {
    let mut oldest: Option<(Vec<u64>, RunnerInfo)> = None;
    let mut first: Option<(&Image, Value)> = None;
    for image in images {
        let untested = || format!("image `{0}` was never boot-tested; run `dayfly image test {0}`", image.name);
        let info = image.manifest.runner_info().ok_or_else(untested)?;
        let said: Value = serde_json::from_str(info.0.get()).unwrap_or_default();
        match &first {
            Some((other, others)) => {
                if let Some(what) = difference((other, others), (image, &said)) {
                    return Err(format!(
                        "images `{}` and `{}` cannot be those of one runner's jobs, for GitLab is told of one: {what}; \
                         give them runners of their own, or build both anew with the same gitlab-runner",
                        other.name, image.name
                    ));
                }
            }
            None => first = Some((image, said.clone())),
        }
        let version = numbers(said["version"].as_str().unwrap_or(&image.manifest.runner.version));
        if oldest.as_ref().is_none_or(|(known, _)| version < *known) {
            oldest = Some((version, info));
        }
    }
    oldest.map(|(_, info)| info).ok_or_else(|| "no image is configured".to_owned())
}

/// In what two images differ, as far as GitLab would have to know.
fn difference((a, a_said): (&Image, &Value), (b, b_said): (&Image, &Value)) -> Option<String> {
    let (one, other) = (a.manifest.executor.to_string(), b.manifest.executor.to_string());
    if one != other {
        return Some(format!("the executor is `{one}` in one and `{other}` in the other"));
    }
    let (one, other) = (&a_said["features"], &b_said["features"]);
    if one == other {
        return None;
    }
    let keys = |value: &Value| value.as_object().map(|map| map.keys().cloned().collect::<Vec<_>>()).unwrap_or_default();
    let all = keys(one).into_iter().chain(keys(other));
    let differs = all.into_iter().find(|key| one.get(key) != other.get(key));
    Some(match differs {
        Some(key) => format!("their gitlab-runners differ in the feature `{}`", key.escape_debug()),
        None => "their gitlab-runners differ in their features".to_owned(),
    })
}

/// The numbers of a version, in order: `19.3.0-rc1` is before `19.10.0`.
fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::manifest::tests::example;
    use crate::image::stamp::Stamp;
    use crate::vm::Boot;

    fn image(name: &str, version: &str, features: &str) -> Image {
        let mut manifest = example();
        name.clone_into(&mut manifest.name);
        manifest.info = Some(format!(r#"{{"name":"gitlab-runner","version":"{version}","features":{features}}}"#));
        let dir = std::path::PathBuf::from("/images").join(name);
        let (disk, boot, stamp) = (dir.join("disk.qcow2"), Boot::Disk, Stamp::default());
        Image { name: name.to_owned(), dir, disk, disk_bytes: 1, boot, manifest, stamp }
    }

    #[test]
    fn gitlab_is_told_the_oldest_version() {
        let features = r#"{"a":true,"b":false}"#;
        let images = [
            image("x", "19.10.0", features),
            image("y", "19.3.0", r#"{"b":false,"a":true}"#),
            image("z", "19.3.1", features),
        ];
        assert!(told(&images).unwrap().0.get().contains(r#""version":"19.3.0""#));
        assert!(told(&images[..1]).unwrap().0.get().contains("19.10.0"));
        assert_eq!(told(&[]).unwrap_err(), "no image is configured");
    }

    #[test]
    fn two_that_differ_are_named() {
        let one = image("x", "19.3.0", r#"{"a":true}"#);
        let other = image("y", "19.3.0", r#"{"a":true,"proxy":true}"#);
        let text = told(&[one.clone(), one.clone(), other]).unwrap_err();
        assert!(text.contains("images `x` and `y`") && text.contains("the feature `proxy`"), "{text}");
        let mut untested = one.clone();
        untested.manifest.info = None;
        assert!(told(&[one, untested]).unwrap_err().contains("never boot-tested; run `dayfly image test x`"));
    }
}
