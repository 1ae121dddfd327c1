//! `cache:` by an S3 store that the config.toml names: which keys a job reads and writes, and the two helpers that do.
//!
//! Signing is arithmetic that nobody here checks, so URLs carry a signature of nothing. The helpers are processes of their
//! own, started by a stage's script in the project directory; whatever becomes of a cache, the job goes on.

use crate::api::agent;
use crate::artifacts::{self, UploadArguments};
use crate::config::Cache;
use crate::payload::{CacheEntry, Job};
use crate::script::{Script, Transfer};
use crate::variables::Variables;
use std::fmt::Write as _;
use std::io::{self, Seek as _};
use ureq::http::{Request, StatusCode};

/// The helpers' names, as the official runner's.
pub(crate) const EXTRACTOR: &str = "cache-extractor";
pub(crate) const ARCHIVER: &str = "cache-archiver";

/// Fetches what earlier jobs have left; `None`: there is nothing to look for.
pub(crate) fn restore(job: &Job, variables: &Variables, store: &Cache, transfer: &Transfer<'_>) -> Option<Script> {
    let mut script = Script::new(variables);
    script.enter(transfer.project_dir);
    let mut any = false;
    for entry in job.cache.iter().filter(|entry| entry.policy != "push") {
        let own = variables.expand(&entry.key);
        let more = entry.fallback_keys.iter().map(|key| variables.expand(key));
        let last = variables.get("CACHE_FALLBACK_KEY").map(str::to_owned);
        // As the official runner: nobody takes protected refs' caches by a variable.
        let last = last.filter(|key| !key.ends_with("-protected"));
        let keys: Vec<String> =
            std::iter::once(own.clone()).chain(more).chain(last).filter(|k| !k.is_empty()).collect();
        if keys.is_empty() || !has_paths(entry) {
            continue;
        }
        any = true;
        let urls: Vec<String> = keys.iter().map(|key| url(store, variables, key)).collect();
        let mut words = vec![transfer.program, EXTRACTOR];
        words.extend(urls.iter().flat_map(|url| ["--url", url]));
        script.notice(&format!("Checking cache for {own}...")).command(&words);
    }
    any.then_some(script)
}

/// Leaves what the job made for later ones; `None`: nothing.
pub(crate) fn save(
    job: &Job,
    variables: &Variables,
    store: &Cache,
    transfer: &Transfer<'_>,
    succeeded: bool,
) -> Option<Script> {
    let mut script = Script::new(variables);
    script.enter(transfer.project_dir);
    let mut any = false;
    for entry in job.cache.iter().filter(|entry| entry.policy != "pull" && has_paths(entry)) {
        let wanted = match entry.when.as_str() {
            "always" => true,
            "on_failure" => !succeeded,
            _ => succeeded,
        };
        let key = variables.expand(&entry.key);
        if !wanted || key.is_empty() {
            continue;
        }
        any = true;
        let url = url(store, variables, &key);
        let paths: Vec<String> = entry.paths.iter().map(|path| variables.expand(path)).collect();
        let mut words = vec![transfer.program, ARCHIVER, "--url", &url];
        words.extend(paths.iter().flat_map(|path| ["--path", path]));
        if entry.untracked {
            words.push("--untracked");
        }
        script.notice(&format!("Creating cache {key}...")).command(&words);
    }
    any.then_some(script)
}

fn has_paths(entry: &CacheEntry) -> bool {
    entry.untracked || !entry.paths.is_empty()
}

/// Where this key is in the store: `[PATH/]project/ID/KEY`, for a store that all runners share.
fn url(store: &Cache, variables: &Variables, key: &str) -> String {
    let project = variables.get("CI_PROJECT_ID").unwrap_or("0");
    let mut path = String::new();
    for byte in format!("{}/project/{project}/{key}", store.s3.bucket_name).bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            path.push(char::from(byte));
        } else {
            let _ = write!(path, "%{byte:02X}");
        }
    }
    format!("http://{}/{path}?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Signature=0", store.s3.server_address)
}

/// The first of these that is there, unpacked into the working directory.
pub(crate) fn extract(urls: &[String]) {
    for url in urls {
        match fetch(url) {
            Ok(Some(file)) => {
                crate::log("Downloading cache from the store");
                match artifacts::unpack(file) {
                    Ok(()) => crate::log("Successfully extracted cache"),
                    Err(error) => crate::log(&format!("WARNING: unpack the cache: {error}")),
                }
                return;
            }
            Ok(None) => {}
            Err(error) => crate::log(&format!("WARNING: fetch the cache: {error}")),
        }
    }
    crate::log("WARNING: file does not exist; failed to extract cache");
}

