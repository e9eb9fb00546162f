//! From the primary's command line to the standby's, by written rules.
//!
//! A standby must be the same machine to the guest and another process to its host. `rules` says for each option whether it
//! is kept, changed, left out or refused; what is not listed is refused by name, as a guess would surface in a takeover.
//! The rules are applied to a command line that came from a peer: nothing in it can name a program or a script to run or a
//! file to write, and each file that it reads must be one that the primary described by its digest.
//!
//! Applying the rules to a derived command line gives the same machine again, so that a guest that was taken over can be
//! protected to the next backup.

mod consoles;
mod machine;
mod net;
mod props;
mod rules;
mod storage;

use std::path::{Path, PathBuf};

use crate::spec::{MachineSpec, QemuMachine};

use props::Props;
use rules::{Fate, find};

/// The programs that a standby may be: the peer chooses among these, nothing else.
pub const PROGRAMS: &[&str] = &[
    "qemu-system-x86_64",
    "qemu-kvm",
    "kvm",
    "qemu-system-x86_64-microvm",
];

/// Why no standby can be derived.
#[derive(Debug, thiserror::Error)]
pub enum CmdlineError {
    /// The machine is another hypervisor's.
    #[error("the machine is not QEMU's, so it has no command line of QEMU's")]
    NotQemu,
    /// The program is none that we know.
    #[error("{0:?} is not a QEMU that a standby can be: {names}", names = PROGRAMS.join(", "))]
    Program(String),
    /// An argument that is no option.
    #[error("{0:?} stands alone on QEMU's command line; name disks by -drive or -blockdev")]
    Positional(String),
    /// An option without a rule.
    #[error(
        "QEMU's option -{0} has no rule (see standby-rules in the manual), so the machine cannot be protected"
    )]
    Unknown(String),
    /// The value is missing.
    #[error("QEMU's option -{0} lacks its value")]
    NoValue(String),
    /// An option that cannot be protected.
    #[error("QEMU's option -{option} cannot be protected: {why}")]
    Refused {
        /// The option with its value.
        option: String,
        /// Why and what to do.
        why: String,
    },
    /// The JSON form of an option cannot be read.
    #[error("an option in JSON cannot be read")]
    Json(#[source] serde_json::Error),
    /// Too many keys in one option.
    #[error("an option has too many keys")]
    TooManyKeys,
    /// A key that is too long.
    #[error("an option in JSON has a key of more than {0} bytes")]
    LongKey(usize),
    /// The main RAM block has a name that no memory backend can have.
    #[error("the guest's memory is the block {block:?}, but the command line names {backend:?}")]
    MainBlock {
        /// The block in the stream.
        block: String,
        /// The memory backend on the command line.
        backend: String,
    },
    /// The standby has too few or too many taps.
    #[error("the machine has {needed} tap network devices and the backup provides {given}")]
    Taps {
        /// On the command line.
        needed: usize,
        /// In the plan.
        given: usize,
    },
    /// A disposable disk of unknown size.
    #[error("the size of the disposable disk {0:?} is not known")]
    DiskSize(String),
}

/// What the backup provides for one standby.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The name of the VM, for the process list.
    pub name: String,
    /// The file of the main RAM block.
    pub main_ram: PathBuf,
    /// Whether the standby writes to that file, or keeps what it writes for itself (a trial).
    pub share: bool,
    /// One tap for each tap network device, in the order of the command line. They exist already.
    pub taps: Vec<String>,
    /// Where the standby listens for QMP.
    pub qmp: PathBuf,
    /// A log for the first serial line, or none.
    pub serial_log: Option<PathBuf>,
    /// A folder for files that only this standby has (writable firmware flash).
    pub private_dir: PathBuf,
    /// The model name of the backup's processor.
    pub host_cpu: String,
}

/// A file that the standby writes and that is made before it is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrivateFile {
    /// Its path, in [`Plan::private_dir`].
    pub path: PathBuf,
    /// Its length. Its content comes with the checkpoint.
    pub bytes: u64,
}

/// A standby's command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Derived {
    /// The program's name and its arguments.
    pub argv: Vec<String>,
    /// What differs from the primary, in words.
    pub changes: Vec<String>,
    /// Files that must be there with the primary's content.
    pub files: Vec<PathBuf>,
    /// Files to be made.
    pub private_files: Vec<PrivateFile>,
}

/// One option of a command line.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Given {
    name: String,
    value: Option<String>,
}

impl Given {
    fn value(&self) -> &str {
        self.value.as_deref().unwrap_or_default()
    }

    fn refuse(&self, why: impl Into<String>) -> CmdlineError {
        let option = if self.value().is_empty() {
            self.name.clone()
        } else {
            format!("{} {}", self.name, self.value())
        };
        CmdlineError::Refused {
            option,
            why: why.into(),
        }
    }
}

