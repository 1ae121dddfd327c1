//! The guest program's first half: it reports, and takes its config.

use dayfly_guest_config::{CONFIG_BYTES_MAX, GuestConfig, Report, Stay};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;
use tokio::io::{
    AsyncBufRead, AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader,
};
use tokio::time::{sleep, timeout};

/// A report that nobody takes is dropped, or a guest without a host would stand still.
const REPORT_LIMIT: Duration = Duration::from_millis(10);

/// How long a guest waits for the word to stay.
const STAY_WORD_LIMIT: Duration = Duration::from_secs(10);

/// Before a channel without a host is looked at again.
const GLANCE: Duration = Duration::from_millis(100);

/// Reports to the host, if it listens.
pub async fn report(channel: &mut (impl AsyncWrite + Unpin), report: &Report) {
    let line = format!("{report}\n");
    let _ = timeout(REPORT_LIMIT, channel.write_all(line.as_bytes())).await;
}

/// One line from the host, with its end. `None`: the host went away before that, and what it had written is no config.
///
/// # Errors
/// The channel's.
pub async fn config_line(channel: &mut (impl AsyncBufRead + Unpin)) -> std::io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    channel.take(CONFIG_BYTES_MAX as u64).read_until(b'\n', &mut line).await?;
    Ok(line.ends_with(b"\n").then_some(line))
}

/// Waits for a host, and for its config: the line as it came. `None`: the channel broke.
pub async fn wait_for_config(channel: &mut (impl AsyncRead + Unpin)) -> Option<Vec<u8>> {
    loop {
        if let Some(line) = config_line(&mut BufReader::new(&mut *channel)).await.ok()? {
            return Some(line);
        }
        sleep(GLANCE).await;
    }
}

/// Reports that it is up, takes its config, and reports that its runner has been started. `None`: there was none.
pub async fn boot(channel: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> Option<GuestConfig> {
    report(channel, &Report::Ready).await;
    let config = GuestConfig::from_line(&wait_for_config(channel).await?).ok()?;
    for told in [Report::Applied, Report::RunnerStarted] {
        report(channel, &told).await;
    }
    Some(config)
}

/// What a guest does whose runner has ended and that may stay: it waits for its host's word, and then for so long.
pub async fn stay(channel: &mut (impl AsyncRead + Unpin)) {
    let word = async {
        let mut lines = BufReader::new(channel);
        loop {
            match config_line(&mut lines).await {
                Ok(Some(line)) => {
                    if let Some(stay) = Stay::parse(line.trim_ascii_end()) {
                        return stay;
                    }
                }
                Ok(None) => sleep(GLANCE).await,
                Err(_) => std::future::pending().await,
            }
        }
    };
    if let Ok(stay) = timeout(STAY_WORD_LIMIT, word).await {
        sleep(Duration::from_secs(stay.seconds)).await;
    }
}

/// Where a guest that is no VM finds its door: SLIRP would map its address to the loopback. `None`: behind its wire.
#[must_use]
pub fn door(config: &GuestConfig) -> Option<SocketAddr> {
    let port = config.door.rsplit(':').next()?.parse().ok()?;
    Some(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
}

/// The guest token that the runner's config.toml holds, as dayfly writes it: to read all of it would cost a simulated
/// guest more than its boot.
#[must_use]
pub fn guest_token(config: &GuestConfig) -> Option<String> {
    let token = |line: &str| Some(line.trim().strip_prefix("token = \"")?.strip_suffix('"')?.to_owned());
    config.runner.config_toml.lines().find_map(token)
}
