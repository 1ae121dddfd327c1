//! The one table of ours: what leaves by `lo`, where the default route of a machine without a network card points, comes
//! to this program, and nothing else does (decision D27).
//!
//! ```text
//! hold_out, hold_pre      a connection's first packet waits in the queue until its far end has answered
//! carry_out, carry_pre    TCP goes to the listener, what is for any name server to ours
//! refuse_out, refuse_fwd  all else is refused at once
//! ```
//!
//! `out` is what this machine's processes send, `pre` and `fwd` what its containers do. What is for an address of the
//! machine itself, and what goes between machine and containers, is none of ours: with a redirect of all that is not
//! local, containers do not reach each other (seen).
//!
//! The table has an owner, this program's socket: nobody else can take it down, also not `nft flush ruleset` of a job or
//! of a service. It is gone when the socket is.

use super::message::{Message, NLM_F_ACK};
use super::{NetfilterError, open, request};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

/// Where redirected connections arrive, on any address: those of containers come to their bridge's.
pub const LISTENER_PORT: u16 = 9999;

/// Where all name servers are.
pub const RESOLVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// The queue in which first packets wait.
pub const QUEUE: u16 = 0;

/// The mark of a first packet whose connection was refused, or that must not wait again. "dfly" is in no tool's marks.
pub const REFUSED: u32 = 0x6466_6c00;
/// And of one whose far end is connected.
pub const CONNECTED: u32 = 0x6466_6c01;

const TABLE: &str = "dayfly";

// linux/netfilter/nfnetlink.h
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFPROTO_IPV4: u8 = 2;

// linux/netfilter/nf_tables.h
const NFT_MSG_NEWTABLE: u16 = NFNL_SUBSYS_NFTABLES << 8;
const NFT_MSG_NEWCHAIN: u16 = NFNL_SUBSYS_NFTABLES << 8 | 3;
const NFT_MSG_NEWRULE: u16 = NFNL_SUBSYS_NFTABLES << 8 | 6;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_TABLE_FLAGS: u16 = 2;
const NFT_TABLE_F_OWNER: u32 = 2;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
const NFT_REG_VERDICT: u32 = 0;
const NFT_REG_1: u32 = 1;
const NFT_REG_2: u32 = 2;
const NF_DROP: u32 = 0;
const NFT_RETURN: u32 = 0xffff_fffb; // -5
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;

// linux/netfilter_ipv4.h, linux/netfilter.h
const PREROUTING: u32 = 0;
const FORWARD: u32 = 2;
const OUTPUT: u32 = 3;
const POSTROUTING: u32 = 4;
/// Before addresses are rewritten, after connections are known.
const BEFORE_NAT: i32 = -150;
const NAT: i32 = -100;
/// Of filters; Docker's are here too, and ours must not come after them.
const FILTER: i32 = 0;
const BEFORE_FILTER: i32 = -10;

const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;
const DNS_PORT: u16 = 53;
const TCP_FLAGS_AT: u32 = 13;
const DESTINATION_PORT_AT: u32 = 2;
const SYN: u8 = 2;
const ACK: u8 = 16;
/// linux/rtnetlink.h: an address of this machine.
const RTN_LOCAL: u32 = 2;
/// linux/icmp.h: host administratively prohibited.
const ICMP_HOST_ANO: u8 = 10;

/// A part of a rule. What loads something does so into register 1.
#[derive(Clone, Copy)]
enum Part {
    /// Loads what the kernel knows of the packet.
    Meta(Meta),
    /// Loads of which kind its destination is, or by which device it would leave now.
    Route(Route),
    /// Loads bytes of its transport header.
    Transport {
        at: u32,
        bytes: u32,
    },
    /// Keeps of register 1's byte what is set here.
    And(u8),
    /// Goes on if register 1 has this value.
    Is(Value),
    /// Or has not.
    IsNot(Value),
    Return,
    Drop,
    /// To the listener, on the address at which the packet came in.
    Redirect,
    /// To our name server.
    ToResolver,
    /// Refuses a connection.
    Reset,
    /// Refuses anything else.
    Prohibit,
    /// Waits in the queue, or goes on if nobody takes from it.
    Queue,
}

