//! The host's side of a session: takes the streams that a guest opens.

use crate::limits::{AUTHORITY, FRAME_BYTES_MAX, HEADERS_BYTES_MAX, RESET_STREAMS_MAX, RESETS_KEPT};
use crate::pipe::{Heard, Pipe};
use crate::stream::halves;
use crate::{Limits, Proven, Reading, SessionError, Stream, Writing};
use bytes::Bytes;
use h2::ext::Protocol;
use h2::server::{Builder, Connection, SendResponse};
use h2::{Reason, RecvStream};
use http::uri::Authority;
use http::{Method, Request, Response, StatusCode};
use std::future::poll_fn;
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
        let mut builder = Builder::new();
        builder
            .initial_window_size(limits.host.window)
            .initial_connection_window_size(limits.connection_window(limits.host))
            .max_concurrent_streams(limits.streams)
            .max_frame_size(FRAME_BYTES_MAX)
            .max_header_list_size(HEADERS_BYTES_MAX)
            .max_send_buffer_size(limits.host.unsent)
            .max_concurrent_reset_streams(RESET_STREAMS_MAX)
            .reset_stream_duration(RESETS_KEPT);
        let begun = timeout(limits.silence, builder.handshake(pipe)).await.map_err(|_| SessionError::Silent)?;
        let connection = begun.map_err(SessionError::Protocol)?;
        Ok(HostSession { connection, heard, silence: limits.silence, over: false })
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
        loop {
            let accepted = tokio::select! {
                // The session first: what has come ends the silence.
                biased;
                accepted = self.connection.accept() => accepted,
                () = silence(&self.heard, self.silence) => {
                    self.over = true;
                    return Some(Err(SessionError::Silent));
                }
            };
            match accepted {
                Some(Ok((request, answer))) => {
                    if let Some(asked) = Asked::new(request, answer) {
                        return Some(Ok(asked));
                    }
                }
                Some(Err(error)) => {
                    self.over = true;
                    return Some(Err(SessionError::Protocol(error)));
                }
                None => {
                    self.over = true;
                    return None;
                }
            }
        }
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
                Ok(asked) if asked.authority() == AUTHORITY => {
                    if let Some(stream) = asked.accept() {
                        return Some(Ok(stream));
                    }
                }
                Ok(mut asked) => asked.answer.send_reset(Reason::REFUSED_STREAM),
                Err(error) => return Some(Err(error)),
            }
        }
    }
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
}

impl Asked {
    /// `None`: it was no CONNECT, and was refused.
    fn new(request: Request<RecvStream>, mut answer: SendResponse<Bytes>) -> Option<Self> {
        let is_connect = request.method() == Method::CONNECT && request.extensions().get::<Protocol>().is_none();
        let Some(authority) = request.uri().authority().filter(|_| is_connect).cloned() else {
            answer.send_reset(Reason::REFUSED_STREAM);
            return None;
        };
        Some(Self { authority, answer, body: request.into_body() })
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
        Some(Stream::of_host(send, self.body))
    }

    /// As [`Asked::accept`], for who says himself how much is taken and sent.
    #[must_use]
    pub fn accept_halves(mut self) -> Option<(Reading, Writing)> {
        let send = self.answer.send_response(Response::new(()), false).ok()?;
        Some(halves(send, self.body))
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
