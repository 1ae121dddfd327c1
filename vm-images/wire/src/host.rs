//! The host's side of a session: takes the streams that a guest opens.

use crate::limits::{
    AUTHORITY, FRAME_BYTES_MAX, HEADERS_BYTES_MAX, RESET_STREAMS_MAX, RESETS_KEPT, SEND_BUFFER_BYTES, STREAM_WINDOW,
};
use crate::pipe::{Heard, Pipe};
use crate::{Limits, Proven, SessionError, Stream};
use bytes::Bytes;
use h2::ext::Protocol;
use h2::server::{Builder, Connection, SendResponse};
use h2::{Reason, RecvStream};
use http::{Method, Request, Response};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{sleep_until, timeout};

/// One session, from the handshake to its end. Nothing of it moves but in [`HostSession::accept`].
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
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(limits.connection_window())
            .max_concurrent_streams(limits.streams)
            .max_frame_size(FRAME_BYTES_MAX)
            .max_header_list_size(HEADERS_BYTES_MAX)
            .max_send_buffer_size(SEND_BUFFER_BYTES)
            .max_concurrent_reset_streams(RESET_STREAMS_MAX)
            .reset_stream_duration(RESETS_KEPT);
        let begun = timeout(limits.silence, builder.handshake(pipe)).await.map_err(|_| SessionError::Silent)?;
        let connection = begun.map_err(SessionError::Protocol)?;
        Ok(HostSession { connection, heard, silence: limits.silence, over: false })
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> HostSession<S> {
    /// The next stream of the guest; `None`: the session is over. All bytes of all streams move in here, so it must
    /// always be polled.
    ///
    /// # Errors
    /// [`SessionError`], once: the session is over, and so are its streams.
    ///
    /// # Cancel safety
    /// Safe: nothing is lost.
    pub async fn accept(&mut self) -> Option<Result<Stream, SessionError>> {
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
                    if let Some(stream) = take(request, answer) {
                        return Some(Ok(stream));
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

/// Answers a request if it is for the door, and refuses it otherwise.
fn take(request: Request<RecvStream>, mut answer: SendResponse<Bytes>) -> Option<Stream> {
    let is_ours = request.method() == Method::CONNECT
        && request.uri().authority().is_some_and(|authority| authority == AUTHORITY)
        && request.extensions().get::<Protocol>().is_none();
    if !is_ours {
        answer.send_reset(Reason::REFUSED_STREAM);
        return None;
    }
    // It fails if the guest has reset it already.
    let send = answer.send_response(Response::new(()), false).ok()?;
    Some(Stream::of_host(send, request.into_body()))
}
