//! Planned faults at work: answers that are not GitLab's, that come late, in pieces, or not whole.

use super::answer::Answer;
use super::exchange::Cut;
use super::fault::Fault;
use bytes::Bytes;
use dayfly::gitlab::Body;
use dayfly::gitlab::transport::{BodyError, full};
use http::{HeaderName, HeaderValue, Response, StatusCode};
use http_body::{Body as HttpBody, Frame};
use http_body_util::BodyExt as _;
use std::future::Future as _;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, Sleep};

/// What a body gives next.
pub(super) type BodyFrame = Option<Result<Frame<Bytes>, BodyError>>;

/// The answer of [`Fault::Status`].
pub(super) fn planned(code: u16, headers: &[(String, String)], body: Bytes) -> Response<Body> {
    let mut answer = Answer::empty(StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR));
    answer.body = full(body);
    let mut response = answer.into_response();
    add_headers(&mut response, headers);
    response
}

fn add_headers(response: &mut Response<Body>, headers: &[(String, String)]) {
    for (name, value) in headers {
        if let (Ok(name), Ok(value)) =
            (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_bytes(value.as_bytes()))
        {
            response.headers_mut().insert(name, value);
        }
    }
}

/// What happens to an answer on its way.
pub(super) async fn misbehave(fault: Fault, mut response: Response<Body>) -> Result<Response<Body>, Cut> {
    match fault {
        Fault::ApplyThenDrop => Err(Cut),
        Fault::DelayAnswer(duration) => {
            tokio::time::sleep(duration).await;
            Ok(response)
        }
        Fault::TruncateBody(bytes) => {
            // The promised length stays, so that the client can see what it missed.
            let length = response.body().size_hint().exact();
            if let Some(length) = length {
                add_headers(&mut response, &[("content-length".into(), length.to_string())]);
            }
            Ok(response.map(|body| Truncated { body, left: bytes }.boxed_unsync()))
        }
        Fault::DribbleBody { piece, every } => {
            let (parts, body) = response.into_parts();
            let whole = body.collect().await.map_err(|_| Cut)?.to_bytes();
            let pause = Box::pin(tokio::time::sleep(every));
            let dribbled = Dribbled { whole, piece: piece.max(1), every, pause }.boxed_unsync();
            Ok(Response::from_parts(parts, dribbled))
        }
        Fault::AnswerHeaders(headers) => {
            add_headers(&mut response, &headers);
            Ok(response)
        }
        Fault::ReplaceBody(bytes) => {
            response.headers_mut().remove(http::header::CONTENT_LENGTH);
            Ok(response.map(|_| full(bytes)))
        }
        Fault::Status { .. } | Fault::DropBeforeApply | Fault::DropInBody(_) | Fault::Delay(_) | Fault::Silence => {
            Ok(response)
        }
    }
}

/// Breaks off after some bytes.
struct Truncated {
    body: Body,
    left: u64,
}

impl HttpBody for Truncated {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<BodyFrame> {
        if self.left == 0 {
            return Poll::Ready(Some(Err(Cut.into())));
        }
        Pin::new(&mut self.body).poll_frame(context).map(|frame| match frame {
            Some(Ok(frame)) => {
                let data = frame.into_data().unwrap_or_default();
                let part = usize::try_from(self.left).unwrap_or(usize::MAX).min(data.len());
                self.left -= u64::try_from(part).unwrap_or(self.left);
                Some(Ok(Frame::data(data.slice(..part))))
            }
            Some(Err(error)) => Some(Err(error)),
            None => Some(Err(Cut.into())),
        })
    }
}

/// Comes in pieces.
struct Dribbled {
    whole: Bytes,
    piece: usize,
    every: Duration,
    pause: Pin<Box<Sleep>>,
}

impl HttpBody for Dribbled {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<BodyFrame> {
        if self.whole.is_empty() {
            return Poll::Ready(None);
        }
        if self.pause.as_mut().poll(context).is_pending() {
            return Poll::Pending;
        }
        let next = Instant::now() + self.every;
        self.pause.as_mut().reset(next);
        let piece = self.piece.min(self.whole.len());
        Poll::Ready(Some(Ok(Frame::data(self.whole.split_to(piece)))))
    }
}
