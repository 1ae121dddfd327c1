//! A multipart body, read part by part as it comes: linear work, and never more in memory than a part's head.
//!
//! A guest can send anything here, so everything that is waited for has a bound before it is read: what stands
//! before the first part, the head of a part (one without an end is refused, and each byte of it is searched
//! once), the number of parts, and the body as a whole. Format: RFC 2046 section 5.1, as Go's `mime/multipart`
//! writes it in the official runner.

use bytes::{Buf as _, Bytes, BytesMut};
use dayfly::gitlab::Body;
use http_body_util::BodyExt as _;
use memchr::memmem;

/// Bytes of a part's head, and of what stands before the first part. The official runner's head has less
/// than 300 bytes and a file's name.
pub(super) const HEAD_BYTES_MAX: usize = 16 << 10;

/// Parts of one body. GitLab takes one file; the official runner sends nothing else.
pub(super) const PARTS_MAX: usize = 32;

/// What a body may have beside the one file: heads, delimiters, fields that are ignored.
const OVERHEAD_BYTES_MAX: u64 = 1 << 20;

/// Length of a delimiter's own part (RFC 2046).
const BOUNDARY_BYTES_MAX: usize = 70;

/// Why a body cannot be read on.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum MultipartError {
    /// It ends before its last delimiter, or the connection did.
    #[error("the multipart body is cut short")]
    Cut,
    /// A head that is none, or that has no end within its bound; too many parts.
    #[error("the multipart body is broken")]
    Broken,
    /// More bytes than it may have.
    #[error("the multipart body is too large")]
    TooLarge,
}

/// A part's head.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Part {
    /// `name` of its disposition.
    pub(super) name: Option<String>,
    /// `filename` of its disposition: it is a file.
    pub(super) filename: Option<String>,
}

/// A body under way.
pub(super) struct Multipart {
    body: Body,
    /// Bytes that may still come.
    left: u64,
    delimiter: memmem::Finder<'static>,
    buffer: BytesMut,
    parts: usize,
    /// The current part, or what is before the first, has not been read to its end.
    in_part: bool,
    over: bool,
}

impl Multipart {
    /// `boundary` is that of the content type; the one file may have `file_bytes_max`.
    pub(super) fn new(body: Body, boundary: &str, file_bytes_max: u64) -> Self {
        Self {
            body,
            left: file_bytes_max.saturating_add(OVERHEAD_BYTES_MAX),
            delimiter: memmem::Finder::new(&format!("\r\n--{boundary}")).into_owned(),
            // The first delimiter may stand at the very beginning.
            buffer: BytesMut::from(&b"\r\n"[..]),
            parts: 0,
            in_part: true,
            over: false,
        }
    }

    /// The next part; what is left of the one before is read and forgotten. `None`: that was the last.
    pub(super) async fn next_part(&mut self) -> Result<Option<Part>, MultipartError> {
        let mut before_first = if self.parts == 0 { HEAD_BYTES_MAX } else { usize::MAX };
        while let Some(skipped) = self.chunk().await? {
            before_first = before_first.checked_sub(skipped.len()).ok_or(MultipartError::Broken)?;
        }
        if self.over {
            return Ok(None);
        }
        let mut searched = 0;
        let end = loop {
            if self.buffer.starts_with(b"--") {
                self.over = true;
                return Ok(None);
            }
            // The line end may stand across two pieces.
            let from = usize::saturating_sub(searched, 3);
            let found = memmem::find(self.buffer.get(from..).unwrap_or_default(), b"\r\n\r\n");
            match found {
                Some(at) => break from + at,
                None if self.buffer.len() > HEAD_BYTES_MAX => return Err(MultipartError::Broken),
                None => {
                    searched = self.buffer.len();
                    self.read_more().await?;
                }
            }
        };
        self.parts += 1;
        if end > HEAD_BYTES_MAX || self.parts > PARTS_MAX {
            return Err(MultipartError::Broken);
        }
        let head = self.buffer.split_to(end);
        self.buffer.advance(4);
        self.in_part = true;
        read_head(&head).map(Some)
    }

    /// More of the current part's content; `None` at its end.
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, MultipartError> {
        while self.in_part {
            let delimiter_bytes = self.delimiter.needle().len();
            match self.delimiter.find(&self.buffer) {
                Some(0) => {
                    self.buffer.advance(delimiter_bytes);
                    self.in_part = false;
                }
                Some(at) => return Ok(Some(self.buffer.split_to(at).freeze())),
                // The last bytes may be the beginning of a delimiter.
                None if self.buffer.len() >= delimiter_bytes => {
                    let ready = self.buffer.len() + 1 - delimiter_bytes;
                    return Ok(Some(self.buffer.split_to(ready).freeze()));
                }
                None => self.read_more().await?,
            }
        }
        Ok(None)
    }

