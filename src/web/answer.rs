//! A request, and what it is answered.

use super::access::{Judged, Sight};
use super::page::{self, Console};
use super::settings::Settings;
use crate::gitlab::JobId;
use crate::metrics::Form;
use crate::status::{ConsoleFound, JobFound, JobList, Reports, RunnerState, StatusReport};
use bytes::Bytes;
use http::header::{
    ACCEPT, ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue,
    WWW_AUTHENTICATE,
};
use http::{Method, Response, StatusCode, Uri};
use http_body_util::Full;

const TEXT: &str = "text/plain; charset=utf-8";
const HTML: &str = "text/html; charset=utf-8";
const JSON: &str = "application/json";

/// Ended jobs that the page shows.
const ENDED_SHOWN: usize = 100;

/// Ended jobs in `/jobs.json`.
const ENDED_LISTED: usize = 1000;

type Answer = Response<Full<Bytes>>;

/// The answer to a request; a HEAD gets that of a GET, less its body.
pub(super) async fn answer(
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
    reports: &dyn Reports,
    settings: &Settings,
) -> Answer {
    if !matches!(*method, Method::GET | Method::HEAD) {
        let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered here\n");
        answer.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return answer;
    }
    let sight = match settings.access.judge(headers) {
        Judged::May(sight) => sight,
        Judged::Wrong => return unauthorized(),
        Judged::Elsewhere => {
            return text(StatusCode::MISDIRECTED_REQUEST, "ask by this host's address: 127.0.0.1, or localhost\n");
        }
    };
    match uri.path() {
        "/healthz" => return text(StatusCode::OK, "ok\n"),
        _ if sight < Sight::Status => return unauthorized(),
        _ => {}
    }
    match uri.path() {
        "/" => {
            let (ended, fleet) = (reports.ended(ENDED_SHOWN), settings.fleet.look());
            html(page::overview(&reports.status(), &ended, &fleet))
        }
        "/readyz" => {
            let (status, why) = ready(&reports.status());
            text(status, why)
        }
        "/metrics" => {
            let form = form(headers);
            whole(StatusCode::OK, form.content_type(), reports.metrics(form))
        }
        "/status.json" => json(&reports.status()),
        "/jobs.json" => json(&JobList { running: reports.status().jobs, ended: Some(reports.ended(ENDED_LISTED)) }),
        "/page.css" => whole(StatusCode::OK, "text/css; charset=utf-8", page::STYLE),
        "/page.js" => whole(StatusCode::OK, "text/javascript; charset=utf-8", page::SCRIPT),
        "/icon.svg" => whole(StatusCode::OK, "image/svg+xml", page::ICON),
        path => match path.strip_prefix("/jobs/").and_then(|id| id.parse().ok()) {
            Some(id) => job(JobId(id), uri.query().unwrap_or_default(), sight, reports, settings).await,
            None => nothing(),
        },
    }
}

/// The page of one job.
async fn job(id: JobId, query: &str, sight: Sight, reports: &dyn Reports, settings: &Settings) -> Answer {
    let asked = |name: &str| {
        let found = url::form_urlencoded::parse(query.as_bytes()).find(|(key, _)| key == name);
        found.map(|(_, value)| value.into_owned())
    };
    if asked("token").is_some() && sight < Sight::All && settings.access.has_token() {
        // So a browser asks for it.
        return unauthorized();
    }
    let runner = asked("runner");
    let mut found = reports.job(id, runner.as_deref()).await;
    let console = if sight < Sight::All {
        if let JobFound::Ended { end } = &mut found {
            end.console = None;
        }
        Console::Hidden { has_token: settings.access.has_token() }
    } else {
        match reports.console(id, runner.as_deref(), None).await {
            ConsoleFound::Running { rows } => Console::Text(rows.text),
            ConsoleFound::Ended { text: Some(text), .. } => Console::Text(text),
            _ => Console::None,
        }
    };
    page::job(&found, &console).map_or_else(nothing, html)
}

/// What a Prometheus takes: it names OpenMetrics if it knows that.
fn form(headers: &HeaderMap) -> Form {
    let accepts = |value: &HeaderValue| value.to_str().is_ok_and(|text| text.contains("application/openmetrics-text"));
    if headers.get_all(ACCEPT).iter().any(accepts) { Form::Open } else { Form::Classic }
}

/// Whether a job could be taken, now or when there is room; and what needs a person.
fn ready(status: &StatusReport) -> (StatusCode, String) {
    let takes = |state: &RunnerState| matches!(state, RunnerState::Polling | RunnerState::WaitingForRoom { .. });
    let takes = status.runners.iter().any(|runner| takes(&runner.state) && runner.outage.is_none());
    let mut lines = Vec::new();
    if status.daemon.draining {
        lines.push("draining: no more jobs are taken".to_owned());
    } else if !takes {
        lines.push("no runner can take a job".to_owned());
    }
    let code = if lines.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    if lines.is_empty() {
        lines.push("ready".to_owned());
    }
    lines.extend(status.daemon.problems.iter().map(|problem| crate::telemetry::printable(problem)));
    lines.push(String::new());
    (code, lines.join("\n"))
}

fn nothing() -> Answer {
    text(StatusCode::NOT_FOUND, "nothing is here; / shows what there is\n")
}

fn unauthorized() -> Answer {
    let mut answer =
        text(StatusCode::UNAUTHORIZED, "show the token of `status.token_file`, as Bearer or as password\n");
    answer
        .headers_mut()
        .insert(WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"dayfly\", charset=\"UTF-8\""));
    answer
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    whole(status, TEXT, body)
}

fn html(page: String) -> Answer {
    whole(StatusCode::OK, HTML, page)
}

fn json(value: &impl serde::Serialize) -> Answer {
    match serde_json::to_string(value) {
        Ok(body) => whole(StatusCode::OK, JSON, body + "\n"),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("write the answer: {error}\n")),
    }
}

fn whole(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    for (name, value) in [
        (CONTENT_TYPE, content_type),
        (CACHE_CONTROL, "no-store"),
        (CONTENT_SECURITY_POLICY, page::POLICY),
        (HeaderName::from_static("x-content-type-options"), "nosniff"),
        (HeaderName::from_static("referrer-policy"), "no-referrer"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
        (HeaderName::from_static("x-frame-options"), "DENY"),
    ] {
        answer.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    answer
}
