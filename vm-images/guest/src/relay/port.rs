//! The port behind which the door is: `/dev/vport…` of a virtio-serial device, as one pipe for each host that comes.
//!
//! Its ways, all measured with QEMU 7.2 and Linux 6.1: while nobody is at its other end it hangs up at once and each
//! time it is asked, reads give 0 and writes `EAGAIN`; the end of a host is seen or not, and bytes of it may come out
//! after the next one's first; opened anew it forgets what lay in it; it can be opened once. And Tokio's readiness keeps
//! a hang-up that it has seen for ever, so that whoever waits by it never sleeps again. So each session has the port
//! opened anew and registered anew, and whether somebody is there is asked by `poll` and a pause.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Between two looks at a port with nobody at its other end: what a session's beginning waits at worst, and a quarter
/// of what looks each 5 ms cost (0.09 of a processor, translated).
const HUNG_UP_PAUSE: Duration = Duration::from_millis(20);

/// And at a port where a person waits: a look costs next to nothing, but there would be one for as long as the machine is.
const RARE_PAUSE: Duration = Duration::from_millis(500);

/// What is read at once. The kernel gives a page with each read, and whoever reads here asks for what a frame still
/// lacks, which is less.
const READ_BYTES: usize = 64 * 1024;

/// One host's bytes.
pub trait Pipe: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Pipe for T {}

/// The next host's pipe, once it is there.
pub type Opening<'a> = Pin<Box<dyn Future<Output = io::Result<Box<dyn Pipe>>> + Send + 'a>>;

/// Where hosts come.
pub trait Port: Send {
    /// Forgets what was left of the last host, waits until one is there, and gives its pipe.
    ///
    /// # Cancel safety
    /// Safe.
    fn open(&mut self) -> Opening<'_>;
}

/// The device of a virtio-serial port.
pub struct Device(pub PathBuf);

impl Port for Device {
    fn open(&mut self) -> Opening<'_> {
        Box::pin(open(&self.0, HUNG_UP_PAUSE))
    }
}

/// The same, of a port that somebody comes to now and then, and waits at.
pub struct RareDevice(pub PathBuf);

impl Port for RareDevice {
    fn open(&mut self) -> Opening<'_> {
        Box::pin(open(&self.0, RARE_PAUSE))
    }
}

async fn open(path: &Path, pause: Duration) -> io::Result<Box<dyn Pipe>> {
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).map_err(io::Error::other)?;
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
    while hung_up(&file) {
        tokio::time::sleep(pause).await;
    }
    pipe(file)
}

/// A file that does not block, as a pipe.
pub(crate) fn pipe(file: File) -> io::Result<Box<dyn Pipe>> {
    #[expect(
        deprecated,
        reason = "its successor is `unsafe`; a `File` keeps its descriptor, which is all that it asks"
    )]
    let registered = AsyncFd::new(file)?;
    Ok(Box::new(Opened::new(registered)))
}

/// Is nobody at the other end?
fn hung_up(file: &File) -> bool {
    let mut ports = [PollFd::new(file, PollFlags::OUT)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut ports, Some(&now)).is_ok() && ports[0].revents().contains(PollFlags::HUP)
}

/// The port, for one host.
struct Opened {
    port: AsyncFd<File>,
    /// Read, and not taken yet: [`Opened::came`] of it.
    buffer: Box<[u8]>,
    came: Range<usize>,
}

impl Opened {
    fn new(port: AsyncFd<File>) -> Self {
        Self { port, buffer: vec![0; READ_BYTES].into(), came: 0..0 }
    }
}

/// Reads until the buffer is full or nothing more is there; an end or an error behind something is met by the next call.
fn fill(mut port: &File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut count = port.read(buffer)?;
    while count > 0 && count < buffer.len() {
        match port.read(&mut buffer[count..]) {
            Ok(0) | Err(_) => break,
            Ok(more) => count += more,
        }
    }
    Ok(count)
}

impl AsyncRead for Opened {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { port, buffer, came } = &mut *self;
        while came.start == came.end {
            let mut ready = ready!(port.poll_read_ready(cx))?;
            let closed = ready.ready().is_read_closed();
            match ready.try_io(|port| fill(port.get_ref(), buffer)) {
                Ok(Ok(0)) => return Poll::Ready(Ok(())),
                Ok(count) => *came = 0..count?,
                // It hung up once, and there is nothing to read because the next host is there already.
                Err(_) if closed => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
                Err(_) => {}
            }
        }
        let count = came.len().min(into.remaining());
        into.put_slice(&buffer[came.start..came.start + count]);
        came.start += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Opened {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.port.poll_write_ready(cx))?;
            let closed = ready.ready().is_write_closed();
            match ready.try_io(|port| port.get_ref().write(bytes)) {
                Ok(written) => return Poll::Ready(written),
                // A port with nobody behind it is full, and nothing will tell us that it is not any more.
                Err(_) if closed || hung_up(self.port.get_ref()) => {
                    return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
                }
                Err(_) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// There is no half of a port.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
