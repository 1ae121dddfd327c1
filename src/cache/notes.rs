//! What has one job had of the caches? For the last lines of its log, and for whoever asks later.

use crate::telemetry::{printable, sized};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use tokio::time::Instant;

/// Notes of one job at most: a guest can ask for any key.
const NOTES_MAX: usize = 24;

/// Characters of a key in a note at most.
const KEY_CHARACTERS_MAX: usize = 80;

/// Something that a job has had of the caches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// The key, for people.
    pub key: String,
    /// What became of it.
    pub what: What,
    /// Bytes that went over the wire for it.
    #[serde(default)]
    pub bytes: u64,
    /// Milliseconds from the first to the last of them.
    #[serde(default)]
    pub ms: u64,
}

/// What became of a request for a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// It was there.
    Hit,
    /// It was not.
    Miss,
    /// It is there now.
    Saved,
    /// It is larger than a project may have.
    TooLarge,
    /// No disk has room for it.
    NoRoom,
    /// The job broke off, or sent another length than it had said.
    Cut,
    /// The store on the host failed; that is not the job's doing.
    Failed,
}

impl What {
    /// Whether that is the end of a save.
    fn is_of_save(self) -> bool {
        !matches!(self, Self::Hit | Self::Miss)
    }

    /// For authors.
    fn words(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Miss => "miss",
            Self::Saved => "saved",
            Self::TooLarge => "not saved, it is larger than a project may have here",
            Self::NoRoom => "not saved, there is no room for it here",
            Self::Cut => "not saved, it did not arrive whole",
            Self::Failed => "not available, the store of caches failed; your job is not the cause",
        }
    }
}

impl Note {
    /// A line of it: `cache: hit, 212.0 MiB in 1.9 s (deps-1)`.
    #[must_use]
    pub fn words(&self) -> String {
        let seconds = Duration::from_millis(self.ms).as_secs_f64();
        let moved = match self.what {
            What::Hit | What::Saved if self.bytes > 0 => format!(", {} in {seconds:.1} s", sized(self.bytes)),
            _ => String::new(),
        };
        // A file of ours may have been changed since.
        format!("cache: {}{moved} ({})", self.what.words(), printable(&self.key))
    }
}

/// The notes of one job.
#[derive(Debug, Default)]
pub(super) struct Notes {
    notes: Vec<(Note, Instant)>,
    more: u64,
}

impl Notes {
    /// Those of a former daemon, to be gone on with.
    pub(super) fn of(before: Vec<Note>) -> Self {
        let now = Instant::now();
        Self { notes: before.into_iter().take(NOTES_MAX).map(|note| (note, now)).collect(), more: 0 }
    }

    /// One more; of the same key and kind it is the same one.
    pub(super) fn note(&mut self, key: &str, what: What, bytes: u64, since: Instant) {
        let key: String = key.chars().take(KEY_CHARACTERS_MAX).collect();
        let is_it = |note: &Note| note.key == key && note.what == what && !what.is_of_save();
        let elapsed = |since: Instant| u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
        if let Some((note, since)) = self.notes.iter_mut().find(|(note, _)| is_it(note)) {
            note.bytes = note.bytes.saturating_add(bytes);
            note.ms = elapsed(*since);
        } else if self.notes.len() < NOTES_MAX {
            self.notes.push((Note { key, what, bytes, ms: elapsed(since) }, since));
        } else {
            self.more = self.more.saturating_add(1);
        }
    }

    /// All of them, and how many there was no room for.
    pub(super) fn all(&self) -> (Vec<Note>, u64) {
        (self.notes.iter().map(|(note, _)| note.clone()).collect(), self.more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn ranges_of_one_entry_are_one_hit_and_each_save_is_its_own() {
        let (mut notes, since) = (Notes::default(), Instant::now());
        notes.note("deps", What::Miss, 0, since);
        notes.note("deps", What::Miss, 0, since);
        tokio::time::advance(Duration::from_secs(5)).await;
        let since = Instant::now();
        notes.note("main", What::Hit, 1, since);
        tokio::time::advance(Duration::from_millis(1900)).await;
        notes.note("main", What::Hit, 212 << 20, Instant::now());
        notes.note("deps", What::Saved, 700, Instant::now());
        notes.note("deps", What::Saved, 800, Instant::now());
        notes.note("big\u{1b}[2J", What::TooLarge, 9, Instant::now());
        let words: Vec<String> = notes.all().0.iter().map(Note::words).collect();
        assert_eq!(
            words,
            [
                "cache: miss (deps)",
                "cache: hit, 212.0 MiB in 1.9 s (main)",
                "cache: saved, 700 bytes in 0.0 s (deps)",
                "cache: saved, 800 bytes in 0.0 s (deps)",
                "cache: not saved, it is larger than a project may have here (big\\u{1b}[2J)",
            ]
        );
    }

    /// However many keys a guest thinks of.
    #[tokio::test(start_paused = true)]
    async fn notes_are_bounded() {
        let mut notes = Notes::default();
        for n in 0..1000 {
            notes.note(&format!("{n}{}", "k".repeat(500)), What::Miss, 0, Instant::now());
        }
        let (all, more) = notes.all();
        assert_eq!((all.len(), more), (NOTES_MAX, 1000 - NOTES_MAX as u64));
        assert!(all.iter().all(|note| note.key.chars().count() <= KEY_CHARACTERS_MAX));
        let words = Notes::of(all.clone()).all().0;
        assert_eq!(words, all);
    }
}