    /// One piece more in the buffer: what the connection had at hand.
    async fn read_more(&mut self) -> Result<(), MultipartError> {
        loop {
            let Some(Ok(frame)) = self.body.frame().await else { return Err(MultipartError::Cut) };
            let Ok(data) = frame.into_data() else { continue };
            let bytes = u64::try_from(data.len()).unwrap_or(u64::MAX);
            self.left = self.left.checked_sub(bytes).ok_or(MultipartError::TooLarge)?;
            if !data.is_empty() {
                self.buffer.extend_from_slice(&data);
                return Ok(());
            }
        }
    }
}

/// The boundary in `Content-Type: multipart/form-data; boundary=…`.
pub(super) fn boundary(content_type: &str) -> Option<String> {
    let (media, parameters) = content_type.split_once(';')?;
    if !media.trim().eq_ignore_ascii_case("multipart/form-data") {
        return None;
    }
    let boundary = parameter(parameters, "boundary")?;
    ((1..=BOUNDARY_BYTES_MAX).contains(&boundary.len()) && boundary.is_ascii()).then_some(boundary)
}

/// What stands between a delimiter and the empty line: the rest of the delimiter's line, and headers.
fn read_head(head: &[u8]) -> Result<Part, MultipartError> {
    let head = String::from_utf8_lossy(head);
    let mut lines = head.split("\r\n");
    if !lines.next().unwrap_or_default().trim_matches([' ', '\t']).is_empty() {
        return Err(MultipartError::Broken);
    }
    let mut part = Part::default();
    for line in lines {
        let (name, value) = line.split_once(':').ok_or(MultipartError::Broken)?;
        if name.trim().eq_ignore_ascii_case("content-disposition")
            && let Some((_, parameters)) = value.split_once(';')
        {
            part = Part { name: parameter(parameters, "name"), filename: parameter(parameters, "filename") };
        }
    }
    Ok(part)
}

