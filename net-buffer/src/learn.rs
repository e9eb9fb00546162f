//! The guest's addresses, learnt from what it sends, so that a backup can announce them after a takeover.
//!
//! Learnt are: every unicast source MAC with its VLAN; IPv4 addresses from the sender fields of ARP, and from IPv4 headers;
//! IPv6 addresses from neighbour advertisements, and from IPv6 headers. An IP header counts only when its time to live
//! is one that hosts start with (64, 128 or 255): a guest that routes forwards other hosts' packets with at least one less,
//! and announcing *their* addresses as the guest's would take their traffic away.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// Most addresses remembered; past it, the one not heard for longest goes.
pub const LEARNT_MAX: usize = 64;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const NEXT_HEADER_ICMPV6: u8 = 58;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Whether it can be the address of one station.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// One address of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LearntAddress {
    /// The Ethernet address.
    pub mac: Mac,
    /// The VLAN tag that its frames carry (1 to 4,094), if any.
    pub vlan: Option<u16>,
    /// The IP address; `None`: a frame of another protocol was all that was seen of this MAC and VLAN.
    pub ip: Option<IpAddr>,
    /// For an IPv6 address: it has said that it is a router, and an announcement must repeat that.
    pub router: bool,
}

#[derive(Debug)]
struct Entry {
    address: LearntAddress,
    heard: u64,
}

/// The addresses, most of [`LEARNT_MAX`] of them.
#[derive(Debug, Default)]
pub struct LearntTable {
    entries: Vec<Entry>,
    clock: u64,
}

impl LearntTable {
    /// Learns from one Ethernet frame (without virtio-net header) that the guest sent. A frame of any shape is fine.
    pub fn learn(&mut self, frame: &[u8]) {
        if let Some(address) = read_frame(frame) {
            self.remember(address);
        }
    }

    /// What is known, IP addresses first by age of learning. A MAC and VLAN for which an IP address is known is not
    /// listed again without one.
    pub fn addresses(&self) -> Vec<LearntAddress> {
        let with_ip = |mac, vlan| {
            self.entries
                .iter()
                .any(|e| e.address.ip.is_some() && e.address.mac == mac && e.address.vlan == vlan)
        };
        let all = self.entries.iter().map(|e| &e.address);
        all.filter(|a| a.ip.is_some() || !with_ip(a.mac, a.vlan))
            .cloned()
            .collect()
    }

    fn remember(&mut self, address: LearntAddress) {
        self.clock += 1;
        let same = |a: &LearntAddress| a.mac == address.mac && a.vlan == address.vlan && a.ip == address.ip;
        if let Some(entry) = self.entries.iter_mut().find(|e| same(&e.address)) {
            entry.heard = self.clock;
            entry.address.router |= address.router;
            return;
        }
        if self.entries.len() == LEARNT_MAX {
            let oldest = self.entries.iter().enumerate().min_by_key(|(_, e)| e.heard);
            let oldest = oldest.expect("the table is full").0;
            self.entries.remove(oldest);
        }
        self.entries.push(Entry {
            address,
            heard: self.clock,
        });
    }
}

fn read_frame(frame: &[u8]) -> Option<LearntAddress> {
    let mac = Mac(frame.get(6..12)?.try_into().ok()?);
    if !mac.is_unicast() {
        return None;
    }
    let mut kind = u16_at(frame, 12)?;
    let mut payload = frame.get(14..)?;
    let mut vlan = None;
    if kind == ETHERTYPE_VLAN {
        // VLAN 0 only carries a priority.
        vlan = Some(u16_at(payload, 0)? & 0x0fff).filter(|id| (1..0xfff).contains(id));
        kind = u16_at(payload, 2)?;
        payload = payload.get(4..)?;
    }
    let (ip, router) = match kind {
        ETHERTYPE_ARP => (arp_sender(payload, mac).map(IpAddr::V4), false),
        ETHERTYPE_IPV4 => (ipv4_source(payload).map(IpAddr::V4), false),
        ETHERTYPE_IPV6 => ipv6_source(payload).map_or((None, false), |(ip, r)| (Some(ip.into()), r)),
        _ => (None, false),
    };
    Some(LearntAddress {
        mac,
        vlan,
        ip,
        router,
    })
}

/// RFC 826: an Ethernet/IPv4 packet whose sender is the one who sent the frame. A probe (RFC 5227) has no sender address.
fn arp_sender(packet: &[u8], mac: Mac) -> Option<Ipv4Addr> {
    let fixed = [0, 1, 8, 0, 6, 4];
    if packet.get(..6)? != fixed || packet.get(8..14)? != mac.0 {
        return None;
    }
    host_ipv4(packet.get(14..18)?)
}

fn ipv4_source(packet: &[u8]) -> Option<Ipv4Addr> {
    if packet.first()? >> 4 != 4 || !fresh(*packet.get(8)?) {
        return None;
    }
    host_ipv4(packet.get(12..16)?)
}

