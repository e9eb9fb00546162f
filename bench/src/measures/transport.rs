//! `transport`: what QUIC with mutual TLS, as Romulus uses it, costs against bare TCP. Both on loopback, each with its other
//! end on a thread of its own.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use romulus_transport::pki::{self, HostNames, Validity};
use romulus_transport::{CloseCode, Connection, Control, Endpoint, Identity, Network, PeerAddress, Service};
use serde::Deserialize;
use tokio::runtime::Runtime;

use super::{Measure, outside};
use crate::run::{Finding, Run, Unable, timed};
use crate::stats::{Unit, float};

const CHUNK_BYTES: usize = 128 << 10;
/// Nothing takes so long, unless something is broken.
const LIMIT: Duration = Duration::from_secs(60);
/// Of a message that goes back and forth.
const MESSAGE_BYTES: usize = 64;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Loopback {
    /// Sent in one go, until the other end has said that it has all.
    #[serde(default = "bulk_mib")]
    bulk_mib: u32,
    /// Largest UDP payload; default as the daemons have it.
    #[serde(default = "mtu")]
    mtu: u16,
    #[serde(default = "rounds")]
    rounds: u32,
    /// Round trips for each bulk.
    #[serde(default = "trips")]
    trips: u32,
}

const fn bulk_mib() -> u32 {
    32
}

fn mtu() -> u16 {
    Network::default().mtu
}

const fn rounds() -> u32 {
    5
}

const fn trips() -> u32 {
    100
}

impl Measure for Loopback {
    fn run(&self, run: &mut Run) -> Result<(), Unable> {
        let network = Network {
            mtu: self.mtu,
            ..Network::default()
        };
        let mut quic = Quic::connect(network)?;
        let mut tcp = Tcp::connect()?;
        let mib = self.bulk_mib as usize;
        let [reference, value] = run.in_turn("bulk", self.rounds, |one| match one {
            0 => tcp.bulk(mib << 20),
            _ => quic.bulk(mib << 20),
        })?;
        let per_mib = Unit {
            name: "ns/MiB",
            size: float(mib as u64),
        };
        let trips = self.rounds.saturating_mul(self.trips);
        let [trip_reference, trip] = run.in_turn("round trip", trips, |one| match one {
            0 => tcp.round_trip(),
            _ => quic.round_trip(),
        })?;
        for (case, unit, value, reference, name) in [
            ("bulk", per_mib, value, reference, "TCP"),
            ("round-trip", Unit::US, trip, trip_reference, "TCP, 64 bytes"),
        ] {
            if let Some((value, reference)) = value.figure(unit).zip(reference.figure(unit)) {
                let at = [("what", case.into()), ("mtu", self.mtu.into())];
                let finding = Finding {
                    case: format!("{case}/mtu-{}", self.mtu),
                    unit: unit.name,
                    value,
                    reference: Some((name.to_owned(), reference)),
                    note: None,
                };
                run.found_at(at, finding);
            }
        }
        quic.close()?;
        tcp.close()
    }

    fn problem(&self) -> Option<String> {
        let network = Network {
            mtu: self.mtu,
            ..Network::default()
        };
        outside("bulk_mib", self.bulk_mib.into(), 1, 4096)
            .or_else(|| outside("rounds", self.rounds.into(), 1, 10_000))
            .or_else(|| outside("trips", self.trips.into(), 1, 10_000))
            .or_else(|| network.check().err().map(|error| error.to_string()))
    }
}

fn chunks(bytes: usize) -> impl Iterator<Item = usize> {
    (0..bytes)
        .step_by(CHUNK_BYTES)
        .map(move |at| CHUNK_BYTES.min(bytes - at))
}

type Ended = Result<(), Unable>;

fn join(thread: JoinHandle<Ended>) -> Ended {
    thread
        .join()
        .unwrap_or_else(|_| Err(Unable::Wrong("the other end's thread panicked".to_owned())))
}

struct Quic {
    runtime: Runtime,
    connection: Connection,
    control: Control,
    chunk: Bytes,
    endpoint: Endpoint,
    other: JoinHandle<Ended>,
}

fn runtime() -> Result<Runtime, Unable> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Unable::failed("starting a runtime"))
}

