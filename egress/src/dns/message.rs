//! DNS messages (RFC 1035), as far as one question and its answer need: read with bounds, written anew.
//!
//! Nothing of what came is passed on as bytes: names are read out of their compression, records that do not answer the
//! question are left out, and so is all behind the answers.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Bytes of a question's message at most; real ones have some hundred.
pub const QUESTION_BYTES_MAX: usize = 4096;

/// Records of one answer that are read at most.
const RECORDS_MAX: u16 = 256;

/// Bytes of a message that is written at most.
pub const ANSWER_BYTES_MAX: usize = 32 * 1024;

/// Bytes of a name at most, its lengths included (RFC 1035, 2.3.4).
const NAME_BYTES_MAX: usize = 255;

const HEADER_BYTES: usize = 12;

/// An IPv4 address.
pub const TYPE_A: u16 = 1;
/// A name server.
pub const TYPE_NS: u16 = 2;
/// An alias.
pub const TYPE_CNAME: u16 = 5;
/// The begin of a zone.
pub const TYPE_SOA: u16 = 6;
/// A pointer of the reverse tree.
pub const TYPE_PTR: u16 = 12;
/// A host for mail.
pub const TYPE_MX: u16 = 15;
/// An IPv6 address.
pub const TYPE_AAAA: u16 = 28;
/// A host for a service.
pub const TYPE_SRV: u16 = 33;
/// An alias of a whole tree.
pub const TYPE_DNAME: u16 = 39;

const CLASS_IN: u16 = 1;

/// How a question was answered (RFC 1035, 4.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code(pub u8);

impl Code {
    /// It is answered.
    pub const NO_ERROR: Self = Self(0);
    /// The question makes no sense.
    pub const FORMAT: Self = Self(1);
    /// No resolver has answered.
    pub const SERVER_FAILURE: Self = Self(2);
    /// There is no such name.
    pub const NO_SUCH_NAME: Self = Self(3);
    /// No such operation.
    pub const NOT_IMPLEMENTED: Self = Self(4);
    /// Not by us.
    pub const REFUSED: Self = Self(5);
}

/// A name as it stands in a message, not compressed, in the letters of whoever wrote it.
#[derive(Clone, Debug)]
pub struct Name(Box<[u8]>);

impl PartialEq for Name {
    fn eq(&self, other: &Self) -> bool {
        // Lengths are no letters: below 64.
        self.0.eq_ignore_ascii_case(&other.0)
    }
}

impl Name {
    /// As text, in lower case, without the dot at its end; `None`: no host has such a name.
    #[must_use]
    pub fn to_host(&self) -> Option<String> {
        let mut text = String::new();
        let mut rest = &self.0[..];
        while let Some((length, after)) = rest.split_first() {
            let (label, after) = after.split_at_checked(usize::from(*length))?;
            if label.is_empty() {
                break;
            }
            if !text.is_empty() {
                text.push('.');
            }
            // A dot within a label would be read as two labels.
            let label = std::str::from_utf8(label).ok().filter(|label| !label.contains('.'))?;
            text.push_str(label);
            rest = after;
        }
        crate::policy::host_name(&text)
    }

    /// A host's name.
    #[cfg(test)]
    pub(crate) fn of_host(host: &str) -> Self {
        let mut bytes = Vec::new();
        for label in host.split('.') {
            bytes.push(u8::try_from(label.len()).unwrap());
            bytes.extend(label.as_bytes());
        }
        bytes.push(0);
        Self(bytes.into())
    }
}

/// One question.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// Of what.
    pub name: Name,
    /// Which records (RFC 1035, 3.2.2).
    pub kind: u16,
    /// 1: the Internet.
    pub class: u16,
}

/// What a guest asks.
#[derive(Clone, Debug)]
pub struct Query {
    /// By which the answer is known.
    pub id: u16,
    /// It is said again in the answer.
    recursion: bool,
    /// What it asks.
    pub question: Question,
}

/// Why it is no question that could be answered.
#[derive(Debug, PartialEq, Eq)]
pub enum NoQuery {
    /// There is nothing to answer to: too short, or an answer itself.
    Nothing,
    /// It is answered with this code.
    Answer(Vec<u8>),
}

/// One record of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// The name that it belongs to.
    pub owner: Name,
    /// See [`Question::kind`].
    pub kind: u16,
    /// Seconds.
    pub ttl: u32,
    /// Without compression.
    pub data: Box<[u8]>,
}

