//! The network on vCPU 0: the interface, the key-value service by TCP, the counted echo by UDP.

use core::fmt::{self, Write};
use core::sync::atomic::Ordering;

use romulus_guest_core::abi::{BootInfo, End, VCPUS_MAX};
use romulus_guest_core::command::{Machine, Then};
use romulus_guest_core::dirty::Dirtying;
use romulus_guest_core::frames::{Frames, Seen};
use romulus_guest_core::settings::Settings;
use romulus_guest_core::store::Store;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet, SocketStorage};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr, Ipv6Address};

use crate::arch::clock::Clock;
use crate::connection::{Connection, socket};
use crate::console::{self, failed};
use crate::memory::Memory;
use crate::shared::{DIRTYING, DIRTYING_CHANGES, FIGURES, Figures};
use crate::virtio::net::Nic;
use crate::worker::Damage;

/// Most clients that are served at once, those included whose connections are just being closed.
const CONNECTIONS: usize = 128;
/// RAM of which one connection's place may take its buffers: no more than half of it goes to all of them.
const RAM_BYTES_A_CONNECTION: u64 = 512 << 10;
/// Most memory for keys when the command line does not say, in bytes.
const KEYS_BYTES_MAX: u64 = 64 << 20;
const DATAGRAMS: usize = 64;
const DATAGRAM_BYTES_MAX: usize = 1472;
/// How long the last reply may take before the machine ends, in nanoseconds.
const ENDING_NS: u64 = 50_000_000;

/// What commands change and ask of the guest.
pub struct Host {
    clock: Clock,
    connection: u64,
    /// What a command wants spoilt.
    pub damage: Option<Damage>,
    /// A vCPU that was not seen for too long.
    pub late: Option<u32>,
    /// Records of the block log: written, verified.
    pub records: (u64, u64),
    frames: (u64, u64),
    vcpus: u32,
}

/// The network and everything behind it.
pub struct Service {
    nic: Nic,
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: &'static mut [Option<Connection>; CONNECTIONS],
    echo: SocketHandle,
    store: Store<'static>,
    frames: Frames,
    port: u16,
    numbers: u64,
    ending: Option<(Then, u64)>,
    /// What commands change and ask.
    pub host: Host,
}

impl Service {
    /// Starts the service on a network device.
    pub fn new(
        mut nic: Nic,
        clock: Clock,
        info: &BootInfo,
        settings: &Settings,
        memory: &mut Memory,
    ) -> Self {
        let ram_bytes = info.ram_low_bytes + info.ram_high_bytes;
        let keys_bytes = match settings.keys_mib {
            Some(mib) => u64::from(mib.max(1)) << 20,
            None => (ram_bytes / 8).min(KEYS_BYTES_MAX),
        };
        let places = usize::try_from(ram_bytes / RAM_BYTES_A_CONNECTION).unwrap_or(CONNECTIONS);
        let interface = interface(&mut nic, clock, settings);
        let storage = memory.place([const { SocketStorage::EMPTY }; CONNECTIONS + 1]);
        let mut sockets = SocketSet::new(&mut storage[..]);
        let connections = memory.place([const { None }; CONNECTIONS]);
        for place in connections.iter_mut().take(places) {
            let handle = sockets.add(socket(memory));
            *place = Some(Connection::new(handle, memory));
        }
        let mut echo = udp::Socket::new(datagrams(memory), datagrams(memory));
        // It only fails for port 0, which the settings refuse.
        let _ = echo.bind(settings.port);
        let echo = sockets.add(echo);
        let host = Host {
            clock,
            connection: 0,
            damage: None,
            late: None,
            records: (0, 0),
            frames: (0, 0),
            vcpus: info.vcpus,
        };
        Service {
            nic,
            interface,
            sockets,
            connections,
            echo,
            store: Store::new(memory.take_bytes(usize::try_from(keys_bytes).unwrap_or(usize::MAX))),
            frames: Frames::default(),
            port: settings.port,
            numbers: 0,
            ending: None,
            host,
        }
    }

    /// Does what has come in; says when it wants to be called again, by kvmclock in nanoseconds.
    pub fn turn(&mut self, now_ns: u64) -> u64 {
        let now = instant(now_ns);
        self.interface.poll(now, &mut self.nic, &mut self.sockets);
        self.serve(now_ns);
        self.echo();
        self.interface.poll(now, &mut self.nic, &mut self.sockets);
        self.nic.kick();
        if let Some((how, at_ns)) = self.ending {
            if now_ns >= at_ns {
                end(how);
            }
            return now_ns;
        }
        match self.interface.poll_delay(now, &self.sockets) {
            Some(delay) => now_ns.saturating_add(delay.total_micros() * 1000),
            None => u64::MAX,
        }
    }

    /// Says whether the device may interrupt. Says whether there is something to do already.
    pub fn interrupts(&self, on: bool) -> bool {
        self.nic.interrupts(on)
    }

    fn serve(&mut self, now_ns: u64) {
        self.host.frames = (self.frames.first, self.frames.again);
        for connection in self.connections.iter_mut().flatten() {
            let socket = self.sockets.get_mut::<tcp::Socket>(connection.handle);
            if connection.is_new(socket, self.port) {
                self.numbers += 1;
                connection.number = self.numbers;
            }
            if connection.number == 0 {
                continue;
            }
            self.host.connection = connection.number;
            let then = connection.turn(socket, &mut self.store, &mut self.host);
            if then != Then::Next && self.ending.is_none() {
                self.ending = Some((then, now_ns + ENDING_NS));
            }
        }
    }

