//! Links, qdiscs and filters: the few questions and changes of traffic control that the gate needs.

use std::io;
use std::os::fd::OwnedFd;

use netlink_packet_core::{
    DefaultNla, Emitable, NLA_F_NESTED, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, Nla, Parseable,
};
use netlink_packet_route::RouteNetlinkMessage as Route;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoTun, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, LinkXdp, XdpAttached,
};
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption, TcActionType,
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcHeader, TcMessage, TcMirror,
    TcMirrorActionType, TcOption,
};
use romulus_host_sys::bpf;

use crate::netlink::Netlink;

/// `ETH_P_ALL` in network order, the lower half of a filter's `tcm_info`.
const PROTOCOL_ALL: u32 = 0x0300;
/// `TCA_BPF_ACT`: what is done with the frames that an eBPF filter takes.
const BPF_ACTIONS: u16 = 1;
const IFLA_TUN_TYPE: u16 = 3;
const IFF_TAP: u8 = 2;

/// Which way a filter looks at an interface's frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Ingress,
    Egress,
}

impl Direction {
    fn parent(self) -> TcHandle {
        let minor = match self {
            Self::Ingress => TcHandle::MIN_INGRESS,
            Self::Egress => TcHandle::MIN_EGRESS,
        };
        TcHandle {
            major: u16::MAX,
            minor,
        }
    }
}

/// What we want to know of an interface.
#[derive(Clone, Debug, Default)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) mtu: u32,
    /// Its Ethernet address.
    pub(crate) address: Vec<u8>,
    pub(crate) kind: String,
    pub(crate) is_tap: bool,
    pub(crate) has_xdp: bool,
    pub(crate) tx_dropped: u64,
}

/// Where a filter sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) interface: u32,
    pub(crate) direction: Direction,
    pub(crate) chain: u32,
    pub(crate) priority: u16,
}

/// A filter found on an interface.
#[derive(Clone, Debug)]
pub(crate) struct SeenFilter {
    pub(crate) chain: u32,
    pub(crate) priority: u16,
    /// The name that an eBPF filter was given.
    pub(crate) name: Option<String>,
}

fn index(interface: u32) -> i32 {
    i32::try_from(interface).expect("interface indexes fit in an int")
}

/// The interface of that name.
pub(crate) fn link_named(netlink: &mut Netlink, name: &str) -> io::Result<Link> {
    let mut question = LinkMessage::default();
    question.attributes.push(LinkAttribute::IfName(name.to_owned()));
    link(netlink, question)
}

/// The interface with that index.
pub(crate) fn link_numbered(netlink: &mut Netlink, interface: u32) -> io::Result<Link> {
    let mut question = LinkMessage::default();
    question.header.index = interface;
    link(netlink, question)
}

fn link(netlink: &mut Netlink, question: LinkMessage) -> io::Result<Link> {
    let mut found = None;
    netlink.ask(Route::GetLink(question), 0, |payload| {
        found = LinkMessage::parse(payload)
            .ok()
            .map(|message| read_link(&message));
    })?;
    found.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "an unreadable answer about a link"))
}

fn read_link(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        ..Link::default()
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(address) => link.address.clone_from(address),
            LinkAttribute::Stats64(stats) => link.tx_dropped = stats.tx_dropped,
            LinkAttribute::Xdp(xdp) => {
                link.has_xdp = xdp
                    .iter()
                    .any(|x| matches!(x, LinkXdp::Attached(how) if *how != XdpAttached::None));
            }
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(kind) => link.kind = kind.to_string(),
                        LinkInfo::Data(InfoData::Tun(data)) => link.is_tap = is_tap(data),
                        _ => (),
                    }
                }
            }
            _ => (),
        }
    }
    link.is_tap &= link.kind == InfoKind::Tun.to_string();
    link
}

fn is_tap(data: &[InfoTun]) -> bool {
    data.iter().any(|nla| {
        let mut value = vec![0; nla.value_len()];
        nla.emit_value(&mut value);
        nla.kind() == IFLA_TUN_TYPE && value == [IFF_TAP]
    })
}

/// Sets MTU and queue length and switches the interface on.
pub(crate) fn bring_up(netlink: &mut Netlink, interface: u32, mtu: u32, queue_frames: u32) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = interface;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message.attributes = vec![LinkAttribute::Mtu(mtu), LinkAttribute::TxQueueLen(queue_frames)];
    netlink.change(Route::SetLink(message), 0)
}

/// Gives an interface an Ethernet address.
pub(crate) fn set_address(netlink: &mut Netlink, interface: u32, address: &[u8]) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = interface;
    message.attributes.push(LinkAttribute::Address(address.to_vec()));
    netlink.change(Route::SetLink(message), 0)
}

fn qdisc(interface: u32, parent: TcHandle, handle: TcHandle, kind: &str) -> TcMessage {
    let mut message = TcMessage::with_index(index(interface));
    message.header.parent = parent;
    message.header.handle = handle;
    message.attributes.push(TcAttribute::Kind(kind.to_owned()));
    message
}

fn clsact(interface: u32) -> TcMessage {
    qdisc(
        interface,
        TcHandle::CLSACT,
        TcHandle {
            major: u16::MAX,
            minor: 0,
        },
        "clsact",
    )
}