fn fetch(url: &str) -> io::Result<Option<std::fs::File>> {
    let request = Request::get(url).body(()).map_err(io::Error::other)?;
    let answer = agent(0).run(request).map_err(ureq::Error::into_io)?;
    match answer.status() {
        StatusCode::NOT_FOUND => return Ok(None),
        StatusCode::OK => {}
        status => return Err(io::Error::other(format!("the store answered {status}"))),
    }
    let mut file = tempfile::tempfile()?;
    io::copy(&mut answer.into_body().into_with_config().limit(u64::MAX).reader(), &mut file)?;
    file.rewind()?;
    Ok(Some(file))
}

/// Packs these paths, and puts them into the store.
pub(crate) fn archive(url: &str, arguments: &UploadArguments) {
    match put(url, arguments) {
        Ok(true) => crate::log("Created cache"),
        Ok(false) => crate::log("WARNING: no files to cache"),
        Err(error) => crate::log(&format!("WARNING: Failed to create cache: {error}")),
    }
}

fn put(url: &str, arguments: &UploadArguments) -> io::Result<bool> {
    let files = artifacts::collect(arguments).map_err(io::Error::other)?;
    if files.is_empty() {
        return Ok(false);
    }
    let mut file = tempfile::tempfile()?;
    artifacts::write_zip(&mut file, &files)?;
    let length = file.stream_position()?;
    file.rewind()?;
    let request = Request::put(url)
        .header("Content-Type", "application/octet-stream")
        .header("Content-Length", length)
        .body(ureq::SendBody::from_owned_reader(file))
        .map_err(io::Error::other)?;
    let answer = agent(0).run(request).map_err(ureq::Error::into_io)?;
    if answer.status().is_success() {
        Ok(true)
    } else {
        Err(io::Error::other(format!("received: {}", answer.status())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::variables::plain;
    use std::path::{Path, PathBuf};

    fn store() -> Cache {
        let mut cache = Cache::default();
        cache.s3.server_address = "192.0.2.1".into();
        cache.s3.bucket_name = "cache".into();
        cache
    }

    fn scripts(cache: &str, more: &[(&str, &str)]) -> (Option<String>, Option<String>) {
        let job = Job::parse(format!(r#"{{"id": 7, "token": "JT", "cache": {cache}}}"#).as_bytes()).expect("a payload");
        let mut list = vec![plain("CI_PROJECT_ID", "42"), plain("NAME", "my deps")];
        list.extend(more.iter().map(|(key, value)| plain(key, *value)));
        let variables = Variables::new(list, PathBuf::from("/nonexistent/proj.tmp"));
        let transfer = Transfer { program: "/bin/runner", url: "http://192.0.2.1", project_dir: Path::new("/b/proj") };
        let text = |script: Option<Script>| script.map(Script::into_text);
        (
            text(restore(&job, &variables, &store(), &transfer)),
            text(super::save(&job, &variables, &store(), &transfer, true)),
        )
    }

    #[test]
    fn keys_are_looked_for_in_their_order_and_saved_by_their_own() {
        let entry = r#"[{"key": "$NAME-1-protected", "paths": ["deps/"], "policy": "pull-push", "when": "on_success",
            "fallback_keys": ["main-1-protected"]}]"#;
        let (restored, saved) = scripts(entry, &[("CACHE_FALLBACK_KEY", "any")]);
        let restored = restored.expect("a script");
        let at = |part: &str| restored.find(part).unwrap_or_else(|| panic!("{part}: {restored}"));
        assert!(at("/cache/project/42/my%20deps-1-protected?") < at("/42/main-1-protected?"));
        assert!(at("/42/main-1-protected?") < at("/42/any?"));
        let saved = saved.expect("a script");
        assert!(saved.contains("/42/my%20deps-1-protected?") && saved.contains("'--path' 'deps/'"), "{saved}");
        let (restored, _) = scripts(entry, &[("CACHE_FALLBACK_KEY", "x-protected")]);
        assert!(!restored.expect("a script").contains("/42/x-protected"));
    }

    #[test]
    fn a_policy_says_which_way() {
        let entry = |policy: &str| format!(r#"[{{"key": "k", "paths": ["d"], "policy": "{policy}"}}]"#);
        let both = |policy: &str| {
            let (restored, saved) = scripts(&entry(policy), &[]);
            (restored.is_some(), saved.is_some())
        };
        assert_eq!(
            [both("pull"), both("push"), both("pull-push"), both("")],
            [(true, false), (false, true), (true, true), (true, true)]
        );
        assert_eq!(scripts(r#"[{"key": "", "paths": ["d"]}, {"key": "k", "paths": []}]"#, &[]), (None, None));
    }
}
