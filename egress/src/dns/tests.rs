//! Messages as nobody should write them, and what is left of an answer.

use super::chain;
use super::message::*;
use proptest::prelude::*;

fn question(name: &str, kind: u16) -> Question {
    Question { name: Name::of_host(name), kind, class: 1 }
}

/// A message with this head behind its id, the question for the address of `a.example`, and these bytes.
fn message(flags: u16, answers: u16, rest: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 7];
    for part in [flags, 1, answers, 0, 0] {
        bytes.extend(part.to_be_bytes());
    }
    bytes.extend(b"\x01a\x07example\x00\x00\x01\x00\x01");
    bytes.extend(rest);
    bytes
}

fn read(flags: u16, answers: u16, rest: &[u8]) -> Option<Answer> {
    read_answer(&message(flags, answers, rest), 7, &question("A.EXAMPLE", TYPE_A))
}

/// The first record's place in such a message.
const FIRST: u8 = 27;

#[test]
fn an_answer_is_read_out_of_its_compression() {
    let alias = b"\xc0\x0c\x00\x05\x00\x01\x00\x00\x00\x3c\x00\x04\x01b\xc0\x0e";
    let address = b"\xc0\x27\x00\x01\x00\x01\x00\x00\x00\x3c\x00\x04\x01\x02\x03\x04";
    let answer = read(0x8180, 2, &[&alias[..], address].concat()).unwrap();
    assert_eq!(answer.code, Code::NO_ERROR);
    assert_eq!(answer.records[0].alias().unwrap(), Name::of_host("B.example"));
    assert_eq!(answer.records[1].owner, Name::of_host("b.example"));
    assert_eq!(answer.records[1].address(), Some([1, 2, 3, 4].into()));
    // Written anew, and read again.
    let asked = question("a.example", TYPE_A);
    let query = read_query(&ask(7, &asked)).unwrap();
    let again = read_answer(&query.answer(Code::NO_ERROR, &answer.records), 7, &asked).unwrap();
    assert_eq!(again.records, answer.records);
}

#[test]
fn what_is_no_answer_to_the_question_is_none() {
    let asked = question("a.example", TYPE_A);
    let good = message(0x8180, 0, &[]);
    assert!(read_answer(&good, 7, &asked).is_some());
    assert!(read_answer(&good, 8, &asked).is_none(), "another id");
    assert!(read_answer(&good, 7, &question("b.example", TYPE_A)).is_none(), "another name");
    assert!(read_answer(&good, 7, &question("a.example", TYPE_AAAA)).is_none(), "another kind");
    assert!(read(0x0180, 0, &[]).is_none(), "a question");
    assert!(read(0x9180, 0, &[]).is_none(), "another operation");
    assert!(read(0x8180, 1, &[]).is_none(), "a record is missing");
    assert!(read(0x8380, 1, &[]).unwrap().truncated, "unless it says so");
}

#[test]
fn compression_has_no_loops_and_leads_backwards() {
    let record = |owner: &[u8]| [owner, b"\x00\x01\x00\x01\x00\x00\x00\x3c\x00\x04\x01\x02\x03\x04"].concat();
    assert!(read(0x8180, 1, &record(&[0xc0, 12])).is_some());
    for owner in [
        &[0xc0, FIRST][..],
        &[0xc0, FIRST + 2, 0xc0, FIRST],
        &[0xff, 0xff],
        &[1, b'x', 0xc0, FIRST],
        &[0xc0],
        &[0x41, 0],
        &[0x80, 12],
    ] {
        assert!(read(0x8180, 1, &record(owner)).is_none(), "{owner:x?}");
    }
    // Names that grow beyond any name's length by what they point to.
    let long: Vec<u8> = [vec![63; 1], vec![b'x'; 63]].concat().repeat(4);
    assert!(read(0x8180, 1, &record(&[&long[..], &[0xc0, 12]].concat())).is_none());
    assert!(read(0x8180, 1, &record(&[&long[64..], &[0xc0, 12]].concat())).is_some());
}

