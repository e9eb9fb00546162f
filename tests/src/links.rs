//! Interfaces of the lab's hosts, made by netlink in the namespace of the calling thread: no program is needed for it.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};

use anyhow::{Context as _, Result};
use net_buffer::netlink::Netlink;
use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage as Route;
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    BridgeStpState, InfoBridge, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};
use rustix::net::{AddressFamily, SocketType, netdevice, socket};

/// One namespace's interfaces.
#[derive(Debug)]
pub struct Links {
    netlink: Netlink,
    /// Any socket: through it the kernel tells an interface's number.
    any: OwnedFd,
}

impl Links {
    /// Those of the calling thread's namespace.
    ///
    /// # Errors
    /// Without netlink sockets.
    pub fn open() -> Result<Links> {
        Ok(Links {
            netlink: Netlink::open().context("cannot open a netlink socket")?,
            any: socket(AddressFamily::INET, SocketType::DGRAM, None).context("cannot open a socket")?,
        })
    }

    /// The number of an interface.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn index(&self, name: &str) -> Result<u32> {
        netdevice::name_to_index(&self.any, name).with_context(|| format!("there is no interface {name}"))
    }

    /// Makes a bridge that forwards at once and hides nothing.
    ///
    /// # Errors
    /// When there is one of this name, or without the right.
    pub fn add_bridge(&mut self, name: &str) -> Result<()> {
        let data = InfoData::Bridge(vec![
            InfoBridge::ForwardDelay(0),
            InfoBridge::StpState(BridgeStpState::Disabled),
            InfoBridge::MulticastSnooping(false),
        ]);
        self.add(name, InfoKind::Bridge, data)
    }

    /// Makes a cable from `name` here to `peer` in another namespace.
    ///
    /// # Errors
    /// When there is one of this name, or without the right.
    pub fn add_cable(&mut self, name: &str, peer: &str, peer_namespace: &File) -> Result<()> {
        let mut end = LinkMessage::default();
        end.attributes = vec![
            LinkAttribute::IfName(peer.to_owned()),
            LinkAttribute::NetNsFd(peer_namespace.as_raw_fd()),
        ];
        self.add(name, InfoKind::Veth, InfoData::Veth(InfoVeth::Peer(end)))
    }

    /// Makes `port` a port of `bridge`.
    ///
    /// # Errors
    /// When there is no such interface, or without the right.
    pub fn join(&mut self, port: &str, bridge: &str) -> Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = self.index(port)?;
        message.attributes = vec![LinkAttribute::Controller(self.index(bridge)?)];
        self.netlink
            .change(Route::SetLink(message), 0)
            .with_context(|| format!("cannot put {port} on {bridge}"))
    }

    /// Switches an interface on or off.
    ///
    /// # Errors
    /// When there is no such interface, or without the right.
    pub fn switch(&mut self, name: &str, on: bool) -> Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = self.index(name)?;
        message.header.change_mask = LinkFlags::Up;
        if on {
            message.header.flags = LinkFlags::Up;
        }
        self.netlink
            .change(Route::SetLink(message), 0)
            .with_context(|| format!("cannot switch {name} {}", if on { "on" } else { "off" }))
    }

    /// Gives an interface an address that can be used at once.
    ///
    /// # Errors
    /// When there is no such interface, or without the right.
    pub fn add_address(&mut self, name: &str, address: IpAddr, prefix_len: u8) -> Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = address.into();
        message.header.prefix_len = prefix_len;
        message.header.index = self.index(name)?;
        if address.is_ipv6() {
            // Otherwise the kernel first asks the others for a second whether somebody has it.
            message.header.flags = AddressHeaderFlags::Nodad;
        }
        message.attributes = vec![
            AddressAttribute::Local(address),
            AddressAttribute::Address(address),
        ];
        self.netlink
            .change(Route::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL)
            .with_context(|| format!("cannot give {name} the address {address}"))
    }

    /// Lets no more than so many bytes a second leave through an interface.
    ///
    /// # Errors
    /// When there is no such interface, without the right, or when the kernel lacks `sch_tbf`.
    pub fn slow_down(&mut self, name: &str, bytes_a_second: u32) -> Result<()> {
        let interface = i32::try_from(self.index(name)?).context("an interface's number")?;
        let mut message = TcMessage::with_index(interface);
        message.header.parent = TcHandle::ROOT;
        message.attributes = vec![
            TcAttribute::Kind("tbf".to_owned()),
            TcAttribute::Options(token_bucket(bytes_a_second)),
        ];
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        self.netlink
            .change(Route::NewQueueDiscipline(message), flags)
            .with_context(|| format!("cannot slow {name} down"))
    }

    fn add(&mut self, name: &str, kind: InfoKind, data: InfoData) -> Result<()> {
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind), LinkInfo::Data(data)]),
        ];
        self.netlink
            .change(Route::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
            .with_context(|| format!("cannot make the interface {name}"))
    }
}

/// The options of `sch_tbf` (linux/pkt_sched.h). What waits is 10 ms' worth, as in a switch.
fn token_bucket(bytes_a_second: u32) -> Vec<TcOption> {
    const TCA_TBF_PARMS: u16 = 1;
    const TCA_TBF_BURST: u16 = 6;
    const LINK_LAYER_ETHERNET: u8 = 1;
    /// A packet that was not cut yet.
    const PACKET_BYTES: u32 = 66_000;
    let waiting_bytes = (bytes_a_second / 100).max(4 * PACKET_BYTES);
    // tc_tbf_qopt: tc_ratespec for the rate and for the peak, limit, buffer, mtu.
    let mut parameters = vec![0, LINK_LAYER_ETHERNET, 0, 0, 0, 0, 0, 0];
    parameters.extend(bytes_a_second.to_ne_bytes());
    parameters.extend([0; 12]);
    for number in [waiting_bytes, 0, 0] {
        parameters.extend(number.to_ne_bytes());
    }
    let burst = PACKET_BYTES.to_ne_bytes().to_vec();
    vec![
        TcOption::Other(DefaultNla::new(TCA_TBF_PARMS, parameters)),
        TcOption::Other(DefaultNla::new(TCA_TBF_BURST, burst)),
    ]
}
