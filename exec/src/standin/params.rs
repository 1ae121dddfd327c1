//! Parameters as GitLab's framework reads them: the query, then a form or JSON body over it.
//!
//! The last of two equal keys wins, body over query. A JSON body that is no JSON is 400 before
//! anything else is looked at.

use super::answer::Answer;
use bytes::Bytes;
use http::StatusCode;
use http::header::{CONTENT_TYPE, HeaderMap};
use serde_json::{Map, Value};

/// Merged parameters of one request.
#[derive(Clone, Debug, Default)]
pub(super) struct Params(pub(super) Map<String, Value>);

/// What a body is, by its content type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Media {
    Json,
    Form,
    Multipart,
    Text,
    Other,
}

impl Media {
    /// Reads `Content-Type`; a missing one counts as JSON, the API's default format.
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let Some(value) = headers.get(CONTENT_TYPE) else { return Self::Json };
        let value = value.to_str().unwrap_or_default();
        match value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase().as_str() {
            "application/json" => Self::Json,
            "application/x-www-form-urlencoded" => Self::Form,
            "multipart/form-data" => Self::Multipart,
            "text/plain" => Self::Text,
            _ => Self::Other,
        }
    }
}

impl Params {
    /// The query's pairs.
    pub(super) fn from_query(query: Option<&str>) -> Self {
        let mut params = Self::default();
        params.merge_form(query.unwrap_or_default().as_bytes());
        params
    }

    /// Lays the body over what is there.
    pub(super) fn merge_body(&mut self, headers: &HeaderMap, body: &Bytes) -> Result<(), Answer> {
        if body.is_empty() {
            return Ok(());
        }
        match Media::of(headers) {
            Media::Json => match serde_json::from_slice(body) {
                Ok(Value::Object(members)) => {
                    self.0.extend(members);
                    Ok(())
                }
                Ok(_) => Ok(()),
                Err(_) => Err(Answer::bad_parameter("message body does not match declared format")),
            },
            Media::Form => {
                self.merge_form(body);
                Ok(())
            }
            Media::Multipart | Media::Text => Ok(()),
            Media::Other => {
                Err(Answer::error(StatusCode::UNSUPPORTED_MEDIA_TYPE, "The provided content-type is not supported."))
            }
        }
    }

    /// `a=b&c[d]=e`: brackets nest, one level.
    fn merge_form(&mut self, text: &[u8]) {
        for (key, value) in url::form_urlencoded::parse(text) {
            let value = Value::String(value.into_owned());
            match key.strip_suffix(']').and_then(|key| key.split_once('[')) {
                Some((outer, "")) => {
                    let list = self.0.entry(outer).or_insert_with(|| Value::Array(Vec::new()));
                    if let Value::Array(list) = list {
                        list.push(value);
                    }
                }
                Some((outer, inner)) => {
                    let map = self.0.entry(outer).or_insert_with(|| Value::Object(Map::new()));
                    if let Value::Object(map) = map {
                        map.insert(inner.to_owned(), value);
                    }
                }
                None => {
                    self.0.insert(key.into_owned(), value);
                }
            }
        }
    }

    /// A text; numbers and booleans count as their text, null as absent.
    pub(super) fn text(&self, key: &str) -> Result<Option<String>, Answer> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(Value::Number(number)) => Ok(Some(number.to_string())),
            Some(Value::Bool(value)) => Ok(Some(value.to_string())),
            Some(Value::Array(_) | Value::Object(_)) => Err(invalid(key)),
        }
    }

    /// A text that must be there. The empty text is there.
    pub(super) fn required_text(&self, key: &str) -> Result<String, Answer> {
        if !self.0.contains_key(key) {
            return Err(Answer::bad_parameter(&format!("{key} is missing")));
        }
        Ok(self.text(key)?.unwrap_or_default())
    }

    /// A whole number, also as text; the empty text is none.
    pub(super) fn integer(&self, key: &str) -> Result<Option<i64>, Answer> {
        integer(self.0.get(key)).map_err(|()| invalid(key))
    }

    /// A boolean, also as text.
    pub(super) fn boolean(&self, key: &str) -> Result<Option<bool>, Answer> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(Value::String(text)) if text.is_empty() => Ok(None),
            Some(value) => match value.as_str().map(str::to_owned).unwrap_or_else(|| value.to_string()).as_str() {
                "true" | "1" | "t" | "on" | "yes" => Ok(Some(true)),
                "false" | "0" | "f" | "off" | "no" => Ok(Some(false)),
                _ => Err(invalid(key)),
            },
        }
    }

    /// An object.
    pub(super) fn object(&self, key: &str) -> Result<Option<&Map<String, Value>>, Answer> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(Value::String(text)) if text.is_empty() => Ok(None),
            Some(_) => Err(invalid(key)),
        }
    }

    /// A list of texts: a JSON list, or one text split at commas and trimmed.
    pub(super) fn list(&self, key: &str) -> Result<Option<Vec<String>>, Answer> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => {
                Ok(Some(text.split(',').map(str::trim).filter(|tag| !tag.is_empty()).map(str::to_owned).collect()))
            }
            Some(Value::Array(items)) => items
                .iter()
                .map(|item| item.as_str().map(|tag| tag.trim().to_owned()).ok_or_else(|| invalid(key)))
                .collect::<Result<_, _>>()
                .map(Some),
            Some(_) => Err(invalid(key)),
        }
    }
}

/// A whole number or its text.
pub(super) fn integer(value: Option<&Value>) -> Result<Option<i64>, ()> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Number(number)) => number.as_i64().map(Some).ok_or(()),
        Some(Value::String(text)) if text.is_empty() => Ok(None),
        Some(Value::String(text)) => text.trim().parse().map(Some).map_err(|_| ()),
        Some(_) => Err(()),
    }
}

fn invalid(key: &str) -> Answer {
    Answer::bad_parameter(&format!("{key} is invalid"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_body_wins_over_the_query_and_the_last_key_over_the_first() {
        let mut params = Params::from_query(Some("token=a&token=b&x=1"));
        assert_eq!(params.text("token").ok().flatten().as_deref(), Some("b"));
        let headers = HeaderMap::new();
        assert!(params.merge_body(&headers, &Bytes::from_static(br#"{"token":"c","token":"d"}"#)).is_ok());
        assert_eq!(params.text("token").ok().flatten().as_deref(), Some("d"));
        assert_eq!(params.text("x").ok().flatten().as_deref(), Some("1"));
    }

    #[test]
    fn a_form_nests_with_brackets() {
        let params = Params::from_query(Some("output[checksum]=crc32%3A1&tags[]=a&tags[]=b"));
        assert_eq!(params.0["output"]["checksum"], "crc32:1");
        assert_eq!(params.list("tags").ok().flatten(), Some(vec!["a".to_owned(), "b".to_owned()]));
    }
}
