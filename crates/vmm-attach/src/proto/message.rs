//! The messages. All times are in nanoseconds; a point in time is one of CLOCK_MONOTONIC on the host that both ends share.

use serde::{Deserialize, Serialize};

use super::MachineInfo;

/// Longest text of a refusal, in bytes.
pub const TEXT_BYTES_MAX: usize = 1024;

/// The versions that one side speaks, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// The lowest.
    pub min: u16,
    /// The highest.
    pub max: u16,
}

/// Opens a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The versions that the client speaks.
    pub versions: Versions,
    /// What the client calls itself, for logs and for the refusal of another client.
    pub client: String,
}

/// Stops the guest for a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    /// After so long the VMM lets the guest run by itself. 1 to `Welcome::pause_limit_ns_max`.
    pub limit_ns: u64,
}

/// Stops the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Halt {
    /// It stays stopped whatever becomes of the client, and nothing but the end of the VMM ends it. Otherwise it runs on when the client
    /// dies, detaches, or says nothing for `Welcome::halt_limit_ns`.
    pub for_good: bool,
}

/// Builds a machine on the memory whose descriptors come along, one a region.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepare {
    /// The machine.
    pub machine: MachineInfo,
    /// Map the memory privately: a trial, which leaves the files as they are and can't be activated.
    pub private: bool,
}

/// Loads a state, whose descriptor comes along, into the machine that was prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restore {
    /// Its length, at most `Welcome::state_bytes_max`.
    pub state_bytes: u64,
}

/// What a client asks. Each is answered by the one reply of its name or by [`Reply::Error`]; `Pause` by two, `Alive` by none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// The first one of every connection. Answered by `Welcome`.
    Hello(Hello),
    /// Dirty tracking starts afresh: every later write is seen.
    Arm,
    /// Bring what was written into the shared bitmap, without a pause.
    Harvest,
    /// Answered by `Paused`, and then by `Captured`, when the state was saved.
    Pause(Pause),
    /// The end of a pause.
    Resume,
    /// Answered by `Halted`.
    Halt(Halt),
    /// The end of a halt. Answered by `Going`.
    Go,
    /// The client lives: a halt lasts on.
    Alive,
    /// Only in the role `Empty`.
    Prepare(Prepare),
    /// Only in the role `Prepared`. The guest does not run yet.
    Restore(Restore),
    /// After `Restore`: run.
    Activate,
    /// Ends the tracking; nothing is left behind.
    Detach,
}

impl Request {
    /// How many file descriptors come with it.
    pub fn descriptors(&self) -> usize {
        match self {
            Self::Prepare(prepare) => prepare.machine.regions.len(),
            Self::Restore(_) => 1,
            _ => 0,
        }
    }

    /// Its name, for errors and logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "Hello",
            Self::Arm => "Arm",
            Self::Harvest => "Harvest",
            Self::Pause(_) => "Pause",
            Self::Resume => "Resume",
            Self::Halt(_) => "Halt",
            Self::Go => "Go",
            Self::Alive => "Alive",
            Self::Prepare(_) => "Prepare",
            Self::Restore(_) => "Restore",
            Self::Activate => "Activate",
            Self::Detach => "Detach",
        }
    }
}

/// What a VMM is, when a client says hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// It has no machine, and waits for `Prepare`.
    Empty,
    /// It has a machine that never ran, and waits for `Restore`.
    Prepared,
    /// It has a guest.
    Running,
    /// Its guest was stopped for good: another host speaks for it.
    Halted,
}

/// The answer to `Hello`. With it come the descriptors of the regions in their order, of the dirty bitmap (when it has
/// bytes), and of the file that states are saved to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The version that is spoken from here on.
    pub version: u16,
    /// The VMM's name.
    pub vmm: String,
    /// Its version.
    pub vmm_version: String,
    /// What it is.
    pub role: Role,
    /// Its machine; there is none in the role `Empty`, and only there.
    pub machine: Option<MachineInfo>,
    /// Bytes of the dirty bitmap: [`MachineInfo::bitmap_bytes`], or 0 where nothing is tracked.
    pub bitmap_bytes: u64,
    /// Most bytes of a saved state.
    pub state_bytes_max: u64,
    /// Longest limit of a pause.
    pub pause_limit_ns_max: u64,
    /// How long a halt lasts without a word from the client.
    pub halt_limit_ns: u64,
}

/// The answer to `Harvest`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Harvested {
    /// Pages that the hypervisor reported, which are now in the bitmap.
    pub dirty_pages: u64,
    /// How long it took.
    pub harvest_ns: u64,
}

/// The first answer to `Pause`: vCPUs and devices stand still, and the bitmap is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Paused {
    /// Since when everything stands still.
    pub stopped_at_ns: u64,
    /// From the request until then.
    pub kick_ns: u64,
    /// How long the harvest took.
    pub harvest_ns: u64,
    /// Pages that the hypervisor reported.
    pub dirty_pages: u64,
}

/// The second answer to `Pause`: the state lies in the state file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Captured {
    /// Its length.
    pub state_bytes: u64,
    /// How long saving it took.
    pub capture_ns: u64,
}

/// The answer to `Resume`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resumed {
    /// When the guest was let go.
    pub resumed_at_ns: u64,
}

/// The answer to `Restore`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restored {
    /// How long it took.
    pub restore_ns: u64,
}

