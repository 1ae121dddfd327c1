//! In which order do the jobs run, and who gets whose artifacts?
//!
//! A job with `needs` runs after those jobs; one without runs after all jobs of earlier stages.
//! Artifacts come from the needed jobs, or those of `dependencies`, or all of earlier stages:
//! GitLab's rules, applied to the jobs that run here.

use super::error::{Fault, Line};
use super::job::{Links, Need, Read};
use super::model::{Job, Note};
use super::resolve::Resolver;
use std::collections::BTreeSet;

/// A job that runs here.
struct Known {
    name: String,
    key: String,
    rank: usize,
}

impl Known {
    /// Whether a link to `name` means it: by its own name, or by the key of which it is one job of several.
    fn is(&self, name: &str) -> bool {
        self.name == name || self.key == name
    }

    fn is_needed(&self, need: &Need) -> bool {
        self.is(&need.job) && need.of_matrix.as_ref().is_none_or(|names| names.contains(&self.name))
    }
}

/// Links and sorts. A link to a job that does not run here is a note; to one that does not exist
/// an error, unless it may stand in a file that is not read.
pub(super) fn order(
    reads: Vec<Read>,
    stages: &[String],
    resolver: &Resolver,
    notes: &mut Vec<Note>,
) -> Result<Vec<Job>, Fault> {
    let rank = |job: &Job| stages.iter().position(|s| *s == job.stage).unwrap_or(stages.len());
    let known: Vec<Known> =
        reads.iter().map(|r| Known { name: r.job.name.clone(), key: r.job.key.clone(), rank: rank(&r.job) }).collect();
    let mut jobs: Vec<Job> = Vec::new();
    for Read { mut job, links, .. } in reads {
        check_links(&job, &links, &known, resolver, notes)?;
        let own = rank(&job);
        let earlier = || known.iter().filter(|k| k.rank < own).map(|k| k.name.clone()).collect();
        let linked = |wanted: &dyn Fn(&Need) -> bool| match &links.needs {
            Some(needs) => {
                let mut names: Vec<String> = Vec::new();
                for need in needs.iter().filter(|need| wanted(need)) {
                    let of_need = known.iter().filter(|k| k.is_needed(need) && k.name != job.name);
                    names.extend(of_need.map(|k| k.name.clone()));
                }
                let mut seen = BTreeSet::new();
                names.retain(|name| seen.insert(name.clone()));
                names
            }
            None => earlier(),
        };
        let after = linked(&|_| true);
        let mut from = linked(&|need| need.artifacts);
        if let Some((_, names)) = &links.dependencies {
            // With `needs`, `dependencies` chooses among them; without, among earlier stages.
            from.retain(|name| known.iter().any(|k| k.name == *name && names.iter().any(|n| k.is(n))));
        }
        (job.after, job.artifacts_from) = (after, from);
        jobs.push(job);
    }
    jobs.sort_by_key(rank);
    sort(jobs)
}

fn check_links(
    job: &Job,
    links: &Links,
    known: &[Known],
    resolver: &Resolver,
    notes: &mut Vec<Note>,
) -> Result<(), Fault> {
    let needs = links.needs.iter().flatten().map(|n| (n.line, "needs", &n.job, n.optional));
    let dependencies = links
        .dependencies
        .iter()
        .flat_map(|(line, names)| names.iter().map(move |n| (*line, "dependencies", n, false)));
    for (line, key, name, optional) in needs.chain(dependencies) {
        let mut note = |what| notes.push(Note { line, job: Some(job.name.clone()), key: key.into(), what });
        if *name == job.name {
            return Err(Fault::at(line, "names the job itself").under(key).of_job(&job.name));
        }
        if known.iter().any(|k| k.is(name)) {
            continue;
        }
        // One of a matrix goes by its key: `linux: [a, b]`, `test 1/4`.
        let of_several = name.match_indices([' ', ':']).filter_map(|(at, _)| name.get(..at));
        let exists = resolver.root().get(name).is_some()
            || of_several
                .into_iter()
                .any(|n| resolver.root().get(n).is_some_and(|e| e.value.entry("script").is_some()));
        if exists {
            note(format!(
                "`{name}` does not run, so its artifacts are missing; to run it first: dayfly exec {} {}",
                argument(name),
                argument(&job.name)
            ));
        } else if !resolver.hint().is_empty() {
            note(format!("there is no job `{name}` in this file, and its artifacts are missing{}", resolver.hint()));
        } else if !optional {
            return Err(Fault::at(line, format!("there is no job `{name}` in this file")).under(key).of_job(&job.name));
        }
    }
    Ok(())
}

/// A name as a shell takes it for one word.
fn argument(name: &str) -> String {
    let plain = name.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | '/' | ':'));
    if plain { name.to_owned() } else { format!("'{}'", name.replace('\'', "'\\''")) }
}

/// Moves each job behind those that it must follow, keeping the order otherwise.
fn sort(mut jobs: Vec<Job>) -> Result<Vec<Job>, Fault> {
    let mut sorted: Vec<Job> = Vec::new();
    while !jobs.is_empty() {
        let ready =
            jobs.iter().position(|job| job.after.iter().all(|name| sorted.iter().any(|done| done.name == *name)));
        match (ready, jobs.first()) {
            (Some(index), _) => sorted.push(jobs.remove(index)),
            (None, first) => {
                let names: Vec<&str> = jobs.iter().map(|j| j.name.as_str()).collect();
                let line = first.map_or(Line::from(1), |job| job.line);
                return Err(Fault::at(line, format!("jobs wait for each other: {}", names.join(", "))).under("needs"));
            }
        }
    }
    Ok(sorted)
}
