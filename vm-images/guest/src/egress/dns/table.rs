//! Questions that were not answered yet, by the ids that they have on the stream.

use super::Question;
use std::collections::HashMap;
use tokio::time::Instant;

/// As many as the host takes.
pub(super) const OUTSTANDING_MAX: usize = 256;

#[derive(Default)]
pub(super) struct Table {
    outstanding: HashMap<u16, Outstanding>,
    next: u16,
}

struct Outstanding {
    question: Question,
    until: Instant,
}

impl Table {
    /// Takes a question, and gives it as it goes over the stream.
    ///
    /// # Errors
    /// The question, if there are too many.
    pub(super) fn add(&mut self, question: Question, until: Instant) -> Result<Vec<u8>, Question> {
        if self.outstanding.len() >= OUTSTANDING_MAX {
            return Err(question);
        }
        // There are more ids than may be in use.
        while self.outstanding.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        let message = with_id(question.message.clone(), id);
        self.outstanding.insert(id, Outstanding { question, until });
        Ok(message)
    }

    /// The question that this answers, and the answer with the id that its asker knows. `None`: none, or none any more.
    pub(super) fn take(&mut self, answer: Vec<u8>) -> Option<(Question, Vec<u8>)> {
        let Outstanding { question, .. } = self.outstanding.remove(&id(&answer)?)?;
        let asked = id(&question.message)?;
        Some((question, with_id(answer, asked)))
    }

    /// All, as they go over the stream.
    pub(super) fn outstanding(&self) -> impl Iterator<Item = Vec<u8>> {
        self.outstanding.iter().map(|(id, outstanding)| with_id(outstanding.question.message.clone(), *id))
    }

    /// Takes out those whose time is over.
    pub(super) fn expired(&mut self, now: Instant) -> Vec<Question> {
        self.outstanding
            .extract_if(|_, outstanding| outstanding.until <= now)
            .map(|(_, expired)| expired.question)
            .collect()
    }
}

fn id(message: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(message.get(..2)?.try_into().ok()?))
}

fn with_id(mut message: Vec<u8>, id: u16) -> Vec<u8> {
    if let Some(place) = message.get_mut(..2) {
        place.copy_from_slice(&id.to_be_bytes());
    }
    message
}

#[cfg(test)]
mod tests {
    use super::super::Asker;
    use super::*;
    use std::time::Duration;

    fn question(id: u16, port: u16) -> Question {
        let message = [&id.to_be_bytes()[..], &[1, 0, 0, 1, 0, 0, 0, 0, 0, 0], b"question"].concat();
        Question { message, asker: Asker::Udp(([127, 0, 0, 1], port).into(), 512) }
    }

    fn port(question: &Question) -> u16 {
        let Asker::Udp(address, _) = question.asker else { panic!("{question:?}") };
        address.port()
    }

    #[tokio::test]
    async fn askers_with_the_same_id_get_their_own_answers() {
        let mut table = Table::default();
        let until = Instant::now() + Duration::from_secs(1);
        let first = table.add(question(7, 1), until).unwrap();
        let second = table.add(question(7, 2), until).unwrap();
        assert_ne!(first[..2], second[..2]);
        assert_eq!(first[2..], second[2..]);
        assert_eq!(table.outstanding().count(), 2);
        for (answer, asker) in [(second, 2), (first.clone(), 1)] {
            let (question, answer) = table.take(answer).unwrap();
            assert_eq!((port(&question), &answer[..2]), (asker, &[0, 7][..]));
        }
        assert!(table.take(first).is_none(), "an answer that comes twice");
        assert!(table.take(vec![0]).is_none());
    }

    #[tokio::test]
    async fn questions_are_bounded_in_number_and_time() {
        let mut table = Table::default();
        let now = Instant::now();
        for n in 0..OUTSTANDING_MAX {
            let late = Duration::from_secs(if n % 2 == 0 { 1 } else { 2 });
            table.add(question(1, u16::try_from(n).unwrap()), now + late).unwrap();
        }
        assert_eq!(port(&table.add(question(1, 999), now).unwrap_err()), 999);
        assert!(table.expired(now).is_empty());
        let expired = table.expired(now + Duration::from_secs(1));
        assert_eq!(expired.len(), OUTSTANDING_MAX / 2);
        assert!(expired.iter().all(|question| port(question).is_multiple_of(2)));
        // An id is used again only when nobody waits under it.
        for _ in 0..70_000 {
            let message = table.add(question(1, 0), now).unwrap();
            table.take(message).unwrap();
        }
        assert_eq!(table.outstanding().count(), OUTSTANDING_MAX / 2);
    }
}
