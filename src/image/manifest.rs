//! stub
pub struct Manifest { pub executor: String }
impl Manifest { pub fn is_standin(&self) -> bool { false } pub fn info(&self) -> Option<crate::gitlab::RunnerInfo> { serde_json::from_str(r#"{"name":"gitlab-runner","version":"19.3.0","features":{"cancel_gracefully":true}}"#).ok() } }
