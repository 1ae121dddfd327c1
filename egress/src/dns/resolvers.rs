//! Who knows the answer? The resolvers that the host itself uses, asked by a socket and an id of each question's own.

use super::message::{Answer, Code, Question, ask, read_answer};
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

/// For one question, over all resolvers.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// For one resolver.
const TRY: Duration = Duration::from_secs(2);

/// Bytes of one answer over UDP that are read; without EDNS there are 512.
const DATAGRAM_BYTES: usize = 4096;

/// The answer of the first resolver that has one, within [`PATIENCE`].
pub(crate) async fn resolve(resolvers: &[SocketAddr], question: &Question) -> Option<Answer> {
    let rounds = async {
        let mut last = None;
        // The second time for those that have lost a packet.
        for resolver in resolvers.iter().chain(resolvers) {
            match timeout(TRY, one(*resolver, question)).await {
                Ok(Ok(answer))
                    if matches!(answer.code, Code::SERVER_FAILURE | Code::REFUSED | Code::NOT_IMPLEMENTED) =>
                {
                    last = Some(answer);
                }
                Ok(Ok(answer)) => return Some(answer),
                Ok(Err(_)) | Err(_) => {}
            }
            if last.is_some() && resolvers.len() == 1 {
                break;
            }
        }
        last
    };
    timeout(PATIENCE, rounds).await.ok().flatten()
}

fn random_id() -> io::Result<u16> {
    let mut id = [0; 2];
    getrandom::fill(&mut id).map_err(io::Error::other)?;
    Ok(u16::from_be_bytes(id))
}

async fn one(resolver: SocketAddr, question: &Question) -> io::Result<Answer> {
    let id = random_id()?;
    let message = ask(id, question);
    let socket = udp_to(resolver)?;
    socket.send(&message).await?;
    let mut came = vec![0; DATAGRAM_BYTES];
    loop {
        // From this resolver's address only: the socket is connected. What answers another question is not ours.
        let count = socket.recv(&mut came).await?;
        match read_answer(&came[..count], id, question) {
            Some(answer) if answer.truncated => return over_tcp(resolver, question).await,
            Some(answer) => return Ok(answer),
            None => {}
        }
    }
}

/// A socket that sends there, from a port that the kernel draws. Nothing is sent by this.
pub(crate) fn udp_to(to: SocketAddr) -> io::Result<UdpSocket> {
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::DGRAM, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None)?;
    connect(&socket, &to)?;
    UdpSocket::from_std(socket.into())
}

async fn over_tcp(resolver: SocketAddr, question: &Question) -> io::Result<Answer> {
    let id = random_id()?;
    let message = ask(id, question);
    let mut stream = TcpStream::connect(resolver).await?;
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes()[..], &message].concat()).await?;
    let length = stream.read_u16().await?;
    let mut came = vec![0; length.into()];
    stream.read_exact(&mut came).await?;
    let answer = read_answer(&came, id, question).filter(|answer| !answer.truncated);
    answer.ok_or_else(|| io::ErrorKind::InvalidData.into())
}