fn identity(pki_dir: &Path, host: &str) -> Result<Identity, Unable> {
    let names: HostNames = format!("{host},127.0.0.1")
        .parse()
        .map_err(Unable::failed("naming a host"))?;
    let validity = Validity::days(1).map_err(Unable::failed("making certificates"))?;
    let dir = pki::issue(pki_dir, &names, validity).map_err(Unable::failed("making certificates"))?;
    Identity::load(&dir).map_err(Unable::failed("reading certificates"))
}

impl Quic {
    fn connect(network: Network) -> Result<Self, Unable> {
        let pki_dir = tempfile::tempdir().map_err(Unable::failed("making a folder"))?;
        let validity = Validity::days(1).map_err(Unable::failed("making certificates"))?;
        pki::init(pki_dir.path(), "bench", validity).map_err(Unable::failed("making certificates"))?;
        let (server, client) = (
            identity(pki_dir.path(), "server")?,
            identity(pki_dir.path(), "client")?,
        );
        let (tell, told) = std::sync::mpsc::channel();
        let at_server = network.clone();
        let other = std::thread::spawn(move || {
            runtime()?.block_on(async {
                let listen = SocketAddr::from(([127, 0, 0, 1], 0));
                let endpoint = Endpoint::server(&server, &at_server, Service::Pair, listen, None)
                    .map_err(Unable::failed("listening"))?;
                let address = endpoint.local_addr().map_err(Unable::failed("listening"))?;
                let _ = tell.send(address);
                let connection = endpoint.accept().await.map_err(Unable::failed("accepting"))?;
                answer(&connection).await
            })
        });
        let Ok(address) = told.recv() else {
            join(other)?;
            return Err(Unable::Wrong("the other end did not listen".to_owned()));
        };
        let runtime = runtime()?;
        let (endpoint, connection, control) = runtime.block_on(async {
            let endpoint = Endpoint::client(&client, &network, Service::Pair, None)
                .map_err(Unable::failed("opening a socket"))?;
            let peer: PeerAddress = address
                .to_string()
                .parse()
                .map_err(Unable::failed("naming the peer"))?;
            let connection = endpoint
                .connect(&peer)
                .await
                .map_err(Unable::failed("connecting"))?;
            let control = connection
                .open_control()
                .await
                .map_err(Unable::failed("opening a stream"))?;
            Ok((endpoint, connection, control))
        })?;
        let mut quic = Self {
            runtime,
            connection,
            control,
            chunk: Bytes::from(vec![0x5a; CHUNK_BYTES]),
            endpoint,
            other,
        };
        // The other end learns of the stream only with the first bytes on it.
        quic.round_trip()?;
        Ok(quic)
    }

    fn bulk(&mut self, bytes: usize) -> Result<u64, Unable> {
        let work = async {
            let mut stream = self.connection.open_data().await?;
            for length in chunks(bytes) {
                stream.send(self.chunk.slice(..length)).await?;
            }
            stream.finish();
            receive(&mut self.control, 1).await
        };
        let limited = async { tokio::time::timeout(LIMIT, work).await };
        let mut done = Ok(Ok(()));
        let time_ns = timed(|| done = self.runtime.block_on(limited));
        done.map_err(Unable::failed("sending over QUIC in time"))?
            .map_err(Unable::failed("sending over QUIC"))?;
        Ok(time_ns)
    }

    fn round_trip(&mut self) -> Result<u64, Unable> {
        let work = async {
            self.control
                .sender
                .send(self.chunk.slice(..MESSAGE_BYTES))
                .await?;
            receive(&mut self.control, MESSAGE_BYTES).await
        };
        let limited = async { tokio::time::timeout(LIMIT, work).await };
        let mut done = Ok(Ok(()));
        let time_ns = timed(|| done = self.runtime.block_on(limited));
        done.map_err(Unable::failed("a round trip over QUIC in time"))?
            .map_err(Unable::failed("a round trip over QUIC"))?;
        Ok(time_ns)
    }

    fn close(self) -> Result<(), Unable> {
        self.connection.close(CloseCode::SHUTDOWN, "measured");
        // The goodbye leaves only while the runtime runs.
        self.runtime.block_on(self.endpoint.shutdown("measured"));
        join(self.other)
    }
}

