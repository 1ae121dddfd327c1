//! An artifact's bytes: in memory, in a file, made up on the fly, or gone; and a body of each.

use bytes::{Bytes, BytesMut};
use dayfly::gitlab::Body;
use dayfly::gitlab::transport::full;
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt as _;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncSeekExt as _, ReadBuf};

/// One read from a file, one piece of made-up content.
const PIECE_BYTES: usize = 64 << 10;

/// Where an artifact's bytes are.
#[derive(Clone, Debug)]
pub enum ArtifactContent {
    /// Here.
    Memory(Bytes),
    /// In this file.
    File(PathBuf),
    /// Nowhere: byte `i` is the low byte of `i * 31 + i / 251`, for downloads of any size.
    Pattern,
    /// Thrown away when it came: it can only be counted.
    Gone,
}

/// Byte `index` of [`ArtifactContent::Pattern`].
fn pattern_byte(index: u64) -> u8 {
    index.wrapping_mul(31).wrapping_add(index / 251).to_le_bytes()[0]
}

impl ArtifactContent {
    /// The bytes from `start` on, `length` of them, as a body; `None` if they are gone.
    pub(in crate::standin) async fn body(&self, start: u64, length: u64) -> io::Result<Option<Body>> {
        Ok(Some(match self {
            Self::Memory(bytes) => {
                let index = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
                full(bytes.slice(index(start)..index(start.saturating_add(length))))
            }
            Self::File(path) => {
                let mut file = tokio::fs::File::open(path).await?;
                file.seek(io::SeekFrom::Start(start)).await?;
                FileBody::new(file, length).map_err(Into::into).boxed_unsync()
            }
            Self::Pattern => PatternBody { at: start, end: start.saturating_add(length) }.boxed_unsync(),
            Self::Gone => return Ok(None),
        }))
    }
}

struct PatternBody {
    at: u64,
    end: u64,
}

impl HttpBody for PatternBody {
    type Data = Bytes;
    type Error = dayfly::gitlab::transport::BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX).min(PIECE_BYTES);
        if left == 0 {
            return Poll::Ready(None);
        }
        let mut piece = BytesMut::with_capacity(left);
        for _ in 0..left {
            piece.extend_from_slice(&[pattern_byte(self.at)]);
            self.at += 1;
        }
        Poll::Ready(Some(Ok(Frame::data(piece.freeze()))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.end - self.at)
    }
}

/// A file's next `left` bytes. A shorter file is an error: the promised length cannot be kept.
pub(in crate::standin) struct FileBody {
    file: tokio::fs::File,
    left: u64,
}

impl FileBody {
    pub(in crate::standin) fn new(file: tokio::fs::File, left: u64) -> Self {
        Self { file, left }
    }
}

impl HttpBody for FileBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let wanted = usize::try_from(self.left).unwrap_or(usize::MAX).min(PIECE_BYTES);
        if wanted == 0 {
            return Poll::Ready(None);
        }
        let mut piece = vec![0; wanted];
        let mut buffer = ReadBuf::new(&mut piece);
        ready!(Pin::new(&mut self.file).poll_read(context, &mut buffer))?;
        let read = buffer.filled().len();
        if read == 0 {
            return Poll::Ready(Some(Err(io::ErrorKind::UnexpectedEof.into())));
        }
        piece.truncate(read);
        self.left -= u64::try_from(read).unwrap_or(self.left);
        Poll::Ready(Some(Ok(Frame::data(Bytes::from(piece)))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
