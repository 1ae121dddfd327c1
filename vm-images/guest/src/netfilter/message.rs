//! Messages of nfnetlink, as bytes: `linux/netlink.h`, `linux/netfilter/nfnetlink.h`.

/// Bytes before a message's attributes: `nlmsghdr`, then `nfgenmsg`.
pub(super) const HEAD: usize = 20;

/// A set bit of an attribute's type: attributes are inside.
const NLA_F_NESTED: u16 = 0x8000;
/// The bits of a type that are none of its number.
const NLA_TYPE_MASK: u16 = 0x3fff;

const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
/// An acknowledgement is wanted.
pub(super) const NLM_F_ACK: u16 = 4;

/// A message in the making.
pub(super) struct Message(Vec<u8>);

impl Message {
    /// One of the subsystem and kind that `kind` says (in its upper and lower byte). `flags` in addition to "request".
    pub(super) fn new(kind: u16, flags: u16, family: u8, resource: u16) -> Self {
        let mut bytes = vec![0; HEAD];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
        bytes[16] = family;
        // bytes[17] is the version, 0.
        bytes[18..20].copy_from_slice(&resource.to_be_bytes());
        Self(bytes)
    }

    pub(super) fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        self.put(kind, value);
        self
    }

    /// A string, which ends with a NUL.
    pub(super) fn text(self, kind: u16, value: &str) -> Self {
        self.bytes(kind, &[value.as_bytes(), &[0]].concat())
    }

    pub(super) fn be32(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    pub(super) fn be16(self, kind: u16, value: u16) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// An attribute of attributes, which `fill` adds.
    pub(super) fn nested(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let at = self.0.len();
        self.put(kind | NLA_F_NESTED, &[]);
        let mut whole = fill(self);
        let length = length(whole.0.len() - at).to_ne_bytes();
        whole.0[at..at + 2].copy_from_slice(&length);
        whole
    }

    fn put(&mut self, kind: u16, value: &[u8]) {
        self.0.extend_from_slice(&length(4 + value.len()).to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    pub(super) fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).expect("messages of ours are short");
        self.0[0..4].copy_from_slice(&length.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

fn length(bytes: usize) -> u16 {
    u16::try_from(bytes).expect("attributes of ours are short")
}

/// An acknowledgement, or a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// Of the message that it is about.
    pub(super) sequence: u32,
    /// 0: it was taken.
    pub(super) errno: i32,
}

impl Answer {
    /// Those in what was received; other messages are passed over.
    pub(super) fn all(bytes: &[u8]) -> impl Iterator<Item = Self> {
        messages(bytes).filter(|(kind, _)| *kind == NLMSG_ERROR).filter_map(|(_, message)| {
            // The errno, negative, and the head of the message that it is about, whose third member is its number.
            let errno = i32::from_ne_bytes(message.get(16..20)?.try_into().ok()?).saturating_neg();
            Some(Self { sequence: u32::from_ne_bytes(message.get(28..32)?.try_into().ok()?), errno })
        })
    }
}

/// The messages in what was received: kind, and the whole of it.
pub(super) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32::from_ne_bytes(bytes.get(0..4)?.try_into().ok()?)).ok()?;
        let message = bytes.get(..length).filter(|message| message.len() >= 16)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([message[4], message[5]]), message))
    })
}

/// The attributes behind a message's head, or inside of one: type and value.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(0..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & NLA_TYPE_MASK;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}
