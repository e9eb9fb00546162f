//! The frames by which a network learns that a guest's addresses have moved, and when to send them.
//!
//! For each address: RARP (what hypervisors send after a migration: it moves the MAC in switches whatever the protocol),
//! for IPv4 a gratuitous ARP as request and as reply (RFC 5227, section 3; RFC 5944, section 4.6), for IPv6 an unsolicited
//! neighbour advertisement (RFC 4861, section 7.2.6). With a VLAN tag where the guest's frames had one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use crate::learn::{LearntAddress, Mac};

/// Shortest Ethernet frame in bytes, without the checksum.
const FRAME_BYTES_MIN: usize = 60;
const BROADCAST: Mac = Mac([0xff; 6]);
const ALL_NODES: Mac = Mac([0x33, 0x33, 0, 0, 0, 1]);
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_RARP: u16 = 0x8035;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ARP_REQUEST: u16 = 1;
const ARP_REPLY: u16 = 2;
const RARP_REQUEST: u16 = 3;
const ICMPV6: u8 = 58;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const ROUTER: u8 = 0x80;
const OVERRIDE: u8 = 0x20;

/// For how long announcements are repeated.
pub const ANNOUNCE_FOR: Duration = Duration::from_secs(30);

/// When to send, counted from the takeover: at once, quickly again in case a switch port or a client was not ready, then every
/// two seconds for [`ANNOUNCE_FOR`].
pub fn schedule() -> impl Iterator<Item = Duration> {
    let quick = [0, 50, 150, 500, 1000].map(Duration::from_millis);
    let slow = (1..)
        .map(|i| Duration::from_secs(2 * i))
        .take_while(|at| *at <= ANNOUNCE_FOR);
    quick.into_iter().chain(slow)
}

/// Every frame that announces `addresses`: first what moves the MACs, then the rest.
pub fn frames(addresses: &[LearntAddress]) -> Vec<Vec<u8>> {
    let mut stations: Vec<(Mac, Option<u16>)> = Vec::new();
    for address in addresses {
        if !stations.contains(&(address.mac, address.vlan)) {
            stations.push((address.mac, address.vlan));
        }
    }
    let mut frames: Vec<_> = stations.into_iter().map(|(mac, vlan)| rarp(mac, vlan)).collect();
    for address in addresses {
        match address.ip {
            Some(IpAddr::V4(ip)) => frames.extend(gratuitous_arp(address.mac, address.vlan, ip)),
            Some(IpAddr::V6(ip)) => {
                frames.push(neighbour_advertisement(
                    address.mac,
                    address.vlan,
                    ip,
                    address.router,
                ));
            }
            None => (),
        }
    }
    frames
}

/// RFC 903: "who has my own MAC".
pub fn rarp(mac: Mac, vlan: Option<u16>) -> Vec<u8> {
    let nobody = Ipv4Addr::UNSPECIFIED;
    let packet = arp_packet(RARP_REQUEST, (mac, nobody), (mac, nobody));
    ethernet(BROADCAST, mac, vlan, ETHERTYPE_RARP, &packet)
}

/// The request and the reply form.
pub fn gratuitous_arp(mac: Mac, vlan: Option<u16>, ip: Ipv4Addr) -> [Vec<u8>; 2] {
    let request = arp_packet(ARP_REQUEST, (mac, ip), (Mac([0; 6]), ip));
    let reply = arp_packet(ARP_REPLY, (mac, ip), (mac, ip));
    [request, reply].map(|packet| ethernet(BROADCAST, mac, vlan, ETHERTYPE_ARP, &packet))
}

/// Unsolicited, to all nodes, overriding what they have cached. `router` must be what the guest says of itself, or its
/// neighbours stop using it as their router.
pub fn neighbour_advertisement(mac: Mac, vlan: Option<u16>, ip: Ipv6Addr, router: bool) -> Vec<u8> {
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let flags = OVERRIDE | if router { ROUTER } else { 0 };
    let mut message = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    message.extend(ip.octets());
    message.extend([2, 1]); // option: target link-layer address, 8 bytes
    message.extend(mac.0);
    let sum = icmpv6_checksum(ip, all_nodes, &message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());

    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(u16::try_from(message.len()).expect("32 bytes").to_be_bytes());
    packet.extend([ICMPV6, 255]);
    packet.extend(ip.octets());
    packet.extend(all_nodes.octets());
    packet.extend(message);
    ethernet(ALL_NODES, mac, vlan, ETHERTYPE_IPV6, &packet)
}