#[test]
fn a_records_length_must_be_its_own() {
    let record = |kind: u8, data: &[u8]| {
        let length = u8::try_from(data.len()).unwrap();
        [&[0xc0, 12, 0, kind, 0, 1, 0, 0, 0, 60, 0, length][..], data].concat()
    };
    let kinds = |kind: u8, data: &[u8]| {
        let asked = Question { kind: kind.into(), ..question("a.example", 0) };
        let mut message = message(0x8180, 1, &record(kind, data));
        message[24] = kind;
        read_answer(&message, 7, &asked).map(|answer| answer.records.len())
    };
    assert_eq!(kinds(1, &[1, 2, 3, 4]), Some(1));
    assert_eq!(kinds(1, &[1, 2, 3]), None);
    assert_eq!(kinds(1, &[1, 2, 3, 4, 5]), None);
    assert_eq!(kinds(5, &[0xc0, 12]), Some(1));
    assert_eq!(kinds(5, &[0xc0, 12, 0]), None);
    assert_eq!(kinds(15, &[0, 1, 0xc0, 12]), Some(1));
    assert_eq!(kinds(15, &[0, 1]), None);
    assert_eq!(kinds(33, &[0, 1, 0, 1, 0, 1, 1, b'x', 0]), Some(1));
    assert_eq!(kinds(16, b"\x03any"), Some(1));
}

#[test]
fn only_what_the_question_leads_to_is_left() {
    let record =
        |owner: &str, kind: u16, data: &[u8]| Record { owner: Name::of_host(owner), kind, ttl: 60, data: data.into() };
    let b = b"\x01b\x07example\x00";
    let a = b"\x01a\x07example\x00";
    let left = |records: Vec<Record>| chain(&Name::of_host("a.example"), TYPE_A, records).len();
    let address = |owner| record(owner, TYPE_A, &[1, 2, 3, 4]);
    assert_eq!(left(vec![address("a.example"), address("evil.example")]), 1);
    assert_eq!(left(vec![address("b.example"), record("A.example", TYPE_CNAME, b)]), 2);
    // Aliases of each other lead nowhere, and come to an end.
    assert_eq!(left(vec![record("a.example", TYPE_CNAME, b), record("b.example", TYPE_CNAME, a)]), 2);
    assert_eq!(left(vec![record("c.example", TYPE_CNAME, b), address("b.example")]), 0);
}

#[test]
fn a_name_of_the_reverse_tree_is_an_address() {
    let is = |name: &str, address: Option<&str>| {
        assert_eq!(reverse(name), address.map(|address| address.parse().unwrap()), "{name}");
    };
    is("1.0.0.10.in-addr.arpa", Some("10.0.0.1"));
    is("1.0.10.in-addr.arpa", None);
    is("256.0.0.10.in-addr.arpa", None);
    let zeros = "0.".repeat(28);
    is(&format!("1.0.0.0.{zeros}ip6.arpa"), Some("::1"));
    is(&format!("1.{zeros}ip6.arpa"), None);
    is("example.com", None);
}

#[test]
fn a_name_is_a_hosts_or_nobodys() {
    let host = |bytes: &[u8]| {
        let query = [&b"\0\x07\x01\0\0\x01\0\0\0\0\0\0"[..], bytes, b"\0\x01\0\x01"].concat();
        read_query(&query).unwrap().question.name.to_host()
    };
    assert_eq!(host(b"\x01A\x07Example\0").as_deref(), Some("a.example"));
    assert_eq!(host(b"\x09a.example\0"), None, "a dot within a label");
    assert_eq!(host(b"\x01\xff\0"), None);
    assert_eq!(host(b"\x01\0\0"), None);
    assert_eq!(host(b"\0"), None);
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = read_query(&bytes);
        let _ = read_answer(&bytes, 7, &question("a.example", TYPE_A));
        for (flags, answers) in [(0x8180, 3), (0x8380, 60_000)] {
            if let Some(answer) = read(flags, answers, &bytes) {
                for record in &answer.records {
                    prop_assert!(record.kind == TYPE_A || record.kind == TYPE_CNAME);
                }
                // What is written of it is read again.
                let asked = question("a.example", TYPE_A);
                let query = read_query(&ask(7, &asked)).unwrap();
                let again = read_answer(&query.answer(answer.code, &answer.records), 7, &asked).unwrap();
                prop_assert_eq!(again.records, answer.records);
            }
        }
    }
}