/// A parameter of `a=b; c="d\"e"`.
fn parameter(mut text: &str, wanted: &str) -> Option<String> {
    loop {
        text = text.trim_start_matches([' ', '\t', ';']);
        let (name, rest) = text.split_once('=')?;
        let (value, after) = match rest.strip_prefix('"') {
            Some(quoted) => {
                let mut value = String::new();
                let mut characters = quoted.char_indices();
                loop {
                    match characters.next()? {
                        (at, '"') => break (value, quoted.get(at + 1..).unwrap_or_default()),
                        // Only these two are ever escaped; a lone backslash is one of a file's name.
                        (_, '\\') if characters.as_str().starts_with(['"', '\\']) => {
                            value.extend(characters.next().map(|(_, c)| c));
                        }
                        (_, c) => value.push(c),
                    }
                }
            }
            None => {
                let end = rest.find(';').unwrap_or(rest.len());
                let (value, after) = rest.split_at(end);
                (value.trim().to_owned(), after)
            }
        };
        if name.trim().eq_ignore_ascii_case(wanted) {
            return Some(value);
        }
        text = after;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::Pin;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::task::{Context, Poll};

    const LIMIT: u64 = 64 << 20;

    /// A body in these pieces; the counter says how many bytes were asked for.
    fn body(pieces: impl Iterator<Item = Bytes> + Send + 'static) -> (Body, Arc<AtomicU64>) {
        let read = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&read);
        let pieces = pieces.inspect(move |piece| {
            count.fetch_add(piece.len() as u64, Ordering::Relaxed);
        });
        (Ready(Box::new(pieces)).boxed_unsync(), read)
    }

    /// Pieces that are always at hand, as from a fast guest.
    struct Ready(Box<dyn Iterator<Item = Bytes> + Send>);

    impl http_body::Body for Ready {
        type Data = Bytes;
        type Error = dayfly::gitlab::transport::BodyError;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<http_body::Frame<Bytes>, Self::Error>>> {
            Poll::Ready(self.0.next().map(|piece| Ok(http_body::Frame::data(piece))))
        }
    }

    async fn read(mut multipart: Multipart) -> Result<Vec<(Part, Vec<u8>)>, MultipartError> {
        let mut parts = Vec::new();
        while let Some(part) = multipart.next_part().await? {
            let mut content = Vec::new();
            while let Some(chunk) = multipart.chunk().await? {
                content.extend_from_slice(&chunk);
            }
            parts.push((part, content));
        }
        Ok(parts)
    }

    fn file(name: &str, filename: Option<&str>) -> Part {
        Part { name: Some(name.into()), filename: filename.map(Into::into) }
    }

    #[tokio::test]
    async fn parts_come_out_whole_however_they_are_cut() {
        let text = b"before\r\n--cut \t\r\nContent-Disposition: form-data; name=\"note\"\r\n\r\nx\r\n--cu\r\n-\r\n--cut\r\ncontent-disposition: form-data; filename=\"a \\\"b\\\\c;d.zip\"; name=file\r\nContent-Type: x\r\n\r\n\r\n--cut--\r\nafter";
        for size in 1..=text.len() {
            let (body, _) = body(text.chunks(size).map(Bytes::from_static).collect::<Vec<_>>().into_iter());
            let parts = read(Multipart::new(body, "cut", LIMIT)).await.unwrap();
            let expected =
                [(file("note", None), b"x\r\n--cu\r\n-".to_vec()), (file("file", Some("a \"b\\c;d.zip")), Vec::new())];
            assert_eq!(parts, expected, "pieces of {size} bytes");
        }
    }

    /// U31: a head without an end is refused within its bound, and so is everything else that could be endless
    #[tokio::test]
    async fn nothing_without_an_end_is_kept_or_read_on() {
        let head = Bytes::from_static(b"--cut\r\nContent-Disposition: form-data; name=\"file\"; filename=\"");
        let piece = Bytes::from(vec![b'a'; 8 << 10]);
        let preamble = std::iter::repeat_n(piece.clone(), 1 << 16);
        let endless = std::iter::once(head).chain(preamble.clone());
        let many = std::iter::repeat_n(Bytes::from_static(b"\r\n--cut\r\n\r\n"), 1 << 16);
        let crs = std::iter::once(Bytes::from_static(b"--cut\r\nA: b"))
            .chain(std::iter::repeat_n(Bytes::from_static(b"\r\n\r\r\n\r"), 1 << 16));
        let pieces: [(&str, Box<dyn Iterator<Item = Bytes> + Send>); 4] = [
            ("head", Box::new(endless)),
            ("preamble", Box::new(preamble)),
            ("parts", Box::new(many)),
            ("line ends", Box::new(crs)),
        ];
        for (what, pieces) in pieces {
            let (body, count) = body(pieces);
            assert_eq!(read(Multipart::new(body, "cut", LIMIT)).await, Err(MultipartError::Broken), "{what}");
            let read = count.load(Ordering::Relaxed);
            assert!(read <= 2 * HEAD_BYTES_MAX as u64 + (16 << 10), "{what}: {read} bytes were read");
        }
    }

    /// U31: a part is passed on as it comes, in memory bounded by a piece, and the whole has a bound
    #[tokio::test]
    async fn a_part_is_never_held_whole() {
        let head =
            Bytes::from_static(b"--cut\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\n");
        let piece = Bytes::from("\r\n--cu".repeat(10_000));
        let (body, count) = body(std::iter::once(head).chain(std::iter::repeat(piece.clone())));
        let mut multipart = Multipart::new(body, "cut", LIMIT);
        assert_eq!(multipart.next_part().await, Ok(Some(file("file", Some("a")))));
        let mut passed = 0;
        let end = loop {
            match multipart.chunk().await {
                Ok(chunk) => passed += chunk.map_or(0, |chunk| chunk.len() as u64),
                Err(error) => break error,
            }
            let held = count.load(Ordering::Relaxed) - passed;
            assert!(held < 128 && multipart.buffer.len() < 128, "{held} bytes are held back");
        };
        assert_eq!(end, MultipartError::TooLarge);
        assert!(passed <= LIMIT + OVERHEAD_BYTES_MAX);
    }

    #[tokio::test]
    async fn bodies_that_end_early_are_cut() {
        for text in ["", "--cut", "--cut\r\n", "--cut\r\n\r\n", "--cut\r\n\r\nx\r\n--cut", "--cut\r\n\r\nx\r\n--cut-"] {
            let (body, _) = body(std::iter::once(Bytes::from_static(text.as_bytes())));
            assert_eq!(read(Multipart::new(body, "cut", LIMIT)).await, Err(MultipartError::Cut), "{text:?}");
        }
        let (body, _) = body(std::iter::once(Bytes::from_static(b"--cutter\r\n\r\nx\r\n--cut--")));
        assert_eq!(read(Multipart::new(body, "cut", LIMIT)).await, Err(MultipartError::Broken));
    }

    #[test]
    fn boundaries_are_read_as_clients_write_them() {
        for (text, expected) in [
            ("multipart/form-data; boundary=abc", Some("abc")),
            ("Multipart/Form-Data;charset=x; Boundary=\"a b\"", Some("a b")),
            ("multipart/form-data", None),
            ("multipart/form-data; boundary=", None),
            ("multipart/form-data; boundary=\"open", None),
            ("text/plain; boundary=abc", None),
        ] {
            assert_eq!(boundary(text).as_deref(), expected, "{text}");
        }
        assert_eq!(boundary(&format!("multipart/form-data; boundary={}", "a".repeat(71))), None);
    }
}
