//! The host's side of a session: takes the streams that a guest opens.

use crate::limits::{AUTHORITY, FRAME_BYTES_MAX, HEADERS_BYTES_MAX, RESET_STREAMS_MAX, RESETS_KEPT};
use crate::pipe::{Heard, Pipe};
use crate::stream::halves;
use crate::{Few, Limits, Proven, Reading, SessionError, Stream, Writing};
use bytes::Bytes;
use h2::ext::Protocol;
use h2::server::{Builder, Connection, SendResponse};
use h2::{Reason, RecvStream};
use http::uri::Authority;
use http::{Method, Request, Response, StatusCode};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{sleep_until, timeout};

/// One session, from the handshake to its end. Nothing of it moves but in [`HostSession::request`] and
/// [`HostSession::accept`].
pub struct HostSession<S> {
    connection: Connection<Pipe<S>, Bytes>,
    heard: Heard,
    silence: Duration,
    over: bool,
    windows: Windows,
    /// Came, and were not handed out yet: at most as many as may be open.
    asked: VecDeque<Asked>,
}

/// How large the streams' windows are.
struct Windows {
    /// Of a stream among many.
    many: u32,
    few: Option<Few>,
    /// The last that the guest was told is that of few.
    is_few: bool,
    /// All streams hold it.
    alive: Arc<()>,
}

impl Windows {
    fn new(limits: &Limits) -> Self {
        Self { many: limits.host.window, few: limits.few, is_few: limits.few.is_some(), alive: Arc::default() }
    }

    fn first(&self) -> u32 {
        self.few.map_or(self.many, |few| few.window)
    }

