//! The client of `scripts/bench wire`, inside a guest: a connection of its own for each request of HTTP/1.1, as a runner's.
//!
//! Compiled, as a runner is: what an interpreter takes for each request would be a part of both sides, and hide what they
//! differ in.
#![expect(clippy::disallowed_types, reason = "a program of its own without a runtime")]

use std::error::Error;
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Instant;

/// The guest's relay.
const RELAY: (&str, u16) = ("192.0.2.1", 80);

/// What is written, and read, at once.
const BLOCK: usize = 256 * 1024;

type Failed = Box<dyn Error>;

/// Sends a request; the connection, with its answer's head read, and what was read behind that.
fn ask(method: &str, path: &str, length: usize, body: Option<&[u8]>) -> Result<(TcpStream, Vec<u8>), Failed> {
    let mut stream = TcpStream::connect(RELAY)?;
    let head = format!("{method} /bench/{path} HTTP/1.1\r\nHost: gitlab\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes())?;
    match body {
        Some(body) => stream.write_all(body)?,
        None => {
            let block = vec![0; BLOCK];
            let mut left = length;
            while left > 0 {
                left -= stream.write(&block[..left.min(BLOCK)])?;
            }
        }
    }
    let (mut read, mut piece) = (Vec::new(), vec![0; 4096]);
    let end = loop {
        let count = stream.read(&mut piece)?;
        if count == 0 {
            return Err("the answer has no end".into());
        }
        read.extend_from_slice(&piece[..count]);
        if let Some(at) = read.windows(4).position(|four| four == b"\r\n\r\n") {
            break at + 4;
        }
    };
    if !read.starts_with(b"HTTP/1.1 200") {
        return Err(String::from_utf8_lossy(&read).into());
    }
    read.drain(..end);
    Ok((stream, read))
}

fn text(method: &str, path: &str, body: &[u8]) -> Result<String, Failed> {
    let (mut stream, mut read) = ask(method, path, body.len(), Some(body))?;
    stream.read_to_end(&mut read)?;
    Ok(String::from_utf8(read)?)
}

fn down(count: usize) -> Result<(), Failed> {
    let (mut stream, rest) = ask("GET", &format!("down/{count}"), 0, None)?;
    let (mut had, mut into) = (rest.len(), vec![0; BLOCK]);
    while had < count {
        match stream.read(&mut into)? {
            0 => return Err(format!("{} bytes are missing", count - had).into()),
            more => had += more,
        }
    }
    Ok(())
}

fn once(what: &str, count: usize) -> Result<(), Failed> {
    match what {
        "down" => down(count),
        "up" => ask("POST", "up", count, None).map(drop),
        _ => text("GET", "small", b"").map(drop),
    }
}

fn main() -> Result<(), Failed> {
    loop {
        let order = text("GET", "next", b"")?;
        let words: Vec<&str> = order.split_whitespace().collect();
        let [what, times, count] = words[..] else { return Err(format!("no order: {order}").into()) };
        if what == "end" {
            return Ok(());
        }
        let mut took = String::new();
        for _ in 0..times.parse()? {
            let since = Instant::now();
            once(what, count.parse()?)?;
            write!(took, "{} ", since.elapsed().as_secs_f64())?;
        }
        text("POST", "took", took.as_bytes())?;
    }
}
