//! Questions for names, from whoever asks, by UDP and TCP: all go over one stream, whose other end resolves and decides.
//!
//! On the stream each message has its length before it (RFC 1035 4.2.2), in any order, and an id that is ours: askers
//! choose theirs as they like. A stream that ends, with its session, takes no question with it: those go over the next.

mod link;
mod message;
mod table;

use dayfly_wire::Opener;
use link::Event;
use message::{QUESTION_BYTES_MAX, fit, is_question, room, servfail};
use std::net::SocketAddr;
use std::time::Duration;
use table::{OUTSTANDING_MAX, Table};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, sleep, timeout};

/// The host answers within 5 s, if only that it failed; the rest is for a session that begins anew.
const DEADLINE: Duration = Duration::from_secs(7);

/// Between two looks for questions whose time is over.
const TICK: Duration = Duration::from_millis(250);

/// Connections of askers. Few use TCP, and a resolver is not what a flood of them should stop.
const ASKERS_MAX: usize = 64;

/// Without a question a connection is closed.
const IDLE: Duration = Duration::from_secs(10);

/// Answers that a connection has not taken yet; beyond that they are lost.
const UNWRITTEN_MAX: usize = 16;

/// Before a failing socket is used again.
const RETRY: Duration = Duration::from_millis(100);

/// Who asks.
#[derive(Debug)]
enum Asker {
    /// By UDP, with room for so many bytes.
    Udp(SocketAddr, usize),
    Tcp(mpsc::Sender<Vec<u8>>),
}

/// A question, as it came.
#[derive(Debug)]
struct Question {
    message: Vec<u8>,
    asker: Asker,
}

/// Answers for ever.
pub(super) async fn run(udp: UdpSocket, tcp: TcpListener, session: watch::Receiver<Option<Opener>>) {
    let (questions, mut asked) = mpsc::channel(OUTSTANDING_MAX);
    let (events, mut happened) = mpsc::channel(OUTSTANDING_MAX);
    let mut askers = JoinSet::new();
    askers.spawn(link::keep(session, events));
    let mut table = Table::default();
    let mut stream: Option<mpsc::Sender<Vec<u8>>> = None;
    let mut buffer = vec![0; QUESTION_BYTES_MAX + 1];
    let mut tick = interval(TICK);
    loop {
        let question = tokio::select! {
            // Answers make room for questions. All are cancel safe.
            biased;
            Some(event) = happened.recv() => {
                match event {
                    Event::Up(begun) => {
                        // As many as there may be have room in it.
                        table.outstanding().for_each(|message| drop(begun.try_send(message)));
                        stream = Some(begun);
                    }
                    Event::Answer(answer) => {
                        if let Some((question, answer)) = table.take(answer) {
                            reply(&udp, &question, answer);
                        }
                    }
                    Event::Down => stream = None,
                }
                continue;
            }
            _ = tick.tick() => {
                for question in table.expired(Instant::now()) {
                    let failed = servfail(&question.message);
                    reply(&udp, &question, failed);
                }
                continue;
            }
            Some(_) = askers.join_next() => continue,
            Some(question) = asked.recv() => question,
            received = udp.recv_from(&mut buffer) => match received {
                Ok((length, from)) => {
                    let message = buffer[..length].to_vec();
                    let asker = Asker::Udp(from, room(&message));
                    Question { message, asker }
                }
                Err(_) => {
                    sleep(RETRY).await;
                    continue;
                }
            },
            accepted = tcp.accept(), if askers.len() <= ASKERS_MAX => {
                match accepted {
                    Ok((asker, _)) => drop(askers.spawn(serve(asker, questions.clone()))),
                    Err(_) => sleep(RETRY).await,
                }
                continue;
            }
        };
        if !is_question(&question.message) {
            continue;
        }
        match table.add(question, Instant::now() + DEADLINE) {
            Ok(message) => {
                if let Some(stream) = &stream {
                    // One that does not go is answered when its time is over.
                    let _ = stream.try_send(message);
                }
            }
            Err(question) => {
                let failed = servfail(&question.message);
                reply(&udp, &question, failed);
            }
        }
    }
}

/// An answer that does not go at once is lost: who asks asks again.
fn reply(udp: &UdpSocket, question: &Question, answer: Vec<u8>) {
    match &question.asker {
        Asker::Udp(to, room) => drop(udp.try_send_to(&fit(answer, *room), *to)),
        Asker::Tcp(connection) => drop(connection.try_send(answer)),
    }
}

/// One connection: questions in, answers out, until no more are wanted.
async fn serve(connection: TcpStream, questions: mpsc::Sender<Question>) {
    let (mut from, mut to) = connection.into_split();
    let (answers, mut answered) = mpsc::channel::<Vec<u8>>(UNWRITTEN_MAX);
    let read = async {
        while let Ok(Ok(message)) = timeout(IDLE, link::read(&mut from, QUESTION_BYTES_MAX)).await {
            let question = Question { message, asker: Asker::Tcp(answers.clone()) };
            if questions.send(question).await.is_err() {
                break;
            }
        }
        // Answers may still come for those.
        drop(answers);
        std::future::pending::<()>().await;
    };
    let write = async {
        while let Some(answer) = answered.recv().await {
            if timeout(IDLE, link::write(&mut to, &answer)).await.is_err() {
                break;
            }
        }
        let _ = to.shutdown().await;
    };
    tokio::select! {
        biased;
        () = write => {}
        () = read => {}
    }
}
