//! The configuration's JSON schema, for editors: made of `config.example.toml` and the defaults, which tests hold to the
//! code, so that it says what they say.
//!
//! It knows each section and key, what it is about, the kind of its value and its default. What values make sense
//! together, `dayfly check` knows.

use super::{Config, EXAMPLE};
use serde_json::{Map, Value, json};
use toml_edit::DocumentMut;

/// Keys without which an entry means nothing.
const REQUIRED: [(&str, &[&str]); 5] = [
    ("cache.tenant", &["name", "projects"]),
    ("class", &["name", "image"]),
    ("forward", &["name", "address", "port", "classes"]),
    ("rule", &[]),
    ("runner", &["name", "url", "token_file", "class"]),
];

/// A key as the example has it.
struct Key {
    /// Empty: at the top.
    section: String,
    name: String,
    /// As TOML.
    value: String,
    /// The lines above it.
    about: String,
}

/// The schema, in draft 2020-12.
#[must_use]
pub fn schema() -> Value {
    let defaults = serde_json::to_value(Config::default()).unwrap_or_default();
    let mut root = object("dayfly's configuration");
    for key in keys(EXAMPLE) {
        let default = match key.section.as_str() {
            "" => defaults.get(&key.name),
            section => defaults.get(section).and_then(|section| section.get(&key.name)),
        };
        let described = describe(&key, default);
        let properties = properties_of(&mut root, &key.section);
        // Of an entry that stands there twice, the first.
        properties.entry(key.name).or_insert(described);
    }
    json!({ "$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "dayfly-config" })
        .as_object()
        .cloned()
        .map(|mut head| {
            head.extend(root);
            Value::Object(head)
        })
        .unwrap_or_default()
}

fn object(about: &str) -> Map<String, Value> {
    let object = json!({ "description": about, "type": "object", "properties": {}, "additionalProperties": false });
    object.as_object().cloned().unwrap_or_default()
}

/// Where the keys of a section stand; made if there are none yet. `class.egress` is a table of each `[[class]]`.
fn properties_of<'a>(root: &'a mut Map<String, Value>, section: &str) -> &'a mut Map<String, Value> {
    const KNOWN: &str = "made by `object`";
    let mut properties = root["properties"].as_object_mut().expect(KNOWN);
    let mut path = String::new();
    for (depth, name) in section.split('.').filter(|name| !name.is_empty()).enumerate() {
        path = if depth == 0 { name.to_owned() } else { format!("{path}.{name}") };
        let required = REQUIRED.iter().find(|(known, _)| *known == path).map(|(_, keys)| *keys);
        let of_section = properties.entry(name).or_insert_with(|| {
            let mut one = object(&format!("[{name}]"));
            if depth > 0 && required.is_none() {
                // The example need not show all that may stand in there.
                one.insert("additionalProperties".into(), true.into());
            }
            match required {
                None => Value::Object(one),
                Some(required) => {
                    one.insert("required".into(), json!(required));
                    json!({ "type": "array", "items": one })
                }
            }
        });
        let of_one = if required.is_some() { &mut of_section["items"] } else { of_section };
        properties = of_one["properties"].as_object_mut().expect(KNOWN);
    }
    properties
}

fn describe(key: &Key, default: Option<&Value>) -> Value {
    let shown = format!("x = {}", key.value).parse::<DocumentMut>().ok();
    let shown = shown.as_ref().and_then(|document| document.get("x"));
    let kind = match shown {
        Some(item) if item.is_integer() => json!({ "type": "integer", "minimum": 0 }),
        Some(item) if item.is_bool() => json!({ "type": "boolean" }),
        Some(item) if item.is_array() => {
            let of_numbers = item.as_array().and_then(|list| list.get(0)).is_some_and(toml_edit::Value::is_integer);
            json!({ "type": "array", "items": { "type": if of_numbers { "integer" } else { "string" } } })
        }
        Some(item) if item.is_table_like() => {
            json!({ "type": "object", "additionalProperties": { "type": "boolean" } })
        }
        _ => json!({ "type": "string" }),
    };
    let mut described = kind;
    described["description"] = key.about.clone().into();
    if let Some(default) = default.filter(|default| !default.is_null() && !default.is_object()) {
        described["default"] = default.clone();
    }
    described
}

