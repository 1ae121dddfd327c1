//! The guest's end of a connection to the door of a test: what must come comes within the limit, or the test fails.

use super::support::{JOB, JOB_TOKEN, LIMIT};
use dayfly::vm::Stream;
use dayfly_guest_config::Pass;
pub(crate) use dayfly_test_guest::Answer as Reply;
use dayfly_test_guest::Connection;
pub(crate) use dayfly_test_guest::http::request;
pub(crate) use dayfly_test_guest::job::ask as poll;
use dayfly_test_guest::job::{patch as patch_of, update};
use tokio::io::WriteHalf;
use tokio::time::timeout;

/// Bytes of a line of the door's at most.
const LINE_MAX: usize = 64 * 1024;

/// The guest's end of a connection.
pub(crate) struct Guest(pub(crate) Connection<Box<dyn Stream>>);

impl Guest {
    pub(crate) fn new(stream: impl Stream + 'static) -> Self {
        Self(Connection::new(Box::new(stream)))
    }

    /// One half to send by, and a guest that only reads. Nothing was read before.
    pub(crate) fn split(self) -> (WriteHalf<Box<dyn Stream>>, Self) {
        let (sending, reading) = self.0.split();
        (sending, Self::new(reading.into_stream()))
    }

    /// The relay's half of the greeting, `first` in one segment with its last line.
    pub(crate) async fn greet(&mut self, pass: &Pass, first: &[u8]) {
        self.0.greet(pass, [7; 16], first).await.expect("the door holds the pass");
    }

    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.send(bytes.as_ref()).await.unwrap();
    }

    /// Sends what the door may not wait for.
    pub(crate) async fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        timeout(LIMIT, self.0.send(bytes.as_ref())).await.is_ok_and(|sent| sent.is_ok())
    }

    /// A line without its CR LF; `None` at the end.
    pub(crate) async fn line(&mut self) -> Option<String> {
        timeout(LIMIT, self.0.line(LINE_MAX)).await.expect("a line within the limit").unwrap_or_default()
    }

    /// All bytes until the door closes.
    pub(crate) async fn rest(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        // A reset is an end, too.
        while let Ok(some) = timeout(LIMIT, self.0.some()).await.expect("something within the limit")
            && !some.is_empty()
        {
            all.extend_from_slice(&some);
        }
        all
    }

    pub(crate) async fn reply(&mut self) -> Reply {
        self.try_reply().await.expect("an answer")
    }

    /// The next answer; `None` if the door closed instead.
    pub(crate) async fn try_reply(&mut self) -> Option<Reply> {
        match timeout(LIMIT, self.0.answer()).await.expect("something within the limit") {
            Ok(reply) => reply,
            // A reset is an end, too.
            Err(error) if error.kind() == std::io::ErrorKind::InvalidData => panic!("no answer: {error}"),
            Err(_) => None,
        }
    }
}

/// A PATCH as 19.3 sends it.
pub(crate) fn patch(offset: u64, bytes: &[u8]) -> Vec<u8> {
    patch_of(JOB, JOB_TOKEN, usize::try_from(offset).unwrap(), bytes)
}

/// A PUT as 19.3 sends it; `members` behind the token.
pub(crate) fn put(members: &str) -> Vec<u8> {
    update(JOB, JOB_TOKEN, &format!(r#"{{"info":{{}},"token":"{JOB_TOKEN}",{members}}}"#))
}
