//! The stand-in behind the daemon's GitLab seam, in the process: no socket, so that the clock may stand.

use super::Standin;
use super::exchange::Cut;
use bytes::Bytes;
use dayfly::BoxFuture;
use dayfly::gitlab::transport::{Body, BodyError, OpenError};
use dayfly::gitlab::{Call, Endpoint, OpenTransport, Transport, TransportError};
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt as _;
use std::future::Future as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::sync::oneshot;
use tokio::time::{Instant, Sleep, sleep_until};

/// What a loopback connection takes without a reader, roughly.
const SOCKET_BUFFER_BYTES: u64 = 128 << 10;

impl Transport for Standin {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<http::Response<Body>, TransportError>> {
        let standin = self.clone();
        Box::pin(async move {
            let Call { request, head_timeout, total_timeout, connection: _ } = call;
            let end = Instant::now() + total_timeout;
            let (sent, body_sent) = oneshot::channel();
            // A body that fits the kernel's buffers is sent at once, whoever reads it.
            let sent = request.body().size_hint().exact().is_none_or(|size| size > SOCKET_BUFFER_BYTES).then_some(sent);
            let request = request.map(|body| Watched { body, _sent: sent }.boxed_unsync());
            let late = async {
                // The sender is dropped with the body: read to its end, or not wanted any more.
                let _ = body_sent.await;
                tokio::time::sleep(head_timeout).await;
            };
            // An answer that is there is taken before a limit that has passed. Dropping a branch ends
            // the exchange like a closed connection; the model changes in one step or not at all.
            tokio::select! {
                biased;
                answer = standin.exchange(request, 0) => match answer {
                    Ok(response) => Ok(response.map(|body| Limited::new(body, end).boxed_unsync())),
                    Err(Cut) => Err(TransportError::Broken(Cut.into())),
                },
                () = late => Err(TransportError::Timeout(head_timeout)),
                () = sleep_until(end) => Err(TransportError::Timeout(total_timeout)),
            }
        })
    }
}

impl OpenTransport for Standin {
    /// Every endpoint is this stand-in.
    fn open(&self, _: &Endpoint) -> Result<Arc<dyn Transport>, OpenError> {
        Ok(Arc::new(self.clone()))
    }
}

/// A request body that tells when it is done.
struct Watched {
    body: Body,
    _sent: Option<oneshot::Sender<()>>,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A response body that ends in an error when the exchange takes too long.
struct Limited {
    body: Body,
    limit: Pin<Box<Sleep>>,
}

impl Limited {
    fn new(body: Body, end: Instant) -> Self {
        Self { body, limit: Box::pin(sleep_until(end)) }
    }
}

impl HttpBody for Limited {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            return Poll::Ready(frame);
        }
        self.limit.as_mut().poll(context).map(|()| Some(Err("the exchange took too long".into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