/// The example's keys, in force or not. Prose has a blank after its `#`.
fn keys(example: &str) -> Vec<Key> {
    let (mut keys, mut section, mut about) = (Vec::new(), String::new(), Vec::new());
    for line in example.lines() {
        let line = line.trim();
        let bare = line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).unwrap_or(line);
        if let Some(name) = bare.strip_prefix('[') {
            section = name.trim_matches(['[', ']']).to_owned();
            about.clear();
        } else if let Some(prose) = line.strip_prefix("# ") {
            about.push(prose);
        } else if let Some((name, value)) = bare.split_once(" = ") {
            let about = std::mem::take(&mut about).join(" ");
            // Keys that stand together have their words together.
            let before = keys.last().filter(|before: &&Key| before.section == section && about.is_empty());
            let about = before.map_or(about, |before| before.about.clone());
            keys.push(Key { section: section.clone(), name: name.to_owned(), value: value.to_owned(), about });
        } else {
            about.clear();
        }
    }
    keys
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the schema takes this value, as far as it says anything.
    fn takes(schema: &Value, value: &Value) -> Result<(), String> {
        let kind = schema["type"].as_str().unwrap();
        let is = match value {
            Value::String(_) => kind == "string",
            Value::Number(_) => kind == "integer",
            Value::Bool(_) => kind == "boolean",
            Value::Array(_) => kind == "array",
            Value::Object(_) => kind == "object",
            Value::Null => return Ok(()),
        };
        if !is {
            return Err(format!("{value} is no {kind}"));
        }
        for element in value.as_array().into_iter().flatten() {
            takes(&schema["items"], element)?;
        }
        for (name, member) in value.as_object().into_iter().flatten() {
            if schema["additionalProperties"] == true && schema["properties"].get(name).is_none() {
                continue;
            }
            let known =
                schema["properties"].get(name).or(schema.get("additionalProperties").filter(|more| more.is_object()));
            takes(known.ok_or_else(|| format!("`{name}` is not known"))?, member)
                .map_err(|why| format!("{name}: {why}"))?;
        }
        Ok(())
    }

    #[test]
    fn the_schema_knows_each_key_its_kind_and_its_default() {
        let schema = schema();
        let loaded = Config::assemble(
            Some((
                "/c".into(),
                "[[class]]\nname = \"s\"\nimage = \"i\"\n[[runner]]\nname = \"n\"\nurl = \"https://g.example\"\ntoken_file = \"t\"\nclass = \"s\"\nfeature_flags = { FF_A = true }\nenvironment = [\"A=b\"]\n".into(),
            )),
            [],
        );
        takes(&schema, &serde_json::to_value(loaded.unwrap().config).unwrap()).unwrap();
        assert_eq!(schema["properties"]["limits"]["properties"]["keepalive"]["default"], "10s");
        assert_eq!(schema["properties"]["concurrent"]["default"], 1);
        let class = &schema["properties"]["class"]["items"];
        assert_eq!(class["required"], json!(["name", "image"]));
        assert!(class["properties"]["cpus"]["description"].as_str().unwrap().starts_with("Virtual CPUs"));
        for (bad, why) in [(json!({ "concurent": 1 }), "not known"), (json!({ "concurrent": "1" }), "no integer")] {
            assert!(takes(&schema, &bad).unwrap_err().contains(why), "{bad}");
        }
    }

    #[test]
    fn each_key_says_what_it_is_about() {
        for key in keys(EXAMPLE) {
            assert!(
                !key.about.is_empty() || key.name == "name" || key.section == "runner",
                "{}.{}",
                key.section,
                key.name
            );
        }
    }
}