/// Splits arguments into options. `-opt` and `--opt` are the same.
fn parse(arguments: &[String]) -> Result<Vec<(Given, &'static rules::Rule)>, CmdlineError> {
    let mut options = Vec::new();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let name = match argument.strip_prefix("--").or_else(|| argument.strip_prefix('-')) {
            Some(name) if !name.is_empty() => name,
            _ => return Err(CmdlineError::Positional(argument.clone())),
        };
        let rule = find(name).ok_or_else(|| CmdlineError::Unknown(name.to_owned()))?;
        let value = if rule.value {
            Some(
                rest.next()
                    .ok_or_else(|| CmdlineError::NoValue(name.to_owned()))?
                    .clone(),
            )
        } else {
            None
        };
        options.push((
            Given {
                name: name.to_owned(),
                value,
            },
            rule,
        ));
    }
    Ok(options)
}

/// How many taps the machine needs, in the order in which a [`Plan`] lists them.
///
/// # Errors
/// [`CmdlineError`] when the command line cannot be read.
pub fn taps_needed(spec: &MachineSpec) -> Result<usize, CmdlineError> {
    let mut count = 0;
    for (given, rule) in parse(own(spec)?.argv.get(1..).unwrap_or_default())? {
        if rule.fate == Fate::Net && net::is_tap(&given)? {
            count += 1;
        }
    }
    Ok(count)
}

/// Files that the machine needs on both hosts, as absolute paths.
///
/// # Errors
/// [`CmdlineError`] when the machine cannot be protected.
pub fn files_needed(spec: &MachineSpec) -> Result<Vec<PathBuf>, CmdlineError> {
    Ok(derive(spec, &rehearsal(spec)?)?.files)
}

/// Checks that a standby can be derived, whatever its taps and files are.
///
/// # Errors
/// [`CmdlineError`] names the option that is in the way.
pub fn check(spec: &MachineSpec) -> Result<(), CmdlineError> {
    derive(spec, &rehearsal(spec)?).map(drop)
}

fn own(spec: &MachineSpec) -> Result<&QemuMachine, CmdlineError> {
    spec.qemu().ok_or(CmdlineError::NotQemu)
}

fn rehearsal(spec: &MachineSpec) -> Result<Plan, CmdlineError> {
    Ok(Plan {
        name: "rehearsal".into(),
        main_ram: "/ram".into(),
        share: false,
        taps: (0..taps_needed(spec)?).map(|n| format!("tap{n}")).collect(),
        qmp: "/qmp".into(),
        serial_log: None,
        private_dir: "/".into(),
        host_cpu: spec.host_cpu.clone(),
    })
}

/// Derives the standby's command line.
///
/// # Errors
/// [`CmdlineError`] names the option that is in the way.
pub fn derive(spec: &MachineSpec, plan: &Plan) -> Result<Derived, CmdlineError> {
    let own = own(spec)?;
    let program = own.argv.first().map(String::as_str).unwrap_or_default();
    let program = program.rsplit('/').next().unwrap_or_default();
    if !PROGRAMS.contains(&program) {
        return Err(CmdlineError::Program(program.to_owned()));
    }
    let options = parse(&own.argv[1..])?;
    let needed = taps_needed(spec)?;
    if needed != plan.taps.len() {
        return Err(CmdlineError::Taps {
            needed,
            given: plan.taps.len(),
        });
    }
    let mut derivation = Derivation::new(spec, own, plan, &options)?;
    for (given, rule) in &options {
        derivation.apply(given, rule)?;
    }
    derivation.finish(program)
}

/// A command line in the making.
struct Derivation<'a> {
    spec: &'a MachineSpec,
    /// The part of `spec` that is QEMU's.
    own: &'a QemuMachine,
    plan: &'a Plan,
    out: Vec<String>,
    changes: Vec<String>,
    files: Vec<PathBuf>,
    private_files: Vec<PrivateFile>,
    /// All `-machine` options, merged.
    machine: Props,
    taps_used: usize,
    net_given: bool,
    nodefaults: bool,
    serials: usize,
    drives: storage::Drives,
}

/// The value of `-qmp` for a monitor at this socket.
pub(super) fn monitor_value(socket: &Path) -> String {
    let socket = socket.display().to_string().replace(',', ",,");
    format!("unix:{socket},server=on,wait=off")
}

