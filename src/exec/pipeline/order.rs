//! In which order do the jobs run, and who gets whose artifacts?
//!
//! A job with `needs` runs after those jobs; one without runs after all jobs of earlier stages.
//! Artifacts come from the needed jobs, or those of `dependencies`, or all of earlier stages:
//! GitLab's rules, applied to the jobs that run here.

use super::error::Fault;
use super::job::{Links, Read};
use super::model::{Job, Note};
use super::node::Node;

/// Links and sorts. A link to a job that does not run here is a note; to one that does not exist
/// an error.
pub(super) fn order(
    reads: Vec<Read>,
    stages: &[String],
    root: &Node,
    notes: &mut Vec<Note>,
) -> Result<Vec<Job>, Fault> {
    let rank = |job: &Job| stages.iter().position(|s| *s == job.stage).unwrap_or(stages.len());
    let known: Vec<(String, usize)> = reads.iter().map(|r| (r.job.name.clone(), rank(&r.job))).collect();
    let mut jobs: Vec<Job> = Vec::new();
    for Read { mut job, links, .. } in reads {
        let earlier: Vec<String> =
            known.iter().filter(|(_, r)| *r < rank(&job)).map(|(name, _)| name.clone()).collect();
        let here = |name: &String| known.iter().any(|(n, _)| n == name);
        check_links(&job, &links, &here, root, notes)?;
        job.after = match &links.needs {
            Some(needs) => needs.iter().map(|n| n.job.clone()).filter(here).collect(),
            None => earlier.clone(),
        };
        let from = match &links.needs {
            Some(needs) => needs.iter().filter(|n| n.artifacts).map(|n| n.job.clone()).collect(),
            None => earlier,
        };
        job.artifacts_from = match links.dependencies {
            // With `needs`, `dependencies` chooses among them; without, among earlier stages.
            Some((_, names)) => from.into_iter().filter(|n| names.contains(n)).collect(),
            None => from,
        };
        job.artifacts_from.retain(|name| here(name));
        jobs.push(job);
    }
    jobs.sort_by_key(rank);
    sort(jobs)
}

fn check_links(
    job: &Job,
    links: &Links,
    here: &dyn Fn(&String) -> bool,
    root: &Node,
    notes: &mut Vec<Note>,
) -> Result<(), Fault> {
    let needs = links.needs.iter().flatten().map(|n| (n.line, "needs", &n.job, n.optional));
    let dependencies = links
        .dependencies
        .iter()
        .flat_map(|(line, names)| names.iter().map(move |n| (*line, "dependencies", n, false)));
    for (line, key, name, optional) in needs.chain(dependencies) {
        let exists = root.get(name).is_some();
        if *name == job.name {
            return Err(Fault::at(line, "names the job itself").under(key).of_job(&job.name));
        }
        if !exists && !optional {
            return Err(Fault::at(line, format!("there is no job `{name}` in this file")).under(key).of_job(&job.name));
        }
        if exists && !here(name) {
            let what = format!(
                "`{name}` does not run, so its artifacts are missing; to run it first: dayfly exec {name} {}",
                job.name
            );
            notes.push(Note { line, job: Some(job.name.clone()), key: key.into(), what });
        }
    }
    Ok(())
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
                let line = first.map_or(1, |job| job.line);
                return Err(Fault::at(line, format!("jobs wait for each other: {}", names.join(", "))).under("needs"));
            }
        }
    }
    Ok(sorted)
}