fn arp_packet(operation: u16, sender: (Mac, Ipv4Addr), target: (Mac, Ipv4Addr)) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4];
    packet.extend(operation.to_be_bytes());
    for (mac, ip) in [sender, target] {
        packet.extend(mac.0);
        packet.extend(ip.octets());
    }
    packet
}

fn ethernet(to: Mac, from: Mac, vlan: Option<u16>, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(FRAME_BYTES_MIN + payload.len());
    frame.extend(to.0);
    frame.extend(from.0);
    if let Some(id) = vlan {
        frame.extend(ETHERTYPE_VLAN.to_be_bytes());
        frame.extend((id & 0x0fff).to_be_bytes());
    }
    frame.extend(kind.to_be_bytes());
    frame.extend(payload);
    let shortest = if vlan.is_some() {
        FRAME_BYTES_MIN + 4
    } else {
        FRAME_BYTES_MIN
    };
    frame.resize(frame.len().max(shortest), 0);
    frame
}

/// RFC 4443, section 2.3: over the pseudo-header and the message, whose checksum field is zero.
fn icmpv6_checksum(source: Ipv6Addr, target: Ipv6Addr, message: &[u8]) -> u16 {
    let mut bytes = source.octets().to_vec();
    bytes.extend(target.octets());
    bytes.extend(
        u32::try_from(message.len())
            .expect("a short message")
            .to_be_bytes(),
    );
    bytes.extend([0, 0, 0, ICMPV6]);
    bytes.extend(message);
    let words = bytes
        .chunks_exact(2)
        .map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("folded to 16 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56]);

    #[test]
    fn announcements_go_on_for_thirty_seconds_and_start_at_once() {
        let times: Vec<_> = schedule().collect();
        assert_eq!(times[0], Duration::ZERO);
        assert_eq!(times.last(), Some(&ANNOUNCE_FOR));
        assert!(times.is_sorted());
        assert!(
            times.len() < 32,
            "a takeover of many guests must not flood the network"
        );
    }

    #[test]
    fn a_gratuitous_arp_says_the_address_as_sender_and_as_target() {
        let [request, reply] = gratuitous_arp(MAC, None, Ipv4Addr::new(10, 0, 0, 2));
        assert_eq!(request.len(), 60);
        assert_eq!(
            &request[..12],
            b"\xff\xff\xff\xff\xff\xff\x52\x54\x00\x12\x34\x56"
        );
        assert_eq!(&request[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!(&request[28..32], [10, 0, 0, 2]);
        assert_eq!(&request[38..42], [10, 0, 0, 2]);
        assert_eq!(&reply[20..22], [0, 2]);
    }

    #[test]
    fn a_vlan_tag_is_put_where_switches_look_for_it() {
        let frame = rarp(MAC, Some(5));
        assert_eq!(frame.len(), 64);
        assert_eq!(&frame[12..18], [0x81, 0, 0, 5, 0x80, 0x35]);
    }

    #[test]
    fn a_neighbour_advertisement_sums_to_zero() {
        // Sum over pseudo-header and message, checksum included, must be all ones (RFC 1071).
        let ip: Ipv6Addr = "fe80::5054:ff:fe12:3456".parse().unwrap();
        let frame = neighbour_advertisement(MAC, None, ip, true);
        assert_eq!(icmpv6_checksum(ip, "ff02::1".parse().unwrap(), &frame[54..]), 0);
        assert_eq!(frame[58], ROUTER | OVERRIDE);
    }

    #[test]
    fn a_mac_with_several_addresses_is_moved_once() {
        let address = |ip: &str| LearntAddress {
            mac: MAC,
            vlan: None,
            ip: Some(ip.parse().unwrap()),
            router: false,
        };
        let all = frames(&[address("10.0.0.2"), address("fe80::1"), address("10.0.0.3")]);
        assert_eq!(all.len(), 1 + 2 + 1 + 2);
        assert_eq!(&all[0][12..14], ETHERTYPE_RARP.to_be_bytes());
    }
}