/// Hands frames to the device at once: no other discipline may delay or drop them on the way to us.
pub(crate) fn set_no_queue(netlink: &mut Netlink, interface: u32) -> io::Result<()> {
    let message = qdisc(interface, TcHandle::ROOT, TcHandle::UNSPEC, "noqueue");
    netlink.change(Route::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// Makes room for filters. `false`: there was an ingress or clsact qdisc already, which does as well.
pub(crate) fn add_clsact(netlink: &mut Netlink, interface: u32) -> io::Result<bool> {
    let message = Route::NewQueueDiscipline(clsact(interface));
    match netlink.change(message, NLM_F_CREATE | NLM_F_EXCL) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// Takes the clsact qdisc away, with every filter on it.
pub(crate) fn remove_clsact(netlink: &mut Netlink, interface: u32) -> io::Result<()> {
    netlink.change(Route::DelQueueDiscipline(clsact(interface)), 0)
}

fn filter(place: Place) -> TcMessage {
    let mut message = TcMessage::with_index(index(place.interface));
    message.header.handle = TcHandle { major: 0, minor: 1 };
    message.header.parent = place.direction.parent();
    message.header.info = (u32::from(place.priority) << 16) | PROTOCOL_ALL;
    message
        .attributes
        .push(TcAttribute::Kind(TcFilterBpf::KIND.to_owned()));
    if place.chain != 0 {
        message.attributes.push(TcAttribute::Chain(place.chain));
    }
    message
}

/// The message that adds an eBPF filter: built ahead, so that sending it is all that the pause pays for.
pub(crate) fn filter_message(place: Place, program: &OwnedFd, name: &str) -> Route {
    let mut message = filter(place);
    message.attributes.push(TcAttribute::Options(vec![
        TcOption::Bpf(TcFilterBpfOption::ProgFd(bpf::descriptor_number(program))),
        TcOption::Bpf(TcFilterBpfOption::ProgName(name.to_owned())),
        TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
    ]));
    Route::NewTrafficFilter(message)
}

/// The message that adds an eBPF filter which takes every frame, after which the frame arrives at the interface `to`.
///
/// The action does it in the same call, while the helper `bpf_redirect` puts the frame in the processor's queue of arrived
/// frames, which a softirq must then empty: some 400 ns a frame.
pub(crate) fn take_to_ingress_message(place: Place, program: &OwnedFd, name: &str, to: u32) -> Route {
    let mut parameters = TcMirror::default();
    parameters.generic.action = TcActionType::Stolen;
    parameters.eaction = TcMirrorActionType::IngressRedir;
    parameters.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            parameters,
        ))]),
    ];
    let actions = [action];
    let mut bytes = vec![0; actions.as_slice().buffer_len()];
    actions.as_slice().emit(&mut bytes);
    let mut message = filter(place);
    message.attributes.push(TcAttribute::Options(vec![
        TcOption::Bpf(TcFilterBpfOption::ProgFd(bpf::descriptor_number(program))),
        TcOption::Bpf(TcFilterBpfOption::ProgName(name.to_owned())),
        TcOption::Bpf(TcFilterBpfOption::Other(DefaultNla::new(
            BPF_ACTIONS | NLA_F_NESTED,
            bytes,
        ))),
    ]));
    Route::NewTrafficFilter(message)
}

/// Adds a filter; it is an error when there is one in that very place.
pub(crate) fn add_filter(netlink: &mut Netlink, message: Route) -> io::Result<()> {
    netlink.change(message, NLM_F_CREATE | NLM_F_EXCL)
}

/// Removes a filter of ours.
pub(crate) fn remove_filter(netlink: &mut Netlink, place: Place) -> io::Result<()> {
    netlink.change(Route::DelTrafficFilter(filter(place)), 0)
}

/// All filters of an interface in that direction, in all chains.
pub(crate) fn filters(
    netlink: &mut Netlink,
    interface: u32,
    direction: Direction,
) -> io::Result<Vec<SeenFilter>> {
    let mut question = TcMessage::with_index(index(interface));
    question.header.parent = direction.parent();
    let mut seen = Vec::new();
    netlink.ask(Route::GetTrafficFilter(question), NLM_F_DUMP, |payload| {
        seen.extend(read_filter(payload));
    })?;
    Ok(seen)
}

/// A filter of a kind that cannot be read in full is somebody else's; its priority is in the fixed part.
fn read_filter(payload: &[u8]) -> Option<SeenFilter> {
    let message = TcMessage::parse(payload).ok();
    let header = match &message {
        Some(message) => message.header.clone(),
        None => TcHeader::parse(payload).ok()?,
    };
    let priority = u16::try_from(header.info >> 16).expect("the upper half of 32 bits");
    let mut filter = SeenFilter {
        chain: 0,
        priority,
        name: None,
    };
    for attribute in message.map(|m| m.attributes).unwrap_or_default() {
        match attribute {
            TcAttribute::Chain(chain) => filter.chain = chain,
            TcAttribute::Options(options) => {
                filter.name = options.into_iter().find_map(|option| match option {
                    TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => Some(name),
                    _ => None,
                });
            }
            _ => (),
        }
    }
    Some(filter)
}
