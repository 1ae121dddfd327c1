//! One guest whose client moves bytes over its relay: by the wire of now, or by TCP through SLIRP, as before it.

use super::service::{Orders, Service};
use crate::bare::greet;
use crate::byhand::{ByHand, Told};
use dayfly::network::Lease;
use dayfly::rng::Rng;
use dayfly::vm::{Host, Stream, VmSpec};
use dayfly_guest_config::Pass;
use dayfly_wire::{Limits, host_handshake};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::sleep;

/// Between two tries to reach a machine's wire.
const GLANCE: Duration = Duration::from_millis(20);

/// By what a guest reaches its door.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Wire,
    Tcp,
}

/// Such a guest, and who serves its door.
pub(super) struct Measured {
    machine: ByHand,
    pub(super) orders: Orders,
    _door: JoinSet<()>,
}

impl Measured {
    pub(super) async fn start(
        side: Side,
        host: &Host,
        like: &VmSpec,
        told: &Told,
        (service, orders): (Service, Orders),
    ) -> Result<Self, String> {
        let rng = Rng::system();
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.map_err(|error| format!("listen: {error}"))?;
        let port = listener.local_addr().map_err(|error| format!("listen: {error}"))?.port();
        let lease = match side {
            Side::Wire => Lease::Wire,
            Side::Tcp => Lease::User { port },
        };
        let mut pass = None;
        let machine = ByHand::start(host, like, |spec, rng| {
            let config = told.config(spec, &lease, rng);
            pass = Pass::from_text(&config.pass);
            config
        })
        .await?;
        let pass = pass.ok_or("a config without a pass")?;
        let mut door = JoinSet::new();
        match side {
            Side::Wire => door.spawn(wire(host.clone(), machine.spec().clone(), pass, service, rng)),
            Side::Tcp => door.spawn(tcp(listener, pass, service, rng)),
        };
        Ok(Self { machine, orders, _door: door })
    }

    /// Processor seconds of its QEMU so far.
    pub(super) fn cpu_seconds(&self) -> Result<f64, String> {
        let id = &self.machine.spec().id;
        let pid = crate::process::of_machine(&id.to_string())?.ok_or("a measured machine has ended")?;
        crate::process::cpu_seconds(pid)
    }

    pub(super) async fn end(self) -> Result<(), String> {
        self.machine.end().await
    }
}

async fn tcp(listener: TcpListener, pass: Pass, service: Service, rng: Rng) {
    let mut tasks = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        while tasks.try_join_next().is_some() {}
        let (pass, service, rng) = (pass.clone(), service.clone(), rng.clone());
        // One that breaks off is the client's matter, which then says so.
        tasks.spawn(async move {
            if let Ok(Some(stream)) = greet(stream, &pass, &rng).await {
                let _ = service.serve(stream).await;
            }
        });
    }
}

async fn wire(host: Host, spec: VmSpec, pass: Pass, service: Service, rng: Rng) {
    let mut tasks = JoinSet::new();
    loop {
        let Ok(mut session) = session(&host, &spec, &pass, &rng).await else {
            sleep(GLANCE).await;
            continue;
        };
        while let Some(Ok(stream)) = session.accept().await {
            while tasks.try_join_next().is_some() {}
            let service = service.clone();
            tasks.spawn(async move {
                let _ = service.serve(stream).await;
            });
        }
    }
}

async fn session(
    host: &Host,
    spec: &VmSpec,
    pass: &Pass,
    rng: &Rng,
) -> Result<dayfly_wire::HostSession<Box<dyn Stream>>, String> {
    let pipe = host.sockets.door(&spec.socket_dir, &spec.id).await.map_err(|error| error.to_string())?;
    let proven = host_handshake(pipe, pass, rng.bytes()).await.map_err(|error| error.to_string())?;
    proven.serve(&Limits::default()).await.map_err(|error| error.to_string())
}