/// linux/netfilter/nf_tables.h, `NFT_META_*`.
#[derive(Clone, Copy)]
enum Meta {
    Mark = 3,
    InName = 6,
    OutName = 7,
    Protocol = 16,
}

/// `NFT_FIB_RESULT_*`.
#[derive(Clone, Copy)]
enum Route {
    OutName = 2,
    Kind = 3,
}

#[derive(Clone, Copy)]
enum Value {
    Byte(u8),
    /// In the network's order.
    Port(u16),
    /// In the machine's order.
    Word(u32),
    /// The loopback device, as a name of 16 bytes.
    Lo,
}

impl Value {
    fn bytes(self) -> Vec<u8> {
        match self {
            Self::Byte(byte) => vec![byte],
            Self::Port(port) => port.to_be_bytes().to_vec(),
            Self::Word(word) => word.to_ne_bytes().to_vec(),
            Self::Lo => b"lo\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec(),
        }
    }
}

/// A chain and its rules.
struct Chain {
    name: &'static str,
    kind: &'static str,
    hook: u32,
    priority: i32,
    rules: Vec<Vec<Part>>,
}

/// What is in the table.
fn chains() -> Vec<Chain> {
    use Part::{And, Drop, Is, IsNot, Meta as Of, Prohibit, Queue, Redirect, Reset, Return, ToResolver, Transport};
    use Value::{Byte, Lo, Port, Word};
    let goes_elsewhere = vec![Of(Meta::OutName), IsNot(Lo), Return];
    let would_go_elsewhere = vec![Part::Route(Route::OutName), IsNot(Lo), Return];
    let is_for_us = vec![Part::Route(Route::Kind), Is(Word(RTN_LOCAL)), Return];
    let comes_back = vec![Of(Meta::InName), Is(Lo), Return];
    let port = Transport { at: DESTINATION_PORT_AT, bytes: 2 };
    let hold = [
        vec![Of(Meta::Mark), Is(Word(REFUSED)), Of(Meta::Protocol), Is(Byte(IPPROTO_TCP)), Reset],
        vec![
            Of(Meta::Mark),
            IsNot(Word(CONNECTED)),
            Of(Meta::Protocol),
            Is(Byte(IPPROTO_TCP)),
            Transport { at: TCP_FLAGS_AT, bytes: 1 },
            And(SYN | ACK),
            Is(Byte(SYN)),
            port,
            IsNot(Port(DNS_PORT)),
            Queue,
        ],
    ];
    let to_resolver = |protocol| vec![Of(Meta::Protocol), Is(Byte(protocol)), port, Is(Port(DNS_PORT)), ToResolver];
    let carry =
        [to_resolver(IPPROTO_UDP), to_resolver(IPPROTO_TCP), vec![Of(Meta::Protocol), Is(Byte(IPPROTO_TCP)), Redirect]];
    let chain = |name, kind, hook, priority, before: &[&Vec<Part>], rules: &[Vec<Part>]| Chain {
        name,
        kind,
        hook,
        priority,
        rules: before.iter().copied().chain(rules).cloned().collect(),
    };
    let out = [&goes_elsewhere, &is_for_us];
    let hold_pre = [&comes_back, &is_for_us, &would_go_elsewhere];
    let carry_pre = [&is_for_us, &would_go_elsewhere];
    // Behind the rewriting of addresses, which other tables do too: a destination may have become a container's since.
    let refuse_out = vec![Of(Meta::OutName), Is(Lo), Part::Route(Route::Kind), IsNot(Word(RTN_LOCAL)), Drop];
    let refuse_fwd = vec![Of(Meta::OutName), Is(Lo), Prohibit];
    vec![
        chain("hold_out", "filter", OUTPUT, BEFORE_NAT, &out, &hold),
        chain("hold_pre", "filter", PREROUTING, BEFORE_NAT, &hold_pre, &hold),
        chain("carry_out", "nat", OUTPUT, NAT, &out, &carry),
        chain("carry_pre", "nat", PREROUTING, NAT, &carry_pre, &carry),
        chain("refuse_out", "filter", POSTROUTING, FILTER, &[], &[refuse_out]),
        chain("refuse_fwd", "filter", FORWARD, BEFORE_FILTER, &[], &[refuse_fwd]),
    ]
}

