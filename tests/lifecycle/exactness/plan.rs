//! What happens in one case, and how such a plan is made at random.

use crate::support::mortal::{End, Seam, When};
use dayfly_exec::standin::Persist;
use proptest::collection::vec;
use proptest::prelude::*;
use std::sync::OnceLock;
use std::time::Duration;

/// One case.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// What the guest has to say.
    pub(super) log: Log,
    /// What it does on its way; then it sends the rest, as the official runner does at the end.
    pub(super) moves: Vec<Move>,
    /// How it ends.
    pub(super) ending: Ending,
    /// How GitLab takes PATCH and PUT, in order; then it behaves.
    pub(super) moods: Vec<Mood>,
    /// How it takes the calls that come after the job's end, before it behaves.
    pub(super) last_moods: Vec<Mood>,
    /// When live chunks of the log are stored.
    pub(super) persist: Persist,
    /// `X-GitLab-Trace-Update-Interval`, in seconds; `None`: as GitLab has it.
    pub(super) interval: Option<u64>,
    /// One life of the daemon each; the last one after them does not end.
    pub(super) kills: Vec<End>,
    /// Lines of ours before the guest's first byte.
    pub(super) first_lines: usize,
    /// Room for the guest in the spool; `None`: more than enough.
    pub(super) room: Option<usize>,
}

/// What the guest has to say: a part of a pool of bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Log {
    pub(super) flavour: Flavour,
    pub(super) start: usize,
    pub(super) length: usize,
}

/// Of which kind the bytes are.
#[derive(Clone, Copy, Debug)]
pub(super) enum Flavour {
    /// Lines as 19.3 writes them.
    Lines,
    /// Anything.
    Bytes,
    /// CR, LF, NUL, ESC and few letters.
    Controls,
    /// Characters of two to four bytes, which pieces cut in two.
    Wide,
}

/// Bytes of a pool; a log is at most this less [`START_MAX`].
const POOL_BYTES: usize = START_MAX + LARGE_MAX;
const START_MAX: usize = 4096;
/// A log of more than three PATCHes.
const LARGE_MAX: usize = 3_400_000;

impl Log {
    /// The bytes.
    pub(super) fn bytes(self) -> &'static [u8] {
        static POOLS: [OnceLock<Vec<u8>>; 4] = [const { OnceLock::new() }; 4];
        let pool = POOLS[self.flavour as usize].get_or_init(|| pool(self.flavour));
        &pool[self.start..self.start + self.length]
    }
}

fn pool(flavour: Flavour) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bytes = Vec::with_capacity(POOL_BYTES + 64);
    while bytes.len() < POOL_BYTES {
        let word = random();
        match flavour {
            Flavour::Lines => {
                bytes.extend_from_slice(b"2026-01-01T00:00:00.000000Z 00O ");
                bytes.extend_from_slice(format!("line {word:x}\n").as_bytes());
            }
            Flavour::Bytes => bytes.extend_from_slice(&word.to_le_bytes()),
            Flavour::Controls => {
                bytes.extend(word.to_le_bytes().iter().map(|byte| b"\r\n\0\x1b\r\nab"[usize::from(byte % 8)]));
            }
            Flavour::Wide => bytes.extend_from_slice(["ä", "€", "😀", "ö\n"][(word % 4) as usize].as_bytes()),
        }
    }
    bytes
}

/// One thing that a guest does to its door. Lengths are cut to what it has to say; the last byte is
/// kept for the end, so that a call to GitLab follows everything.
#[derive(Clone, Copy, Debug)]
pub(super) enum Move {
    /// PATCH the next bytes.
    Send(usize),
    /// The same, but the connection is cut in the body.
    SendCut(usize, usize),
    /// The same, but the guest goes away this many milliseconds after the last byte.
    SendLost(usize, u64),
    /// The last piece again.
    Again,
    /// Bytes that the door has, and more.
    Overlap(usize, usize),
    /// Bytes too far ahead: a gap.
    Gap(usize, usize),
    /// A `Content-Range` that disagrees with the body.
    Lie(usize, Lie),
    /// Two PATCHes at once, on two connections.
    Both(usize, usize),
    /// A sign of life.
    Alive,
    /// The next PATCH is one with `debug_trace=true`.
    Debug,
    /// Milliseconds of work.
    Work(u64),
    /// GitLab loses its log but for so many thousandths. Not the guest's doing; but it must be
    /// before its last byte, because nobody asks GitLab for its size after the last.
    GitlabLoses(usize),
}

