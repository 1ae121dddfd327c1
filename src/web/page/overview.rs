//! The first page: what runs, what waits and why, what has ended, the host, the fleet.

use super::{cell, colour, job_path, page, row_name, table, time};
use crate::history::End;
use crate::status::{CapacityStatus, ImageStatus, JobStatusReport, RunnerState, RunnerStatus, StatusReport, why};
use crate::telemetry::lasting;
use crate::web::fleet::Other;
use maud::{Markup, html};
use std::time::Duration;

/// The page.
pub(in crate::web) fn overview(status: &StatusReport, ended: &[End], fleet: &[Other]) -> String {
    let title = match (status.daemon.problems.len(), status.jobs.len()) {
        (0, jobs) => format!("dayfly: {}", count(jobs, "job")),
        (problems, _) => format!("dayfly: {}", count(problems, "problem")),
    };
    page(
        &title,
        &header(status),
        &html! {
            section aria-labelledby="host-h" { h2 #host-h { "Room on this host" } div #host data-live { (room(&status.capacity)) } }
            section aria-labelledby="runners-h" { h2 #runners-h { "Runners" } div #runners data-live { (runners(&status.runners)) } }
            section aria-labelledby="jobs-h" { h2 #jobs-h { "Jobs under way" } div #jobs data-live { (jobs(&status.jobs)) } }
            section aria-labelledby="ended-h" { h2 #ended-h { "Ended jobs" } div #ended data-live { (ends(ended)) } }
            section aria-labelledby="images-h" { h2 #images-h { "Images" } div #images data-live { (images(&status.images)) } }
            @if !fleet.is_empty() {
                section aria-labelledby="fleet-h" { h2 #fleet-h { "The fleet" } div #fleet data-live { (others(fleet)) } }
            }
        },
    )
}

fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

fn header(status: &StatusReport) -> Markup {
    let daemon = &status.daemon;
    html! {
        header {
            h1 { "dayfly " (daemon.version) }
            p .faint { "Process " (daemon.pid) ", since " (daemon.since) }
            // What a screen reader reads out when it changes.
            p #news data-live role="status" {
                (count(status.jobs.len(), "job")) " under way, "
                @if daemon.problems.is_empty() { "no problem" } @else { (count(daemon.problems.len(), "problem")) }
                @if daemon.draining { "; draining: no more jobs are taken" }
            }
            div #problems data-live {
                @if !daemon.problems.is_empty() {
                    ul .problems aria-label="Problems" { @for problem in &daemon.problems { li { (problem) } } }
                }
            }
        }
    }
}

fn room(c: &CapacityStatus) -> Markup {
    let rows = [
        ("Jobs", u64::from(c.jobs), Some(u64::from(c.jobs_max)), ""),
        ("CPUs", u64::from(c.cpus), c.cpus_max.map(u64::from), ""),
        ("Memory", c.memory_mib, Some(c.memory_mib_max), " MiB"),
        ("Disk", c.disk_gib, Some(c.disk_gib_max), " GiB"),
    ];
    html! {
        ul .room {
            @for (what, promised, bound, unit) in rows {
                li {
                    strong { (what) } ": " (promised)
                    @if let Some(bound) = bound {
                        " of " (bound) (unit)
                        meter min="0" max=(bound.max(1)) value=(promised.min(bound.max(1))) aria-label=(format!("{what} promised")) {}
                    } @else { " promised" }
                }
            }
        }
    }
}

fn runners(runners: &[RunnerStatus]) -> Markup {
    let row = |runner: &RunnerStatus| {
        let answered = match (&runner.outage, runner.answered_s) {
            (Some(outage), _) => html! { span .bad { (outage) } },
            (None, Some(seconds)) => html! { "answered " (age(seconds)) " ago" },
            (None, None) => html! { "not asked yet" },
        };
        let well = matches!(runner.state, RunnerState::Polling | RunnerState::WaitingForRoom { .. });
        html! {
            (row_name(&html! { (runner.name) }))
            (cell("GitLab", &html! { (runner.url) br; span .faint { (answered) } }))
            (cell("Class", &html! { (runner.class) }))
            (cell("Jobs", &html! { (runner.jobs) }))
            (cell("State", &html! { span .bad[!well] { (runner.state) } }))
        }
    };
    let rows: Vec<Markup> = runners.iter().map(row).collect();
    table("Runners", &["Runner", "GitLab", "Class", "Jobs", "State, and why the next job waits"], &rows)
}

fn jobs(jobs: &[JobStatusReport]) -> Markup {
    if jobs.is_empty() {
        return html! { p .faint { "No job is under way." } };
    }
    let row = |job: &JobStatusReport| {
        html! {
            (row_name(&html! { a href=(job_path(job.id.0, &job.runner)) { (job.id) } }))
            (cell("What", &html! { (job.project) ": " (job.name) }))
            (cell("Runner", &html! { (job.runner) }))
            (cell("State", &html! { span class=(colour(&job.state)) { (job.state) } }))
            (cell("Phase", &html! { (job.phase) }))
            (cell("For", &html! { (age(job.age_s)) }))
            (cell("VM", &html! { @if let Some(vm) = &job.vm { (vm) } }))
        }
    };
    let rows: Vec<Markup> = jobs.iter().map(row).collect();
    table("Jobs under way", &["Job", "What", "Runner", "State", "Phase", "For", "VM"], &rows)
}

fn ends(ended: &[End]) -> Markup {
    if ended.is_empty() {
        return html! { p .faint { "None is kept." } };
    }
    let row = |end: &End| {
        let took = Duration::try_from(end.ended.duration_since(end.received)).unwrap_or_default();
        html! {
            (row_name(&html! { a href=(job_path(end.id.0, &end.runner)) { (end.id) } }))
            (cell("What", &html! { (end.project) ": " (end.name) }))
            (cell("Runner", &html! { (end.runner) }))
            (cell("Verdict", &html! { span class=(colour(end.verdict.word())) { (end.verdict.word()) } }))
            (cell("Why", &html! { (why(end)) }))
            (cell("Took", &html! { (lasting(took)) }))
            (cell("Ended", &time(end.ended)))
        }
    };
    let rows: Vec<Markup> = ended.iter().map(row).collect();
    table("Ended jobs", &["Job", "What", "Runner", "Verdict", "Why", "Took", "Ended"], &rows)
}

fn images(images: &[ImageStatus]) -> Markup {
    if images.is_empty() {
        return html! { p .faint { "No class has an image that is known." } };
    }
    let row = |image: &ImageStatus| {
        html! { (row_name(&html! { (image.name) })) (cell("Made", &html! { (age(image.age_s)) " ago" })) }
    };
    let rows: Vec<Markup> = images.iter().map(row).collect();
    table("Images", &["Image", "Made"], &rows)
}

fn others(fleet: &[Other]) -> Markup {
    let row = |other: &Other| {
        let name =
            html! { a href=(other.url) rel="noreferrer" { (other.url.host_str().unwrap_or(other.url.as_str())) } };
        match &other.status {
            None => {
                html! { (row_name(&name)) (cell("State", &html! { "is being asked" })) (cell("Jobs", &html! {})) (cell("Version", &html! {})) }
            }
            Some(Err(why)) => html! {
                (row_name(&name)) (cell("State", &html! { span .bad { "does not answer: " (why) } })) (cell("Jobs", &html! {})) (cell("Version", &html! {}))
            },
            Some(Ok(status)) => {
                let problems = &status.daemon.problems;
                html! {
                    (row_name(&name))
                    (cell("State", &html! {
                        @if problems.is_empty() { span .well { "well" } } @else { span .bad { (problems.join("; ")) } }
                        @if status.daemon.draining { ", draining" }
                    }))
                    (cell("Jobs", &html! { (status.capacity.jobs) " of " (status.capacity.jobs_max) }))
                    (cell("Version", &html! { (status.daemon.version) }))
                }
            }
        }
    };
    let rows: Vec<Markup> = fleet.iter().map(row).collect();
    table("The fleet", &["Daemon", "State", "Jobs", "Version"], &rows)
}

fn age(seconds: u64) -> String {
    lasting(Duration::from_secs(seconds))
}
