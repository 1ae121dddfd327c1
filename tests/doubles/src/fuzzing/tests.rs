//! The properties wherever cargo runs: on the committed corpus, and on mutations of it.

use super::{TARGETS, Target};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestRunner};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Cases of each property.
const CASES: u32 = 512;
/// Bytes of the whole corpus at most: it is there to begin with, not to keep everything that was ever found.
const CORPUS_BYTES_MAX: u64 = 300 * 1024;
/// Bytes of an input at most, as `scripts/fuzz` has it.
const INPUT_BYTES_MAX: usize = 16 * 1024;

fn fuzz() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz")
}

/// Names in a directory, without what hides, and without `extension`.
fn names(dir: &Path, extension: &str) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| !name.starts_with('.')).map(|name| name.trim_end_matches(extension).to_owned()).collect()
}

fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let dir = fuzz().join("corpus").join(target);
    names(&dir, "").into_iter().map(|name| (name.clone(), std::fs::read(dir.join(name)).unwrap())).collect()
}

/// The words of a target's dictionary, in libFuzzer's form: a text in quotes a line, `\xNN` for other bytes.
fn words(target: &str) -> Vec<Vec<u8>> {
    let text = std::fs::read_to_string(fuzz().join("dictionary").join(target)).unwrap_or_default();
    text.lines().filter(|line| line.starts_with('"')).map(|line| unquoted(line.trim_matches('"'))).collect()
}

fn unquoted(text: &str) -> Vec<u8> {
    let mut word = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((byte, more)) = rest.split_first() {
        let (byte, more) = match (byte, more) {
            (b'\\', [b'x', a, b, more @ ..]) => {
                let hex = [*a, *b];
                (u8::from_str_radix(std::str::from_utf8(&hex).unwrap(), 16).unwrap(), more)
            }
            (b'\\', [byte, more @ ..]) => (*byte, more),
            (byte, more) => (*byte, more),
        };
        word.push(byte);
        rest = more;
    }
    word
}

fn target(name: &str) -> &'static Target {
    TARGETS.iter().find(|target| target.name == name).unwrap()
}

/// B13: each property is a target of the fuzzer, with a corpus.
#[test]
fn targets_functions_and_corpora_go_together() {
    let known: BTreeSet<String> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
    assert_eq!(known.len(), TARGETS.len());
    assert_eq!(names(&fuzz().join("fuzz_targets"), ".rs"), known);
    assert_eq!(names(&fuzz().join("corpus"), ""), known);
    assert!(names(&fuzz().join("dictionary"), "").is_subset(&known));
    let manifest = std::fs::read_to_string(fuzz().join("Cargo.toml")).unwrap();
    let mut bytes = 0;
    for Target { name, .. } in TARGETS {
        assert!(manifest.contains(&format!("name = \"{name}\"\n")), "{name} is not in fuzz/Cargo.toml");
        let source = std::fs::read_to_string(fuzz().join(format!("fuzz_targets/{name}.rs"))).unwrap();
        assert!(source.contains(&format!("dayfly_doubles::fuzzing::{name}(input)")), "{name} runs something else");
        let inputs = corpus(name);
        assert!(inputs.len() >= 6, "{name} has {} inputs", inputs.len());
        bytes += inputs.iter().map(|(_, input)| input.len() as u64).sum::<u64>();
    }
    assert!(bytes <= CORPUS_BYTES_MAX, "the corpus has {bytes} bytes");
}

/// B13: the committed corpus, without a fuzzer.
#[test]
fn every_input_of_the_corpus_holds_its_property() {
    for Target { name, check } in TARGETS {
        for (file, input) in corpus(name) {
            println!("fuzz/corpus/{name}/{file}");
            check(&input);
        }
    }
}

