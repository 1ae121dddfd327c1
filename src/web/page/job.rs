//! The page of one job: its steps, its machine, what GitLab has of it, and its console for who may see that.

use super::{colour, job_path, page, time};
use crate::history::{End, MachineWas, Step};
use crate::status::{JobDetail, JobFound, why};
use crate::telemetry::lasting;
use maud::{Markup, html};
use std::time::Duration;

/// Characters of an image's digest that are shown.
const DIGEST_CHARACTERS: usize = 12;

/// What is shown of a console.
pub(in crate::web) enum Console {
    /// What it says.
    Text(String),
    /// None is there, or kept.
    None,
    /// Not to somebody without the token.
    Hidden {
        /// Whether there is one to be shown.
        has_token: bool,
    },
}

/// The page; `None`: no such job is known.
pub(in crate::web) fn job(found: &JobFound, console: &Console) -> Option<String> {
    let (title, now, facts, steps, path) = match found {
        JobFound::Running { job } => {
            let title = format!("Job {}: {}", job.job.id, job.job.state);
            let now = if job.job.phase.is_empty() { job.job.state.clone() } else { job.job.phase.clone() };
            (title, now, running(job), &job.steps, job_path(job.job.id.0, &job.job.runner))
        }
        JobFound::Ended { end } => {
            let title = format!("Job {}: {}", end.id, end.verdict.word());
            (title, format!("ended: {}", end.verdict.word()), ended(end), &end.steps, job_path(end.id.0, &end.runner))
        }
        JobFound::Unknown | JobFound::Ambiguous { .. } => return None,
    };
    let header = html! {
        header {
            p { a href="/" { "All jobs" } }
            h1 #name data-live { (title) }
            // What a screen reader reads out when it changes.
            p #news .faint data-live role="status" { (now) }
        }
    };
    Some(page(
        &format!("{title} · dayfly"),
        &header,
        &html! {
            section aria-labelledby="facts-h" { h2 #facts-h { "What it is" } div #facts data-live { (facts) } }
            section aria-labelledby="steps-h" { h2 #steps-h { "What it has come to" } div #steps data-live { (list(steps)) } }
            section aria-labelledby="console-h" {
                h2 #console-h { "The end of its machine's console" }
                div #console data-live { (shown(console, &path)) }
            }
        },
    ))
}

fn running(job: &JobDetail) -> Markup {
    let status = &job.job;
    html! {
        dl {
            dt { "What" } dd { (status.project) ": " (status.name) }
            dt { "Runner" } dd { (status.runner) ", class " (job.class) }
            dt { "State" } dd { span class=(colour(&status.state)) { (status.state) } ", for " (lasting(Duration::from_secs(status.age_s))) }
            dt { "Phase" } dd { (status.phase) }
            dt { "GitLab's word" } dd { (job.gitlab) }
            (machine(job.machine.as_ref()))
        }
    }
}

fn ended(end: &End) -> Markup {
    let (took, why) = (Duration::try_from(end.ended.duration_since(end.received)).unwrap_or_default(), why(end));
    html! {
        dl {
            dt { "What" } dd { (end.project) ": " (end.name) }
            dt { "Runner" } dd { (end.runner) ", class " (end.class) }
            dt { "Verdict" } dd { span class=(colour(end.verdict.word())) { (end.verdict.word()) } @if !why.is_empty() { ": " (why) } }
            dt { "Came" } dd { (time(end.received)) }
            dt { "Ended" } dd { (time(end.ended)) ", after " (lasting(took)) }
            dt { "GitLab" } dd { (end.gitlab) " " (end.at_gitlab.words()) "; the log has " (end.log_bytes.div_ceil(1024)) " KiB" }
            (machine(end.machine.as_ref()))
        }
    }
}

fn machine(machine: Option<&MachineWas>) -> Markup {
    let Some(m) = machine else { return html! {} };
    let digest: String = m.digest.chars().take(DIGEST_CHARACTERS).collect();
    html! {
        dt { "Machine" }
        dd { (m.cpus) " CPUs, " (m.memory_mib) " MiB memory, " (m.disk_gib) " GiB disk, executor " (m.executor)
             @if let Some(vm) = &m.vm { ", " (vm) } }
        dt { "Image" } dd { (m.image) " (" (digest) ")" }
    }
}

fn list(steps: &[Step]) -> Markup {
    if steps.is_empty() {
        return html! { p .faint { "Nothing yet, or a daemon before this one knew." } };
    }
    html! {
        ol {
            @for step in steps {
                li { (step.what) " " span .faint { "after " (format!("{:.2}", Duration::from_millis(step.at_ms).as_secs_f64())) " s" } }
            }
        }
    }
}

fn shown(console: &Console, path: &str) -> Markup {
    match console {
        Console::Text(text) => html! { pre tabindex="0" role="region" aria-label="Console" { (text) } },
        Console::None => html! { p .faint { "There is none, or none is kept." } },
        Console::Hidden { has_token: true } => html! {
            p { "It is shown to who has the token: " a href=(format!("{path}&token")) { "show it" } " (any name, the token as password)." }
        },
        Console::Hidden { has_token: false } => html! {
            p .faint { "It is shown by " code { "dayfly console" } ", and here to who has the token of " code { "status.token_file" } ", once there is one." }
        },
    }
}