/// How a range lies.
#[derive(Clone, Copy, Debug)]
pub(super) enum Lie {
    TooLong,
    TooShort,
    Backwards,
    Huge,
    Words,
}

/// How the guest's part of the job ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// A final PUT.
    Verdict { success: bool },
    /// Our word after this many moves, with lines of ours. (Whole daemon: the VM dies there.)
    Ours { after: usize },
}

/// How GitLab takes one call.
#[derive(Clone, Copy, Debug)]
pub(super) enum Mood {
    Fine,
    /// Cut before it has read anything.
    Cut,
    /// Cut in the body.
    CutInBody(u64),
    /// Taken, and the answer is lost.
    AnswerLost,
    /// Refused with this status, and `Retry-After` if that is not 0.
    Status(u16, u8),
    /// A page for people, with 200 or an error.
    Page(u16),
    /// 416 to a PATCH, with this `Range`, whatever it holds.
    Wrong(Range),
    /// 202 to a PUT, with this interval: ask again.
    Later(u8),
    /// 412 to a PUT: all of the trace again.
    AllAgain,
    /// Slow to take it.
    Slow(u16),
    /// Slow to say so.
    SlowAnswer(u16),
    /// Taken, with this update interval.
    Interval(i32),
}

/// What a wrong 416 names.
#[derive(Clone, Copy, Debug)]
pub(super) enum Range {
    Zero,
    Missing,
    Garbage,
    /// The offset of the PATCH less this.
    Lower(u16),
    /// Beyond the end of the PATCH by this.
    Higher(u16),
}

/// Which plans a rig can run.
#[derive(Clone, Copy)]
pub(super) struct Kinds {
    /// Of a hundred logs, how many have more than 1 MiB.
    large_percent: u32,
    kills_max: usize,
    /// Calls of a seam among which a kill is chosen: file layer, GitLab.
    kill_calls: (u64, u64),
    first_lines_max: usize,
    /// Of a hundred spools, how many are small.
    room_percent: u32,
}

impl Kinds {
    pub(super) const RIG: Self =
        Self { large_percent: 2, kills_max: 3, kill_calls: (40, 20), first_lines_max: 3, room_percent: 6 };
    pub(super) const WHOLE: Self =
        Self { large_percent: 4, kills_max: 3, kill_calls: (120, 40), first_lines_max: 0, room_percent: 0 };
}

/// Any plan of these kinds.
pub(super) fn plans(kinds: Kinds) -> impl Strategy<Value = Plan> {
    let setting = (
        prop_oneof![
            3 => Just(Persist::AtOnce),
            1 => (1..4_u32).prop_map(Persist::AfterReports),
            1 => (0..20_u64).prop_map(|s| Persist::After(Duration::from_secs(s)))
        ],
        prop::option::weighted(0.5, prop_oneof![0..5_u64, Just(60), Just(1_000_000)]),
        0..=kinds.first_lines_max,
        prop_oneof![100 - kinds.room_percent => Just(None), kinds.room_percent => (0..3000_usize).prop_map(Some)],
    );
    let ends = (ending(), vec(mood(), 0..4));
    let happens = (vec(a_move(), 0..14), vec(mood(), 0..14), vec(kill(kinds), 0..=kinds.kills_max));
    (log(kinds), happens, ends, setting).prop_map(
        |(log, (moves, moods, kills), (ending, last_moods), (persist, interval, first_lines, room))| Plan {
            log,
            moves,
            ending,
            moods,
            last_moods,
            persist,
            interval,
            kills,
            first_lines,
            room,
        },
    )
}