/// The first inputs are right ones: a format that has grown since would turn them away at once, and their mutations too.
#[test]
fn what_the_corpora_begin_with_is_still_read() {
    let input = |target: &str, name: &str| std::fs::read(fuzz().join("corpus").join(target).join(name)).unwrap();
    let text = |target: &str, name: &str| String::from_utf8(input(target, name)).unwrap();
    for name in ["accepted", "booting", "running", "releasing", "over", "ended", "uptime"] {
        serde_json::from_slice::<dayfly::job::journal::Record>(&input("journal", name)).unwrap();
    }
    dayfly::gitlab::JobPayload::parse(input("payload", "whole").into(), None).unwrap();
    dayfly_guest_config::GuestConfig::from_line(&input("guest_config", "right")).unwrap();
    dayfly::config::Config::assemble(Some(("/f".into(), text("config", "small"))), []).unwrap();
    dayfly::image::manifest::Manifest::parse(&text("image", "manifest")).unwrap();
    dayfly::image::qcow2::parse(&input("image", "disk")).unwrap();
    dayfly::vm::domain_xml::read_metadata(&text("libvirt_answers", "metadata")).unwrap();
    let named = dayfly_egress::hello::Hello::Tls(Some("a.example".to_owned()));
    for name in ["named", "cut", "bytes", "more"] {
        assert_eq!(dayfly_egress::hello::read(&input("tls_hello", name)), named);
    }
    let question = dayfly_egress::dns::message::read_query(&input("dns_message", "question")).unwrap().question;
    for name in ["answer", "alias"] {
        let answer = input("dns_message", name);
        let records = dayfly_egress::dns::message::read_answer(&answer, 7, &question).unwrap().records;
        assert!(records.iter().any(|record| record.address().is_some()), "{name}");
    }
    for line in text("egress_policy", "names").lines() {
        line.parse::<dayfly_egress::policy::Pattern>().unwrap();
    }
    assert!(dayfly_egress::target(&text("connect_target", "v6")).is_some());
    let names = ["job", "test"].map(str::to_owned);
    for name in ["two", "extends"] {
        dayfly_exec::pipeline::plan(Path::new("f"), &text("pipeline", name), &names).unwrap();
    }
}

/// One change to an input.
#[derive(Clone, Debug)]
enum Change {
    Set(Index, u8),
    Flip(Index, u8),
    Insert(Index, Vec<u8>),
    Word(Index, Index),
    Remove(Index, usize),
    Repeat(Index, usize, usize),
    Cut(Index),
    /// Another input's bytes from there on.
    Join(Index, Index, Index),
    /// A number in the text becomes this one.
    Number(Index, u64),
}

fn change() -> impl Strategy<Value = Change> {
    let at = any::<Index>;
    let number =
        prop_oneof![0..12_u64, any::<u64>(), Just(u64::MAX), Just(1 << 63), Just((1 << 63) - 1), Just(1 << 32)];
    prop_oneof![
        (at(), prop_oneof![any::<u8>(), Just(b'\r'), Just(b'\n'), Just(b'\0'), Just(b' '), Just(b'"')])
            .prop_map(|(at, byte)| Change::Set(at, byte)),
        (at(), 0..8_u32).prop_map(|(at, bit)| Change::Flip(at, 1 << bit)),
        (at(), proptest::collection::vec(any::<u8>(), 1..6)).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        (at(), at()).prop_map(|(at, word)| Change::Word(at, word)),
        (at(), 1..40_usize).prop_map(|(at, bytes)| Change::Remove(at, bytes)),
        (at(), 1..40_usize, 1..60_usize).prop_map(|(at, bytes, times)| Change::Repeat(at, bytes, times)),
        at().prop_map(Change::Cut),
        (at(), at(), at()).prop_map(|(at, input, from)| Change::Join(at, input, from)),
        (at(), number).prop_map(|(at, number)| Change::Number(at, number)),
    ]
}