impl Record {
    /// Its address, if it is one of IPv4.
    #[must_use]
    pub fn address(&self) -> Option<Ipv4Addr> {
        (self.kind == TYPE_A).then(|| <[u8; 4]>::try_from(&*self.data).ok().map(Ipv4Addr::from))?
    }

    /// The name that an alias is for.
    #[must_use]
    pub fn alias(&self) -> Option<Name> {
        (self.kind == TYPE_CNAME).then(|| Name(self.data.clone()))
    }
}

/// What a resolver answers.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Whether there is one.
    pub code: Code,
    /// Not all of it fitted: to be asked again over TCP.
    pub truncated: bool,
    /// Of the kind that was asked for, and aliases.
    pub records: Vec<Record>,
}

/// Reads a message from its beginning.
struct Reader<'a> {
    message: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(count)?;
        let taken = self.message.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }

    fn short(&mut self) -> Option<u16> {
        self.take(2)?.try_into().ok().map(u16::from_be_bytes)
    }

    fn long(&mut self) -> Option<u32> {
        self.take(4)?.try_into().ok().map(u32::from_be_bytes)
    }

    /// A name, out of its compression. Each pointer leads to before where it stands, and before the one that led to it:
    /// so there is no loop.
    fn name(&mut self) -> Option<Name> {
        let mut bytes = Vec::new();
        let mut at = self.at;
        let mut before = self.at;
        let mut end = None;
        loop {
            let length = *self.message.get(at)?;
            match length {
                0 => {
                    bytes.push(0);
                    self.at = end.unwrap_or(at + 1);
                    return (bytes.len() <= NAME_BYTES_MAX).then(|| Name(bytes.into()));
                }
                1..=63 => {
                    let next = at + 1 + usize::from(length);
                    bytes.extend_from_slice(self.message.get(at..next)?);
                    if bytes.len() >= NAME_BYTES_MAX {
                        return None;
                    }
                    at = next;
                }
                0xc0.. => {
                    let low = *self.message.get(at + 1)?;
                    let to = usize::from(u16::from_be_bytes([length & 0x3f, low]));
                    end.get_or_insert(at + 2);
                    if to >= before {
                        return None;
                    }
                    before = to;
                    at = to;
                }
                // Kinds of labels that nobody uses.
                64..=0xbf => return None,
            }
        }
    }

    fn question(&mut self) -> Option<Question> {
        Some(Question { name: self.name()?, kind: self.short()?, class: self.short()? })
    }

    /// A record's data, without compression.
    fn data(&mut self, kind: u16, length: usize) -> Option<Box<[u8]>> {
        let end = self.at.checked_add(length)?;
        let mut data = Vec::new();
        let fixed = match kind {
            TYPE_MX => 2,
            TYPE_SRV => 6,
            _ => 0,
        };
        match kind {
            TYPE_A if length != 4 => return None,
            TYPE_NS | TYPE_CNAME | TYPE_PTR | TYPE_DNAME | TYPE_MX | TYPE_SRV => {
                data.extend_from_slice(self.take(fixed)?);
                data.extend_from_slice(&self.name()?.0);
            }
            TYPE_SOA => {
                data.extend_from_slice(&self.name()?.0);
                data.extend_from_slice(&self.name()?.0);
                data.extend_from_slice(self.take(20)?);
            }
            // Those of later kinds are not compressed (RFC 3597, 4).
            _ => data.extend_from_slice(self.take(length)?),
        }
        (self.at == end).then(|| data.into())
    }

    fn record(&mut self) -> Option<(u16, Record)> {
        let owner = self.name()?;
        let (kind, class, ttl) = (self.short()?, self.short()?, self.long()?);
        let length = usize::from(self.short()?);
        let data = self.data(kind, length)?;
        // The highest bit is no part of it (RFC 2181, 8).
        let ttl = if ttl > i32::MAX.unsigned_abs() { 0 } else { ttl };
        Some((class, Record { owner, kind, ttl, data }))
    }
}

/// Reads what a guest asks.
///
/// # Errors
/// [`NoQuery`], with what to answer.
pub fn read_query(message: &[u8]) -> Result<Query, NoQuery> {
    let mut reader = Reader { message, at: 0 };
    let (Some(id), Some(flags), Some(questions)) = (reader.short(), reader.short(), reader.short()) else {
        return Err(NoQuery::Nothing);
    };
    if message.len() < HEADER_BYTES || flags & 0x8000 != 0 {
        return Err(NoQuery::Nothing);
    }
    let refuse = |code| NoQuery::Answer(write(id, 0x8000 | (flags & 0x7900), code, None, &[]));
    if flags & 0x7800 != 0 {
        return Err(refuse(Code::NOT_IMPLEMENTED));
    }
    if questions != 1 || message.len() > QUESTION_BYTES_MAX {
        return Err(refuse(Code::FORMAT));
    }
    reader.at = HEADER_BYTES;
    let question = reader.question().ok_or_else(|| refuse(Code::FORMAT))?;
    Ok(Query { id, recursion: flags & 0x0100 != 0, question })
}

