//! The status page: written by the daemon, kept fresh by a small script of ours, nothing from elsewhere.
//!
//! Every text is escaped by the templates (maud), whoever has chosen it; what it may do in a browser is bounded by
//! [`POLICY`] besides. The script asks for the same page again and takes over the parts that have changed: without it, a
//! reload shows the same.

mod job;
mod overview;

pub(super) use job::{Console, job};
pub(super) use overview::overview;

use jiff::Timestamp;
use maud::{DOCTYPE, Markup, html};

/// What a browser may do with a page of ours.
pub(super) const POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; \
                                 img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub(super) const STYLE: &str = include_str!("page.css");
pub(super) const SCRIPT: &str = include_str!("page.js");
pub(super) const ICON: &str = include_str!("icon.svg");

/// A page with this title and content.
fn page(title: &str, header: &Markup, main: &Markup) -> String {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="referrer" content="no-referrer";
                title { (title) }
                link rel="icon" href="/icon.svg" type="image/svg+xml";
                link rel="stylesheet" href="/page.css";
                script src="/page.js" defer {}
            }
            body {
                a .skip href="#main" { "Skip to the content" }
                (header)
                p #lost .bad role="status" {}
                main #main tabindex="-1" { (main) }
                footer {
                    nav aria-label="For programs" {
                        p .faint {
                            "For programs: " a href="/status.json" { "status" } ", " a href="/jobs.json" { "jobs" } ", "
                            a href="/metrics" { "metrics" } ", " a href="/healthz" { "health" } ", " a href="/readyz" { "readiness" }
                        }
                    }
                }
            }
        }
    };
    page.into_string()
}

/// A point in time: UTC, for people and machines.
fn time(at: Timestamp) -> Markup {
    let at = at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    html! { time datetime=(at) { (at.replace('T', " ")) } }
}

/// Where the page of a job is.
fn job_path(id: u64, runner: &str) -> String {
    let query = url::form_urlencoded::Serializer::new(String::new()).append_pair("runner", runner).finish();
    format!("/jobs/{id}?{query}")
}

/// By which class a verdict or a state is coloured; the word itself says it, too.
fn colour(word: &str) -> &'static str {
    match word {
        "success" => "well",
        "failed" => "bad",
        "running" | "booting" | "canceling" => "busy",
        _ => "faint",
    }
}

/// A cell of a table, named by its column where rows are cards. Roles are said, for a browser forgets those of a table
/// that is laid out otherwise.
fn cell(column: &str, content: &Markup) -> Markup {
    html! { td role="cell" data-column=(column) { (content) } }
}

/// A table with these columns, the first of which names the row.
fn table(label: &str, columns: &[&str], rows: &[Markup]) -> Markup {
    html! {
        table role="table" aria-label=(label) {
            thead role="rowgroup" {
                tr role="row" { @for column in columns { th role="columnheader" scope="col" { (column) } } }
            }
            tbody role="rowgroup" { @for row in rows { tr role="row" { (row) } } }
        }
    }
}

/// The cell that names a row.
fn row_name(content: &Markup) -> Markup {
    html! { th role="rowheader" scope="row" { (content) } }
}
