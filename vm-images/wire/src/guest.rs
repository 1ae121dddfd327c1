//! The guest's side of a session: opens a stream for each connection of the runner, and asks whether its host is there.

use crate::limits::{AUTHORITY, FRAME_BYTES_MAX, HEADERS_BYTES_MAX};
use crate::pipe::Pipe;
use crate::stream::Left;
use crate::{Limits, Proven, SessionError, Stream};
use bytes::Bytes;
use h2::client::{Builder, Connection, SendRequest};
use h2::{Ping, PingPong};
use http::uri::Authority;
use http::{Method, Request, Uri};
use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{sleep, timeout};

/// Opens streams; clones share the session.
#[derive(Clone)]
pub struct Opener {
    requests: SendRequest<Bytes>,
    places: Arc<Semaphore>,
    left: mpsc::UnboundedSender<Left>,
}

/// What moves a session: [`GuestSession::run`].
pub struct GuestSession<S> {
    connection: Connection<Pipe<S>, Bytes>,
    /// h2 ends a session that nobody can open a stream in.
    _requests: SendRequest<Bytes>,
    pings: Option<PingPong>,
    /// Streams that were dropped; at most as many as are open.
    dropped: mpsc::UnboundedReceiver<Left>,
    limits: Limits,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Proven<S> {
    /// Begins the session at the guest. `heard` is called whenever something has come.
    ///
    /// # Errors
    /// [`SessionError`] if the pipe breaks.
    ///
    /// # Cancel safety
    /// None: the pipe is gone with the future.
    pub async fn connect(
        self,
        limits: &Limits,
        heard: impl Fn() + Send + 'static,
    ) -> Result<(Opener, GuestSession<S>), SessionError> {
        let pipe = Pipe::of_guest(self.pipe, self.read, Box::new(heard));
        let mut builder = Builder::new();
        builder
            .initial_window_size(limits.guest.window)
            .initial_connection_window_size(limits.guest_window())
            .initial_max_send_streams(limits.opened as usize)
            .max_frame_size(FRAME_BYTES_MAX)
            .max_header_list_size(HEADERS_BYTES_MAX)
            .max_send_buffer_size(limits.guest.unsent)
            .enable_push(false);
        let (requests, mut connection) = builder.handshake(pipe).await.map_err(SessionError::Protocol)?;
        let pings = connection.ping_pong();
        let (left, dropped) = mpsc::unbounded_channel();
        let kept = requests.clone();
        let opener = Opener { requests, places: Arc::new(Semaphore::new(limits.opened as usize)), left };
        Ok((opener, GuestSession { connection, _requests: kept, pings, dropped, limits: limits.clone() }))
    }
}

impl Opener {
    /// A stream to the door: bytes may be written at once. Waits for a place if [`Limits::opened`] are open.
    ///
    /// # Errors
    /// [`SessionError`] if the session is over.
    ///
    /// # Cancel safety
    /// Safe: what was not returned was not opened.
    pub async fn open(&self) -> Result<Stream, SessionError> {
        self.open_uri(Uri::from_static(AUTHORITY)).await
    }

    /// A stream to what the host reaches by `host:port`; whether it does, [`Stream::accepted`] tells. Else as
    /// [`Opener::open`].
    ///
    /// # Errors
    /// [`SessionError`] if the session is over, or this is no authority.
    ///
    /// # Cancel safety
    /// Safe: what was not returned was not opened.
    pub async fn open_to(&self, authority: &str) -> Result<Stream, SessionError> {
        let authority = Authority::try_from(authority).map_err(|_| SessionError::Authority)?;
        self.open_uri(Uri::from(authority)).await
    }

    async fn open_uri(&self, target: Uri) -> Result<Stream, SessionError> {
        // The semaphore is never closed.
        let permit = Arc::clone(&self.places).acquire_owned().await.map_err(|_| SessionError::Ended)?;
        let mut requests = self.requests.clone().ready().await.map_err(SessionError::Protocol)?;
        let (answer, send) = requests.send_request(connect(target), false).map_err(SessionError::Protocol)?;
        Ok(Stream::of_guest(send, answer, permit, self.left.clone()))
    }
}

fn connect(target: Uri) -> Request<()> {
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = target;
    request
}

impl<S: AsyncRead + AsyncWrite + Unpin> GuestSession<S> {
    /// Moves all bytes of all streams, asks now and then whether the host is there, and ends streams that were dropped.
    /// Returns why the session is over; its streams are over with it.
    pub async fn run(mut self) -> SessionError {
        let mut watch = pin!(watch(self.pings.take(), &self.limits));
        let mut left: Vec<Left> = Vec::new();
        loop {
            let (connection, ending) = (&mut self.connection, &mut left);
            let streams_end = poll_fn(|cx| {
                ending.retain_mut(|stream| stream.poll_end(cx).is_pending());
                Poll::<()>::Pending
            });
            tokio::select! {
                // What has come first: it may end the others' waiting. All are kept over the turns, or hold nothing.
                biased;
                ended = connection => {
                    return ended.map_or_else(SessionError::Protocol, |()| SessionError::Ended);
                }
                Some(dropped) = self.dropped.recv() => left.push(dropped),
                () = streams_end => {}
                error = &mut watch => return error,
            }
        }
    }
}

/// Returns if the host does not answer in time.
async fn watch(pings: Option<PingPong>, limits: &Limits) -> SessionError {
    let Some(mut pings) = pings else { return std::future::pending().await };
    loop {
        sleep(limits.ping).await;
        if let Err(error) = pings.send_ping(Ping::opaque()) {
            return SessionError::Protocol(error);
        }
        match timeout(limits.pong, poll_fn(|cx| pings.poll_pong(cx))).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return SessionError::Protocol(error),
            Err(_) => return SessionError::Silent,
        }
    }
}
