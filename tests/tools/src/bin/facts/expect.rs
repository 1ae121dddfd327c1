//! Holds one reply, and the state after it, to what is expected.

use crate::fact::Expect;
use crate::matcher::{self, Before, check};
use crate::names::Placeholders;
use crate::send::Reply;
use crate::state::{Snapshot, is_known};
use serde_json::Value;

/// The first member that differs.
pub(crate) fn judge(
    expect: &Expect,
    reply: &Reply,
    before: &Snapshot,
    after: &Snapshot,
    placeholders: &Placeholders,
) -> Result<(), String> {
    let none = Before(None);
    if let Some(status) = &expect.status {
        let body = String::from_utf8_lossy(&reply.body);
        let short: String = body.chars().take(200).collect();
        check("status", Some(&reply.status.into()), status, none).map_err(|error| format!("{error} ({short})"))?;
    }
    for (name, expected) in &expect.headers {
        let values: Vec<String> = reply
            .headers
            .get_all(name.as_str())
            .iter()
            .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
            .collect();
        let actual = (!values.is_empty()).then(|| Value::String(values.join(", ")));
        // Headers are texts: an id of a placeholder is compared as one.
        let expected = match placeholders.resolve(expected)? {
            Value::Number(number) => Value::String(number.to_string()),
            expected => expected,
        };
        check(&format!("header {name}"), actual.as_ref(), &expected, none)?;
    }
    if let Some(expected) = &expect.body.json {
        let expected = placeholders.resolve(expected)?;
        let actual: Value = serde_json::from_slice(&reply.body).map_err(|error| format!("body is no JSON: {error}"))?;
        match (&actual, &expected) {
            (Value::Object(actual), Value::Object(members)) if !members.keys().any(|key| key.starts_with('$')) => {
                matcher::members("body", actual, members)?;
            }
            (actual, expected) => check("body", Some(actual), expected, none)?,
        }
    }
    if let Some(expected) = &expect.body.text {
        let actual = Value::String(String::from_utf8_lossy(&reply.body).into_owned());
        check("body", Some(&actual), &placeholders.resolve(expected)?, none)?;
    }
    for (path, expected) in &expect.after {
        if !is_known(path) {
            return Err(format!("after {path} is unknown"));
        }
        let expected = placeholders.resolve(expected)?;
        // In the state, what is not there is null, and null does not exist.
        let asks_for_existence = ["$any", "$absent", "$absent_or_null"].iter().any(|name| expected.get(name).is_some());
        let actual = match after.get(path).filter(|value| !value.is_null()) {
            None if !asks_for_existence => Some(&Value::Null),
            actual => actual,
        };
        check(&format!("after {path}"), actual, &expected, Before(before.get(path)))?;
    }
    Ok(())
}
