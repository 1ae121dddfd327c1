//! What a job may have of the caches, and what it has had: for its log, and for whoever asks later.

use super::Machinery;
use crate::cache::{JobCache, Note, Tenant};
use crate::gitlab::JobPayload;
use crate::job::Parts;
use crate::job::journal::Record;
use crate::job::lines::Section;
use jiff::Timestamp;

/// What the job may have of the caches, by what its payload says of it. A project that GitLab does not name has none.
pub(super) fn of(parts: &Parts, record: &Record, payload: Option<&JobPayload>) -> Option<JobCache> {
    let source = &payload?.source;
    let caches = parts.caches.as_ref()?;
    let tenant = Tenant::new(&record.gitlab, source.project_id?, source.protected);
    let tenant = tenant.among(caches.tenants(), &record.gitlab, source.project_at(&record.gitlab));
    Some(caches.of(tenant, record.key.id.0, &record.key.directory()))
}

impl Machinery {
    /// What the job has had of the caches, without what its log masks.
    pub(super) fn cache_notes(&self) -> Vec<Note> {
        let Some(cache) = &self.cache else { return self.past.cache.clone() };
        let (notes, _) = cache.noted();
        let masked = |note: Note| Some(Note { key: self.masked(&note.key)?, ..note });
        notes.into_iter().filter_map(masked).collect()
    }

    /// A row of the log's last section for each of them.
    pub(in crate::job) fn add_cache_rows(&self, section: &mut Section) {
        let Some(cache) = &self.cache else { return };
        let (notes, more) = cache.noted();
        for note in notes {
            section.row(&note.words());
        }
        if more > 0 {
            section.row(&format!("cache: {more} more requests for other keys"));
        }
    }

    /// The section of a job whose machine cannot be asked what it has used; empty: it has had nothing, or what to mask is
    /// not known any more.
    pub(in crate::job) fn cache_section(&self, now: Timestamp) -> String {
        let Some(payload) = &self.payload else { return String::new() };
        let mut section = Section::default();
        self.add_cache_rows(&mut section);
        section.text(now, self.record.trace_sections, &payload.masks)
    }

    /// The job has ended: it holds on to no version any more.
    pub(super) async fn let_caches_go(&self) {
        if let Some(caches) = &self.parts.caches {
            caches.let_go(&self.record.key.directory()).await;
        }
    }
}
