//! Gives the machine the identity of the guest config: seed and clock first, names, network, and
//! the runner's files last, in the order of `vm-images/README.md`.
//!
//! What only the kernel can do is in [`identity`] and [`network`]; what is files is in [`files`],
//! below a root that tests choose. Applying the same config twice changes nothing more.

use crate::host_clock::HostClock;
use crate::machine;
use crate::netlink::{Netlink, NetlinkError};
use crate::users::{User, UserError};
use dayfly_guest_config::{CA_FILE, CONFIG_FILE, GuestConfig, GuestNetwork, RELAY_ADDRESS};
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

/// The only network card, where `net.ifnames=0` keeps its name; elsewhere udev gives it another.
const DEVICE: &str = "eth0";

/// Where the kernel shows its network devices.
const DEVICES: &str = "/sys/class/net";

/// The card's driver is loaded by the initrd, so it is there long before us.
const DEVICE_DEADLINE: Duration = Duration::from_secs(5);

/// Where the kernel shows the id of this boot; the same in all clones of a snapshot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Why the config could not be applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// A member of the config is not what it should be.
    #[error("guest config: `{0}` is no {1}")]
    Member(&'static str, &'static str),
    /// A file could not be written, or is not what was written.
    #[error("write {0}")]
    File(PathBuf, #[source] io::Error),
    /// The runner would ignore a missing CA file without a word (17.5 does).
    #[error("config.toml names {CA_FILE}, but the guest config has no CA chain")]
    CaMissing,
    /// A system call failed.
    #[error("{0}")]
    System(&'static str, #[source] io::Error),
    /// No network card.
    #[error("no network card within {} s", DEVICE_DEADLINE.as_secs())]
    NoDevice,
    /// Address, MAC or route.
    #[error("set up the network")]
    Network(#[from] NetlinkError),
    /// The runner's user.
    #[error("find the runner's user")]
    User(#[from] UserError),
}

/// Mixes the seed in, uncredited: a machine that has booted has virtio-rng for that.
///
/// # Errors
/// [`ApplyError`].
pub fn seed(config: &GuestConfig) -> Result<(), ApplyError> {
    write_at("/dev/urandom", &seed_of(config)?)
}

/// Makes the kernel's random numbers this machine's own, from the next one on. Those of a machine that was restored would
/// be its brothers', too, up to a minute, for so long does the kernel keep a key; and no virtio-rng is asked before that.
///
/// # Errors
/// [`ApplyError`]: a machine that cannot do this must not go on.
pub fn seed_anew(config: &GuestConfig) -> Result<(), ApplyError> {
    let seed = seed_of(config)?;
    let bits = u32::try_from(seed.len() * 8).map_err(|_| ApplyError::Member("seed", "seed of some bytes"))?;
    let failed = |what| move |error| ApplyError::System(what, io::Error::other(error));
    linux_crng_ioctl::ioctl::add_randomness_to_kernel(&seed, bits).map_err(failed("add the seed"))?;
    linux_crng_ioctl::ioctl::force_kernel_crng_reseed().map_err(failed("seed the kernel's random numbers anew"))
}

fn seed_of(config: &GuestConfig) -> Result<Vec<u8>, ApplyError> {
    from_hex(&config.seed).ok_or(ApplyError::Member("seed", "even number of hex digits"))
}

/// Clock, boot id and host name. `clock` is what the host has answered, if it has.
///
/// # Errors
/// [`ApplyError`].
pub fn identity(config: &GuestConfig, clock: Option<HostClock>) -> Result<(), ApplyError> {
    let set = match clock {
        Some(clock) => machine::set_clock(clock.at(machine::own_us())),
        None => machine::set_clock_at_least(config.clock_us),
    };
    set.map_err(|error| ApplyError::System("set the clock", error))?;

    fs::create_dir_all("/run/dayfly").map_err(|error| ApplyError::File("/run/dayfly".into(), error))?;
    let own = Path::new("/run/dayfly/boot_id");
    write(own, format!("{}\n", config.boot_id).as_bytes(), 0o444, None)?;
    rustix::mount::mount_bind(own, BOOT_ID).map_err(|error| ApplyError::System("mount boot_id", error.into()))?;

    rustix::system::sethostname(config.hostname.as_bytes())
        .map_err(|error| ApplyError::System("set the host name", error.into()))
}

/// Whether there is a network card.
#[must_use]
pub fn has_card() -> bool {
    card(Path::new(DEVICES)).is_some()
}

/// The network card's name: `eth0`, or else that of the only device with hardware behind it.
fn card(devices: &Path) -> Option<String> {
    let mut cards: Vec<String> = fs::read_dir(devices)
        .ok()?
        .flatten()
        .filter(|device| device.path().join("device").exists())
        .filter_map(|device| device.file_name().into_string().ok())
        .collect();
    cards.sort_by_key(|name| (name != DEVICE, name.clone()));
    cards.into_iter().next()
}

/// Loopback with the relay's address alone: what a machine needs that is nobody yet.
///
/// # Errors
/// [`ApplyError`].
pub fn loopback() -> Result<(), ApplyError> {
    up_to_the_relay(&mut Netlink::open()?).map(drop)
}

/// The index of loopback, which is up and has the relay's address.
fn up_to_the_relay(netlink: &mut Netlink) -> Result<u32, ApplyError> {
    let relay: SocketAddr = RELAY_ADDRESS.parse().expect("a constant");
    let lo = netlink.index("lo").ok_or(ApplyError::NoDevice)?;
    netlink.set_up(lo)?;
    netlink.add_address(lo, "127.0.0.1".parse().expect("a constant"), 8)?;
    netlink.add_address(lo, relay.ip(), 32)?;
    Ok(lo)
}

/// Loopback with the relay's address, then MAC, address and route of the card, or, in a machine without one, address and
/// route on loopback: what is sent out by it comes to [`crate::egress`].
///
/// # Errors
/// [`ApplyError`].
pub fn network(network: &GuestNetwork) -> Result<(), ApplyError> {
    let (address, prefix) = parse_address(&network.address).ok_or(ApplyError::Member("address", "address/prefix"))?;
    let mac = match &network.mac {
        Some(mac) => Some(parse_mac(mac).ok_or(ApplyError::Member("mac", "MAC"))?),
        None => None,
    };
    let mut netlink = Netlink::open()?;
    let lo = up_to_the_relay(&mut netlink)?;
    if network.relay {
        netlink.add_address(lo, address, prefix)?;
        netlink.set_default_device(lo, address)?;
        return Ok(());
    }

    let index = || netlink.index(&card(Path::new(DEVICES))?);
    let device = wait_for(DEVICE_DEADLINE, index).ok_or(ApplyError::NoDevice)?;
    if let Some(mac) = mac {
        netlink.set_mac(device, mac)?;
    }
    netlink.set_up(device)?;
    netlink.add_address(device, address, prefix)?;
    netlink.set_default_route(device, network.gateway)?;
    Ok(())
}

/// Host name, hosts and resolv.conf below `root`.
///
/// # Errors
/// [`ApplyError`].
pub fn names(root: &Path, config: &GuestConfig) -> Result<(), ApplyError> {
    let write_text = |path: &str, text: &str| write(&below(root, path), text.as_bytes(), 0o644, None);
    write_text("/etc/hostname", &format!("{}\n", config.hostname))?;
    write_text(
        "/etc/hosts",
        &format!("127.0.0.1 localhost\n127.0.1.1 {}\n::1 localhost ip6-localhost\n", config.hostname),
    )?;
    write_text("/etc/resolv.conf", &resolv_conf(&config.network.dns))
}

/// The runner's config.toml and CA file below `root`. They belong to `user`, and are read back.
///
/// # Errors
/// [`ApplyError`].
pub fn files(root: &Path, config: &GuestConfig, user: &User) -> Result<(), ApplyError> {
    let runner = &config.runner;
    let ca = match &runner.ca_pem {
        Some(pem) if pem.contains("-----BEGIN CERTIFICATE-----") => Some(pem),
        Some(_) => return Err(ApplyError::Member("ca_pem", "PEM certificate")),
        None if runner.config_toml.contains(CA_FILE) => return Err(ApplyError::CaMissing),
        None => None,
    };
    let config_file = below(root, CONFIG_FILE);
    if let Some(dir) = config_file.parent() {
        // The runner keeps a file of its own beside them, and warns if it can't.
        let made = fs::create_dir_all(dir).and_then(|()| chown(dir, Some(user.uid), Some(user.gid)));
        made.map_err(|error| ApplyError::File(dir.to_owned(), error))?;
    }
    write(&config_file, runner.config_toml.as_bytes(), 0o600, Some(user))?;
    if let Some(pem) = ca {
        write(&below(root, CA_FILE), pem.as_bytes(), 0o644, Some(user))?;
    }
    Ok(())
}

/// Puts a machine-id in force. In place: systemd may have mounted something over the file.
///
/// # Errors
/// [`ApplyError`].
pub fn machine_id(root: &Path, id: &str) -> Result<(), ApplyError> {
    if id.len() != 32 || from_hex(id).is_none() {
        return Err(ApplyError::Member("machine_id", "machine-id (32 hex digits)"));
    }
    write(&below(root, "/etc/machine-id"), format!("{id}\n").as_bytes(), 0o444, None)
}

fn resolv_conf(servers: &[IpAddr]) -> String {
    if servers.is_empty() {
        // Without a server libc asks 127.0.0.1, which refuses at once.
        return "# Name resolution is off in this network mode.\noptions timeout:1 attempts:1\n".to_owned();
    }
    servers.iter().map(|server| format!("nameserver {server}\n")).collect()
}

fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

/// Writes a file and reads it back: a full or read-only disk must not start a runner on half a config.
fn write(path: &Path, bytes: &[u8], mode: u32, owner: Option<&User>) -> Result<(), ApplyError> {
    let error = |error| ApplyError::File(path.to_owned(), error);
    let mut file =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(path).map_err(error)?;
    io::Write::write_all(&mut file, bytes).map_err(error)?;
    file.set_permissions(fs::Permissions::from_mode(mode)).map_err(error)?;
    if let Some(owner) = owner {
        chown(path, Some(owner.uid), Some(owner.gid)).map_err(error)?;
    }
    if fs::read(path).map_err(error)? == bytes {
        Ok(())
    } else {
        Err(error(io::Error::other("it does not hold what was written")))
    }
}

/// Writes to a device.
fn write_at(path: &str, bytes: &[u8]) -> Result<(), ApplyError> {
    let open = fs::OpenOptions::new().write(true).open(path);
    open.and_then(|mut file| io::Write::write_all(&mut file, bytes))
        .map_err(|error| ApplyError::File(path.into(), error))
}

fn parse_address(text: &str) -> Option<(IpAddr, u8)> {
    let (address, prefix) = text.split_once('/')?;
    let (address, prefix): (IpAddr, u8) = (address.parse().ok()?, prefix.parse().ok()?);
    (prefix <= if address.is_ipv4() { 32 } else { 128 }).then_some((address, prefix))
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Vec<u8> =
        text.split(':').map(|part| from_hex(part).filter(|b| b.len() == 1).map(|b| b[0])).collect::<Option<_>>()?;
    bytes.try_into().ok()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

/// Asks every 10 ms. There is nothing in this machine that could tell us (no udev).
#[expect(clippy::disallowed_methods, clippy::disallowed_types, reason = "no async runtime in the guest")]
pub fn wait_for<T>(deadline: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let start = std::time::Instant::now();
    loop {
        if let Some(answer) = ask() {
            return Some(answer);
        }
        if start.elapsed() > deadline {
            return None;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

#[cfg(test)]
mod tests;
