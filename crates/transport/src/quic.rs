//! QUIC's settings, derived from ours.
//!
//! What one connection may hold, in bytes:
//!
//! ```text
//!   receive_window = (data streams + control streams + greeting) x one stream's window
//! ```
//!
//! QUIC bounds a connection's unread bytes over all of its streams. With every stream at its own bound, unread
//! page data still leaves the control stream its whole share. The sender's buffer is twice that, since bytes
//! stay in it until they are acknowledged, somewhat after the receiver has made room for more.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use quinn::{EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use romulus_config::Network;
use socket2::{Domain, Protocol, Socket, Type};

use crate::error::TransportError;
use crate::tls::Service;

/// UDP payload that every path carries (RFC 9000, section 14).
const MTU_MIN: u16 = 1200;
/// The first congestion window: one epoch's pages should not have to wait for slow start.
const INITIAL_WINDOW_BYTES: u64 = 1 << 20;

fn data_streams(network: &Network, service: Service) -> u32 {
    match service {
        Service::Pair => network.data_streams_max.into(),
        Service::Witness => 0,
    }
}

fn stream_window(network: &Network, service: Service) -> u64 {
    let streams = data_streams(network, service) + service.control_streams_max() + 1;
    network.receive_window.bytes() / u64::from(streams)
}

fn varint(value: u64) -> VarInt {
    VarInt::from_u64(value).expect("checked settings are below 2^62")
}

fn idle(timeout: Duration) -> IdleTimeout {
    timeout.try_into().expect("checked timeouts are at most a minute")
}

/// # Panics
/// When `network` was not checked.
pub(crate) fn transport_config(network: &Network, service: Service) -> TransportConfig {
    let window = network.receive_window.bytes();
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(network.mtu);
    let mut congestion = quinn::congestion::CubicConfig::default();
    congestion.initial_window(INITIAL_WINDOW_BYTES);
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(service.control_streams_max().into())
        .max_concurrent_uni_streams((data_streams(network, service) + 1).into())
        .stream_receive_window(varint(stream_window(network, service)))
        .receive_window(varint(window))
        .send_window(2 * window)
        .max_idle_timeout(Some(idle(network.idle_timeout)))
        .keep_alive_interval(Some(network.keep_alive))
        .initial_rtt(network.initial_rtt)
        .initial_mtu(MTU_MIN)
        .mtu_discovery_config((network.mtu > MTU_MIN).then_some(discovery))
        .congestion_controller_factory(Arc::new(congestion))
        .datagram_receive_buffer_size(None)
        .allow_spin(false);
    config
}

/// # Panics
/// When `network` was not checked.
pub(crate) fn endpoint_config(network: &Network) -> EndpointConfig {
    let mut config = EndpointConfig::default();
    let largest = network.mtu.max(1472);
    config
        .max_udp_payload_size(largest)
        .expect("checked settings are at most 6500");
    config
}

/// Opens a UDP socket. `None` is any free port, of both families where the kernel has IPv6.
pub(crate) fn socket(
    local: Option<SocketAddr>,
    network: &Network,
) -> Result<std::net::UdpSocket, TransportError> {
    match local {
        Some(address) => bind(address, network),
        None => {
            let both = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
            bind(both, network).or_else(|_| bind((Ipv4Addr::UNSPECIFIED, 0).into(), network))
        }
    }
}

fn bind(address: SocketAddr, network: &Network) -> Result<std::net::UdpSocket, TransportError> {
    let failed = |source| TransportError::Bind {
        address,
        source: Arc::new(source),
    };
    let socket =
        Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP)).map_err(failed)?;
    if address.is_ipv6() {
        socket.set_only_v6(false).map_err(failed)?;
    }
    grow_buffers(&socket, network.socket_buffer.as_len());
    socket.bind(&address.into()).map_err(failed)?;
    Ok(socket.into())
}

/// Asks for larger buffers; root may exceed net.core.rmem_max and wmem_max. Small ones cost throughput, not more.
fn grow_buffers(socket: &Socket, bytes: usize) {
    use rustix::net::sockopt;
    if sockopt::set_socket_recv_buffer_size_force(socket, bytes).is_err() {
        let _ = socket.set_recv_buffer_size(bytes);
    }
    if sockopt::set_socket_send_buffer_size_force(socket, bytes).is_err() {
        let _ = socket.set_send_buffer_size(bytes);
    }
}
