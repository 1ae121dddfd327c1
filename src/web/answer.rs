//! A request, and what it is answered.

use crate::metrics::Form;
use crate::status::{Reports, RunnerState, StatusReport};
use bytes::Bytes;
use http::header::{ACCEPT, ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Response, StatusCode};
use http_body_util::Full;

const TEXT: &str = "text/plain; charset=utf-8";

/// What the listener has, for who asks for its root.
const INDEX: &str = "dayfly\n\n/metrics\n/healthz\n/readyz\n";

/// The answer to a request; a HEAD gets that of a GET, less its body.
pub(super) fn answer(method: &Method, path: &str, headers: &HeaderMap, reports: &dyn Reports) -> Response<Full<Bytes>> {
    if !matches!(*method, Method::GET | Method::HEAD) {
        let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET is answered here\n".to_owned());
        answer.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return answer;
    }
    match path {
        "/" => text(StatusCode::OK, TEXT, INDEX.to_owned()),
        "/healthz" => text(StatusCode::OK, TEXT, "ok\n".to_owned()),
        "/readyz" => {
            let (status, why) = ready(&reports.status());
            text(status, TEXT, why)
        }
        "/metrics" => {
            let form = form(headers);
            text(StatusCode::OK, form.content_type(), reports.metrics(form))
        }
        _ => text(StatusCode::NOT_FOUND, TEXT, "nothing is here; / lists what there is\n".to_owned()),
    }
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

fn text(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::new(Bytes::from(body)));
    *answer.status_mut() = status;
    for (name, value) in [
        (CONTENT_TYPE, content_type),
        (CACHE_CONTROL, "no-store"),
        (HeaderName::from_static("x-content-type-options"), "nosniff"),
    ] {
        answer.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    answer
}
