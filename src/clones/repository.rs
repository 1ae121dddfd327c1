//! What of which repository does a job want? Pure: of the payload only what no variable changes.

use crate::gitlab::Source;
use crate::hex::hex;
use sha2::{Digest as _, Sha256};
use url::Url;

/// Refs of one fetch; GitLab names two or three.
const REFSPECS_MAX: usize = 16;

/// Bytes of one of them.
const REF_BYTES_MAX: usize = 512;

/// Bytes of a repository's path.
const PATH_BYTES_MAX: usize = 1024;

/// A project's repository, and what of it a job needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repository {
    /// GitLab's URL.
    pub(super) gitlab: Url,
    /// GitLab's id of the project.
    pub(super) project: u64,
    /// Where git fetches it: scheme, host and port of GitLab's own URL, whatever the payload says.
    pub(super) url: Url,
    /// The commit of the job, hex.
    pub(super) sha: String,
    /// What is fetched: a ref of the server's, and where it goes in the mirror.
    pub(super) refspecs: Vec<String>,
}

impl Repository {
    /// The repository of a job from the GitLab at this URL. `None`: the payload does not name one that could be fetched.
    ///
    /// The refs are those that the payload has the runner fetch, so a mirror holds what this job gets anyway, and nothing
    /// that its token could not read.
    #[must_use]
    pub fn of(gitlab: &Url, source: &Source) -> Option<Self> {
        let path = source.repository.as_deref().filter(|path| is_plain_path(path))?;
        let mut url = gitlab.clone();
        url.set_path(&format!("{path}.git"));
        url.set_query(None);
        url.set_fragment(None);
        // None of GitLab's own URL either: the token goes by a header of its own.
        url.set_username("").ok()?;
        url.set_password(None).ok()?;
        let sha = source.sha.clone().filter(|sha| is_object(sha))?;
        let refspecs: Vec<String> =
            source.refspecs.iter().take(REFSPECS_MAX).filter_map(|refspec| mirrored(refspec)).collect();
        if refspecs.is_empty() {
            return None;
        }
        Some(Self { gitlab: gitlab.clone(), project: source.project_id?, url, sha, refspecs })
    }

    /// A name for its directory: the same for the same project of the same GitLab, and no other's.
    #[must_use]
    pub fn directory(&self) -> String {
        // Two GitLabs may both have a project 42.
        format!(
            "{}-{}",
            &hex(&Sha256::digest(self.gitlab.as_str().trim_end_matches('/').as_bytes()))[..16],
            self.project
        )
    }
}

/// The id of an object: SHA-1, or SHA-256 in a repository of that kind.
pub(super) fn is_object(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// A path that stays the one it is in a URL.
fn is_plain_path(path: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'/' | b'~' | b'+');
    path.len() <= PATH_BYTES_MAX
        && path.strip_prefix('/').is_some_and(|rest| rest.split('/').all(|part| !matches!(part, "" | "." | "..")))
        && path.bytes().all(is_plain)
}

/// A refspec of the payload with a place of the mirror's own behind it; `None`: git would not take it, or for more than a ref.
///
/// Branches keep a place each, by the digest of their names: no name of a server's becomes a name of a file here. Refs
/// that live for one pipeline share one.
fn mirrored(refspec: &str) -> Option<String> {
    let refspec = refspec.strip_prefix('+').unwrap_or(refspec);
    let from = refspec.split_once(':').map_or(refspec, |(from, _)| from);
    let plain = from.strip_suffix("/*").unwrap_or(from);
    if !is_ref(plain) {
        return None;
    }
    let digest = hex(&Sha256::digest(from.as_bytes()));
    let place = match (plain == from, from.starts_with("refs/pipelines/")) {
        (true, true) => "refs/dayfly/pipeline".to_owned(),
        (true, false) => format!("refs/dayfly/{}", &digest[..32]),
        (false, _) => format!("refs/dayfly/{}/*", &digest[..32]),
    };
    Some(format!("+{from}:{place}"))
}

