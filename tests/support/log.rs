//! What the daemon logs while a test runs. Everything of a test is on one thread, so its subscriber
//! is that thread's.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use tracing::Level;
use tracing::subscriber::DefaultGuard;
use tracing_subscriber::fmt::MakeWriter;

/// The lines so far. Clones share them.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    /// Listens until the guard is dropped.
    pub fn listen(&self) -> DefaultGuard {
        self.listen_to(Level::INFO)
    }

    /// The same to lines of this level and above.
    pub fn listen_to(&self, level: Level) -> DefaultGuard {
        let subscriber = tracing_subscriber::fmt()
            .with_writer(self.clone())
            .with_ansi(false)
            .without_time()
            .with_target(false)
            // As the daemon's own: what h2 says has no bound.
            .with_env_filter(format!("h2=off,{level}"));
        tracing::subscriber::set_default(subscriber.finish())
    }

    /// All lines.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// Lines of level WARN and ERROR.
    pub fn trouble(&self) -> Vec<String> {
        let is_trouble = |line: &&str| line.trim_start().starts_with("WARN") || line.starts_with("ERROR");
        self.text().lines().filter(is_trouble).map(str::to_owned).collect()
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;
    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
