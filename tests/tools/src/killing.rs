//! What the kill harness and its guests agree on: the lines of a job's script, and the bytes that each of them
//! prints. Both follow from job and script alone, so the harness knows every byte of a guest it has never seen.
//!
//! | line | does |
//! | --- | --- |
//! | `bytes N` | prints so many bytes |
//! | `work MS` | works on for so long, sending its trace as the runner does; prints nothing |
//! | `upload N` | uploads an artifact of so many bytes, and prints that it did |
//! | `download ID N` | fetches the artifact of another job, looks at its bytes, and prints that they are right |
//! | `cache N` | saves a cache of so many bytes by the key that all jobs have, looks for it, and prints that what it found is whole |
//! | `exit CODE` | ends the script so |

use std::fmt::Write as _;

/// First line of a guest's bytes: where dayfly's own lines before it end.
#[must_use]
pub fn first_line(job: u64) -> String {
    format!("the guest of job {job} begins\n")
}

/// Last line of a script that came to its end.
#[must_use]
pub fn last_line(code: i64) -> String {
    format!("the script ended with {code}\n")
}

/// Last line of a script that was canceled.
pub const CANCELED_LINE: &str = "the script was canceled\n";

/// One line of a script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// `bytes N`.
    Bytes(usize),
    /// `work MS`.
    Work(u64),
    /// `upload N`.
    Upload(usize),
    /// `download ID N`.
    Download(u64, usize),
    /// `cache N`.
    Cache(usize),
    /// `exit CODE`.
    Exit(i64),
}

impl Step {
    /// Reads a line; `None`: none of the above.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let (word, number) = (words.next()?, words.next()?);
        let step = match word {
            "bytes" => Self::Bytes(number.parse().ok()?),
            "work" => Self::Work(number.parse().ok()?),
            "upload" => Self::Upload(number.parse().ok()?),
            "download" => Self::Download(number.parse().ok()?, words.next()?.parse().ok()?),
            "cache" => Self::Cache(number.parse().ok()?),
            "exit" => Self::Exit(number.parse().ok()?),
            _ => return None,
        };
        words.next().is_none().then_some(step)
    }

    /// What it prints, if all goes well. `at`: how many bytes the guest has printed before.
    #[must_use]
    pub fn printed(self, job: u64, at: usize) -> Vec<u8> {
        match self {
            Self::Bytes(count) => bytes(job, at, count),
            Self::Work(_) | Self::Exit(_) => Vec::new(),
            Self::Upload(count) => uploaded(count).into_bytes(),
            Self::Download(from, count) => downloaded(from, count).into_bytes(),
            Self::Cache(count) => cached(count).into_bytes(),
        }
    }
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bytes(count) => write!(f, "bytes {count}"),
            Self::Work(ms) => write!(f, "work {ms}"),
            Self::Upload(count) => write!(f, "upload {count}"),
            Self::Download(from, count) => write!(f, "download {from} {count}"),
            Self::Cache(count) => write!(f, "cache {count}"),
            Self::Exit(code) => write!(f, "exit {code}"),
        }
    }
}

/// The line after an upload that GitLab took.
#[must_use]
pub fn uploaded(count: usize) -> String {
    format!("uploaded {count} bytes\n")
}

/// The line after a download that was right.
#[must_use]
pub fn downloaded(from: u64, count: usize) -> String {
    format!("downloaded {count} bytes of job {from}\n")
}

/// The line after a cache that was saved, and found whole.
#[must_use]
pub fn cached(count: usize) -> String {
    format!("cached {count} bytes\n")
}

/// A cache of this job's: whose it is, and so many bytes.
#[must_use]
pub fn cache(job: u64, count: usize) -> Vec<u8> {
    let mut cache = format!("{job} {count}\n").into_bytes();
    cache.extend_from_slice(&artifact(job, count));
    cache
}

/// Whether that is a whole cache of some job's.
#[must_use]
pub fn is_a_cache(found: &[u8]) -> bool {
    let line = found.split(|byte| *byte == b'\n').next().and_then(|line| std::str::from_utf8(line).ok());
    let words = line.and_then(|line| line.split_once(' '));
    let whose = words.and_then(|(job, count)| Some((job.parse().ok()?, count.parse().ok()?)));
    whose.is_some_and(|(job, count)| count <= found.len() && cache(job, count) == found)
}

/// `count` bytes of a job's trace, in lines of up to 64, each telling job and offset: one that is missing, doubled or
/// out of its place shows.
#[must_use]
pub fn bytes(job: u64, at: usize, count: usize) -> Vec<u8> {
    let mut text = String::with_capacity(count + 64);
    while text.len() < count {
        let offset = at + text.len();
        // Writing to a String never fails.
        let _ = writeln!(text, "job {job} byte {offset:012} abcdefghijklmnopqrstuvwxyz");
    }
    let mut bytes = text.into_bytes();
    bytes.truncate(count);
    if let Some(last) = bytes.last_mut() {
        *last = b'\n';
    }
    bytes
}

/// `count` bytes of the artifact of a job.
#[must_use]
pub fn artifact(job: u64, count: usize) -> Vec<u8> {
    (0..count)
        .map(|at| job.wrapping_mul(31).wrapping_add((at as u64).wrapping_mul(0x9e37_79b9) >> 16).to_le_bytes()[0])
        .collect()
}

/// All that the guest of this job prints if nothing stops it, and the script's exit code.
#[must_use]
pub fn expected(job: u64, script: &[Step]) -> (Vec<u8>, i64) {
    let mut all = first_line(job).into_bytes();
    let mut code = 0;
    for step in script {
        let printed = step.printed(job, all.len());
        all.extend_from_slice(&printed);
        if let Step::Exit(end) = step {
            code = *end;
            break;
        }
    }
    all.extend_from_slice(last_line(code).as_bytes());
    (all, code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_reads_back_as_it_was_written() {
        for step in [
            Step::Bytes(7),
            Step::Work(20),
            Step::Upload(9),
            Step::Download(4_300_000_001, 9),
            Step::Cache(5),
            Step::Exit(3),
        ] {
            assert_eq!(Step::parse(&step.to_string()), Some(step));
        }
        for line in ["", "bytes", "bytes x", "bytes 1 2", "sleep 1"] {
            assert_eq!(Step::parse(line), None, "{line}");
        }
    }

    #[test]
    fn a_guests_bytes_follow_from_job_and_script_and_end_with_the_exit() {
        let (all, code) = expected(5, &[Step::Bytes(100), Step::Exit(3), Step::Bytes(100)]);
        let first = first_line(5).len();
        assert_eq!((all.len(), code), (first + 100 + last_line(3).len(), 3));
        assert_eq!(all[first..first + 100], bytes(5, first, 100));
        assert!(all.ends_with(last_line(3).as_bytes()));
        assert_ne!(bytes(5, 0, 50), bytes(5, 1, 50), "a piece at another place is another one");
        assert_ne!(artifact(5, 50), artifact(6, 50));
        let whole = cache(5, 3000);
        assert!(is_a_cache(&whole) && !is_a_cache(&whole[..2999]) && !is_a_cache(b"") && !is_a_cache(b"5 3000\n"));
        let torn = [&whole[..1000], &cache(6, 3000)[1000..]].concat();
        assert!(!is_a_cache(&torn));
    }
}
