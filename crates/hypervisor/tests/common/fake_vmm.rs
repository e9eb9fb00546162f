//! A fake VMM behind a real attach socket: in this process for a source, as a process of its own for a standby.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use romulus_vmm_attach::fake::{FAKE_VMM, FakeMachine};
use romulus_vmm_attach::proto::Role;
use romulus_vmm_attach::server::{Events, ServeOptions, ServerHandle, bind, serve};

/// Between two steps of its guest.
const PACE: Duration = Duration::from_micros(300);
/// Its regions' pages; neither fills its last word of the bitmap.
pub(crate) const PAGES: [u64; 2] = [70, 33];

/// A VMM in this process.
pub(crate) struct Vmm {
    pub(crate) machine: Arc<FakeMachine>,
    pub(crate) events: Events,
    pub(crate) socket: PathBuf,
    pub(crate) server: ServerHandle,
    _folder: tempfile::TempDir,
}

/// One with a guest that runs.
pub(crate) fn running() -> Vmm {
    running_at(PACE)
}

/// The same, with a step every `pace`.
pub(crate) fn running_at(pace: Duration) -> Vmm {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("attach");
    let machine = FakeMachine::running(&PAGES, pace);
    let (server, events) = serve_at(&socket, Role::Running, &machine);
    Vmm {
        machine,
        events,
        socket,
        server,
        _folder: folder,
    }
}

fn serve_at(socket: &Path, role: Role, machine: &Arc<FakeMachine>) -> (ServerHandle, Events) {
    let events = Events::new().unwrap();
    let mut options = ServeOptions::new(FAKE_VMM, "1", events.clone());
    options.pause_limit_max = Duration::from_secs(30);
    let server = serve(bind(socket).unwrap(), role, Arc::clone(machine) as _, options).unwrap();
    (server, events)
}

/// The body of a standby's process: waits for a machine until it is killed, and talks. As with any program that prints, it is its
/// end when that fails.
pub(crate) fn wait_as_standby(socket: &Path) -> ! {
    let machine = FakeMachine::empty(PACE);
    let _server = serve_at(socket, Role::Empty, &machine);
    loop {
        eprintln!("the fake VMM is there");
        std::thread::sleep(Duration::from_millis(20));
    }
}
