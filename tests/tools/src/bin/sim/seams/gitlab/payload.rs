//! A job on its way from GitLab to the daemon, and what may become of it there.

use super::{Gate, Head};
use crate::event::Event;
use crate::kinds::Kind;
use bytes::Bytes;
use dayfly::gitlab::JobId;
use dayfly::gitlab::transport::{Body, BodyError, full};
use http::Response;
use http_body_util::BodyExt as _;
use hyper::body::{Body as HttpBody, Frame};
use serde_json::Value;
use std::pin::Pin;
use std::task::{Context, Poll};

impl Gate {
    /// Reads a payload whole, as the daemon would, and gives it on, perhaps not as it was.
    pub(super) async fn assigned(&self, head: &Head, response: Response<Body>, faulted: bool) -> Response<Body> {
        self.story.point(Kind::KillK1).await;
        let (parts, mut body) = response.into_parts();
        let mut bytes = Vec::new();
        let mut broken = None;
        while let Some(frame) = body.frame().await {
            match frame {
                Ok(frame) => bytes.extend_from_slice(&frame.into_data().unwrap_or_default()),
                Err(error) => {
                    broken = Some(error);
                    break;
                }
            }
        }
        self.story.point(Kind::KillK2).await;
        if broken.is_none() {
            broken = self.spoil(&mut bytes);
        }
        let whole = if broken.is_none() { serde_json::from_slice::<Value>(&bytes).ok() } else { None };
        let whole = whole.filter(|payload| payload["token"].is_string());
        let job = whole.as_ref().and_then(|payload| payload["id"].as_u64()).map(JobId);
        self.story.tell(&head.answer(Some(parts.status.as_u16()), Some(&parts.headers), faulted));
        match job {
            Some(job) => {
                self.story.tell(&Event::Assigned { job, payload: &bytes });
                if self.story.strikes(Kind::OverAtFirstWord) {
                    self.standin.cancel(job, false);
                    self.users(job, "canceled at once");
                }
            }
            None => self.note_lost(),
        }
        let body = match broken {
            None => full(bytes),
            Some(error) => Broken { bytes: Some(bytes.into()), error: Some(error) }.boxed_unsync(),
        };
        Response::from_parts(parts, body)
    }

    fn spoil(&self, bytes: &mut Vec<u8>) -> Option<BodyError> {
        if self.story.strikes(Kind::AssignTruncated) {
            let keep = self.story.inner().dice().below(bytes.len() as u64);
            bytes.truncate(usize::try_from(keep).unwrap_or(0));
            return Some("injected: connection reset".into());
        }
        if self.story.strikes(Kind::AssignNonsense) {
            let at = self.story.inner().dice().below(bytes.len() as u64);
            bytes.truncate(usize::try_from(at).unwrap_or(0));
            bytes.extend_from_slice(b"}}");
        } else if bytes.first() == Some(&b'{') && self.story.strikes(Kind::StrangeMembers) {
            let mut text = br#"{"member_of_tomorrow":{"a":[1,"two",null]},"#.to_vec();
            text.extend_from_slice(&bytes[1..]);
            *bytes = text;
        }
        None
    }
}

/// A body that breaks off.
struct Broken {
    bytes: Option<Bytes>,
    error: Option<BodyError>,
}

impl HttpBody for Broken {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(bytes) = self.bytes.take() {
            return Poll::Ready(Some(Ok(Frame::data(bytes))));
        }
        Poll::Ready(self.error.take().map(Err))
    }
}
