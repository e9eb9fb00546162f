//! A network for one test: a namespace that ends with the test's thread, and a bridge in it that the taps join.

use std::net::{IpAddr, Ipv4Addr};

use net_buffer::netlink::Netlink;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage as Route;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{
    BridgeStpState, InfoBridge, InfoData, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use romulus_host_sys::tap::Tap;
use rustix::net::{AddressFamily, SocketType, netdevice, socket};

const BRIDGE: &str = "testbed0";
/// The host's address.
const HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

/// The network of the calling thread and of what it starts.
pub struct Network {
    netlink: Netlink,
}

impl Network {
    /// Moves the calling thread into a new namespace with a bridge.
    pub fn new() -> Network {
        romulus_host_sys::netns::enter_new().expect("a network namespace (this test needs root)");
        let mut network = Network {
            netlink: Netlink::open().unwrap(),
        };
        let mut bridge = LinkMessage::default();
        let data = InfoData::Bridge(vec![
            InfoBridge::ForwardDelay(0),
            InfoBridge::StpState(BridgeStpState::Disabled),
            InfoBridge::MulticastSnooping(false),
        ]);
        bridge.attributes = vec![
            LinkAttribute::IfName(BRIDGE.to_owned()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge), LinkInfo::Data(data)]),
        ];
        network
            .netlink
            .change(Route::NewLink(bridge), NLM_F_CREATE | NLM_F_EXCL)
            .unwrap();
        let mut address = AddressMessage::default();
        address.header.family = IpAddr::from(HOST).into();
        address.header.prefix_len = 24;
        address.header.index = index(BRIDGE);
        address.attributes = vec![
            AddressAttribute::Local(HOST.into()),
            AddressAttribute::Address(HOST.into()),
        ];
        network
            .netlink
            .change(Route::NewAddress(address), NLM_F_CREATE | NLM_F_EXCL)
            .unwrap();
        network.set(BRIDGE, None, true);
        network
    }

    /// Makes a tap that outlives the VMMs which take it, a port of the bridge, and switches it on. The kernel tells
    /// the bridge at once when a VMM takes a tap that is on; of a tap that is new it may tell a second late, and all
    /// frames until then are lost.
    pub fn add_tap(&mut self, name: &str) {
        let tap = Tap::create_or_attach_without_offloads(name).unwrap();
        tap.persist().unwrap();
        self.set(name, Some(index(BRIDGE)), true);
    }

    /// Has the bridge forget who was behind a tap, as it would a second after its VMM has ended.
    pub fn forget(&mut self, tap: &str) {
        self.set(tap, None, false);
        self.set(tap, None, true);
    }

    fn set(&mut self, name: &str, controller: Option<u32>, on: bool) {
        let mut message = LinkMessage::default();
        message.header.index = index(name);
        message.header.change_mask = LinkFlags::Up;
        if on {
            message.header.flags = LinkFlags::Up;
        }
        message.attributes = controller.map(LinkAttribute::Controller).into_iter().collect();
        self.netlink.change(Route::SetLink(message), 0).unwrap();
    }
}

fn index(name: &str) -> u32 {
    let any = socket(AddressFamily::INET, SocketType::DGRAM, None).unwrap();
    netdevice::name_to_index(&any, name).unwrap_or_else(|error| panic!("interface {name}: {error}"))
}