fn host_ipv4(bytes: &[u8]) -> Option<Ipv4Addr> {
    let bytes: [u8; 4] = bytes.try_into().ok()?;
    let ip = Ipv4Addr::from(bytes);
    let nobody = ip.octets()[0] == 0 || ip.is_loopback() || ip.is_multicast() || ip.octets()[0] >= 240;
    (!nobody).then_some(ip)
}

/// The source, or the target of a neighbour advertisement, and whether it says that it is a router.
fn ipv6_source(packet: &[u8]) -> Option<(Ipv6Addr, bool)> {
    if packet.first()? >> 4 != 6 || !fresh(*packet.get(7)?) {
        return None;
    }
    let is_icmp = *packet.get(6)? == NEXT_HEADER_ICMPV6;
    let message = packet.get(40).filter(|_| is_icmp);
    if message == Some(&NEIGHBOUR_ADVERTISEMENT) {
        let router = packet.get(44)? & 0x80 != 0;
        return Some((host_ipv6(packet.get(48..64)?)?, router));
    }
    let source = host_ipv6(packet.get(8..24)?)?;
    Some((source, message == Some(&ROUTER_ADVERTISEMENT)))
}

fn host_ipv6(bytes: &[u8]) -> Option<Ipv6Addr> {
    let bytes: [u8; 16] = bytes.try_into().ok()?;
    let ip = Ipv6Addr::from(bytes);
    (!ip.is_unspecified() && !ip.is_loopback() && !ip.is_multicast()).then_some(ip)
}

/// A time to live (hop limit) that no router has lowered yet.
fn fresh(time_to_live: u8) -> bool {
    matches!(time_to_live, 64 | 128 | 255)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(
        bytes.get(at..at.checked_add(2)?)?.try_into().ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::announce;
    use proptest::prelude::*;

    const MAC: Mac = Mac([0x52, 0x54, 0, 1, 2, 3]);

    fn ethernet(kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0xff; 6];
        frame.extend(MAC.0);
        frame.extend(kind.to_be_bytes());
        frame.extend(payload);
        frame
    }

    fn ipv4(source: [u8; 4], time_to_live: u8) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 20, 0, 0, 0, 0, time_to_live, 17, 0, 0];
        packet.extend(source);
        packet.extend([10, 0, 0, 1]);
        ethernet(ETHERTYPE_IPV4, &packet)
    }

    fn learnt(frames: &[Vec<u8>]) -> Vec<LearntAddress> {
        let mut table = LearntTable::default();
        for frame in frames {
            table.learn(frame);
        }
        table.addresses()
    }

    #[test]
    fn what_is_announced_is_what_would_be_learnt() {
        for vlan in [None, Some(5)] {
            for (ip, router) in [("10.1.2.3", false), ("fe80::1", true), ("2001:db8::7", false)] {
                let address = LearntAddress {
                    mac: MAC,
                    vlan,
                    ip: Some(ip.parse().unwrap()),
                    router,
                };
                let frames = announce::frames(std::slice::from_ref(&address));
                assert_eq!(learnt(&frames), [address]);
            }
        }
    }

    #[test]
    fn a_source_that_was_forwarded_is_not_the_guests() {
        let frames = [
            ipv4([192, 0, 2, 9], 63),
            ipv4([10, 0, 0, 2], 64),
            ipv4([0, 0, 0, 0], 64),
        ];
        let known = learnt(&frames);
        assert_eq!(known.len(), 1);
        assert_eq!(known[0].ip, Some(Ipv4Addr::new(10, 0, 0, 2).into()));
    }

    #[test]
    fn a_mac_without_an_ip_address_is_known_too() {
        let known = learnt(&[ethernet(0x88b5, b"x")]);
        assert_eq!(
            known,
            [LearntAddress {
                mac: MAC,
                vlan: None,
                ip: None,
                router: false
            }]
        );
    }

    #[test]
    fn the_table_is_bounded_and_keeps_what_is_in_use() {
        let mut table = LearntTable::default();
        for i in 0..=255u8 {
            table.learn(&ipv4([10, 0, 0, 200], 64));
            table.learn(&ipv4([10, 1, 0, i], 64));
        }
        let known = table.addresses();
        assert_eq!(known.len(), LEARNT_MAX);
        assert!(
            known
                .iter()
                .any(|a| a.ip == Some(Ipv4Addr::new(10, 0, 0, 200).into()))
        );
    }

    #[test]
    fn an_address_survives_serialisation() {
        let address = LearntAddress {
            mac: MAC,
            vlan: Some(7),
            ip: Some("fe80::1".parse().unwrap()),
            router: true,
        };
        let text = serde_json::to_string(&address).unwrap();
        assert_eq!(serde_json::from_str::<LearntAddress>(&text).unwrap(), address);
    }

    proptest! {
        #[test]
        fn no_frame_makes_learning_panic(kind in prop::sample::select(vec![ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_VLAN]), payload in prop::collection::vec(any::<u8>(), 0..80)) {
            let mut table = LearntTable::default();
            table.learn(&ethernet(kind, &payload));
            table.learn(&payload);
        }
    }
}
