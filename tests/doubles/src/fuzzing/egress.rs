//! What must hold for any bytes that a job sends out: its questions for names, what resolvers answer, what it connects to and
//! begins with; and for any text of a policy.

use dayfly_egress::dns::message::{Code, NoQuery, TYPE_CNAME, ask, read_answer, read_query};
use dayfly_egress::hello::{HELLO_BYTES_MAX, Hello, read};
use dayfly_egress::policy::{Mode, Pattern, Policy, To, canonical, special};
use dayfly_egress::target;
use std::net::IpAddr;

/// A host's name, as it is compared and written down.
fn is_host(name: &str) -> bool {
    let byte = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_' | b'.');
    (1..=253).contains(&name.len()) && name.bytes().all(byte) && !name.split('.').any(str::is_empty)
}

/// As a question: it is answered, in the form of an answer to it. As an answer: what is read of it answers the question, and
/// is read the same once it was written anew.
pub fn dns_message(input: &[u8]) {
    match read_query(input) {
        Ok(query) => {
            assert_eq!(query.id.to_be_bytes(), input[..2]);
            assert!(query.question.name.to_host().is_none_or(|name| is_host(&name)));
            let answer = query.answer(Code::SERVER_FAILURE, &[]);
            let read = read_answer(&answer, query.id, &query.question).expect("an answer to it");
            assert!(read.code == Code::SERVER_FAILURE && read.records.is_empty() && !read.truncated);
        }
        Err(NoQuery::Nothing) => assert!(input.len() < 12 || input[2] & 0x80 != 0),
        Err(NoQuery::Answer(answer)) => {
            assert!(answer.len() == 12 && answer[..2] == input[..2] && answer[2] & 0x80 != 0 && answer[3] & 0x0f != 0);
        }
    }
    // The same bytes, as the answer to the question that they hold.
    let Some(id) = input.first_chunk::<2>() else { return };
    let id = u16::from_be_bytes(*id);
    let mut asked = input.to_vec();
    if let Some(flags) = asked.get_mut(2..4) {
        flags.copy_from_slice(&[1, 0]);
    }
    let Ok(query) = read_query(&asked) else { return };
    let Some(answer) = read_answer(input, id, &query.question) else { return };
    for record in &answer.records {
        assert!(record.kind == query.question.kind || record.kind == TYPE_CNAME);
    }
    let question = read_query(&ask(id, &query.question)).unwrap();
    let again = read_answer(&question.answer(answer.code, &answer.records), id, &query.question).unwrap();
    assert!(again.records.len() <= answer.records.len());
    assert!(again.records == answer.records[..again.records.len()], "what is written is what was read");
}

/// Cut anywhere, it is the same hello once it can be told; and it can be told in time.
pub fn tls_hello(input: &[u8]) {
    let whole = read(input);
    if let Hello::Tls(Some(name)) = &whole {
        assert!(is_host(name), "{name}");
    }
    assert!(whole != Hello::NotYet || input.len() < HELLO_BYTES_MAX);
    let step = 1 + input.len() / 64;
    for end in (0..input.len()).step_by(step) {
        let part = read(&input[..end]);
        assert!(part == Hello::NotYet || part == whole, "{end}: {part:?}, {whole:?}");
    }
}

/// What is reached is an address in its one form, with a port; written as it is read.
pub fn connect_target(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let Some(to) = target(text) else { return };
    assert!(to.port() != 0 && canonical(to.ip()) == to.ip());
    assert_eq!(target(&to.to_string()), Some(to));
    assert!(text.bytes().all(|byte| byte.is_ascii_hexdigit() || b".:[]".contains(&byte)), "{text}");
}

/// Lines of patterns, allowed and denied by turns: each is read and written alike or refused in one sentence, and what
/// the policy of them says holds together.
pub fn egress_policy(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let mut lists = [Vec::new(), Vec::new()];
    for (n, line) in text.lines().take(200).enumerate() {
        match line.parse::<Pattern>() {
            Ok(pattern) => {
                assert_eq!(pattern.to_string().parse::<Pattern>().unwrap(), pattern);
                lists[n % 2].push(pattern);
            }
            Err(error) => {
                let error = error.to_string();
                assert!(!error.is_empty() && !error.ends_with('.') && !error.chars().any(char::is_control), "{error}");
            }
        }
    }
    let [allow, deny] = lists;
    let names: Vec<&str> = vec!["a.example", "x.corp"];
    let named = allow.iter().any(|allow| !matches!(allow.to, To::Gitlab | To::Any));
    let with = |mode, deny: &[Pattern]| Policy { mode, allow: allow.clone(), deny: deny.to_vec(), ..Policy::default() };
    let _ = with(Mode::Observe, &deny).validate();
    let observe = with(Mode::Observe, &deny);
    let enforce = with(Mode::Enforce, &deny);
    let free = with(Mode::Observe, &[]);
    for bytes in input.chunks_exact(4).take(64) {
        let address = IpAddr::from(<[u8; 4]>::try_from(bytes).unwrap());
        for port in [22, 443] {
            let allowed = observe.check(address, port, &names).is_allowed();
            assert!(allowed || !enforce.check(address, port, &names).is_allowed(), "enforce allows no more");
            assert!(!allowed || free.check(address, port, &names).is_allowed(), "deny takes away");
            assert!(!allowed || named || special(address).is_none(), "what is not public is named");
            for name in &names {
                let told = observe.answer(name, address).is_allowed() && observe.lookup(name).is_allowed();
                assert!(told || !observe.check(address, port, &[*name]).is_allowed(), "reached is what was told");
            }
        }
    }
}
