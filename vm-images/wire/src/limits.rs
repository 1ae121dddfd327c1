//! Sizes, counts and times of the wire. What the other side is held to is a constant; what tests shorten is in [`Limits`].

use std::time::Duration;

/// The target of each CONNECT to the door. It names nothing that could be resolved: there is one door behind its wire.
pub const AUTHORITY: &str = "door.dayfly.invalid:80";

/// The target of a stream of DNS messages, where what a job sends out goes over a wire of its own. Each message has its
/// length in front of it, as over TCP (RFC 1035, 4.2.2).
pub const DNS_AUTHORITY: &str = "dns.dayfly.invalid:53";

/// Behind the streams to the door and between them, streams to what an operator forwards to a machine (`[[forward]]`): the
/// host of their targets, whose port says which one. What is behind it only the daemon knows.
const FORWARD_HOST: &str = "forward.dayfly.invalid";

/// Streams to forwards at once, beside those to the door, in a session of a machine that has forwards.
pub const FORWARD_STREAMS: u32 = 64;

/// The target of a stream to the forward that a machine has at this port.
#[must_use]
pub fn forward_authority(port: u16) -> String {
    format!("{FORWARD_HOST}:{port}")
}

/// The port of [`forward_authority`]; `None`: it is for something else.
#[must_use]
pub fn forward_port(authority: &str) -> Option<u16> {
    let port = authority.strip_prefix(FORWARD_HOST)?.strip_prefix(':')?;
    port.parse().ok().filter(|number: &u16| number.to_string() == port)
}

/// What a filler is made of. No frame begins with it: none is so long.
pub(crate) const FILLER_BYTE: u8 = 0xff;

/// [`FILLER_BYTE`] so often before a handshake: more than one frame holds ([`FRAME_BYTES_MAX`] and its head), so what is left of
/// one that an earlier session began is eaten, and behind it stands the head of a frame that is too long for any session.
pub const FILLER_BYTES: usize = 17 * 1024;

/// Payload of one frame, either way: HTTP/2's smallest maximum.
pub(crate) const FRAME_BYTES_MAX: u32 = 16 * 1024;

/// Between two hellos to a guest that was heard: what a session's beginning waits at worst.
pub(crate) const HELLO_PERIOD: Duration = Duration::from_millis(25);

/// Between two hellos to one that is silent; each pause is twice the last. A guest that begins to listen says so by its
/// filler, unless that went to the host before: then the pauses have just begun again.
pub(crate) const HELLO_PERIOD_MAX: Duration = Duration::from_secs(1);

/// The filler comes again with the next hello after this time, for a guest whose old session read neither the end of the
/// pipe nor the first filler whole. A guest that boots for a minute finds 600 KiB of it.
pub(crate) const FILLER_PERIOD: Duration = Duration::from_millis(1600);

/// Bytes that a handshake reads in search of the other side's words. A port and its socket hold some 5 MB of an
/// earlier session.
pub const SCANNED_BYTES_MAX: usize = 32 * 1024 * 1024;

/// Proofs that one handshake makes. An honest guest asks for one, and for another if it had to open its port again.
pub(crate) const PROOFS_MAX: usize = 64;

/// Headers of one request or answer. Ours have some 60 bytes.
pub(crate) const HEADERS_BYTES_MAX: u32 = 4 * 1024;

/// Streams that were reset here and whose last frames may still come, kept for [`RESETS_KEPT`].
pub(crate) const RESET_STREAMS_MAX: usize = 64;
/// See [`RESET_STREAMS_MAX`]: longer than what is in a port takes to come out of it.
pub(crate) const RESETS_KEPT: Duration = Duration::from_secs(10);

/// What is still read of an answer that nobody waits for, before its stream is reset.
pub(crate) const DRAIN_BYTES: usize = 256 * 1024;
/// And for how long after its first byte could have come.
pub(crate) const DRAIN: Duration = Duration::from_secs(5);

/// What a guest may make the host read: units a second, and at once. A frame of data or a window's update is one unit,
/// any other (it opens, resets, asks or sets something) is [`COSTLY_FRAME`]. A gigabyte a second in whole frames is
/// 65,000, with as many updates for what flows the other way. Beyond it the host reads no faster: its
/// guest waits, and harms nobody else.
pub(crate) const UNITS_A_SECOND: u32 = 200_000;
/// See [`UNITS_A_SECOND`]: 12,500 a second of these.
pub(crate) const COSTLY_FRAME: u32 = 16;