    /// Sends datagrams back to where they came from.
    fn echo(&mut self) {
        let socket = self.sockets.get_mut::<udp::Socket>(self.echo);
        let mut datagram = [0; DATAGRAM_BYTES_MAX];
        while socket.can_recv() && socket.can_send() {
            let Ok((bytes, from)) = socket.recv_slice(&mut datagram) else {
                continue;
            };
            if let Seen::Again { sender, sequence } = self.frames.see(&datagram[..bytes]) {
                failed(
                    0,
                    format_args!("datagram {sequence} of sender {sender} was received twice"),
                );
            }
            // There is room: it was asked for.
            let _ = socket.send_slice(&datagram[..bytes], from);
        }
    }
}

fn datagrams(memory: &mut Memory) -> udp::PacketBuffer<'static> {
    let metadata = memory.place([udp::PacketMetadata::EMPTY; DATAGRAMS]);
    udp::PacketBuffer::new(
        &mut metadata[..],
        memory.take_bytes(DATAGRAMS * DATAGRAM_BYTES_MAX),
    )
}

fn interface(nic: &mut Nic, clock: Clock, settings: &Settings) -> Interface {
    let mac = nic.mac();
    let now = clock.moment();
    let mut config = Config::new(EthernetAddress(mac).into());
    config.random_seed = now.tsc;
    let mut interface = Interface::new(config, nic, instant(now.ns));
    interface.update_ip_addrs(|addresses| {
        let (ip, prefix) = settings.ip;
        let wanted = [
            Some(IpCidr::new(IpAddress::Ipv4(ip), prefix)),
            settings
                .ip6
                .map(|(ip6, prefix)| IpCidr::new(IpAddress::Ipv6(ip6), prefix)),
            settings
                .ip6
                .map(|_| IpCidr::new(IpAddress::Ipv6(link_local(mac)), 64)),
        ];
        for address in wanted.into_iter().flatten() {
            addresses
                .push(address)
                .expect("the interface has room for three addresses");
        }
    });
    if let Some(gateway) = settings.gateway {
        let route = interface.routes_mut().add_default_ipv4_route(gateway);
        route.expect("the table has room for one route");
    }
    interface
}

/// The address that a host gives itself on a link (RFC 4291, appendix A).
fn link_local(mac: [u8; 6]) -> Ipv6Address {
    let [a, b, c, d, e, f] = mac;
    Ipv6Address::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

fn instant(ns: u64) -> Instant {
    Instant::from_micros(i64::try_from(ns / 1000).unwrap_or(i64::MAX))
}

fn end(how: Then) -> ! {
    match how {
        Then::Reset => console::reset(),
        Then::Crash => panic!("a client asked for it"),
        _ => console::end(End::PowerOff, format_args!("power off")),
    }
}

impl Machine for Host {
    fn clock(&mut self) -> (u64, u64) {
        let moment = self.clock.moment();
        (moment.ns, moment.tsc)
    }

    fn self_check(&mut self, why: &mut dyn Write) -> bool {
        // Whatever else is wrong has ended the machine.
        if let Some(vcpu) = self.late {
            let _ = write!(why, "vCPU {vcpu} was not seen for a second");
        }
        self.late.is_none()
    }

    fn report(&mut self, into: &mut dyn Write) -> fmt::Result {
        let sum = |figure: fn(&Figures) -> u64| FIGURES[..VCPUS_MAX as usize].iter().map(figure).sum::<u64>();
        let lines = [
            ("vcpus", self.vcpus.into()),
            ("kvmclock_ns", self.clock.ns()),
            ("connection", self.connection),
            (
                "check_rounds",
                sum(|figures| figures.rounds.load(Ordering::Relaxed)),
            ),
            ("timers", sum(|figures| figures.timers.load(Ordering::Relaxed))),
            (
                "pages_written",
                sum(|figures| figures.pages_written.load(Ordering::Relaxed)),
            ),
            (
                "pages_skipped",
                sum(|figures| figures.pages_skipped.load(Ordering::Relaxed)),
            ),
            (
                "work_units",
                sum(|figures| figures.work_units.load(Ordering::Relaxed)),
            ),
            ("records_written", self.records.0),
            ("records_verified", self.records.1),
            ("datagrams", self.frames.0),
            ("datagrams_again", self.frames.1),
        ];
        lines
            .into_iter()
            .try_for_each(|(name, value)| write!(into, "{name}:{value}\r\n"))
    }

    fn connection(&self) -> u64 {
        self.connection
    }

    fn dirtying(&mut self) -> Option<Dirtying> {
        DIRTYING.with(|dirtying| *dirtying)
    }

    fn set_dirtying(&mut self, wanted: Option<Dirtying>) {
        DIRTYING.with(|dirtying| *dirtying = wanted);
        DIRTYING_CHANGES.fetch_add(1, Ordering::AcqRel);
    }

    fn damage(&mut self, what: &str) -> bool {
        self.damage = match what {
            "byte" => Some(Damage::Byte),
            "register" => Some(Damage::Register),
            "timer" => Some(Damage::Timer),
            "clock" => Some(Damage::Clock),
            _ => None,
        };
        self.damage.is_some()
    }
}
