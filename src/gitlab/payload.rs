//! The job as GitLab sent it: the raw bytes, and the few fields that we read.
//!
//! The payload passes through whole. Nothing here re-serialises it; the one edit (decision D8) is a
//! number spliced into the raw bytes. Only id and token must be there; every other member that is
//! missing, null or of another type than expected is read as if it were not there, because it is
//! the guest runner's to judge.

mod asked;

pub use asked::{Asked, Source};

use super::answers::clean;
use super::calls::{is_request_id, is_token};
use super::{JobId, json};
use crate::secret::Secret;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;
use tokio::time::Instant;

/// Deepest nesting of a payload that we take (GitLab's own are below 10).
const DEPTH_MAX: usize = 64;
/// Names for people are cut here: GitLab's own limit for a job's name.
const NAME_CHARS_MAX: usize = 255;
/// So many addresses of registries are read; GitLab names two.
const REGISTRIES_MAX: usize = 16;
/// Bytes of such an address at most.
const HOST_BYTES_MAX: usize = 300;
/// So many services are named to people.
const SERVICES_MAX: usize = 8;

/// A dependency whose artifacts the job may fetch.
#[derive(Clone, Debug)]
pub struct Dependency {
    /// Its job id.
    pub id: JobId,
    /// The token to present for it.
    pub token: Secret,
}

/// Names of the containers that a job asks for, each cleaned and cut.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Containers {
    /// `image:` of the job.
    pub image: Option<String>,
    /// `services:` of the job, the first eight.
    pub services: Vec<String>,
}

/// One job, ready to hand out.
#[derive(Clone, Debug)]
pub struct JobPayload {
    raw: RawPayload,
    /// Where in it the digits of `runner_info.timeout` stand, if `timeout` is some.
    timeout_at: Range<usize>,
    /// Its id.
    pub id: JobId,
    /// The job token.
    pub token: Secret,
    /// `runner_info.timeout`, if it is a positive integer.
    pub timeout: Option<Duration>,
    /// Name of the job, cleaned of control characters and cut to 255 characters: for people only.
    pub name: String,
    /// Path of its project, likewise.
    pub project: String,
    /// Its dependencies.
    pub dependencies: Vec<Dependency>,
    /// Whether CI_DEBUG_TRACE or CI_DEBUG_SERVICES is true.
    pub debug_trace: bool,
    /// `features.trace_sections`.
    pub trace_sections: bool,
    /// `features.failure_reasons`.
    pub failure_reasons: Vec<String>,
    /// What its log masks: values of masked variables, and the job token.
    pub masks: Vec<Secret>,
    /// The containers that it asks for, for people only.
    pub containers: Containers,
    /// What its author asks for of its machine.
    pub asked: Asked,
    /// Whose job it is, and of what.
    pub source: Source,
    /// Where the credentials are for that GitLab itself gives it: its registry, its dependency proxy. As it was sent, and
    /// of another member than variables, which an author can set.
    pub registries: Vec<String>,
    /// `X-Request-Id` of the 201, if it was well-formed.
    pub request_id: Option<String>,
    /// When its last byte had been read. From here until the journal has the job, it is in memory only.
    pub read_at: Instant,
}

/// Why a payload cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    /// The body broke off, was too large or too deep, or was not said to be JSON.
    #[error("{0}")]
    Body(String),
    /// Not JSON.
    #[error("parse as JSON")]
    Json(#[source] serde_json::Error),
    /// No usable id.
    #[error("member `id` is no positive integer")]
    Id,
    /// No usable job token.
    #[error("member `token` holds no token")]
    Token,
}

/// The raw bytes: secrets in most of them, so they never print.
#[derive(Clone)]
struct RawPayload(Bytes);

impl std::fmt::Debug for RawPayload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{} bytes]", self.0.len())
    }
}

/// Members of an object, undecoded. Where one stands twice the last wins, as in the guest runner.
type Object<'a> = BTreeMap<Cow<'a, str>, &'a RawValue>;

/// Decodes leniently: of another type is the same as not there.
fn get<'a, T: Deserialize<'a>>(object: &Object<'a>, name: &str) -> Option<T> {
    object.get(name).and_then(|raw| serde_json::from_str(raw.get()).ok())
}

