//! The file's shape. A member that nobody here knows is an error, not a pass.

use serde::Deserialize;
use serde_json::{Map, Value};

/// One fact.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Fact {
    pub(crate) id: String,
    pub(crate) endpoint: String,
    pub(crate) title: String,
    pub(crate) given: Map<String, Value>,
    pub(crate) request: Sent,
    pub(crate) expect: Expect,
    pub(crate) tier: u8,
    #[serde(default)]
    pub(crate) needs: Vec<String>,
    #[serde(rename = "source", default)]
    _source: Value,
    #[serde(rename = "gitlab", default)]
    _gitlab: Value,
    #[serde(rename = "confidence", default)]
    _confidence: Value,
    #[serde(rename = "layer", default)]
    _layer: Value,
    #[serde(rename = "tags", default)]
    _tags: Value,
}

/// A request to send.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Sent {
    pub(crate) method: String,
    pub(crate) path: String,
    #[serde(default)]
    pub(crate) headers: Map<String, Value>,
    #[serde(default)]
    pub(crate) query: Map<String, Value>,
    #[serde(default)]
    pub(crate) body: SentBody,
}

/// Its body.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub(crate) enum SentBody {
    #[default]
    None,
    Json {
        value: Value,
    },
    Form {
        value: Map<String, Value>,
    },
    Text {
        value: Value,
    },
    Multipart {
        parts: Vec<Part>,
    },
}

/// One part of a multipart body.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Part {
    pub(crate) field: String,
    pub(crate) filename: Option<String>,
    pub(crate) content: String,
}

/// Something that happens: a request, or an action of somebody else.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Step {
    Action(Action),
    Request(Box<Sent>),
}

/// An action beside the requests.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Action {
    #[serde(rename = "do")]
    pub(crate) what: String,
    #[serde(default)]
    pub(crate) at_s: f64,
}

/// What must come back and be true.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Expect {
    pub(crate) status: Option<Value>,
    #[serde(default)]
    pub(crate) headers: Map<String, Value>,
    #[serde(default)]
    pub(crate) body: ExpectedBody,
    #[serde(default)]
    pub(crate) after: Map<String, Value>,
    pub(crate) soft: Option<Box<Expect>>,
}

/// What must stand in the body.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ExpectedBody {
    pub(crate) json: Option<Value>,
    pub(crate) text: Option<Value>,
}