impl Query {
    /// Whether it is about the Internet.
    #[must_use]
    pub fn is_internet(&self) -> bool {
        self.question.class == CLASS_IN
    }

    /// The message that answers it.
    #[must_use]
    pub fn answer(&self, code: Code, records: &[Record]) -> Vec<u8> {
        // An answer, by recursion.
        let flags = 0x8080 | if self.recursion { 0x0100 } else { 0 };
        write(self.id, flags, code, Some(&self.question), records)
    }
}

/// The message that asks a resolver.
#[must_use]
pub fn ask(id: u16, question: &Question) -> Vec<u8> {
    write(id, 0x0100, Code::NO_ERROR, Some(question), &[])
}

/// Reads what a resolver answers to this question; `None`: it is no answer to it.
#[must_use]
pub fn read_answer(message: &[u8], id: u16, question: &Question) -> Option<Answer> {
    let mut reader = Reader { message, at: 0 };
    let (of, flags) = (reader.short()?, reader.short()?);
    let (questions, answers) = (reader.short()?, reader.short()?);
    if of != id || flags & 0xf800 != 0x8000 || questions != 1 {
        return None;
    }
    reader.at = HEADER_BYTES;
    if reader.question()? != *question {
        return None;
    }
    let truncated = flags & 0x0200 != 0;
    let [_, low] = flags.to_be_bytes();
    let mut records = Vec::new();
    for _ in 0..answers.min(RECORDS_MAX) {
        match reader.record() {
            Some((class, record)) => {
                if class == CLASS_IN && (record.kind == question.kind || record.kind == TYPE_CNAME) {
                    records.push(record);
                }
            }
            // A message that was cut ends anywhere.
            None if truncated => break,
            None => return None,
        }
    }
    Some(Answer { code: Code(low & 0x0f), truncated, records })
}

/// As many records as fit.
fn write(id: u16, flags: u16, code: Code, question: Option<&Question>, records: &[Record]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in [id, flags | u16::from(code.0 & 0x0f), u16::from(question.is_some()), 0, 0, 0] {
        bytes.extend(part.to_be_bytes());
    }
    if let Some(question) = question {
        bytes.extend_from_slice(&question.name.0);
        bytes.extend(question.kind.to_be_bytes());
        bytes.extend(question.class.to_be_bytes());
    }
    let mut count: u16 = 0;
    for record in records {
        let pointer: &[u8] = &[0xc0, 12];
        let owner =
            if question.is_some_and(|question| question.name == record.owner) { pointer } else { &record.owner.0 };
        let Ok(length) = u16::try_from(record.data.len()) else { continue };
        if bytes.len() + owner.len() + 10 + record.data.len() > ANSWER_BYTES_MAX {
            break;
        }
        bytes.extend_from_slice(owner);
        bytes.extend(record.kind.to_be_bytes());
        bytes.extend(CLASS_IN.to_be_bytes());
        bytes.extend(record.ttl.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.extend_from_slice(&record.data);
        count += 1;
    }
    bytes[6..8].copy_from_slice(&count.to_be_bytes());
    bytes
}

/// The address that a name of the reverse tree is for (RFC 1035, 3.5; RFC 3596, 2.5); `None`: it is for none.
#[must_use]
pub fn reverse(host: &str) -> Option<std::net::IpAddr> {
    if let Some(digits) = host.strip_suffix(".in-addr.arpa") {
        let mut octets: Vec<u8> = digits.split('.').map(str::parse).collect::<Result<_, _>>().ok()?;
        octets.reverse();
        return <[u8; 4]>::try_from(octets).ok().map(|octets| Ipv4Addr::from(octets).into());
    }
    let digits = host.strip_suffix(".ip6.arpa")?;
    let mut bits = 0u128;
    let mut count = 0;
    for digit in digits.rsplit('.') {
        bits = (bits << 4) | u128::from(u8::from_str_radix(digit, 16).ok().filter(|_| digit.len() == 1)?);
        count += 1;
    }
    (count == 32).then(|| Ipv6Addr::from(bits).into())
}
