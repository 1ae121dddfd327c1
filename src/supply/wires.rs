//! The two wires of a VM, its channel and its console: opened again and again for as long as it is watched.

use super::Supply;
use super::machine::{Binding, MachineEvent};
use crate::vm::console::Ring;
use crate::vm::{Stream, VmId};
use dayfly_guest_config::{ClockQuestion, REPORT_LINE_MAX, Report, Stay};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// Reports of a guest that are passed on in one second; more are dropped.
const REPORTS_PER_SECOND: u32 = 20;

/// Pause before the channel or the console is opened again.
const REOPEN_PAUSE: Duration = Duration::from_millis(500);

/// One VM, as its wires know it.
#[derive(Clone)]
pub(super) struct Wires {
    pub(super) supply: Supply,
    pub(super) id: VmId,
    pub(super) events: mpsc::Sender<MachineEvent>,
    /// Who the guest is, once it is bound.
    pub(super) binding: watch::Receiver<Option<Binding>>,
    /// Until when it is to stay without its job, once that is wanted.
    pub(super) stay: watch::Receiver<Option<Instant>>,
    /// The guest has shown its pass: it has its config.
    pub(super) greeted: Arc<AtomicBool>,
    pub(super) console: Arc<Mutex<Ring>>,
}

impl Wires {
    /// Writes the config until the guest has been seen, passes its reports on and tells it the time when it asks.
    /// `ended` hears of each end of the channel. For ever.
    pub(super) async fn serve_channel(self, ended: mpsc::Sender<()>) {
        loop {
            let opened = self.supply.host().sockets.channel(&self.supply.setup().socket_dir, &self.id).await;
            if let Ok(stream) = opened {
                let (reader, mut writer) = tokio::io::split(stream);
                // One at a time: a guest that asks and does not read waits for itself.
                let (questions_out, mut questions) = mpsc::channel::<ClockQuestion>(1);
                let write = async {
                    let (mut binding, mut stay) = (self.binding.clone(), self.stay.clone());
                    let (mut written, mut stays) = (false, false);
                    loop {
                        tokio::select! {
                            biased;
                            // Both are cancel safe.
                            Some(line) = bound(&mut binding), if !written => {
                                written = true;
                                if !self.greeted.load(Ordering::Relaxed) {
                                    // An error shows at the reading half too.
                                    let _ = writer.write_all(&line).await;
                                    let _ = writer.flush().await;
                                }
                            }
                            Some(until) = stays_until(&mut stay), if !stays => {
                                stays = true;
                                // A guest that is still spared a second is told so: none would be no word.
                                let left = until.saturating_duration_since(Instant::now()).as_secs().max(1);
                                let _ = writer.write_all(format!("{}\n", Stay::of(left)).as_bytes()).await;
                                let _ = writer.flush().await;
                            }
                            Some(question) = questions.recv() => {
                                let answer = question.answer(self.supply.0.clock.now().as_microsecond());
                                let _ = writer.write_all(format!("{answer}\n").as_bytes()).await;
                                let _ = writer.flush().await;
                            }
                            else => std::future::pending().await,
                        }
                    }
                };
                tokio::select! {
                    biased;
                    // Reading ends with the stream; writing never ends by itself.
                    () = read_reports(reader, &self.events, &questions_out) => {}
                    () = write => {}
                }
            }
            // A full queue holds the same news already.
            let _ = ended.try_send(());
            tokio::time::sleep(REOPEN_PAUSE).await;
        }
    }

    /// Drains the console: an unread one stalls the guest. For ever.
    pub(super) async fn serve_console(self) {
        loop {
            let opened = self.supply.host().sockets.console(&self.supply.setup().socket_dir, &self.id).await;
            if let Ok(mut stream) = opened {
                let mut buffer = [0; 4096];
                while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                    self.console.lock().unwrap_or_else(PoisonError::into_inner).push(&buffer[..read]);
                }
            }
            tokio::time::sleep(REOPEN_PAUSE).await;
        }
    }
}

/// Until when the guest is to stay, once that is wanted; `None`: nobody will.
pub(super) async fn stays_until(stay: &mut watch::Receiver<Option<Instant>>) -> Option<Instant> {
    *stay.wait_for(Option::is_some).await.ok()?
}

/// The guest config, once there is one; `None`: nobody will bind the guest any more.
async fn bound(binding: &mut watch::Receiver<Option<Binding>>) -> Option<Vec<u8>> {
    binding.wait_for(Option::is_some).await.ok()?.as_ref().map(|bound| bound.config.clone())
}

/// Reads report lines until the stream ends. Long or too many lines are dropped: the guest is hostile.
async fn read_reports(
    reader: tokio::io::ReadHalf<Box<dyn Stream>>,
    events: &mpsc::Sender<MachineEvent>,
    questions: &mpsc::Sender<ClockQuestion>,
) {
    let mut reader = BufReader::with_capacity(REPORT_LINE_MAX + 1, reader);
    let mut line = Vec::new();
    let (mut window, mut count) = (Instant::now(), 0);
    loop {
        let piece = match reader.fill_buf().await {
            Ok([]) | Err(_) => return,
            Ok(piece) => piece,
        };
        let (taken, ended) = match piece.iter().position(|b| *b == b'\n') {
            Some(end) => (end + 1, true),
            None => (piece.len(), false),
        };
        if line.len() <= REPORT_LINE_MAX {
            line.extend_from_slice(&piece[..taken]);
        }
        reader.consume(taken);
        if !ended {
            continue;
        }
        if window.elapsed() >= Duration::from_secs(1) {
            (window, count) = (Instant::now(), 0);
        }
        count += 1;
        let bounded = count <= REPORTS_PER_SECOND && line.len() <= REPORT_LINE_MAX;
        let text = std::str::from_utf8(&line).ok().filter(|_| bounded).map(str::trim_end);
        if let Some(report) = text.and_then(Report::parse) {
            // Only a hint: dropped if the job is busy.
            let _ = events.try_send(MachineEvent::Report(report));
        } else if let Some(question) = text.and_then(ClockQuestion::parse) {
            let _ = questions.try_send(question);
        }
        line.clear();
    }
}