impl Part {
    fn write(self, list: Message) -> Message {
        match self {
            // NFTA_META_DREG, NFTA_META_KEY
            Self::Meta(key) => part(list, "meta", |m| m.be32(1, NFT_REG_1).be32(2, key as u32)),
            // NFTA_FIB_DREG, NFTA_FIB_RESULT, NFTA_FIB_FLAGS (NFTA_FIB_F_DADDR)
            Self::Route(result) => part(list, "fib", |m| m.be32(1, NFT_REG_1).be32(2, result as u32).be32(3, 2)),
            // NFTA_PAYLOAD_DREG, _BASE (NFT_PAYLOAD_TRANSPORT_HEADER), _OFFSET, _LEN
            Self::Transport { at, bytes } => {
                part(list, "payload", |m| m.be32(1, NFT_REG_1).be32(2, 2).be32(3, at).be32(4, bytes))
            }
            // NFTA_BITWISE_SREG, _DREG, _LEN, _MASK, _XOR
            Self::And(mask) => part(list, "bitwise", |m| {
                let value = |m: Message, kind, byte| m.nested(kind, |m| m.bytes(NFTA_DATA_VALUE, &[byte]));
                value(value(m.be32(1, NFT_REG_1).be32(2, NFT_REG_1).be32(3, 1), 4, mask), 5, 0)
            }),
            Self::Is(value) => compare(list, 0, value),
            Self::IsNot(value) => compare(list, 1, value),
            Self::Return => verdict(list, NFT_RETURN),
            Self::Drop => verdict(list, NF_DROP),
            // NFTA_REDIR_REG_PROTO_MIN
            Self::Redirect => {
                let list = load(list, NFT_REG_1, &LISTENER_PORT.to_be_bytes());
                part(list, "redir", |m| m.be32(1, NFT_REG_1))
            }
            // NFTA_NAT_TYPE (NFT_NAT_DNAT), _FAMILY, _REG_ADDR_MIN, _REG_PROTO_MIN
            Self::ToResolver => {
                let list = load(list, NFT_REG_1, &RESOLVER.octets());
                let list = load(list, NFT_REG_2, &DNS_PORT.to_be_bytes());
                let family = u32::from(NFPROTO_IPV4);
                part(list, "nat", |m| m.be32(1, 1).be32(2, family).be32(3, NFT_REG_1).be32(5, NFT_REG_2))
            }
            // NFTA_REJECT_TYPE (NFT_REJECT_TCP_RST)
            Self::Reset => part(list, "reject", |m| m.be32(1, 1)),
            // NFTA_REJECT_TYPE (NFT_REJECT_ICMP_UNREACH), NFTA_REJECT_ICMP_CODE
            Self::Prohibit => part(list, "reject", |m| m.be32(1, 0).bytes(2, &[ICMP_HOST_ANO])),
            // NFTA_QUEUE_NUM, _TOTAL, _FLAGS (NFT_QUEUE_FLAG_BYPASS)
            Self::Queue => part(list, "queue", |m| m.be16(1, QUEUE).be16(2, 1).be16(3, 1)),
        }
    }
}

fn part(list: Message, name: &str, fill: impl FnOnce(Message) -> Message) -> Message {
    list.nested(NFTA_LIST_ELEM, |m| m.text(NFTA_EXPR_NAME, name).nested(NFTA_EXPR_DATA, fill))
}

/// `NFTA_CMP_SREG`, `_OP`, `_DATA`.
fn compare(list: Message, operator: u32, value: Value) -> Message {
    let value = value.bytes();
    part(list, "cmp", |m| m.be32(1, NFT_REG_1).be32(2, operator).nested(3, |m| m.bytes(NFTA_DATA_VALUE, &value)))
}