impl<'a> Derivation<'a> {
    fn new(
        spec: &'a MachineSpec,
        own: &'a QemuMachine,
        plan: &'a Plan,
        options: &[(Given, &rules::Rule)],
    ) -> Result<Self, CmdlineError> {
        let mut machine = Props::default();
        for (given, rule) in options {
            if rule.fate == Fate::Machine {
                machine.merge(Props::parse(given.value(), Some("type"))?);
            }
        }
        let blockdevs = options.iter().filter(|(_, rule)| rule.fate == Fate::Blockdev);
        let blockdevs = blockdevs
            .map(|(given, _)| Props::parse(given.value(), None))
            .collect::<Result<_, _>>()?;
        let drives = storage::Drives::new(&machine, blockdevs);
        Ok(Self {
            spec,
            own,
            plan,
            out: Vec::new(),
            changes: Vec::new(),
            files: Vec::new(),
            private_files: Vec::new(),
            machine,
            taps_used: 0,
            net_given: false,
            nodefaults: options.iter().any(|(given, _)| given.name == "nodefaults"),
            serials: 0,
            drives,
        })
    }

    fn apply(&mut self, given: &Given, rule: &rules::Rule) -> Result<(), CmdlineError> {
        match rule.fate {
            // Record and replay would write a file, and replay is not what a standby does.
            Fate::Keep if given.name == "icount" && given.value().contains("rr") => {
                return Err(given.refuse("record and replay is not supported"));
            }
            Fate::Keep => self.keep(given),
            // A folder: what the machine reads of it is in the guest's memory by now.
            Fate::KeepFile if given.name == "L" => {
                let path = self.own.cwd.join(given.value());
                self.put("L", path.display().to_string());
            }
            Fate::KeepFile => {
                let path = self.file(given.value());
                self.put(&given.name, path);
            }
            Fate::KeepFileKey => self.keep_file_key(given)?,
            Fate::Drop => self
                .changes
                .push(format!("-{} left out: {}", given.name, rule.why)),
            Fate::Refuse => return Err(given.refuse(rule.why)),
            Fate::Machine => {}
            Fate::Memory => self.memory(given)?,
            Fate::Cpu => self.cpu(given)?,
            Fate::Global => self.global(given)?,
            Fate::Object => self.object(given)?,
            Fate::Device => self.device(given)?,
            Fate::Net => self.net(given)?,
            Fate::Chardev => self.chardev(given)?,
            Fate::Console => self.console(given),
            Fate::Drive => self.drive(given)?,
            Fate::Blockdev => self.blockdev(given)?,
            Fate::Audio => self.audio(given)?,
            Fate::Nographic => {
                self.machine.set("graphics", "off");
                self.changes.push("-nographic becomes graphics=off".into());
            }
        }
        Ok(())
    }

    /// Takes an option over as it is.
    fn keep(&mut self, given: &Given) {
        self.out.push(format!("-{}", given.name));
        self.out.extend(given.value.clone());
    }

    fn put(&mut self, name: &str, value: impl Into<String>) {
        self.out.extend([format!("-{name}"), value.into()]);
    }

    /// Notes a file that must be there and returns its absolute path.
    fn file(&mut self, path: &str) -> String {
        let path = self.own.cwd.join(path);
        if !self.files.contains(&path) {
            self.files.push(path.clone());
        }
        path.display().to_string()
    }

    fn keep_file_key(&mut self, given: &Given) -> Result<(), CmdlineError> {
        let implied = (given.name == "fw_cfg").then_some("name");
        let mut props = Props::parse(given.value(), implied)?;
        // -acpitable calls it data, -smbios type=11 calls it path.
        for key in ["file", "data", "path"] {
            if let Some(path) = props.get(key).map(str::to_owned) {
                if path.contains(':') {
                    return Err(given.refuse("give each file an option of its own"));
                }
                let path = self.file(&path);
                props.set(key, path);
                self.put(&given.name, props.to_string());
                return Ok(());
            }
        }
        self.keep(given);
        Ok(())
    }

    fn is_disposable(&self, names: &[&str]) -> bool {
        self.spec
            .disposable
            .iter()
            .any(|declared| names.contains(&declared.as_str()))
    }

    fn finish(mut self, program: &str) -> Result<Derived, CmdlineError> {
        if !self.net_given && !self.nodefaults {
            self.default_net()?;
        }
        self.finish_machine()?;
        let mut argv = vec![
            program.to_owned(),
            "-name".to_owned(),
            format!("guest={}", self.plan.name),
        ];
        argv.append(&mut self.out);
        for (option, value) in [
            ("-display", "none"),
            ("-monitor", "none"),
            ("-qmp", &monitor_value(&self.plan.qmp)),
            ("-incoming", "defer"),
        ] {
            argv.extend([option.to_owned(), value.to_owned()]);
        }
        Ok(Derived {
            argv,
            changes: self.changes,
            files: self.files,
            private_files: self.private_files,
        })
    }
}

#[cfg(test)]
mod tests;
