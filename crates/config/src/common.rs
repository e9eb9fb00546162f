//! Sections that more than one daemon has: suspicion, the network, logs and metrics.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::check::{Checks, Invalid};
use crate::quantity::{ByteSize, duration};

/// `[failover]`: when a silent peer counts as lost. Both hosts of a pair should use the same values.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Failover {
    /// Silence after which the peer is suspected. Default 150 ms.
    #[serde(with = "duration")]
    pub suspicion_timeout: Duration,
    /// A primary says at least so often that it lives; at most a third of `suspicion_timeout`. A checkpoint that the backup has
    /// committed says it, too, so that with shorter epochs there are heartbeats only while commits take long. Default 30 ms.
    #[serde(with = "duration")]
    pub heartbeat_interval: Duration,
    /// A primary that may not speak for this long suspends its guest until the witness's record is known.
    /// Default 60 s.
    #[serde(with = "duration")]
    pub mute_limit: Duration,
}

impl Default for Failover {
    fn default() -> Self {
        Self {
            suspicion_timeout: Duration::from_millis(150),
            heartbeat_interval: Duration::from_millis(30),
            mute_limit: Duration::from_secs(60),
        }
    }
}

impl Failover {
    pub(crate) fn check(&self) -> Result<(), Invalid> {
        let suspicion = self.suspicion_timeout;
        Checks::new("failover")
            .duration(
                "suspicion_timeout",
                suspicion,
                Duration::from_millis(20),
                Duration::from_secs(60),
            )?
            .duration(
                "heartbeat_interval",
                self.heartbeat_interval,
                Duration::from_millis(1),
                suspicion / 3,
            )?
            .duration(
                "mute_limit",
                self.mute_limit,
                suspicion,
                Duration::from_secs(24 * 3600),
            )?;
        Ok(())
    }
}

/// `[network]`: QUIC between the daemons.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    /// Largest UDP payload in bytes that path MTU discovery tries. Default 1452, which fits Ethernet; up to
    /// 6500 for jumbo frames. More is refused, as batches of larger ones do not fit one segmentation offload.
    pub mtu: u16,
    /// Most bytes that one connection may hold here unread; a peer cannot make it more. Default 16 MiB.
    pub receive_window: ByteSize,
    /// Most page streams that a peer may have open in one connection. Default 2.
    pub data_streams_max: u16,
    /// Most connections that a server holds; `receive_window` times this bounds their memory. Default 64.
    pub connections_max: u16,
    /// Most of them for one host, by its certificate: twice its VMs, as a lost connection keeps its place
    /// for `idle_timeout`. Default 32.
    pub connections_per_host_max: u16,
    /// Most handshakes that a server has under way. Default 32.
    pub handshakes_max: u16,
    /// Time that a handshake may take. Default 3 s.
    #[serde(with = "duration")]
    pub handshake_timeout: Duration,
    /// Silence after which QUIC gives a connection up (suspicion comes long before). Default 3 s.
    #[serde(with = "duration")]
    pub idle_timeout: Duration,
    /// Time between QUIC's own probes on an otherwise quiet connection. Default 1 s.
    #[serde(with = "duration")]
    pub keep_alive: Duration,
    /// Round trip assumed before the first is measured. Default 5 ms.
    #[serde(with = "duration")]
    pub initial_rtt: Duration,
    /// Bytes asked of the kernel for each of a socket's two buffers. Default 4 MiB.
    pub socket_buffer: ByteSize,
}

impl Default for Network {
    fn default() -> Self {
        Self {
            mtu: 1452,
            receive_window: ByteSize::from_mib(16),
            data_streams_max: 2,
            connections_max: 64,
            connections_per_host_max: 32,
            handshakes_max: 32,
            handshake_timeout: Duration::from_secs(3),
            idle_timeout: Duration::from_secs(3),
            keep_alive: Duration::from_secs(1),
            initial_rtt: Duration::from_millis(5),
            socket_buffer: ByteSize::from_mib(4),
        }
    }
}