/// `NFTA_IMMEDIATE_DREG`, `_DATA`.
fn load(list: Message, register: u32, value: &[u8]) -> Message {
    part(list, "immediate", |m| m.be32(1, register).nested(2, |m| m.bytes(NFTA_DATA_VALUE, value)))
}

fn verdict(list: Message, code: u32) -> Message {
    part(list, "immediate", |m| {
        m.be32(1, NFT_REG_VERDICT).nested(2, |m| m.nested(NFTA_DATA_VERDICT, |m| m.be32(NFTA_VERDICT_CODE, code)))
    })
}

/// The messages that make the table, and what each is.
fn messages(chains: Vec<Chain>) -> Vec<(Message, String)> {
    let table = Message::new(NFT_MSG_NEWTABLE, NLM_F_ACK | NLM_F_CREATE, NFPROTO_IPV4, 0)
        .text(NFTA_TABLE_NAME, TABLE)
        .be32(NFTA_TABLE_FLAGS, NFT_TABLE_F_OWNER);
    let mut all = vec![(table, format!("make table {TABLE}"))];
    for chain in chains {
        let message = Message::new(NFT_MSG_NEWCHAIN, NLM_F_ACK | NLM_F_CREATE, NFPROTO_IPV4, 0)
            .text(NFTA_CHAIN_TABLE, TABLE)
            .text(NFTA_CHAIN_NAME, chain.name)
            .nested(NFTA_CHAIN_HOOK, |m| {
                m.be32(NFTA_HOOK_HOOKNUM, chain.hook).bytes(NFTA_HOOK_PRIORITY, &chain.priority.to_be_bytes())
            })
            .text(NFTA_CHAIN_TYPE, chain.kind);
        all.push((message, format!("make chain {}", chain.name)));
        for (number, rule) in chain.rules.into_iter().enumerate() {
            let message = Message::new(NFT_MSG_NEWRULE, NLM_F_ACK | NLM_F_CREATE | NLM_F_APPEND, NFPROTO_IPV4, 0)
                .text(NFTA_RULE_TABLE, TABLE)
                .text(NFTA_RULE_CHAIN, chain.name)
                .nested(NFTA_RULE_EXPRESSIONS, |list| rule.into_iter().fold(list, |list, part| part.write(list)));
            all.push((message, format!("make rule {} of chain {}", number + 1, chain.name)));
        }
    }
    all
}

/// The chains without the rules that need `nft_queue`, which is not in every kernel that tests run on.
#[cfg(test)]
pub(crate) fn install_without_queue() -> Result<Rules, NetfilterError> {
    let mut chains = chains();
    for chain in &mut chains {
        chain.rules.retain(|rule| !matches!(rule.last(), Some(Part::Queue)));
    }
    Rules::of(chains)
}

/// The table, as long as this lives.
#[derive(Debug)]
pub struct Rules {
    _owner: OwnedFd,
}

impl Rules {
    /// Puts the table into the kernel: all of it, or nothing.
    ///
    /// # Errors
    /// [`NetfilterError`].
    pub fn install() -> Result<Self, NetfilterError> {
        Self::of(chains())
    }

    fn of(chains: Vec<Chain>) -> Result<Self, NetfilterError> {
        let owner = open()?;
        let messages = messages(chains);
        let wanted = messages.len();
        let mut whole = Message::new(NFNL_MSG_BATCH_BEGIN, 0, 0, NFNL_SUBSYS_NFTABLES).finish(0);
        let mut names = Vec::with_capacity(wanted);
        for (sequence, (message, name)) in (1..).zip(messages) {
            whole.extend(message.finish(sequence));
            names.push(name);
        }
        whole.extend(Message::new(NFNL_MSG_BATCH_END, 0, 0, NFNL_SUBSYS_NFTABLES).finish(0));
        request(&owner, &whole, wanted, |sequence| {
            let at = usize::try_from(sequence).ok().and_then(|sequence| sequence.checked_sub(1));
            at.and_then(|at| names.get(at)).cloned().unwrap_or_else(|| "put the rules in force".to_owned())
        })?;
        Ok(Self { _owner: owner })
    }
}
