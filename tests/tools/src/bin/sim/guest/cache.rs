//! A guest's caches: what it saves, whole or cut, and what it finds.
//!
//! Each says by itself whose it is and where each of its bytes belongs, so that whoever finds one can tell whether it is
//! whole and for him (invariant 23).

use super::Guest;
use super::job::Runner;
use crate::event::GuestDoes;
use crate::kinds::Kind;
use dayfly_test_guest::Answer;
use dayfly_test_guest::http::request;
use std::time::Duration;
use tokio::time::sleep;

/// What costs no more than a cache, by what stands in the threat model: a disk that failed, or a clock that was set.
const EXCUSES: [Kind; 7] = [
    Kind::SyncFails,
    Kind::NoSpaceStart,
    Kind::ReadFails,
    Kind::ReadOnly,
    Kind::LowDisk,
    Kind::WallJump,
    Kind::RecordDamaged,
];

/// Whose a cache is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Whose {
    pub(crate) project: u64,
    pub(crate) protected: bool,
    pub(crate) key: u8,
}

impl Whose {
    /// Every third key is plain, the others are apart by what GitLab appends.
    fn path(self) -> String {
        let ending = ["", "-protected", "-non_protected"][usize::from(self.key % 3)];
        format!("/cache/project/{}/k{}{ending}", self.project, self.key)
    }

    fn content(self, job: u64, bytes: usize) -> Vec<u8> {
        let Self { project, protected, key } = self;
        let mut content = Vec::with_capacity(bytes + 64);
        while content.len() < bytes {
            let mut line = format!("{project} {protected} {key} {job} {bytes} {:08} ", content.len());
            line.extend(std::iter::repeat_n('.', 63_usize.saturating_sub(line.len())));
            line.push('\n');
            content.extend_from_slice(line.as_bytes());
        }
        content.truncate(bytes);
        content
    }

    /// What is wrong with what was found by this one's key.
    fn judge(self, found: &[u8]) -> Option<&'static str> {
        let line = found.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let words: Vec<&str> = std::str::from_utf8(line).unwrap_or_default().split(' ').collect();
        let [project, protected, key, job, bytes, ..] = words[..] else { return Some("a cache that is none") };
        let (Ok(project), Ok(protected), Ok(key)) = (project.parse(), protected.parse(), key.parse()) else {
            return Some("a cache that is none");
        };
        let (of, job, bytes) = (Self { project, protected, key }, job.parse().unwrap_or(0), bytes.parse().unwrap_or(0));
        if of.content(job, bytes) != found {
            return Some("a cache that is torn");
        }
        let is_his = match (of.protected, self.protected) {
            (true, false) => self.key.is_multiple_of(3),
            (writer, reader) => writer == reader,
        };
        (of.project != self.project || of.key != self.key || !is_his).then_some("a cache of somebody else's")
    }
}

/// Fetches, whole or in two parts with a pause between them, and judges what came.
pub(crate) async fn restore(runner: &Runner, guest: &mut Guest, key: u8) {
    let whose = runner.whose(guest, key);
    let path = whose.path();
    let was_saved = guest.line.story.inner().ledger.caches.contains(&whose);
    let whole = guest.line.dice.chance(500);
    let found = if whole {
        let Some(reply) = call(guest, &request("GET", &path, &[], "")).await else { return };
        (reply.status == 200).then_some(Some(reply.body)).or((reply.status == 404).then_some(None))
    } else {
        in_parts(guest, &path).await
    };
    match found {
        None => {}
        Some(Some(body)) => {
            if let Some(what) = whose.judge(&body) {
                guest.line.tell(GuestDoes::Wrong { invariant: 23, what });
            }
        }
        Some(None) if was_saved && !excused(guest) => {
            guest.line.tell(GuestDoes::Wrong { invariant: 23, what: "a cache that was saved is not there" });
        }
        Some(None) => {}
    }
}

/// `None`: something was in the way. `Some(None)`: there is none.
async fn in_parts(guest: &mut Guest, path: &str) -> Option<Option<Vec<u8>>> {
    let first = call(guest, &request("GET", path, &[("Range", "bytes=0-9")], "")).await?;
    if first.status != 206 {
        return (first.status == 404).then_some(None);
    }
    let version = first.header("etag").map(str::to_owned);
    // Somebody may save meanwhile, or another daemon come.
    sleep(Duration::from_millis(guest.line.dice.range(10, 20_000))).await;
    let rest = call(guest, &request("GET", path, &[("Range", "bytes=10-")], "")).await?;
    let is_same = rest.status == 206 && rest.header("etag").map(str::to_owned) == version;
    if !is_same {
        if matches!(rest.status, 206 | 404 | 416) && !excused(guest) {
            guest.line.tell(GuestDoes::Wrong { invariant: 23, what: "parts of two versions of a cache" });
        }
        return None;
    }
    Some(Some([first.body, rest.body].concat()))
}

/// One request, which its daemon takes for a sign of life.
async fn call(guest: &mut Guest, request: &[u8]) -> Option<Answer> {
    guest.line.tell(GuestDoes::Calls);
    let answer = guest.line.call(request).await;
    guest.line.tell(GuestDoes::Calls);
    answer
}

fn excused(guest: &Guest) -> bool {
    let inner = guest.line.story.inner();
    EXCUSES.iter().any(|kind| inner.hits.of(*kind) > 0)
}

/// Saves; `cut`: half of it, and hangs up.
pub(crate) async fn save(runner: &Runner, guest: &mut Guest, key: u8, bytes: usize, cut: bool) {
    let whose = runner.whose(guest, key);
    let request = request("PUT", &whose.path(), &[], whose.content(runner.job.id, bytes));
    if cut {
        guest.line.tell(GuestDoes::Calls);
        if let Some(mut connection) = guest.line.connect().await {
            let _ = connection.send(&request[..request.len() - bytes / 2 - 1]).await;
            sleep(Duration::from_millis(guest.line.dice.range(0, 500))).await;
        }
        return;
    }
    if call(guest, &request).await.is_some_and(|reply| reply.status == 200) {
        guest.line.story.inner().ledger.caches.insert(whose);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_tells_whose_it_is_and_whether_it_is_whole() {
        let whose = Whose { project: 7, protected: false, key: 1 };
        let content = whose.content(42, 1000);
        assert_eq!((content.len(), whose.judge(&content)), (1000, None));
        let mut torn = content.clone();
        torn[500..].copy_from_slice(&whose.content(43, 1000)[500..]);
        assert_eq!(whose.judge(&torn), Some("a cache that is torn"));
        assert_eq!(whose.judge(&content[..999]), Some("a cache that is torn"));
        assert_eq!(whose.judge(b"x"), Some("a cache that is none"));
        for other in [Whose { project: 8, ..whose }, Whose { protected: true, ..whose }, Whose { key: 2, ..whose }] {
            assert_eq!(other.judge(&content), Some("a cache of somebody else's"), "{other:?}");
        }
        let plain = Whose { protected: true, key: 3, ..whose };
        assert_eq!(Whose { protected: false, ..plain }.judge(&plain.content(1, 100)), None, "a plain key");
    }
}