    /// Makes the windows fit to how many streams there are; `false`: that must wait until the guest has taken note of the
    /// last change. What is said here goes out before the answer to a stream that is handed out after it, and a guest
    /// that waits for it sends nothing before.
    fn fit(&mut self, set: impl FnOnce(u32) -> Result<(), h2::Error>) -> bool {
        let Some(few) = self.few else { return true };
        let streams = u32::try_from(Arc::strong_count(&self.alive) - 1).unwrap_or(u32::MAX);
        // Not to and fro with each stream.
        let is_few = streams <= if self.is_few { few.streams } else { few.streams / 2 };
        if is_few == self.is_few {
            return true;
        }
        if set(if is_few { few.window } else { self.many }).is_ok() {
            self.is_few = is_few;
            return true;
        }
        // To grow is no duty.
        is_few
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Proven<S> {
    /// Begins the session at the host.
    ///
    /// # Errors
    /// [`SessionError`] if the guest does not begin it, too, within [`Limits::silence`].
    ///
    /// # Cancel safety
    /// None: the pipe is gone with the future.
    pub async fn serve(self, limits: &Limits) -> Result<HostSession<S>, SessionError> {
        let heard = Heard::now();
        let pipe = Pipe::of_host(self.pipe, self.read, &heard);
        let windows = Windows::new(limits);
        let mut builder = Builder::new();
        builder
            .initial_window_size(windows.first())
            .initial_connection_window_size(limits.host_window())
            .max_concurrent_streams(limits.streams)
            .max_frame_size(FRAME_BYTES_MAX)
            .max_header_list_size(HEADERS_BYTES_MAX)
            .max_send_buffer_size(limits.host.unsent)
            .max_concurrent_reset_streams(RESET_STREAMS_MAX)
            .reset_stream_duration(RESETS_KEPT);
        let begun = timeout(limits.silence, builder.handshake(pipe)).await.map_err(|_| SessionError::Silent)?;
        let connection = begun.map_err(SessionError::Protocol)?;
        Ok(HostSession { connection, heard, silence: limits.silence, over: false, windows, asked: VecDeque::new() })
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> HostSession<S> {
    /// The next stream that the guest asks for, whatever for; `None`: the session is over. All bytes of all streams move
    /// in here, so it must always be polled.
    ///
    /// # Errors
    /// [`SessionError`], once: the session is over, and so are its streams.
    ///
    /// # Cancel safety
    /// Safe: nothing is lost.
    pub async fn request(&mut self) -> Option<Result<Asked, SessionError>> {
        if self.over {
            return None;
        }
        let Self { connection, heard, windows, asked, .. } = self;
        let next = poll_fn(|cx| poll_request(connection, windows, asked, cx));
        let next = tokio::select! {
            // The session first: what has come ends the silence.
            biased;
            next = next => next,
            () = silence(heard, self.silence) => Some(Err(SessionError::Silent)),
        };
        if !matches!(next, Some(Ok(_))) {
            self.over = true;
            self.asked.clear();
        }
        next
    }

    /// The next stream to the door; others are refused. Else as [`HostSession::request`].
    ///
    /// # Errors
    /// As [`HostSession::request`].
    ///
    /// # Cancel safety
    /// Safe: nothing is lost.
    pub async fn accept(&mut self) -> Option<Result<Stream, SessionError>> {
        loop {
            match self.request().await? {
                Ok(asked) if asked.is_for_door() => {
                    if let Some(stream) = asked.accept() {
                        return Some(Ok(stream));
                    }
                }
                Ok(asked) => asked.reset(),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// Moves all bytes, and takes in what is asked for; of that, the next one that may be answered.
fn poll_request<S: AsyncRead + AsyncWrite + Unpin>(
    connection: &mut Connection<Pipe<S>, Bytes>,
    windows: &mut Windows,
    asked: &mut VecDeque<Asked>,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<Asked, SessionError>>> {
    loop {
        match connection.poll_accept(cx) {
            Poll::Ready(Some(Ok((request, answer)))) => {
                asked.extend(Asked::new(request, answer, &windows.alive));
            }
            Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(SessionError::Protocol(error)))),
            Poll::Ready(None) => return Poll::Ready(None),
            Poll::Pending => break,
        }
    }
    if asked.is_empty() || !windows.fit(|window| connection.set_initial_window_size(window)) {
        // What it waits for comes over the connection, which wakes us.
        return Poll::Pending;
    }
    Poll::Ready(asked.pop_front().map(Ok))
}

/// Ends when nothing has come for so long.
async fn silence(heard: &Heard, most: Duration) {
    loop {
        let until = heard.last() + most;
        sleep_until(until).await;
        if heard.last() + most <= until {
            return;
        }
    }
}

/// A stream that the guest asks for. Dropped without an answer it is reset.
pub struct Asked {
    authority: Authority,
    answer: SendResponse<Bytes>,
    body: RecvStream,
    alive: Arc<()>,
}

impl Asked {
    /// `None`: it was no CONNECT, and was refused.
    fn new(request: Request<RecvStream>, mut answer: SendResponse<Bytes>, alive: &Arc<()>) -> Option<Self> {
        let is_connect = request.method() == Method::CONNECT && request.extensions().get::<Protocol>().is_none();
        let Some(authority) = request.uri().authority().filter(|_| is_connect).cloned() else {
            answer.send_reset(Reason::REFUSED_STREAM);
            return None;
        };
        Some(Self { authority, answer, body: request.into_body(), alive: Arc::clone(alive) })
    }

    /// Whether it is for the door.
    #[must_use]
    pub fn is_for_door(&self) -> bool {
        self.authority() == AUTHORITY
    }

    /// Ends it as one that nobody here serves.
    pub fn reset(mut self) {
        self.answer.send_reset(Reason::REFUSED_STREAM);
    }

    /// What the guest wants to reach: `host:port`, but for what it made of that. At most a few kilobytes.
    #[must_use]
    pub fn authority(&self) -> &str {
        self.authority.as_str()
    }

    /// Ready when the guest does not wait for an answer any more.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn given_up(&mut self) {
        // An error says the same: there is no such stream any more.
        let _ = poll_fn(|cx| self.answer.poll_reset(cx)).await;
    }

    /// Answers 200: bytes follow. `None`: the guest has reset it.
    #[must_use]
    pub fn accept(mut self) -> Option<Stream> {
        let send = self.answer.send_response(Response::new(()), false).ok()?;
        Some(Stream::of_host(send, self.body, self.alive))
    }

    /// As [`Asked::accept`], for who says himself how much is taken and sent.
    #[must_use]
    pub fn accept_halves(mut self) -> Option<(Reading, Writing)> {
        let send = self.answer.send_response(Response::new(()), false).ok()?;
        Some(halves(send, self.body, self.alive))
    }

    /// Answers with this status, and no bytes follow. One that is no HTTP status is 500.
    pub fn refuse(mut self, status: u16) {
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        // It fails if the guest has reset it already.
        let _ = self.answer.send_response(response, true);
    }
}

impl std::fmt::Debug for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Asked").field("authority", &self.authority).finish_non_exhaustive()
    }
}