/// Whether this is the name of a ref, by git-check-ref-format(1) and narrower: it goes into an argument.
fn is_ref(name: &str) -> bool {
    let is_bad = |c: char| c.is_control() || c.is_whitespace() || "~^:?*[\\\u{7f}".contains(c);
    let part_is_good = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.ends_with(".lock");
    name.len() <= REF_BYTES_MAX
        && name.starts_with("refs/")
        && !name.chars().any(is_bad)
        && !name.contains("..")
        && !name.contains("@{")
        && !name.ends_with('.')
        && name.split('/').all(part_is_good)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(repository: &str, refspecs: &[&str]) -> Source {
        Source {
            repository: Some(repository.into()),
            project_id: Some(42),
            sha: Some("ab".repeat(20)),
            refspecs: refspecs.iter().map(|text| (*text).to_owned()).collect(),
            ..Source::default()
        }
    }

    fn of(gitlab: &str, source: &Source) -> Option<Repository> {
        Repository::of(&gitlab.parse().unwrap(), source)
    }

    #[test]
    fn what_a_payload_has_the_runner_fetch_is_mirrored_from_gitlab_itself() {
        let wanted = source(
            "/group/project",
            &["+refs/pipelines/7:refs/pipelines/7", "+refs/heads/main:refs/remotes/origin/main"],
        );
        let repository = of("https://gitlab.example:8443/", &wanted).unwrap();
        assert_eq!(repository.url.as_str(), "https://gitlab.example:8443/group/project.git");
        assert_eq!(repository.refspecs[0], "+refs/pipelines/7:refs/dayfly/pipeline");
        let (from, to) = repository.refspecs[1].split_once(':').unwrap();
        assert_eq!((from, to.len()), ("+refs/heads/main", "refs/dayfly/".len() + 32));
        // The same branch has the same place, another another.
        let again =
            of("https://gitlab.example:8443/", &source("/group/project", &["+refs/heads/main:x", "refs/heads/other"]))
                .unwrap();
        assert_eq!(again.refspecs[0], repository.refspecs[1]);
        assert_ne!(again.refspecs[1].split_once(':').unwrap().1, to);
        assert_eq!(again.directory(), repository.directory());
        // All branches, as for a job that wants the whole history.
        let all = of("https://gitlab.example/", &source("/g/p", &["+refs/heads/*:refs/remotes/origin/*"])).unwrap();
        assert!(
            all.refspecs[0].starts_with("+refs/heads/*:refs/dayfly/") && all.refspecs[0].ends_with("/*"),
            "{all:?}"
        );
    }

    /// T40: a token goes to the GitLab of its runner's entry and nowhere else, and a name never becomes an option or a path.
    #[test]
    fn what_git_could_take_for_something_else_is_no_repository() {
        let refs = ["+refs/heads/main:refs/remotes/origin/main"];
        for path in
            ["", "group/p", "/g/../p", "/g//p", "/g/p?x", "/g/p#x", "/g/p%2e", "/g/p q", "//evil.example/p", "/g/p\n"]
        {
            assert_eq!(of("https://gitlab.example/", &source(path, &refs)), None, "{path}");
        }
        for bad in [
            "",
            "--upload-pack=touch /tmp/x",
            "main",
            "refs/heads/a b",
            "refs/heads/../x",
            "refs/heads/.x",
            "refs/heads/x.lock",
            "refs/heads/*/x",
            "refs/heads/x^{}",
            "refs/heads/x@{1}",
            "refs//x",
            "refs/heads/x\u{7}",
        ] {
            assert_eq!(mirrored(bad), None, "{bad}");
        }
        assert_eq!(of("https://gitlab.example/", &source("/g/p", &["--x"])), None);
        for sha in ["", "HEAD", "--all", "AB", &"g".repeat(40)] {
            assert_eq!(of("https://gitlab.example/", &Source { sha: Some(sha.into()), ..source("/g/p", &refs) }), None);
        }
        assert_eq!(of("https://gitlab.example/", &Source { project_id: None, ..source("/g/p", &refs) }), None);
        // What stands in GitLab's URL besides is not sent along.
        let url = of("https://u:p@gitlab.example/sub/?q=1#f", &source("/sub/g/p", &refs)).unwrap().url;
        assert_eq!(url.as_str(), "https://gitlab.example/sub/g/p.git");
    }

    /// Two projects never share a directory: neither of one GitLab nor of two.
    #[test]
    fn each_project_of_each_gitlab_has_a_directory_of_its_own() {
        let refs = ["refs/heads/main"];
        let of_project = |gitlab: &str, project: u64| {
            of(gitlab, &Source { project_id: Some(project), ..source("/g/p", &refs) }).unwrap().directory()
        };
        let one = of_project("https://gitlab.example/", 42);
        assert_eq!(one, of_project("https://gitlab.example/", 42));
        for (gitlab, project) in
            [("https://gitlab.example/", 43), ("https://other.example/", 42), ("https://gitlab.example/sub/", 42)]
        {
            assert_ne!(one, of_project(gitlab, project));
        }
        // A fork has an id of its own, whatever its path becomes.
        assert!(one.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'), "{one}");
    }
}
