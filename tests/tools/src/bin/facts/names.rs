//! Placeholders, and texts that are described instead of written out.

use dayfly::gitlab::JobId;
use dayfly_exec::standin::{Model, ProjectId, RunnerId};
use serde_json::{Map, Value, json};

/// The things of one fact that a placeholder may name.
#[derive(Clone, Debug, Default)]
pub(crate) struct Names {
    pub(crate) project: Option<ProjectId>,
    pub(crate) runner: Option<RunnerId>,
    pub(crate) job: Option<JobId>,
    pub(crate) other_job: Option<JobId>,
    pub(crate) target: Option<JobId>,
    pub(crate) upstream: Vec<JobId>,
    /// `{runner.token@start}`.
    pub(crate) first_runner_token: String,
    /// `{queue.stale}`.
    pub(crate) stale_queue: String,
}

/// An id that nothing has.
const UNKNOWN_ID: u64 = 9_999_999_999;

/// Values of all placeholders at one moment.
pub(crate) struct Placeholders(Map<String, Value>);

impl Names {
    /// What the placeholders stand for now.
    pub(crate) fn placeholders(&self, model: &Model) -> Placeholders {
        let mut values = Map::new();
        let mut put = |name: &str, value: Value| values.insert(name.to_owned(), value);
        put("unknown.id", json!(UNKNOWN_ID));
        put("registration.token", json!(model.registration_token.expose()));
        put("workhorse.jwt", json!(model.workhorse_token.expose()));
        put("runner.token@start", json!(self.first_runner_token));
        put("queue.stale", json!(self.stale_queue));
        if let Some(project) = self.project.and_then(|id| model.projects.get(&id)) {
            put("project.id", json!(project.id.0));
            put("project.name", json!(project.name()));
            put("project.runners_token", json!(project.runners_token.expose()));
        }
        if let Some(id) = self.runner {
            put("runner.id", json!(id.0));
            if let Some(runner) = model.runners.get(&id) {
                put("runner.token", json!(runner.token.expose()));
                put("queue.value", json!(runner.queue_value));
            }
        }
        for (name, id) in [("job", self.job), ("other_job", self.other_job), ("target", self.target)] {
            let Some(job) = id.and_then(|id| model.jobs.get(&id)) else { continue };
            put(&format!("{name}.id"), json!(job.id));
            put(&format!("{name}.token"), json!(job.token.expose()));
            if name == "job" {
                put("pipeline.id", json!(job.pipeline));
            }
        }
        for (index, id) in self.upstream.iter().enumerate() {
            put(&format!("upstream[{index}].id"), json!(id));
        }
        Placeholders(values)
    }
}

impl Placeholders {
    /// Where no placeholder may stand.
    pub(crate) fn none() -> Self {
        Self(Map::new())
    }

    /// Replaces placeholders in every string, and described texts by themselves. A string that is
    /// only a placeholder takes the type of the value.
    pub(crate) fn resolve(&self, value: &Value) -> Result<Value, String> {
        Ok(match value {
            Value::String(text) => self.resolve_string(text)?,
            Value::Array(items) => Value::Array(items.iter().map(|item| self.resolve(item)).collect::<Result<_, _>>()?),
            Value::Object(members) => match described(value)? {
                Some(bytes) => as_text(&bytes),
                None => {
                    let resolve =
                        |(key, value): (&String, &Value)| Ok::<_, String>((key.clone(), self.resolve(value)?));
                    Value::Object(members.iter().map(resolve).collect::<Result<_, _>>()?)
                }
            },
            other => other.clone(),
        })
    }

    fn resolve_string(&self, text: &str) -> Result<Value, String> {
        if let Some(name) = text.strip_prefix('{').and_then(|rest| rest.strip_suffix('}'))
            && is_name(name)
        {
            return self.get(name).cloned();
        }
        self.text(text).map(Value::String)
    }

    /// The same for a text that stays a text.
    pub(crate) fn text(&self, text: &str) -> Result<String, String> {
        let mut out = String::new();
        let mut rest = text;
        while let Some(start) = rest.find('{') {
            let (before, tail) = rest.split_at(start);
            out.push_str(before);
            let name = tail.find('}').map(|end| &tail[1..end]).filter(|name| is_name(name));
            match name {
                Some(name) => {
                    match self.get(name)? {
                        Value::String(value) => out.push_str(value),
                        value => out.push_str(&value.to_string()),
                    }
                    rest = &tail[name.len() + 2..];
                }
                None => {
                    out.push('{');
                    rest = &tail[1..];
                }
            }
        }
        out.push_str(rest);
        Ok(out)
    }

    fn get(&self, name: &str) -> Result<&Value, String> {
        self.0.get(name).ok_or_else(|| format!("placeholder {{{name}}} names nothing here"))
    }
}

/// `job.id`, `upstream[0].id`, `runner.token@start`; no regular expression's `{4}`.
fn is_name(name: &str) -> bool {
    name.contains('.')
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "._[]@".contains(c))
}

/// `{"$repeat": "x", "count": n}` or `{"$bytes_hex": "…"}` as bytes.
fn described(value: &Value) -> Result<Option<Vec<u8>>, String> {
    if let (Some(Value::String(text)), Some(count)) = (value.get("$repeat"), value.get("count")) {
        let count = count.as_u64().and_then(|count| usize::try_from(count).ok()).ok_or("count is no number")?;
        return Ok(Some(text.repeat(count).into_bytes()));
    }
    let Some(Value::String(hex)) = value.get("$bytes_hex") else { return Ok(None) };
    let byte = |pair: &[u8]| {
        let pair = std::str::from_utf8(pair).ok()?;
        u8::from_str_radix(pair, 16).ok()
    };
    hex.as_bytes().chunks(2).map(byte).collect::<Option<_>>().map(Some).ok_or_else(|| "$bytes_hex is no hex".to_owned())
}

/// Bytes of a text value in any of its forms, placeholders resolved.
pub(crate) fn bytes_of(value: &Value, placeholders: &Placeholders) -> Result<Vec<u8>, String> {
    match value {
        Value::String(text) => placeholders.text(text).map(String::into_bytes),
        value => described(value)?.ok_or_else(|| format!("{value} is no text")),
    }
}

/// Bytes as comparable JSON: a text if they are one, else their hex form.
pub(crate) fn as_text(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) => json!(text),
        Err(_) => {
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            json!({ "$bytes_hex": hex })
        }
    }
}