impl JobPayload {
    /// Reads the fields of a 201's body (at most 32 MiB, JSON depth at most 64).
    ///
    /// # Errors
    /// [`PayloadError`].
    pub fn parse(raw: Bytes, request_id: Option<String>) -> Result<Self, PayloadError> {
        let read_at = Instant::now();
        let depth = json::depth(&raw);
        if depth > DEPTH_MAX {
            return Err(PayloadError::Body(format!("nested {depth} deep, more than {DEPTH_MAX}")));
        }
        let object: Object<'_> = serde_json::from_slice(&raw).map_err(PayloadError::Json)?;
        let id = object.get("id").and_then(|raw| job_id(raw.get().as_bytes())).ok_or(PayloadError::Id)?;
        let token = get::<String>(&object, "token").filter(|token| is_token(token)).ok_or(PayloadError::Token)?;
        let info: Object<'_> = get(&object, "job_info").unwrap_or_default();
        let features: Object<'_> = get(&object, "features").unwrap_or_default();
        let name = |member: &str| {
            get::<String>(&info, member).map(|text| clean(&text, NAME_CHARS_MAX)).filter(|text| !text.is_empty())
        };
        let variables = variables(&object);
        let (timeout_at, timeout) = find_timeout(&raw).unzip();
        Ok(Self {
            id,
            timeout: timeout.map(Duration::from_secs),
            timeout_at: timeout_at.unwrap_or_default(),
            name: name("name").unwrap_or_default(),
            project: name("project_full_path").or_else(|| name("project_name")).unwrap_or_default(),
            dependencies: dependencies(&object),
            debug_trace: debug_trace(&variables),
            trace_sections: get(&features, "trace_sections").unwrap_or(false),
            failure_reasons: get(&features, "failure_reasons").unwrap_or_default(),
            containers: containers(&object),
            asked: asked::asked(&object, &variables),
            source: asked::source(&object),
            registries: registries(&object),
            masks: masks(&variables, &token),
            token: Secret::new(token),
            request_id: request_id.filter(|id| is_request_id(id)),
            read_at,
            raw: RawPayload(raw),
        })
    }

    /// The bytes as GitLab sent them.
    #[must_use]
    pub fn raw(&self) -> &Bytes {
        &self.raw.0
    }

    /// The bytes with `runner_info.timeout` lowered to `remaining` whole seconds, as a number
    /// spliced into the raw text; unchanged if it is no positive integer (decision D8).
    ///
    /// It is never raised, and never set to 0, which would mean "no timeout" to a runner: with
    /// less than a second left there is no hand-out, so nobody asks.
    #[must_use]
    pub fn with_timeout(&self, remaining: Duration) -> Bytes {
        let Some(timeout) = self.timeout else { return self.raw.0.clone() };
        let seconds = timeout.as_secs().min(remaining.as_secs()).max(1);
        if seconds == timeout.as_secs() {
            return self.raw.0.clone();
        }
        let digits = seconds.to_string();
        let mut spliced = Vec::with_capacity(self.raw.0.len() + digits.len());
        spliced.extend_from_slice(&self.raw.0[..self.timeout_at.start]);
        spliced.extend_from_slice(digits.as_bytes());
        spliced.extend_from_slice(&self.raw.0[self.timeout_at.end..]);
        spliced.into()
    }
}

/// Id and token from a body that cannot be used as a whole, cut off perhaps: so that the job can
/// at least be ended (G6).
pub fn salvage(raw: &[u8]) -> Option<(JobId, Secret)> {
    let (mut id, mut token) = (None, None);
    for (key, value) in json::members(raw, 0) {
        if json::is_key(key, "id") {
            id = job_id(&raw[value]);
        } else if json::is_key(key, "token") {
            token = serde_json::from_slice::<String>(&raw[value]).ok().filter(|token| is_token(token));
        }
    }
    Some((id?, Secret::new(token?)))
}

/// A positive integer that the guest runner's int64 can hold, written with digits only.
fn job_id(digits: &[u8]) -> Option<JobId> {
    positive(digits).filter(|id| i64::try_from(*id).is_ok()).map(JobId)
}

fn positive(digits: &[u8]) -> Option<u64> {
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok().filter(|number| *number > 0)
}

/// Where the digits of `runner_info.timeout` stand, and their value; `None` if it is no positive
/// integer. The guest runner's decoder reads members in order into one struct, so what stands
/// last counts, over several `runner_info` too.
fn find_timeout(raw: &[u8]) -> Option<(Range<usize>, u64)> {
    let infos = json::members(raw, 0).filter(|(key, _)| json::is_key(key, "runner_info"));
    let timeouts =
        infos.flat_map(|(_, info)| json::members(raw, info.start)).filter(|(key, _)| json::is_key(key, "timeout"));
    let (_, at) = timeouts.last()?;
    positive(&raw[at.clone()]).map(|seconds| (at, seconds))
}

