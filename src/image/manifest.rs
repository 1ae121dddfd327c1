//! stub
pub struct Manifest { pub executor: String }
impl Manifest { pub fn is_standin(&self) -> bool { false } pub fn info(&self) -> Option<crate::gitlab::RunnerInfo> { None } }
