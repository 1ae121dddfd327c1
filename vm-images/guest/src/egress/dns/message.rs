//! What a resolver in between must know of a DNS message (RFC 1035, RFC 6891): is it a question, how much does its asker
//! take, what says that it failed, and how does an answer say that it is too long. The host reads the rest.

/// Of a question. Real ones have a name of 255 bytes at most and some options.
pub(super) const QUESTION_BYTES_MAX: usize = 4096;

/// Of an answer: what its length can say.
pub(super) const MESSAGE_BYTES_MAX: usize = 65_535;

/// Of an answer by UDP, whatever its asker offers: that of what most resolvers offer.
const UDP_BYTES_MAX: usize = 4096;
/// And where it offers nothing.
const UDP_BYTES_PLAIN: usize = 512;

const HEADER: usize = 12;
const TYPE_OPT: u16 = 41;
/// In the third byte of a header: it is an answer; it is cut.
const ANSWER: u8 = 0x80;
const CUT: u8 = 0x02;
/// What an answer keeps of it: kind of question, and whether recursion was wanted.
const KEPT: u8 = 0x79;
/// In the fourth: recursion is to be had; the server failed.
const RECURSION: u8 = 0x80;
const SERVFAIL: u8 = 2;

/// Whether somebody asks something in this.
pub(super) fn is_question(message: &[u8]) -> bool {
    (HEADER..=QUESTION_BYTES_MAX).contains(&message.len()) && message[2] & ANSWER == 0
}

fn count(message: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(message.get(at..at + 2)?.try_into().ok()?))
}

/// Where the one question of this message ends. `None`: there is not one, or none that can be told.
fn question_end(message: &[u8]) -> Option<usize> {
    if count(message, 4)? != 1 {
        return None;
    }
    let mut at = HEADER;
    loop {
        let label = usize::from(*message.get(at)?);
        at += 1 + label;
        match label {
            0 => break,
            1..=63 => {}
            // A pointer has nothing before it to point to.
            _ => return None,
        }
    }
    // Type and class.
    (at + 4 <= message.len()).then_some(at + 4)
}

/// How many bytes the asker takes by UDP.
pub(super) fn room(question: &[u8]) -> usize {
    offered(question).map_or(UDP_BYTES_PLAIN, |bytes| usize::from(bytes).clamp(UDP_BYTES_PLAIN, UDP_BYTES_MAX))
}

/// What the question's option record says (RFC 6891 6.1.2); it is the first of its additional records, as resolvers send
/// it.
fn offered(question: &[u8]) -> Option<u16> {
    let none_between = count(question, 6)? == 0 && count(question, 8)? == 0 && count(question, 10)? > 0;
    let at = question_end(question).filter(|_| none_between)?;
    let is_option = *question.get(at)? == 0 && count(question, at + 1)? == TYPE_OPT;
    if is_option { count(question, at + 3) } else { None }
}

/// The answer that there is none.
pub(super) fn servfail(question: &[u8]) -> Vec<u8> {
    let mut answer = head_of(question);
    if let [_, _, flags, code, ..] = &mut answer[..] {
        *flags = ANSWER | (*flags & KEPT);
        *code = RECURSION | SERVFAIL;
    }
    answer
}

/// An answer that has room: itself, or one that says that it was cut, and that it is to be had by TCP.
pub(super) fn fit(answer: Vec<u8>, room: usize) -> Vec<u8> {
    if answer.len() <= room {
        return answer;
    }
    let mut cut = head_of(&answer);
    if let Some(flags) = cut.get_mut(2) {
        *flags |= CUT;
    }
    cut
}

/// Header and question, and no records.
fn head_of(message: &[u8]) -> Vec<u8> {
    let end = question_end(message);
    let mut head = message[..end.unwrap_or(HEADER).min(message.len())].to_vec();
    if let Some(counts) = head.get_mut(4..HEADER) {
        counts.copy_from_slice(&[0, u8::from(end.is_some()), 0, 0, 0, 0, 0, 0]);
    }
    head
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `name` of type A, with an option record that offers so many bytes.
    fn question(name: &str, offers: Option<u16>) -> Vec<u8> {
        let mut message = vec![0xab, 0xcd, 1, 0x20, 0, 1, 0, 0, 0, 0, 0, u8::from(offers.is_some())];
        for label in name.split('.') {
            message.push(u8::try_from(label.len()).unwrap());
            message.extend(label.as_bytes());
        }
        message.extend([0, 0, 1, 0, 1]);
        if let Some(bytes) = offers {
            message.extend([0, 0, 41]);
            message.extend(bytes.to_be_bytes());
            message.extend([0, 0, 0, 0, 0, 0]);
        }
        message
    }

    #[test]
    fn an_asker_gets_no_more_than_it_takes() {
        for (offers, takes) in [(None, 512), (Some(1232), 1232), (Some(0), 512), (Some(u16::MAX), 4096)] {
            assert_eq!(room(&question("deb.debian.org", offers)), takes, "{offers:?}");
        }
        let mut answer = question("deb.debian.org", None);
        answer[2] |= ANSWER;
        answer[7] = 60;
        let head = answer.len();
        answer.resize(head + 60 * 16, 7);
        assert_eq!(fit(answer.clone(), 1232), answer);
        let cut = fit(answer.clone(), 512);
        assert_eq!(cut.len(), head);
        assert_eq!(cut[2] & CUT, CUT);
        assert_eq!((cut[..2].to_vec(), &cut[4..HEADER]), (answer[..2].to_vec(), &[0, 1, 0, 0, 0, 0, 0, 0][..]));
        assert_eq!(cut[HEADER..], answer[HEADER..head]);
    }

    #[test]
    fn a_failure_names_its_question() {
        let question = question("deb.debian.org", Some(1232));
        let failure = servfail(&question);
        assert_eq!(failure[..4], [0xab, 0xcd, 0x81, 0x82]);
        assert_eq!(failure[4..HEADER], [0, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(failure[HEADER..], question[HEADER..HEADER + 16 + 4]);
        assert!(is_question(&question) && !is_question(&failure));
    }

    #[test]
    fn what_is_broken_is_answered_too() {
        let whole = question("deb.debian.org", Some(1232));
        for cut in HEADER..whole.len() {
            let failure = servfail(&whole[..cut]);
            assert!(failure.len() >= HEADER && failure.len() <= cut, "{cut}");
            assert!((512..=4096).contains(&room(&whole[..cut])));
        }
        assert!(!is_question(&whole[..HEADER - 1]) && !is_question(&vec![0; QUESTION_BYTES_MAX + 1]));
        let mut pointer = whole.clone();
        pointer[HEADER] = 0xc0;
        assert_eq!(servfail(&pointer).len(), HEADER);
        // Two questions, of which neither is the one.
        let mut two = whole;
        two[5] = 2;
        assert_eq!(servfail(&two)[4..HEADER], [0; 8]);
    }
}
