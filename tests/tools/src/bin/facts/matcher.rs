//! Comparing a value with what is expected, matchers included. The answer names the one member that differs.

use regex_lite::Regex;
use serde_json::{Map, Value};

/// What the matchers look at besides the value itself.
#[derive(Clone, Copy, Default)]
pub(crate) struct Before<'a>(pub(crate) Option<&'a Value>);

/// `Ok` if `actual` is as expected. `None` is an absent value.
pub(crate) fn check(path: &str, actual: Option<&Value>, expected: &Value, before: Before<'_>) -> Result<(), String> {
    match expected {
        Value::Object(members) if is_matcher(members) => {
            for (name, argument) in members.iter().filter(|(name, _)| name.starts_with('$')) {
                apply(path, actual, name, argument, members, before)?;
            }
            Ok(())
        }
        expected => exact(path, actual, expected, before),
    }
}

fn is_matcher(members: &Map<String, Value>) -> bool {
    !members.contains_key("$bytes_hex") && members.keys().any(|key| key.starts_with('$'))
}

fn differs(path: &str, actual: Option<&Value>, expected: impl std::fmt::Display) -> String {
    let actual = actual.map_or_else(|| "nothing".to_owned(), Value::to_string);
    let short = |text: String| {
        if text.chars().count() > 300 { format!("{}…", text.chars().take(300).collect::<String>()) } else { text }
    };
    format!("{path}: expected {}, got {}", short(expected.to_string()), short(actual))
}

/// Equal, with no further members; matchers may stand inside.
fn exact(path: &str, actual: Option<&Value>, expected: &Value, before: Before<'_>) -> Result<(), String> {
    match (actual, expected) {
        (Some(Value::Object(actual)), Value::Object(expected)) => {
            members(path, actual, expected)?;
            match actual.keys().find(|key| !expected.contains_key(*key)) {
                Some(extra) => Err(format!("{path}.{extra}: not expected")),
                None => Ok(()),
            }
        }
        (Some(Value::Array(actual)), Value::Array(expected)) if actual.len() == expected.len() => {
            let pairs = actual.iter().zip(expected).enumerate();
            pairs
                .into_iter()
                .try_for_each(|(i, (actual, expected))| check(&format!("{path}[{i}]"), Some(actual), expected, before))
        }
        (Some(Value::Number(actual)), Value::Number(expected)) if actual.as_f64() == expected.as_f64() => Ok(()),
        (Some(actual), expected) if actual == expected => Ok(()),
        (actual, expected) => Err(differs(path, actual, expected)),
    }
}

/// Every expected member is there and as expected; others are free.
pub(crate) fn members(path: &str, actual: &Map<String, Value>, expected: &Map<String, Value>) -> Result<(), String> {
    let one =
        |(key, expected): (&String, &Value)| check(&format!("{path}.{key}"), actual.get(key), expected, Before(None));
    expected.iter().try_for_each(one)
}

