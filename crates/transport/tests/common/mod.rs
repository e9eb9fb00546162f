//! Certificates and endpoints on loopback for the tests.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

use std::net::SocketAddr;
use std::path::Path;

use romulus_transport::pki::{self, HostNames, Validity};
use romulus_transport::{Connection, Endpoint, Identity, Network, PeerAddress, Service};
use tempfile::TempDir;

/// A CA with a folder for each of `hosts`; each server also answers to 127.0.0.1.
pub fn pki_for(hosts: &[&str]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    pki::init(dir.path(), "test CA", Validity::days(30).unwrap()).unwrap();
    for host in hosts {
        issue(dir.path(), host, Validity::days(30).unwrap());
    }
    dir
}

pub fn issue(dir: &Path, host: &str, validity: Validity) {
    let names: HostNames = format!("{host},127.0.0.1").parse().unwrap();
    pki::issue(dir, &names, validity).unwrap();
}

pub fn identity(pki: &TempDir, host: &str) -> Identity {
    Identity::load(&pki.path().join(host)).unwrap()
}

pub fn server(identity: &Identity, network: &Network) -> (Endpoint, SocketAddr) {
    let listen = SocketAddr::from(([127, 0, 0, 1], 0));
    let endpoint = Endpoint::server(identity, network, Service::Pair, listen, None).unwrap();
    let address = endpoint.local_addr().unwrap();
    (endpoint, address)
}

pub fn client(identity: &Identity, network: &Network) -> Endpoint {
    Endpoint::client(identity, network, Service::Pair, None).unwrap()
}

pub fn peer(address: SocketAddr) -> PeerAddress {
    address.to_string().parse().unwrap()
}

/// Everything that makes up two connected ends; keep it while they are used.
pub struct Pair {
    pub pki: TempDir,
    pub server: Endpoint,
    pub client: Endpoint,
    pub at_server: Connection,
    pub at_client: Connection,
}

pub async fn connected(network: &Network) -> Pair {
    let pki = pki_for(&["primary", "backup"]);
    let (server, address) = server(&identity(&pki, "backup"), network);
    let client = client(&identity(&pki, "primary"), network);
    let target = peer(address);
    let (at_client, at_server) = tokio::join!(client.connect(&target), server.accept());
    Pair {
        pki,
        server,
        client,
        at_server: at_server.unwrap(),
        at_client: at_client.unwrap(),
    }
}