async fn receive(control: &mut Control, bytes: usize) -> Result<(), romulus_transport::TransportError> {
    let mut received = 0;
    while received < bytes {
        match control.receiver.recv().await? {
            Some(chunk) => received += chunk.len(),
            None => return Err(romulus_transport::TransportError::StreamReset),
        }
    }
    Ok(())
}

/// The other end: messages go back, and the end of each data stream is answered by one byte. Ends with the connection.
async fn answer(connection: &Connection) -> Ended {
    let mut control = connection
        .accept_control()
        .await
        .map_err(Unable::failed("accepting a stream"))?;
    loop {
        tokio::select! {
            message = control.receiver.recv() => match message {
                Ok(Some(message)) => {
                    let _ = control.sender.send(message).await;
                }
                _ => return Ok(()),
            },
            stream = connection.accept_data() => {
                let Ok(mut stream) = stream else { return Ok(()) };
                while let Ok(Some(_)) = stream.recv().await {}
                let _ = control.sender.send(Bytes::from_static(b"!")).await;
            }
        }
    }
}

struct Tcp {
    bulk: TcpStream,
    trips: TcpStream,
    chunk: Vec<u8>,
    others: [JoinHandle<Ended>; 2],
}

impl Tcp {
    fn connect() -> Result<Self, Unable> {
        let listener = TcpListener::bind("127.0.0.1:0").map_err(Unable::failed("listening"))?;
        let address = listener.local_addr().map_err(Unable::failed("listening"))?;
        let open = || -> std::io::Result<(TcpStream, TcpStream)> {
            let here = TcpStream::connect(address)?;
            let (there, _) = listener.accept()?;
            here.set_nodelay(true)?;
            there.set_nodelay(true)?;
            Ok((here, there))
        };
        let (bulk, bulk_there) = open().map_err(Unable::failed("connecting"))?;
        let (trips, trips_there) = open().map_err(Unable::failed("connecting"))?;
        Ok(Self {
            bulk,
            trips,
            chunk: vec![0x5a; CHUNK_BYTES],
            others: [
                std::thread::spawn(move || swallow(bulk_there).map_err(Unable::failed("reading from TCP"))),
                std::thread::spawn(move || echo(trips_there).map_err(Unable::failed("reading from TCP"))),
            ],
        })
    }

    fn bulk(&mut self, bytes: usize) -> Result<u64, Unable> {
        let mut done = Ok(());
        let time_ns = timed(|| {
            done = (|| {
                self.bulk.write_all(&(bytes as u64).to_le_bytes())?;
                for length in chunks(bytes) {
                    self.bulk.write_all(&self.chunk[..length])?;
                }
                self.bulk.read_exact(&mut [0])
            })();
        });
        done.map_err(Unable::failed("sending over TCP"))?;
        Ok(time_ns)
    }

    fn round_trip(&mut self) -> Result<u64, Unable> {
        let mut done = Ok(());
        let time_ns = timed(|| {
            done = (|| {
                self.trips.write_all(&self.chunk[..MESSAGE_BYTES])?;
                self.trips.read_exact(&mut [0; MESSAGE_BYTES])
            })();
        });
        done.map_err(Unable::failed("a round trip over TCP"))?;
        Ok(time_ns)
    }

    fn close(self) -> Result<(), Unable> {
        drop((self.bulk, self.trips));
        let [bulk, trips] = self.others;
        join(bulk).and(join(trips))
    }
}

/// Reads a length and as many bytes, and says so; until the connection ends.
fn swallow(mut stream: TcpStream) -> std::io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut length = [0; 8];
    while stream.read_exact(&mut length).is_ok() {
        let mut left = u64::from_le_bytes(length);
        while left > 0 {
            let room = usize::try_from(left.min(CHUNK_BYTES as u64)).unwrap_or(CHUNK_BYTES);
            match stream.read(&mut buffer[..room])? {
                0 => return Ok(()),
                read => left -= read as u64,
            }
        }
        stream.write_all(b"!")?;
    }
    Ok(())
}

fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    let mut message = [0; MESSAGE_BYTES];
    while stream.read_exact(&mut message).is_ok() {
        stream.write_all(&message)?;
    }
    Ok(())
}