fn changed(mut input: Vec<u8>, changes: &[Change], inputs: &[(String, Vec<u8>)], words: &[Vec<u8>]) -> Vec<u8> {
    for change in changes {
        let len = input.len();
        match change {
            Change::Set(at, byte) if len > 0 => input[at.index(len)] = *byte,
            Change::Flip(at, bit) if len > 0 => input[at.index(len)] ^= bit,
            Change::Insert(at, bytes) => drop(input.splice(at.index(len + 1)..at.index(len + 1), bytes.clone())),
            Change::Word(at, word) if !words.is_empty() => {
                let at = at.index(len + 1);
                drop(input.splice(at..at, words[word.index(words.len())].clone()));
            }
            Change::Remove(at, bytes) if len > 0 => {
                let at = at.index(len);
                drop(input.drain(at..len.min(at + bytes)));
            }
            Change::Repeat(at, bytes, times) if len > 0 => {
                let at = at.index(len);
                let piece = input[at..len.min(at + bytes)].repeat(*times);
                drop(input.splice(at..at, piece));
            }
            Change::Cut(at) => input.truncate(at.index(len + 1)),
            Change::Join(at, other, from) => {
                let other = &inputs[other.index(inputs.len())].1;
                input.truncate(at.index(len + 1));
                input.extend_from_slice(&other[from.index(other.len() + 1)..]);
            }
            Change::Number(at, number) => {
                let digit = |byte: &u8| byte.is_ascii_digit();
                let Some(from) = (at.index(len + 1)..len).find(|at| digit(&input[*at])) else { continue };
                let to = input[from..].iter().position(|byte| !digit(byte)).map_or(len, |length| from + length);
                drop(input.splice(from..to, number.to_string().into_bytes()));
            }
            _ => {}
        }
    }
    input.truncate(INPUT_BYTES_MAX);
    input
}

/// Bytes that print as they would be written.
struct Input(Vec<u8>);

impl std::fmt::Debug for Input {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "b\"{}\"", self.0.escape_ascii())
    }
}

/// Holds a property to mutations of its corpus.
fn mutate(name: &str) {
    let (inputs, words) = (corpus(name), words(name));
    let case = (any::<Index>(), proptest::collection::vec(change(), 1..6)).prop_map(|(input, changes)| {
        Input(changed(inputs[input.index(inputs.len())].1.clone(), &changes, &inputs, &words))
    });
    let config = Config { cases: CASES, failure_persistence: None, ..Config::default() };
    let check = target(name).check;
    TestRunner::new(config)
        .run(&case, |Input(input)| {
            check(&input);
            Ok(())
        })
        .unwrap_or_else(|error| panic!("{error}"));
}

macro_rules! properties {
    ($($name:ident)*) => { $(
        /// By proptest what the fuzzer does (B13).
        #[test]
        fn $name() {
            mutate(stringify!($name));
        }
    )* };
}

mod near_misses_hold_the_property_of {
    use super::mutate;

    properties! {
        artifact_upload chunked_body config connect_target content_range dns_message domain_xml egress_policy
        forwarded_headers gitlab_answers greeting_door greeting_relay guest_config image journal libvirt_answers payload
        pipeline proxy request_head requests route tls_hello update_body wire_handshake wire_session
        wishes
    }

    /// None is left out.
    #[test]
    fn all_targets() {
        let here = include_str!("tests.rs").split("properties! {").nth(1).unwrap().split('}').next().unwrap();
        let here: Vec<&str> = here.split_whitespace().collect();
        assert_eq!(here, super::TARGETS.iter().map(|target| target.name).collect::<Vec<_>>());
    }
}

/// E13: each byte of a record flipped, each way to tear it.
#[test]
fn a_record_may_be_torn_and_flipped_anywhere() {
    for (_, input) in corpus("journal").into_iter().filter(|(name, _)| name == "running" || name == "releasing") {
        for at in 0..input.len() {
            super::journal(&input[..at]);
            for bit in 0..8 {
                let mut flipped = input.clone();
                flipped[at] ^= 1 << bit;
                super::journal(&flipped);
            }
        }
    }
}