fn apply(
    path: &str,
    actual: Option<&Value>,
    name: &str,
    argument: &Value,
    all: &Map<String, Value>,
    before: Before<'_>,
) -> Result<(), String> {
    let unless =
        |holds: bool| if holds { Ok(()) } else { Err(differs(path, actual, format!("{{{name}: {argument}}}"))) };
    let wrong = || format!("{path}: matcher {name} cannot use {argument}");
    let list = || argument.as_array().ok_or_else(wrong);
    let text = actual.and_then(Value::as_str);
    let number = actual.and_then(Value::as_f64);
    let items = actual.and_then(Value::as_array);
    let fits = |item: &Value, expected: &Value| check(path, Some(item), expected, Before(None)).is_ok();
    match name {
        "$any" => unless(actual.is_some()),
        "$absent" => unless(actual.is_none()),
        "$absent_or_null" => unless(actual.is_none_or(Value::is_null)),
        "$exact" => exact(path, actual, argument, before),
        "$superset" => match (actual, argument) {
            (Some(Value::Object(actual)), Value::Object(expected)) => members(path, actual, expected),
            _ => unless(false),
        },
        "$type" => unless(actual.map(type_of).is_some_and(|kind| {
            argument.as_str().is_some_and(|wanted| kind == wanted || (wanted == "number" && kind == "integer"))
        })),
        "$regex" => {
            let pattern = argument.as_str().ok_or_else(wrong)?;
            let regex = Regex::new(pattern).map_err(|error| format!("{path}: {pattern}: {error}"))?;
            unless(text.is_some_and(|text| regex.is_match(text)))
        }
        "$contains" => unless(argument.as_str().zip(text).is_some_and(|(part, text)| text.contains(part))),
        "$not_contains" => unless(argument.as_str().zip(text).is_some_and(|(part, text)| !text.contains(part))),
        "$gte" => unless(argument.as_f64().zip(number).is_some_and(|(limit, number)| number >= limit)),
        "$lt" => unless(argument.as_f64().zip(number).is_some_and(|(limit, number)| number < limit)),
        "$int_gt" => {
            let whole =
                text.and_then(|text| text.trim().parse::<i64>().ok()).or_else(|| actual.and_then(Value::as_i64));
            unless(argument.as_i64().zip(whole).is_some_and(|(limit, number)| number > limit))
        }
        "$near" => {
            let within = all.get("within").and_then(Value::as_f64).ok_or_else(wrong)?;
            unless(argument.as_f64().zip(number).is_some_and(|(wanted, number)| (number - wanted).abs() <= within))
        }
        "$one_of" => {
            let fits = list()?.iter().any(|expected| check(path, actual, expected, before).is_ok());
            unless(fits)
        }
        "$all" => list()?.iter().try_for_each(|expected| check(path, actual, expected, before)),
        "$not" => unless(check(path, actual, argument, before).is_err()),
        "$items_include" => {
            let items = items.ok_or_else(|| differs(path, actual, "a list"))?;
            let missing = list()?.iter().find(|expected| !items.iter().any(|item| fits(item, expected)));
            missing.map_or(Ok(()), |missing| Err(differs(path, actual, format!("an item {missing}"))))
        }
        "$items_match" => {
            let expected = list()?;
            let items = items.filter(|items| items.len() == expected.len());
            let Some(items) = items else { return unless(false) };
            let pairs = items.iter().zip(expected).enumerate();
            pairs.into_iter().try_for_each(|(i, (item, expected))| {
                check(&format!("{path}[{i}]"), Some(item), expected, Before(None))
            })
        }
        "$same_items" => {
            let mut left: Vec<&Value> = items.ok_or_else(|| differs(path, actual, "a list"))?.iter().collect();
            for expected in list()? {
                let Some(at) = left.iter().position(|item| fits(item, expected)) else { return unless(false) };
                left.remove(at);
            }
            unless(left.is_empty())
        }
        "$json_string" => {
            let parsed = text.and_then(|text| serde_json::from_str::<Value>(text).ok());
            exact(path, parsed.as_ref(), argument, before)
        }
        "$changed" => {
            let null = Value::Null;
            let changed = actual.unwrap_or(&null) != before.0.unwrap_or(&null);
            unless(argument.as_bool() == Some(changed))
        }
        "$byte_length_of" => {
            let length = argument.as_str().and_then(|text| u64::try_from(text.len()).ok());
            unless(length.is_some() && actual.and_then(Value::as_u64) == length)
        }
        _ => Err(format!("{path}: unknown matcher {name}")),
    }
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_i64() || number.is_u64() => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn holds(actual: Value, expected: Value) -> bool {
        check("v", Some(&actual), &expected, Before(Some(&json!(1)))).is_ok()
    }

    #[test]
    fn each_matcher_tells_right_from_wrong() {
        let cases = [
            (json!({ "$any": true }), json!(null), None),
            (json!({ "$exact": { "a": { "$type": "integer" } } }), json!({ "a": 1 }), Some(json!({ "a": 1, "b": 2 }))),
            (json!({ "$superset": { "a": 1 } }), json!({ "a": 1, "b": 2 }), Some(json!({ "b": 2 }))),
            (json!({ "$regex": "^a+$" }), json!("aa"), Some(json!("ab"))),
            (json!({ "$contains": "b" }), json!("abc"), Some(json!("ac"))),
            (json!({ "$not_contains": "b" }), json!("ac"), Some(json!("abc"))),
            (json!({ "$gte": 2, "$lt": 4 }), json!(3), Some(json!(4))),
            (json!({ "$int_gt": 1 }), json!("2"), Some(json!("1"))),
            (json!({ "$near": 10, "within": 2 }), json!(11.5), Some(json!(13))),
            (json!({ "$one_of": [1, { "$type": "string" }] }), json!("x"), Some(json!(2))),
            (json!({ "$all": [{ "$gte": 1 }, { "$not": 2 }] }), json!(3), Some(json!(2))),
            (
                json!({ "$items_include": [{ "$superset": { "a": 1 } }] }),
                json!([{ "a": 1, "b": 2 }, 3]),
                Some(json!([3])),
            ),
            (json!({ "$items_match": [1, { "$type": "string" }] }), json!([1, "x"]), Some(json!(["x", 1]))),
            (json!({ "$same_items": [1, 2] }), json!([2, 1]), Some(json!([1, 2, 2]))),
            (json!({ "$json_string": { "a": [1] } }), json!("{\"a\": [1]}"), Some(json!("{}"))),
            (json!({ "$changed": true }), json!(2), Some(json!(1))),
            (json!({ "$changed": false }), json!(1), Some(json!(2))),
            (json!({ "$byte_length_of": "äb" }), json!(3), Some(json!(2))),
            (json!({ "$absent_or_null": true }), json!(null), Some(json!(0))),
            (json!({ "a": 1 }), json!({ "a": 1.0 }), Some(json!({ "a": 1, "b": 1 }))),
        ];
        for (expected, right, wrong) in cases {
            assert!(holds(right.clone(), expected.clone()), "{right} should fit {expected}");
            if let Some(wrong) = wrong {
                assert!(!holds(wrong.clone(), expected.clone()), "{wrong} should not fit {expected}");
            }
        }
        assert!(check("v", None, &json!({ "$absent": true }), Before(None)).is_ok());
        assert!(check("v", None, &json!(null), Before(None)).is_err());
        assert!(check("v", None, &json!({ "$unheard_of": true }), Before(None)).is_err());
    }
}