/// The answer to `Activate`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Activated {
    /// When the first vCPU entered the guest.
    pub first_entry_at_ns: u64,
}

/// Why a request was not done. As a number it travels unchanged through every version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "u16", into = "u16")]
pub enum ErrorCode {
    /// The two sides have no version in common.
    NoCommonVersion,
    /// Another client is attached.
    Busy,
    /// The message can't be understood. The VMM closes the connection.
    Malformed,
    /// This request does not belong here.
    WrongOrder,
    /// The file descriptors are too few, too many, of the wrong kind, or too small. The VMM closes the connection when their number is
    /// wrong.
    WrongDescriptors,
    /// A number is out of its range.
    OutOfRange,
    /// The guest was let go before, because the pause or the halt had lasted too long: what was copied since is void.
    PauseExpired,
    /// The machine changed since the client said hello: connect anew.
    MachineChanged,
    /// The VMM failed; the text says how. The guest runs, if it ran before.
    MachineFailed,
    /// The VMM can't do that.
    Unsupported,
    /// The machine is a trial on private memory: it is never activated.
    TrialOnly,
    /// The guest was stopped for good.
    HaltedForGood,
    /// A code of a later version.
    Other(u16),
}

const CODES: [ErrorCode; 12] = [
    ErrorCode::NoCommonVersion,
    ErrorCode::Busy,
    ErrorCode::Malformed,
    ErrorCode::WrongOrder,
    ErrorCode::WrongDescriptors,
    ErrorCode::OutOfRange,
    ErrorCode::PauseExpired,
    ErrorCode::MachineChanged,
    ErrorCode::MachineFailed,
    ErrorCode::Unsupported,
    ErrorCode::TrialOnly,
    ErrorCode::HaltedForGood,
];

impl From<u16> for ErrorCode {
    fn from(number: u16) -> Self {
        let known = usize::from(number).checked_sub(1).and_then(|at| CODES.get(at));
        known.copied().unwrap_or(Self::Other(number))
    }
}

impl From<ErrorCode> for u16 {
    fn from(code: ErrorCode) -> Self {
        match code {
            ErrorCode::NoCommonVersion => 1,
            ErrorCode::Busy => 2,
            ErrorCode::Malformed => 3,
            ErrorCode::WrongOrder => 4,
            ErrorCode::WrongDescriptors => 5,
            ErrorCode::OutOfRange => 6,
            ErrorCode::PauseExpired => 7,
            ErrorCode::MachineChanged => 8,
            ErrorCode::MachineFailed => 9,
            ErrorCode::Unsupported => 10,
            ErrorCode::TrialOnly => 11,
            ErrorCode::HaltedForGood => 12,
            ErrorCode::Other(number) => number,
        }
    }
}

/// A request was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Why.
    pub code: ErrorCode,
    /// What happened and what to do, for a person; at most [`TEXT_BYTES_MAX`] bytes.
    pub text: String,
}

impl Refusal {
    /// A refusal whose text is cut to its limit.
    pub fn new(code: ErrorCode, text: impl Into<String>) -> Self {
        let mut text = text.into();
        text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
        Self { code, text }
    }
}

/// What the VMM says unasked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// Somebody other than the client stopped the guest.
    Paused,
    /// Somebody other than the client let it run: another hand, or the limit of a halt.
    Resumed,
    /// It was reset.
    Reset,
    /// It powered itself off.
    PoweredOff,
    /// It crashed.
    Crashed,
    /// Memory, devices or vCPUs are not those of `Welcome` any more.
    MachineChanged,
}

/// What a VMM says.
#[expect(clippy::large_enum_variant, reason = "a Welcome comes once a connection")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// To `Hello`.
    Welcome(Welcome),
    /// To `Arm`.
    Armed,
    /// To `Harvest`.
    Harvested(Harvested),
    /// To `Pause`, first.
    Paused(Paused),
    /// To `Pause`, second.
    Captured(Captured),
    /// To `Resume`.
    Resumed(Resumed),
    /// To `Halt`.
    Halted,
    /// To `Go`.
    Going,
    /// To `Prepare`.
    Prepared,
    /// To `Restore`.
    Restored(Restored),
    /// To `Activate`.
    Activated(Activated),
    /// To `Detach`.
    Detached,
    /// To any request. In place of `Captured` it means that the guest runs and the pause is over.
    Error(Refusal),
    /// Unasked.
    Event(Event),
}

impl Reply {
    /// How many file descriptors come with it.
    pub fn descriptors(&self) -> usize {
        let Self::Welcome(welcome) = self else { return 0 };
        let regions = welcome
            .machine
            .as_ref()
            .map_or(0, |machine| machine.regions.len());
        regions + usize::from(welcome.bitmap_bytes > 0) + 1
    }

    /// Its name, for errors and logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Welcome(_) => "Welcome",
            Self::Armed => "Armed",
            Self::Harvested(_) => "Harvested",
            Self::Paused(_) => "Paused",
            Self::Captured(_) => "Captured",
            Self::Resumed(_) => "Resumed",
            Self::Halted => "Halted",
            Self::Going => "Going",
            Self::Prepared => "Prepared",
            Self::Restored(_) => "Restored",
            Self::Activated(_) => "Activated",
            Self::Detached => "Detached",
            Self::Error(_) => "Error",
            Self::Event(_) => "Event",
        }
    }
}
