//! One recorded run of an official runner: what it sent, what it was answered, what GitLab had then.
//!
//! A recording is a sequence of JSON objects, one a line; their `kind` says what they are (see the
//! table in `tests/data/README.md`). Unknown kinds and members are no concern of a replay.

use serde::Deserialize;
use serde_json::value::RawValue;
use std::io::{BufRead, Read as _};
use std::path::Path;

/// Where recordings are when nobody says.
pub(crate) const DEFAULT: &str = "tests/data/recordings.jsonl.gz";

/// One run of one runner.
#[derive(Debug, Default)]
pub(crate) struct Recording {
    /// Scenario and version.
    pub(crate) name: String,
    pub(crate) runner_token: String,
    pub(crate) job_token: String,
    /// The runner's config.toml.
    pub(crate) config: Option<String>,
    /// In the order in which they were sent.
    pub(crate) requests: Vec<Request>,
    /// The trace that GitLab had at the end.
    pub(crate) trace: Option<Trace>,
}

/// What a request is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    Ask,
    Put,
    Patch,
    Upload,
    Download,
    /// To GitLab's git server, which a guest reaches without dayfly.
    Git,
    /// Registration and the like: not a job's.
    Other,
}

#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) class: Class,
    /// Same value, same TCP connection.
    pub(crate) connection: String,
    pub(crate) method: String,
    pub(crate) target: String,
    /// All headers, in order and case of the wire.
    pub(crate) headers: Vec<(String, String)>,
    /// Pieces of a chunked body; `None`: not chunked.
    pub(crate) chunks: Option<usize>,
    pub(crate) body: Body,
    pub(crate) answer: Answer,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }
}

/// A request's body as far as it was recorded.
#[derive(Debug)]
pub(crate) enum Body {
    Empty,
    /// Compact JSON in the order of the wire.
    Json(String),
    Text(String),
    /// The form's one part: its header lines and the bytes of its content; and of the whole body.
    Form {
        part_headers: Vec<String>,
        content_bytes: usize,
        bytes: usize,
    },
    /// Of another kind; only its size was kept.
    Lost,
}

#[derive(Debug, Default)]
pub(crate) struct Answer {
    /// `None`: the connection was cut.
    pub(crate) status: Option<u16>,
    pub(crate) job_status: Option<String>,
    /// Of a text; empty where only a summary was kept.
    pub(crate) body: String,
    /// Bytes of a body of which a summary was kept.
    pub(crate) body_bytes: Option<u64>,
}

#[derive(Debug)]
pub(crate) struct Trace {
    pub(crate) bytes: Vec<u8>,
    pub(crate) crc: String,
}

/// Why a file of recordings cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unusable {
    #[error("read `{0}`")]
    Read(String, #[source] std::io::Error),
    #[error("read line {line} of `{file}`")]
    Line {
        file: String,
        line: usize,
        #[source]
        source: serde_json::Error,
    },
    #[error("read line {line} of `{file}`: {why}")]
    Sense { file: String, line: usize, why: &'static str },
}

/// All recordings at `path`: a folder of `.jsonl` files, or one file, compressed by gzip or not, in
/// which each `meta` line begins the next recording.
pub(crate) fn read(path: &Path) -> Result<Vec<Recording>, Unusable> {
    let failed = |source| Unusable::Read(path.display().to_string(), source);
    if !path.is_dir() {
        return read_file(path);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let file = entry.map_err(failed)?.path();
        if file.extension().is_some_and(|extension| extension == "jsonl") {
            files.push(file);
        }
    }
    files.sort();
    let mut recordings = Vec::new();
    for file in files {
        recordings.extend(read_file(&file)?);
    }
    Ok(recordings)
}

fn read_file(path: &Path) -> Result<Vec<Recording>, Unusable> {
    let failed = |source| Unusable::Read(path.display().to_string(), source);
    let mut file = std::io::BufReader::new(std::fs::File::open(path).map_err(failed)?);
    let mut text = String::new();
    if file.fill_buf().map_err(failed)?.starts_with(&[0x1f, 0x8b]) {
        flate2::bufread::GzDecoder::new(file).read_to_string(&mut text).map_err(failed)?;
    } else {
        file.read_to_string(&mut text).map_err(failed)?;
    }
    parse(&text, &path.display().to_string())
}

pub(crate) fn parse(text: &str, file: &str) -> Result<Vec<Recording>, Unusable> {
    let mut recordings: Vec<Recording> = Vec::new();
    for (number, text) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let line = number + 1;
        let json = |source| Unusable::Line { file: file.into(), line, source };
        let sense = |why| Unusable::Sense { file: file.into(), line, why };
        let Kind { kind } = serde_json::from_str(text).map_err(json)?;
        if kind == "meta" {
            let Meta { scenario, runner, runner_token, job_token } = serde_json::from_str(text).map_err(json)?;
            let name = format!("{scenario}.{runner}");
            recordings.push(Recording { name, runner_token, job_token, ..Recording::default() });
            continue;
        }
        let recording = recordings.last_mut().ok_or_else(|| sense("no `meta` line stands before it"))?;
        match kind.as_str() {
            "request" => {
                let request: RawRequest<'_> = serde_json::from_str(text).map_err(json)?;
                recording.requests.push(request.understood().map_err(sense)?);
            }
            "config" => {
                let Config { toml } = serde_json::from_str(text).map_err(json)?;
                recording.config = Some(toml);
            }
            "final_trace" => {
                let FinalTrace { text, crc } = serde_json::from_str(text).map_err(json)?;
                recording.trace = Some(Trace { bytes: text.into_bytes(), crc });
            }
            _ => {}
        }
    }
    Ok(recordings)
}