fn log(kinds: Kinds) -> impl Strategy<Value = Log> {
    let flavour = prop_oneof![Just(Flavour::Lines), Just(Flavour::Bytes), Just(Flavour::Controls), Just(Flavour::Wide)];
    let length = prop_oneof![
        kinds.large_percent => 1_000_000..LARGE_MAX,
        5 => Just(0_usize),
        40 => 1..200_usize,
        50 => 200..20_000_usize,
        5 => 20_000..200_000_usize,
    ];
    (flavour, 0..START_MAX, length).prop_map(|(flavour, start, length)| Log { flavour, start, length })
}

fn length() -> impl Strategy<Value = usize> {
    prop_oneof![4 => 1..100_usize, 4 => 100..5000_usize, 1 => Just(1 << 20), 1 => (1_usize << 20)..(2 << 20)]
}

fn a_move() -> impl Strategy<Value = Move> {
    let lie =
        prop_oneof![Just(Lie::TooLong), Just(Lie::TooShort), Just(Lie::Backwards), Just(Lie::Huge), Just(Lie::Words)];
    prop_oneof![
        10 => length().prop_map(Move::Send),
        2 => (length(), 0..3000_usize).prop_map(|(length, cut)| Move::SendCut(length, cut)),
        3 => (length(), 0..3000_u64).prop_map(|(length, ms)| Move::SendLost(length, ms)),
        2 => Just(Move::Again),
        1 => (1..2000_usize, length()).prop_map(|(back, length)| Move::Overlap(back, length)),
        1 => (1..2000_usize, length()).prop_map(|(ahead, length)| Move::Gap(ahead, length)),
        1 => (length(), lie).prop_map(|(length, lie)| Move::Lie(length, lie)),
        2 => (length(), length()).prop_map(|(one, other)| Move::Both(one, other)),
        1 => Just(Move::Alive),
        1 => Just(Move::Debug),
        6 => (0..9000_u64).prop_map(Move::Work),
        1 => (9000..70_000_u64).prop_map(Move::Work),
        2 => prop_oneof![Just(0), Just(999), 0..1000_usize].prop_map(Move::GitlabLoses),
    ]
}

fn ending() -> impl Strategy<Value = Ending> {
    prop_oneof![
        3 => prop::bool::ANY.prop_map(|success| Ending::Verdict { success }),
        1 => (0..15_usize).prop_map(|after| Ending::Ours { after }),
    ]
}

fn mood() -> impl Strategy<Value = Mood> {
    let range = prop_oneof![
        Just(Range::Zero),
        Just(Range::Missing),
        Just(Range::Garbage),
        any::<u16>().prop_map(Range::Lower),
        any::<u16>().prop_map(Range::Higher),
    ];
    let status = prop_oneof![
        Just(500),
        Just(502),
        Just(503),
        Just(504),
        Just(429),
        Just(408),
        Just(409),
        Just(404),
        Just(401),
        Just(400),
        Just(200),
        Just(204),
        Just(302),
    ];
    prop_oneof![
        8 => Just(Mood::Fine),
        2 => Just(Mood::Cut),
        2 => (0..5000_u64).prop_map(Mood::CutInBody),
        3 => Just(Mood::AnswerLost),
        3 => (status, 0..6_u8).prop_map(|(status, wait)| Mood::Status(status, wait)),
        1 => prop_oneof![Just(200_u16), Just(202), Just(502)].prop_map(Mood::Page),
        3 => range.prop_map(Mood::Wrong),
        1 => (0..6_u8).prop_map(Mood::Later),
        1 => Just(Mood::AllAgain),
        1 => (0..20_000_u16).prop_map(Mood::Slow),
        1 => (0..20_000_u16).prop_map(Mood::SlowAnswer),
        1 => prop_oneof![Just(-1), 0..4_i32, Just(i32::MAX)].prop_map(Mood::Interval),
    ]
}

fn kill(kinds: Kinds) -> impl Strategy<Value = End> {
    let (files, gitlab) = kinds.kill_calls;
    let place = prop_oneof![(Just(Seam::Files), 1..=files), (Just(Seam::GitLab), 1..=gitlab)];
    (place, prop_oneof![Just(When::Before), Just(When::After)]).prop_map(|((seam, call), when)| End {
        seam,
        call,
        when,
    })
}
