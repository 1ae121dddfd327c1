//! Bodies on their way to and from GitLab: who has finished, who is idle, what ends with what.
//!
//! [`Upload`] tells when the request's body has ended, which is when the wait for the answer's head
//! begins, and it ends in an error once the answer is complete. Without the latter an early answer
//! (413 or 403 before the body was read) would leave a half-sent request, its socket and its task
//! behind for as long as the sender likes (threats.md F4). [`Answer`] holds the limits of reading.

use super::transport::{Body, BodyError, TransportError};
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use std::pin::Pin;
use std::sync::Mutex;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::sync::{CancellationToken, DropGuard, WaitForCancellationFutureOwned};

/// A request's body.
pub(super) struct Upload {
    /// reqwest wants a body that is `Sync`, and ours is only `Send`. The mutex is never locked:
    /// each access is through `&mut self`.
    body: Mutex<Body>,
    /// Dropped when the body has ended, well or not.
    sending: Option<oneshot::Sender<()>>,
    /// Fires when the answer is complete.
    answered: Pin<Box<WaitForCancellationFutureOwned>>,
}

/// The other ends of an [`Upload`].
pub(super) struct UploadWatch {
    /// Ends when the body has.
    pub(super) sent: oneshot::Receiver<()>,
    /// For the [`Answer`]: dropping it ends the upload.
    pub(super) answered: DropGuard,
}

impl Upload {
    pub(super) fn new(body: Body) -> (Self, UploadWatch) {
        let (sending, sent) = oneshot::channel();
        let token = CancellationToken::new();
        let answered = Box::pin(token.clone().cancelled_owned());
        // A body that is empty from the start is never asked for a frame.
        let sending = (!body.is_end_stream()).then_some(sending);
        (Self { body: Mutex::new(body), sending, answered }, UploadWatch { sent, answered: token.drop_guard() })
    }

    fn body(&mut self) -> &mut Body {
        self.body.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl HttpBody for Upload {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        use std::future::Future as _;
        let this = self.get_mut();
        if this.answered.as_mut().poll(context).is_ready() {
            this.sending = None;
            return Poll::Ready(Some(Err("the answer is complete".into())));
        }
        let polled = Pin::new(this.body()).poll_frame(context);
        let ended = match &polled {
            Poll::Pending => false,
            Poll::Ready(None | Some(Err(_))) => true,
            Poll::Ready(Some(Ok(_))) => this.body().is_end_stream(),
        };
        if ended {
            this.sending = None;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.lock().unwrap_or_else(std::sync::PoisonError::into_inner).is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.lock().unwrap_or_else(std::sync::PoisonError::into_inner).size_hint()
    }
}

/// An answer's body, read within limits.
pub(super) struct Answer {
    body: reqwest::Body,
    idle: Duration,
    total: Duration,
    /// When the wait for the next frame ends. Runs only while somebody waits: a reader that takes
    /// its time is not GitLab being idle.
    idle_end: Pin<Box<Sleep>>,
    waiting: bool,
    deadline: Pin<Box<Sleep>>,
    answered: Option<DropGuard>,
}

impl Answer {
    pub(super) fn new(
        body: reqwest::Body,
        idle: Duration,
        total: Duration,
        deadline: Instant,
        answered: DropGuard,
    ) -> Self {
        let answered = (!body.is_end_stream()).then_some(answered);
        let (idle_end, deadline) = (Box::pin(sleep_until(deadline)), Box::pin(sleep_until(deadline)));
        Self { body, idle, total, idle_end, waiting: false, deadline, answered }
    }
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        use std::future::Future as _;
        let this = self.get_mut();
        let failed = |error: TransportError| Poll::Ready(Some(Err(BodyError::from(error))));
        // The deadline first: a body that drips for ever is always ready.
        if this.deadline.as_mut().poll(context).is_ready() {
            this.answered = None;
            return failed(TransportError::Timeout(this.total));
        }
        match Pin::new(&mut this.body).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => {
                this.waiting = false;
                if this.body.is_end_stream() {
                    this.answered = None;
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                this.answered = None;
                failed(TransportError::Broken(error.without_url().into()))
            }
            Poll::Ready(None) => {
                this.answered = None;
                Poll::Ready(None)
            }
            Poll::Pending => {
                if !this.waiting {
                    this.waiting = true;
                    this.idle_end.as_mut().reset(Instant::now() + this.idle);
                }
                if this.idle_end.as_mut().poll(context).is_ready() {
                    this.answered = None;
                    return failed(TransportError::Timeout(this.idle));
                }
                Poll::Pending
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