#[derive(Deserialize)]
struct Kind {
    kind: String,
}

#[derive(Deserialize)]
struct Meta {
    scenario: String,
    runner: String,
    runner_token: String,
    job_token: String,
}

#[derive(Deserialize)]
struct Config {
    toml: String,
}

#[derive(Deserialize)]
struct FinalTrace {
    text: String,
    crc: String,
}

#[derive(Deserialize)]
struct RawRequest<'a> {
    cls: String,
    conn: String,
    method: String,
    target: String,
    headers: Vec<(String, String)>,
    framing: String,
    #[serde(borrow)]
    body: RawBody<'a>,
    answer: Option<RawAnswer>,
}

#[derive(Deserialize)]
struct RawBody<'a> {
    bytes: usize,
    #[serde(borrow)]
    json: Option<&'a RawValue>,
    text: Option<String>,
    multipart: Option<Vec<RawPart>>,
}

#[derive(Deserialize)]
struct RawPart {
    headers: Vec<String>,
    bytes: usize,
}

#[derive(Deserialize)]
struct RawAnswer {
    status: Option<u16>,
    #[serde(default)]
    headers: Vec<(String, String)>,
    #[serde(default)]
    body: serde_json::Value,
}

impl RawRequest<'_> {
    fn understood(self) -> Result<Request, &'static str> {
        let class = match self.cls.as_str() {
            "request" => Class::Ask,
            "put" => Class::Put,
            "patch" => Class::Patch,
            "upload" => Class::Upload,
            "download" => Class::Download,
            "git" => Class::Git,
            _ => Class::Other,
        };
        let RawBody { bytes, json, text, multipart } = self.body;
        let body = match (json, text, multipart) {
            (Some(json), _, _) => Body::Json(compact(json.get())),
            (_, Some(text), _) => Body::Text(text),
            (_, _, Some(parts)) => match <[RawPart; 1]>::try_from(parts) {
                Ok([part]) => Body::Form { part_headers: part.headers, content_bytes: part.bytes, bytes },
                Err(_) => Body::Lost,
            },
            _ if bytes == 0 => Body::Empty,
            _ => Body::Lost,
        };
        let chunks = match self.framing.strip_prefix("chunked(") {
            Some(rest) => Some(rest.split(' ').next().and_then(|n| n.parse().ok()).ok_or("its framing has no number")?),
            None => None,
        };
        let answer = self.answer.map(|answer| {
            let job_status = answer.headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("job-status"));
            Answer {
                status: answer.status,
                job_status: job_status.map(|(_, status)| status.clone()),
                body_bytes: answer.body.get("bytes").and_then(serde_json::Value::as_u64),
                body: answer.body.as_str().unwrap_or_default().to_owned(),
            }
        });
        Ok(Request {
            class,
            connection: self.conn,
            method: self.method,
            target: self.target,
            headers: self.headers,
            chunks,
            body,
            answer: answer.unwrap_or_default(),
        })
    }
}

/// JSON without the spaces between its tokens, as the official runner sends it.
fn compact(json: &str) -> String {
    let (mut in_string, mut escaped) = (false, false);
    let keep = |letter: &char| {
        let keep = in_string || !letter.is_ascii_whitespace();
        in_string ^= *letter == '"' && !escaped;
        escaped = in_string && *letter == '\\' && !escaped;
        keep
    };
    json.chars().filter(keep).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_loses_its_spaces_and_keeps_its_order() {
        assert_eq!(compact(r#"{"b": 1, "a": "x \" y, z\\", "c": [1, 2]}"#), r#"{"b":1,"a":"x \" y, z\\","c":[1,2]}"#);
    }

    #[test]
    fn a_meta_line_begins_the_next_recording() {
        let meta =
            |name| format!(r#"{{"kind":"meta","scenario":"{name}","runner":"v1","runner_token":"r","job_token":"j"}}"#);
        let text = format!("{}\n{{\"kind\":\"exit\",\"code\":0}}\n{}\n", meta("a"), meta("b"));
        let names: Vec<String> = parse(&text, "f").unwrap().into_iter().map(|recording| recording.name).collect();
        assert_eq!(names, ["a.v1", "b.v1"]);
        assert!(parse("{\"kind\":\"exit\"}", "f").is_err());
    }
}