fn dependencies(object: &Object<'_>) -> Vec<Dependency> {
    let list: Vec<&RawValue> = get(object, "dependencies").unwrap_or_default();
    let one = |raw: &&RawValue| {
        let dependency: Object<'_> = serde_json::from_str(raw.get()).ok()?;
        let id = job_id(dependency.get("id")?.get().as_bytes())?;
        let token = get::<String>(&dependency, "token").filter(|token| is_token(token))?;
        Some(Dependency { id, token: Secret::new(token) })
    };
    list.iter().filter_map(one).collect()
}

/// Its variables; those that are no objects are left out.
fn variables<'a>(object: &Object<'a>) -> Vec<Object<'a>> {
    let list: Vec<&RawValue> = get(object, "variables").unwrap_or_default();
    list.into_iter().filter_map(|raw| serde_json::from_str(raw.get()).ok()).collect()
}

/// A variable is masked by its own member; the runner masks the job token whatever GitLab says.
fn masks(variables: &[Object<'_>], token: &str) -> Vec<Secret> {
    let values =
        variables.iter().filter_map(|variable| get::<bool>(variable, "masked")?.then(|| get(variable, "value"))?);
    values.chain([token.to_owned()]).map(Secret::new).collect()
}

/// GitLab sends `image` and each service as an object with a `name`, and an empty one for none.
fn containers(object: &Object<'_>) -> Containers {
    let name = |raw: &RawValue| {
        let image = serde_json::from_str::<Object<'_>>(raw.get()).ok()?;
        get::<String>(&image, "name").map(|name| clean(&name, NAME_CHARS_MAX)).filter(|name| !name.is_empty())
    };
    let services: Vec<&RawValue> = get(object, "services").unwrap_or_default();
    Containers {
        image: object.get("image").and_then(|raw| name(raw)),
        services: services.into_iter().filter_map(name).take(SERVICES_MAX).collect(),
    }
}

/// Addresses in `credentials`, the first sixteen: GitLab sends `registry.example:5050`, or a URL.
fn registries(object: &Object<'_>) -> Vec<String> {
    let list: Vec<&RawValue> = get(object, "credentials").unwrap_or_default();
    let url = |raw: &RawValue| get::<String>(&serde_json::from_str::<Object<'_>>(raw.get()).ok()?, "url");
    list.into_iter().filter_map(url).filter(|url| url.len() <= HOST_BYTES_MAX).take(REGISTRIES_MAX).collect()
}

/// Whether the job's trace may show secrets: the last value of either variable counts, and is
/// read as Go's `strconv.ParseBool` reads it.
fn debug_trace(variables: &[Object<'_>]) -> bool {
    let (mut trace, mut services) = (false, false);
    for variable in variables {
        let which = match get::<String>(variable, "key").as_deref() {
            Some("CI_DEBUG_TRACE") => &mut trace,
            Some("CI_DEBUG_SERVICES") => &mut services,
            _ => continue,
        };
        let value: String = get(variable, "value").unwrap_or_default();
        *which = matches!(value.as_str(), "1" | "t" | "T" | "true" | "TRUE" | "True");
    }
    trace || services
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn parse(text: impl Into<String>) -> Result<JobPayload, PayloadError> {
        JobPayload::parse(Bytes::from(text.into()), None)
    }

    fn minimal(more: &str) -> String {
        format!(r#"{{"id":7,"token":"glcbt-x"{more}}}"#)
    }

    #[test]
    fn the_fields_we_read_are_read() {
        let raw = json!({
            "id": 9_223_372_036_854_775_807_u64, "token": "glcbt-64_abc",
            "job_info": {"name": "te\u{7}st\u{202e}", "project_full_path": "group/project", "project_name": "project"},
            "runner_info": {"timeout": 3600, "runner_session_url": ""},
            "variables": [{"key": "CI_DEBUG_TRACE", "value": "false"}, {"key": "X", "value": null}, {"key": "CI_DEBUG_TRACE", "value": "T"}],
            "dependencies": [{"id": 3, "token": "dep", "name": "a"}, {"id": "4", "token": "x"}, {"id": 5}, 6, null],
            "features": {"trace_sections": true, "failure_reasons": ["script_failure"]},
            "credentials": [{"type": "registry", "url": "registry.example:5050", "username": "u", "password": "p"},
                {"type": "registry"}, {"url": 7}, "x", {"url": "x".repeat(1000)}],
        });
        let payload = JobPayload::parse(Bytes::from(raw.to_string()), Some("01ABC".into())).unwrap();
        assert_eq!(payload.id, JobId(i64::MAX as u64));
        assert!(payload.token.matches("glcbt-64_abc"));
        assert_eq!(payload.timeout, Some(Duration::from_secs(3600)));
        assert_eq!((payload.name.as_str(), payload.project.as_str()), ("te st", "group/project"));
        assert_eq!(payload.dependencies.iter().map(|d| (d.id.0, d.token.expose())).collect::<Vec<_>>(), [(3, "dep")]);
        assert!(payload.debug_trace && payload.trace_sections);
        assert_eq!(payload.failure_reasons, ["script_failure"]);
        assert_eq!(payload.request_id.as_deref(), Some("01ABC"));
        assert_eq!(payload.registries, ["registry.example:5050"]);
        assert_eq!(payload.raw(), raw.to_string().as_bytes());
    }

    /// G7: what is missing, null or new is no reason to lose the job.
    #[test]
    fn odd_members_cost_nothing() {
        for more in [
            "",
            r#","job_info":null,"runner_info":null,"variables":null,"dependencies":null,"features":null"#,
            r#","job_info":[],"runner_info":5,"variables":{},"dependencies":"x","features":{"trace_sections":"yes"}"#,
            r#","features":{"failure_reasons":[1]},"variables":[[],{"key":5}],"dependencies":[[]]"#,
            r#","a_feature_never_seen":{"deep":[1e400,-0,"\ud800"]}"#,
        ] {
            let payload = parse(minimal(more)).unwrap_or_else(|error| panic!("{more}: {error}"));
            assert_eq!((payload.id, payload.timeout, payload.debug_trace), (JobId(7), None, false), "{more}");
            assert_eq!(payload.with_timeout(Duration::from_secs(5)), minimal(more), "{more}");
        }
    }

    /// T28: only a positive integer is an id; it is all that names things on the host.
    #[test]
    fn ids_that_are_no_positive_integers_are_refused() {
        for id in ["\"7\"", "-7", "0", "7.0", "7e0", "null", "9223372036854775808", "[7]", "true"] {
            assert!(matches!(parse(format!(r#"{{"id":{id},"token":"x"}}"#)), Err(PayloadError::Id)), "{id}");
        }
        assert!(matches!(parse(r#"{"token":"x"}"#), Err(PayloadError::Id)));
        for token in ["\"\"", "null", "5", r#""a\r\nb""#, "\"a b\"", "\"ä\""] {
            assert!(matches!(parse(format!(r#"{{"id":7,"token":{token}}}"#)), Err(PayloadError::Token)), "{token}");
        }
        assert!(matches!(parse(r#"{"id":7}"#), Err(PayloadError::Token)));
        assert!(matches!(parse("[]"), Err(PayloadError::Json(_))));
    }

    /// T27: a million brackets cost one pass and no stack.
    #[test]
    fn deep_payloads_are_refused() {
        assert!(matches!(parse("[".repeat(1_000_000)), Err(PayloadError::Body(_))));
        let deep = |n: usize| minimal(&format!(r#","x":{}{}"#, "[".repeat(n), "]".repeat(n)));
        assert!(parse(deep(63)).is_ok());
        assert!(matches!(parse(deep(64)), Err(PayloadError::Body(_))));
    }

    #[test]
    fn debug_trace_is_the_last_value_as_go_reads_it() {
        let check = |variables: &[(&str, &str)], expected: bool| {
            let list: Vec<Value> = variables.iter().map(|(k, v)| json!({"key": k, "value": v})).collect();
            let payload = parse(minimal(&format!(r#","variables":{}"#, Value::from(list)))).unwrap();
            assert_eq!(payload.debug_trace, expected, "{variables:?}");
        };
        for yes in ["1", "t", "T", "true", "TRUE", "True"] {
            check(&[("CI_DEBUG_TRACE", yes)], true);
            check(&[("CI_DEBUG_SERVICES", yes)], true);
        }
        for no in ["0", "", "yes", "tRUE", " true", "false"] {
            check(&[("CI_DEBUG_TRACE", no)], false);
        }
        check(&[("CI_DEBUG_TRACE", "true"), ("CI_DEBUG_TRACE", "false")], false);
        check(&[("CI_DEBUG_SERVICES", "true"), ("CI_DEBUG_TRACE", "false")], true);
    }

    #[test]
    fn only_a_positive_integer_timeout_is_touched() {
        let check = |info: &str, remaining: u64, expected: &str| {
            let payload = parse(minimal(&format!(r#","runner_info":{info},"z":1"#))).unwrap();
            let expected = minimal(&format!(r#","runner_info":{expected},"z":1"#));
            assert_eq!(payload.with_timeout(Duration::from_millis(remaining * 1000 + 999)), expected, "{info}");
        };
        check(r#"{"timeout":3600}"#, 3590, r#"{"timeout":3590}"#);
        check(
            r#"{ "a":{"timeout":5}, "timeout" : 3600 , "b":"timeout" }"#,
            9,
            r#"{ "a":{"timeout":5}, "timeout" : 9 , "b":"timeout" }"#,
        );
        check(r#"{"timeout":3600}"#, 4000, r#"{"timeout":3600}"#);
        check(r#"{"timeout":3600}"#, 0, r#"{"timeout":1}"#);
        check(r#"{"time\u006fut":3600}"#, 2, r#"{"time\u006fut":2}"#);
        check(r#"{"timeout":1,"timeout":99}"#, 5, r#"{"timeout":1,"timeout":5}"#);
        check(r#"{"timeout":99},"runner_info":{"uuid":"x"}"#, 5, r#"{"timeout":5},"runner_info":{"uuid":"x"}"#);
        for same in [
            r#"{"timeout":0}"#,
            r#"{"timeout":-5}"#,
            r#"{"timeout":3600.5}"#,
            r#"{"timeout":"3600"}"#,
            r#"{"timeout":null}"#,
            "{}",
            r#"{"timeout":36e2}"#,
        ] {
            check(same, 5, same);
        }
        check(r#"{"timeout":99999999999999999999}"#, 5, r#"{"timeout":99999999999999999999}"#);
    }

    /// G6: what a cut 201 still says is enough to end the job.
    #[test]
    fn id_and_token_are_salvaged_from_what_arrived() {
        let whole = minimal(r#","job_info":{"id":5,"token":"no"},"x":"y""#);
        for end in 0..=whole.len() {
            let found = salvage(&whole.as_bytes()[..end]);
            let enough = end >= r#"{"id":7,"token":"glcbt-x""#.len();
            assert_eq!(found.is_some(), enough, "{}", &whole[..end]);
            if let Some((id, token)) = found {
                assert!(id == JobId(7) && token.matches("glcbt-x"));
            }
        }
        assert!(salvage(br#"{"id":7,"token":"a","x":nonsense}"#).is_some());
        assert!(salvage(br#"{"id":"7","token":"a"}"#).is_none());
        assert!(salvage(b"<html>").is_none());
    }

    /// Any JSON value, with the member names that matter among its keys.
    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 6, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                proptest::collection::vec(
                    (prop_oneof!["timeout", "runner_info", "id", "[a-z\"\\\\é]{0,6}"], inner),
                    0..6
                )
                .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
            ]
        })
    }

    proptest! {
        /// G7, T28: whatever stands around it, the splice changes the timeout and not one byte else.
        #[test]
        fn the_splice_changes_the_number_and_nothing_else(
            before in value(), inside in value(), after in value(), timeout in 2..u64::MAX, remaining in 1..u64::MAX, spaces in "[ \n\t\r]{0,3}",
        ) {
            let head = format!(r#"{{"id":7,"x":{before},{spaces}"runner_info"{spaces}:{{"y":{inside},{spaces}"timeout"{spaces}:{spaces}"#);
            let tail = format!(r#"{spaces}}},"token":"t","z":{after}}}"#);
            let payload = parse(format!("{head}{timeout}{tail}")).unwrap();
            prop_assert_eq!(payload.timeout, Some(Duration::from_secs(timeout)));
            let spliced = payload.with_timeout(Duration::from_secs(remaining));
            prop_assert_eq!(spliced, format!("{head}{}{tail}", timeout.min(remaining)));
        }

        /// G7: any payload that can be used is handed out as it came; what cannot is an error, no panic.
        #[test]
        fn any_json_is_kept_or_refused(value in value()) {
            let text = json!({"id": 7, "token": "t", "job_info": value, "variables": value, "dependencies": value, "features": value}).to_string();
            let payload = parse(text.clone()).unwrap();
            prop_assert_eq!(payload.raw(), text.as_bytes());
            let _ = parse(value.to_string());
        }

        #[test]
        fn no_bytes_upset_the_parser(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = salvage(&bytes);
            let _ = JobPayload::parse(bytes.into(), None);
        }
    }
}
