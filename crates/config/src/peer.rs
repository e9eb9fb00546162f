//! The address of another daemon, and the name that its certificate must carry.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest host part of an address in bytes (a DNS name's limit).
const HOST_BYTES_MAX: usize = 253;

/// Where a peer listens: `HOST:PORT`, `[IPv6]:PORT` or `NAME@HOST:PORT`.
///
/// The peer's certificate must carry HOST (a DNS name or an IP address), or NAME when one is given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PeerAddress {
    host: String,
    port: u16,
    name: Option<String>,
}

/// Why a text is not a [`PeerAddress`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerAddressError {
    /// No port, or one that is not a number from 1 to 65535.
    #[error("{0:?} has no port: write HOST:PORT, such as \"backup.example:7700\" or \"[2001:db8::1]:7700\"")]
    Port(String),
    /// The host or the name is empty, too long or holds a character that neither names nor addresses have.
    #[error("{0:?} names no host: write HOST:PORT or NAME@HOST:PORT")]
    Host(String),
}

impl PeerAddress {
    /// The host to connect to: a DNS name or an IP address without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The UDP port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The name that the peer's certificate must carry.
    pub fn certificate_name(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.host)
    }
}

fn is_host(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    !text.is_empty() && text.len() <= HOST_BYTES_MAX && text.bytes().all(plain)
}

impl FromStr for PeerAddress {
    type Err = PeerAddressError;
    fn from_str(text: &str) -> Result<Self, PeerAddressError> {
        let no_host = || PeerAddressError::Host(text.to_owned());
        let (name, rest) = match text.split_once('@') {
            Some((name, rest)) if is_host(name) => (Some(name.to_owned()), rest),
            Some(_) => return Err(no_host()),
            None => (None, text),
        };
        let (host, port) = rest
            .rsplit_once(':')
            .ok_or_else(|| PeerAddressError::Port(text.to_owned()))?;
        let port = port.parse().ok().filter(|port| *port != 0);
        let port: u16 = port.ok_or_else(|| PeerAddressError::Port(text.to_owned()))?;
        let host = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
            Some(inner) => inner
                .parse::<std::net::Ipv6Addr>()
                .map_err(|_| no_host())?
                .to_string(),
            None if is_host(host) => host.to_owned(),
            None => return Err(no_host()),
        };
        Ok(Self { host, port, name })
    }
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(name) = &self.name {
            write!(f, "{name}@")?;
        }
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl TryFrom<String> for PeerAddress {
    type Error = PeerAddressError;
    fn try_from(text: String) -> Result<Self, PeerAddressError> {
        text.parse()
    }
}

impl From<PeerAddress> for String {
    fn from(peer: PeerAddress) -> Self {
        peer.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_reads_back_as_it_is_written() {
        for good in [
            "10.0.0.1:7700",
            "b.example:1",
            "[2001:db8::1]:7700",
            "web-1@10.0.0.1:7700",
            "a@[::1]:1",
        ] {
            assert_eq!(good.parse::<PeerAddress>().unwrap().to_string(), good);
        }
    }

    #[test]
    fn the_certificate_must_carry_the_host_unless_a_name_is_given() {
        let plain: PeerAddress = "10.0.0.1:7700".parse().unwrap();
        assert_eq!(plain.certificate_name(), "10.0.0.1");
        let named: PeerAddress = "backup@10.0.0.1:7700".parse().unwrap();
        assert_eq!(
            (named.certificate_name(), named.host(), named.port()),
            ("backup", "10.0.0.1", 7700)
        );
    }

    #[test]
    fn an_address_without_host_or_port_is_refused() {
        for bad in [
            "", ":1", "a", "a:", "a:0", "a:65536", "::1:7700", "[::1]", "[x]:1", "@a:1", "a b:1", "a@:1",
        ] {
            assert!(bad.parse::<PeerAddress>().is_err(), "{bad:?} was accepted");
        }
    }
}
