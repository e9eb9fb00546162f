//! What the daemons' settings have in common by value: places, ports, names.

use std::net::{IpAddr, Ipv4Addr};

use crate::check::{Checks, Invalid};
use crate::peer::PeerAddress;

/// Where certificates are looked for unless a setting says otherwise.
pub const PKI_DIR: &str = "/etc/romulus/pki";
/// Where admin sockets are made unless a setting says otherwise.
pub const RUN_DIR: &str = "/run/romulus";

/// TCP port of the replicator's metrics unless a setting says otherwise; further replicators of a host take the next free ones.
pub const REPLICATOR_METRICS_PORT: u16 = 7702;
/// TCP port of the agent's metrics unless a setting says otherwise.
pub const AGENT_METRICS_PORT: u16 = 7700;
/// TCP port of the witness's metrics unless a setting says otherwise.
pub const WITNESS_METRICS_PORT: u16 = 7701;
/// Every address of the host.
pub(crate) const ANY: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

pub(crate) fn check_witness(witness: &[PeerAddress]) -> Result<(), Invalid> {
    Checks::new("")
        .number("witness", witness.len() as u64, 0, 8)
        .map(drop)
}

/// An interface name as Linux allows it.
pub(crate) fn check_interface(key: &str, name: &str) -> Result<(), Invalid> {
    let plain = |b: u8| b.is_ascii_graphic() && b != b'/' && b != b':';
    if name.is_empty() || name.len() > 15 || !name.bytes().all(plain) {
        return Err(Invalid::new(
            key,
            format!("{name:?} is not the name of a network interface"),
        ));
    }
    Ok(())
}
