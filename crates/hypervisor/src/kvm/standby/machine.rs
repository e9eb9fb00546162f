//! One VMM that waits: its process and our connection to it.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use romulus_vmm_attach::channel::ChannelError;
use romulus_vmm_attach::client::{Attachment, Client, ClientError};
use romulus_vmm_attach::proto::{MachineInfo, Role, Welcome};

use super::StandbyOptions;
use crate::fault;
use crate::process::Process;
use crate::standby::StandbyError;

/// What we call ourselves in the VMM's log.
const NAME: &str = "backup-agent";
/// How long a machine that an earlier agent left may take to welcome us.
const LEFTOVER_LIMIT: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(2);

/// The attach socket of the machine in this folder.
pub(super) fn socket(folder: &Path) -> PathBuf {
    folder.join("attach")
}

/// What an earlier agent left in a folder.
pub(super) enum Found {
    /// No process.
    Nothing,
    /// This process, which has never run a guest.
    NeverRan(u32),
    /// This process, which runs one, or has run one until it was stopped for good.
    Guest(u32),
}

/// Looks for a machine in a folder.
pub(super) fn find(folder: &Path) -> Result<Found, StandbyError> {
    let socket = socket(folder);
    if !socket.exists() {
        return Ok(Found::Nothing);
    }
    let deadline = Instant::now() + LEFTOVER_LIMIT;
    loop {
        return match Client::connect(&socket, NAME, LEFTOVER_LIMIT) {
            Ok((client, Attachment { welcome, .. })) => Ok(match welcome.role {
                Role::Empty | Role::Prepared => Found::NeverRan(client.vmm_pid()),
                Role::Running | Role::Halted => Found::Guest(client.vmm_pid()),
            }),
            // Perhaps it is the earlier agent's connection, whose end has not been noticed.
            Err(ClientError::Busy { .. }) if Instant::now() < deadline => {
                std::thread::sleep(POLL);
                continue;
            }
            // Only a guest that runs is of use to another client: a replicator that protects it from here.
            Err(ClientError::Busy { pid, .. }) => Ok(Found::Guest(pid)),
            Err(error) if is_gone(&error) => Ok(Found::Nothing),
            Err(error) => {
                let what = format!(
                    "a machine has its attach socket at {} and does not answer",
                    socket.display()
                );
                Err(StandbyError::new(what, error))
            }
        };
    }
}

/// Nobody listens, or not any more.
fn is_gone(error: &ClientError) -> bool {
    match error {
        ClientError::Connect { source, .. } => {
            matches!(source.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused)
        }
        ClientError::Channel(ChannelError::Closed) => true,
        _ => false,
    }
}

/// A VMM in the role of a standby.
pub(super) struct Machine {
    pub(super) process: Process,
    client: Client,
}

impl Machine {
    /// Starts the operator's command and waits for its welcome.
    pub(super) fn start(
        info: &MachineInfo,
        folder: &Path,
        options: &StandbyOptions,
    ) -> Result<Self, StandbyError> {
        let failed =
            |source| StandbyError::new(format!("could not use the folder {}", folder.display()), source);
        if folder.exists() {
            fs::remove_dir_all(folder).map_err(failed)?;
        }
        fs::create_dir_all(folder).map_err(failed)?;
        let socket = socket(folder);
        let mut argv = options.command.clone();
        argv.extend(["--attach".to_owned(), socket.display().to_string()]);
        for nic in &info.nics {
            argv.extend(["--tap".to_owned(), nic.tap.clone()]);
        }
        let process = Process::spawn(&info.vmm, &options.launcher, &argv, folder)?;
        let (process, client, welcome) = connect(process, &socket, options)?;
        fault::point("standby.started");
        check(info, &welcome)?;
        Ok(Self { process, client })
    }

    /// Has it build the machine on these files. A private machine leaves them as they are.
    pub(super) fn build(
        &mut self,
        info: &MachineInfo,
        ram: &[PathBuf],
        private: bool,
    ) -> Result<(), StandbyError> {
        let open = |path: &PathBuf| {
            let opened = OpenOptions::new().read(true).write(!private).open(path);
            opened.map_err(|error| StandbyError::new(format!("could not open {}", path.display()), error))
        };
        let files = ram.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let fds: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        let built = self.client.prepare(info, &fds, private);
        built.map_err(|error| self.failed("the standby could not build the machine", error))
    }

    /// Has it load a state. The guest does not run.
    pub(super) fn restore(&mut self, state: &[u8]) -> Result<(), StandbyError> {
        let restored = self.client.restore(state);
        restored
            .map(drop)
            .map_err(|error| self.failed("the standby could not load the checkpoint", error))
    }

    /// Lets the guest run.
    pub(super) fn activate(&mut self) -> Result<(), StandbyError> {
        let activated = self.client.activate();
        activated
            .map(drop)
            .map_err(|error| self.failed("the standby could not let the guest run", error))
    }

    /// Its process, which outlives us, without our connection.
    pub(super) fn leave(self) -> Process {
        let Self { mut process, client } = self;
        drop(client);
        process.outlive();
        process
    }

    fn failed(&mut self, what: &str, error: ClientError) -> StandbyError {
        if !self.process.is_alive() {
            let said = self.process.stderr();
            return StandbyError::new(format!("{what}: it ended ({said})"), error);
        }
        self.process.error(&format!("{what}: {error}"), error)
    }
}

fn connect(
    mut process: Process,
    socket: &Path,
    options: &StandbyOptions,
) -> Result<(Process, Client, Welcome), StandbyError> {
    let deadline = Instant::now() + options.start_timeout;
    loop {
        if !process.is_alive() {
            return Err(StandbyError::plain(format!(
                "the standby {} ended at once: {}",
                options.command.join(" "),
                process.stderr()
            )));
        }
        let error = match Client::connect(socket, NAME, options.load_timeout) {
            Ok((mut client, attachment)) => {
                client.set_reply_limit(options.load_timeout);
                return Ok((process, client, attachment.welcome));
            }
            Err(error) => error,
        };
        if !is_gone(&error) || Instant::now() >= deadline {
            return Err(process.error("the standby's attach socket cannot be used", error));
        }
        std::thread::sleep(POLL);
    }
}

/// State is known to load in the same version of the same VMM only.
fn check(info: &MachineInfo, welcome: &Welcome) -> Result<(), StandbyError> {
    if (&info.vmm, &info.vmm_version) != (&welcome.vmm, &welcome.vmm_version) {
        return Err(StandbyError::plain(format!(
            "the primary runs {} {} and the standby's command here is {} {}: install the same version on both (setting vmm)",
            info.vmm, info.vmm_version, welcome.vmm, welcome.vmm_version
        )));
    }
    if welcome.role != Role::Empty {
        return Err(StandbyError::plain(
            "the standby's command started a machine of its own instead of waiting for one (setting vmm)",
        ));
    }
    Ok(())
}