impl Network {
    /// Checks this section on its own.
    ///
    /// # Errors
    /// [`Invalid`] names the first key that is out of its range.
    pub fn check(&self) -> Result<(), Invalid> {
        let (ms, s) = (Duration::from_millis, Duration::from_secs);
        Checks::new("network")
            .number("mtu", self.mtu.into(), 1200, 6500)?
            .size(
                "receive_window",
                self.receive_window,
                ByteSize::from_mib(1),
                ByteSize::from_gib(1),
            )?
            .number("data_streams_max", self.data_streams_max.into(), 1, 16)?
            .number("connections_max", self.connections_max.into(), 1, 4096)?
            .number(
                "connections_per_host_max",
                self.connections_per_host_max.into(),
                1,
                4096,
            )?
            .number("handshakes_max", self.handshakes_max.into(), 1, 4096)?
            .duration("handshake_timeout", self.handshake_timeout, ms(100), s(60))?
            .duration("idle_timeout", self.idle_timeout, ms(500), s(60))?
            .duration("keep_alive", self.keep_alive, ms(10), self.idle_timeout / 2)?
            .duration("initial_rtt", self.initial_rtt, ms(1), s(1))?
            .size(
                "socket_buffer",
                self.socket_buffer,
                ByteSize::from_bytes(64 << 10),
                ByteSize::from_gib(1),
            )?;
        Ok(())
    }
}

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One line of text for people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl std::str::FromStr for LogFormat {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(format!("{other:?} is no log format: write text or json")),
        }
    }
}

/// `[log]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// What is logged: a level, or tracing's filter such as `info,romulus_transport=debug`. Default `info`.
    pub level: String,
    /// Text for people or JSON. Default text.
    pub format: LogFormat,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: "info".into(),
            format: LogFormat::Text,
        }
    }
}

impl Log {
    pub(crate) fn check(&self) -> Result<(), Invalid> {
        let plain = |b: u8| b.is_ascii_graphic();
        if self.level.is_empty() || self.level.len() > 1024 || !self.level.bytes().all(plain) {
            return Err(Invalid::new(
                "log.level",
                "write a level (error, warn, info, debug, trace) or a filter",
            ));
        }
        Ok(())
    }
}

/// `[metrics]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Metrics {
    /// Where `/metrics`, `/healthz` and `/readyz` are served, besides the admin socket. Default [`Metrics::listen`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<MetricsListen>,
    /// A work loop that has not turned for longer makes `/healthz` say so. Default 60 s.
    #[serde(with = "duration")]
    pub stall_limit: Duration,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            listen: None,
            stall_limit: Duration::from_secs(60),
        }
    }
}

impl Metrics {
    /// The TCP address, by default this port of the loopback address.
    pub fn listen(&self, default_port: u16) -> Option<SocketAddr> {
        match self.listen {
            None => Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), default_port)),
            Some(MetricsListen::Nowhere) => None,
            Some(MetricsListen::At(address)) => Some(address),
        }
    }

    pub(crate) fn check(&self) -> Result<(), Invalid> {
        let (s, limit) = (Duration::from_secs, self.stall_limit);
        Checks::new("metrics")
            .duration("stall_limit", limit, s(2), s(3600))
            .map(drop)
    }
}

/// A TCP address, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum MetricsListen {
    /// Metrics are on the admin socket alone.
    Nowhere,
    /// They are here as well.
    At(SocketAddr),
}

impl std::str::FromStr for MetricsListen {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::Nowhere),
            _ => text.parse().map(Self::At).map_err(|_| {
                format!(
                    "{text:?} is no TCP address: write ADDRESS:PORT, such as \"127.0.0.1:7702\", or \"none\""
                )
            }),
        }
    }
}

impl TryFrom<String> for MetricsListen {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<MetricsListen> for String {
    fn from(listen: MetricsListen) -> Self {
        match listen {
            MetricsListen::Nowhere => "none".to_owned(),
            MetricsListen::At(address) => address.to_string(),
        }
    }
}
