//! What must hold for any bytes of a guest? The properties of the door; see [`crate::fuzzing`].
#![expect(clippy::unwrap_used, reason = "a property fails by panicking")]

mod bodies;
mod door;
mod greeting;
mod heads;
mod proxy;
mod requests;

pub use bodies::{chunked_body, content_range, update_body};
pub use greeting::{greeting_door, greeting_relay};
pub use heads::{forwarded_headers, request_head, route};
pub use proxy::{artifact_upload, proxy};
pub use requests::requests;