/// Of one session. The same on both sides, but for what each enforces.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Streams at once that a host takes; more than that wait at the guest.
    pub streams: u32,
    /// Streams at once that a guest opens: fewer, so that it never finds out what the host does with one too many.
    pub opened: u32,
    /// Between two questions of the guest whether its host is there. Only the guest asks: h2 does not read while a
    /// question of its own waits for room, so that two askers with full pipes would wait for each other.
    pub ping: Duration,
    /// The answer's time. A stalled stream does not delay it, a full pipe does.
    pub pong: Duration,
    /// Without a byte of the guest, which asks every few seconds, the host ends the session.
    pub silence: Duration,
    /// What one stream may hold at the host.
    pub host: Held,
    /// What one stream may hold at the guest.
    pub guest: Held,
    /// What one may while there are few.
    pub few: Option<Few>,
}

/// A host that has memory for few streams at speed, or for many.
#[derive(Clone, Copy, Debug)]
pub struct Few {
    /// So many streams are few.
    pub streams: u32,
    /// The window that each of them has at the host instead of [`Held::window`]. One stream in a small window moves no
    /// more than that in the time that a window's update takes to come, which is many times less than the pipe could.
    pub window: u32,
}

/// What one stream may hold of the memory of one side, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    /// That came and were not taken yet. The window of the connection holds as much for each stream that there may be,
    /// so that streams which stand still hold up no other.
    pub window: u32,
    /// That were written and have not left yet; beyond that a writer waits.
    pub unsent: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            streams: 64,
            opened: 48,
            ping: Duration::from_secs(5),
            pong: Duration::from_secs(30),
            silence: Duration::from_secs(40),
            host: Held { window: 256 * 1024, unsent: 256 * 1024 },
            // More than a port and its socket hold, so that they never run empty while an update is on its way.
            guest: Held { window: 1024 * 1024, unsent: 256 * 1024 },
            few: None,
        }
    }
}

impl Limits {
    /// With room for forwards beside the streams to the door.
    #[must_use]
    pub fn with_forwards(self) -> Self {
        Self { streams: self.streams + FORWARD_STREAMS, opened: self.opened + FORWARD_STREAMS, ..self }
    }

    /// Those of the wire by which a job reaches the world: many streams, of which the host may hold little, for it holds
    /// them for each VM. A thousand of which nobody takes what the guest sent are 19 MiB; as much again and more, if
    /// the guest reads its pipe no longer. What they hold at the guest is the guest's memory.
    #[must_use]
    pub fn egress() -> Self {
        Self {
            streams: 1024,
            opened: 1000,
            host: Held { window: 16 * 1024, unsent: 32 * 1024 },
            guest: Held { window: 256 * 1024, unsent: 64 * 1024 },
            few: Some(Few { streams: 12, window: 256 * 1024 }),
            ..Self::default()
        }
    }

    /// The window of the connection at the guest: all streams of a session may be full, and one more still gets its
    /// bytes.
    pub(crate) fn guest_window(&self) -> u32 {
        self.window(self.guest)
    }

    /// The window of the connection at the host: likewise, with those few that began in a larger one.
    pub(crate) fn host_window(&self) -> u32 {
        let few = self.few.map_or(0, |few| few.streams.saturating_mul(few.window));
        self.window(self.host).saturating_add(few).min(i32::MAX.unsigned_abs())
    }

    fn window(&self, held: Held) -> u32 {
        (self.streams + 4).saturating_mul(held.window).min(i32::MAX.unsigned_abs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forwards_target_names_its_port_and_nothing_else_does() {
        for port in [1, 3142, 65_535] {
            assert_eq!(forward_port(&forward_authority(port)), Some(port));
        }
        for other in [
            AUTHORITY,
            DNS_AUTHORITY,
            "forward.dayfly.invalid",
            "forward.dayfly.invalid:",
            "forward.dayfly.invalid:+80",
            "forward.dayfly.invalid:080",
            "forward.dayfly.invalid:65536",
            "forward.dayfly.invalid:80:80",
            "a@forward.dayfly.invalid:80",
            "127.0.0.1:80",
        ] {
            assert_eq!(forward_port(other), None, "{other}");
        }
    }
}
