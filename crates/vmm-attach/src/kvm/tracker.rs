//! Which pages the vCPUs wrote, asked of the kernel in one of three ways.
//!
//! | mode | how | costs the guest a fault at |
//! |---|---|---|
//! | `Log` | the dirty log; reading it protects the pages again | the first write to a page after each harvest |
//! | `Manual` | the dirty log; pages are protected again one by one, and hot ones are not | the same, hot pages excepted |
//! | `Ring` | a ring a vCPU, in which the kernel writes the pages | the same, and a full ring stops the vCPU |
//!
//! Invariant, in all of them: a bit reaches the shared bitmap only after its page is protected again, or while the guest
//! stands still. Whoever takes the bit then copies the page sees every write that was made under it; a later one is told of
//! again. A page that was told of and not protected is told of at the next harvest, whether it was written or not.
//!
//! What the VMM itself writes is not here: it is in the bitmap already ([`crate::memory::SharedBitmap`]).

use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, kvm_enable_cap};
use kvm_ioctls::{VcpuFd, VmFd};
use romulus_host_sys::SysError;
use romulus_host_sys::kvm::{DirtyRing, KvmSlots};

use super::hot::HotPages;
use crate::memory::DirtyBitmap;
use crate::proto;

/// `KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE` and `KVM_DIRTY_LOG_INITIALLY_SET`.
const MANUAL_FLAGS: u64 = 3;
/// Words of the log that are cleared in one call when tracking begins: 64 MiB of guest memory, so that the running
/// guest's faults do not wait long for the kernel's lock.
const ARM_WORDS: usize = 256;
/// Bytes of an entry of a ring, `struct kvm_dirty_gfn`.
const RING_ENTRY_BYTES: u64 = 16;

/// How the kernel is asked. A setting of the VMM, fixed when it creates the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// The plain log.
    Log,
    /// The log with manual protection and the exemption of hot pages.
    Manual(HotPageRule),
    /// A dirty ring a vCPU.
    Ring {
        /// Entries of each ring: a power of two from 1,024 to 65,536.
        entries: u32,
    },
}

/// Which pages [`Tracking::Manual`] does not protect again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HotPageRule {
    /// A page that was dirty at this many pauses in a row is hot: it stays writable, and counts as dirty each time.
    /// 0: never.
    pub hot_after: u8,
    /// At each pause one in this many of the hot pages is tried again: protected, and hot again at the next pause if
    /// it was written. At least 1.
    pub recheck_every: u16,
}

impl Default for HotPageRule {
    fn default() -> Self {
        Self {
            hot_after: 8,
            recheck_every: 64,
        }
    }
}

impl Default for Tracking {
    fn default() -> Self {
        Self::Manual(HotPageRule::default())
    }
}

impl Tracking {
    /// Asks the kernel for this mode. Right after the VM is created, before its vCPUs are.
    ///
    /// # Errors
    /// [`TrackError::Unsupported`], [`TrackError::Ring`].
    pub fn enable(self, vm: &VmFd) -> Result<(), TrackError> {
        let (cap, argument, mode) = match self {
            Self::Log => return Ok(()),
            Self::Manual(rule) if rule.recheck_every == 0 => return Err(TrackError::Recheck),
            Self::Manual(_) => (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, MANUAL_FLAGS, "manual"),
            Self::Ring { entries } if !(1024..=65_536).contains(&entries) || !entries.is_power_of_two() => {
                return Err(TrackError::Ring { entries });
            }
            Self::Ring { entries } => (
                KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
                u64::from(entries) * RING_ENTRY_BYTES,
                "ring",
            ),
        };
        let mut request = kvm_enable_cap {
            cap,
            ..Default::default()
        };
        request.args[0] = argument;
        vm.enable_cap(&request)
            .map_err(|source| TrackError::Unsupported { mode, source })
    }
}

/// Why dirty pages cannot be tracked.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// This kernel does not have the mode.
    #[error("this kernel does not do dirty tracking mode {mode:?} ({source}); choose another, such as log")]
    Unsupported {
        /// The mode.
        mode: &'static str,
        /// What it said.
        source: kvm_ioctls::Error,
    },
    /// A ring of a size that the kernel does not make.
    #[error("a dirty ring has a power of two of entries from 1024 to 65536, not {entries}")]
    Ring {
        /// What was asked for.
        entries: u32,
    },
    /// A rule that never ends.
    #[error("hot pages have to be tried again: recheck_every is at least 1")]
    Recheck,
    /// The kernel refused a call.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// The kernel was interrupted while it took a ring back.
    #[error(
        "{taken} entries were taken out of the dirty rings, but the kernel took only {reset} back; arm tracking again"
    )]
    RingReset {
        /// How many were taken out.
        taken: usize,
        /// How many it took back.
        reset: usize,
    },
    /// Nothing was armed.
    #[error("dirty tracking is not on; arm it first")]
    NotArmed,
}

/// When pages are harvested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The guest runs on.
    Live,
    /// The guest stands still: an epoch ends.
    Paused,
}

/// Tracks what the vCPUs of one VM write. Owns the VM's memory slots.
#[derive(Debug)]
pub struct DirtyTracker {
    slots: KvmSlots,
    regions: Vec<Region>,
    mode: Mode,
    armed: bool,
    /// A harvest failed: pages may have been lost with it.
    broken: bool,
    /// When the pages in the regions' bits were gathered, which are to be protected again.
    owed: Option<Moment>,
}

#[derive(Debug)]
struct Region {
    first_page: u64,
    /// The region's bits, as they are gathered.
    log: Vec<u64>,
}

#[derive(Debug)]
enum Mode {
    Log,
    Manual {
        /// One for each region.
        hot: Vec<HotPages>,
        /// What is to be protected again.
        clear: Vec<u64>,
    },
    Ring {
        rings: Vec<DirtyRing>,
        /// Entries that were taken out and not handed back yet.
        taken: usize,
    },
}

impl DirtyTracker {
    /// Prepares to track. `vcpus` are all of the VM's, which has been asked for this mode ([`Tracking::enable`]).
    ///
    /// # Errors
    /// The kernel's, when a ring cannot be mapped.
    pub fn new<'a>(
        slots: KvmSlots,
        tracking: Tracking,
        vcpus: impl IntoIterator<Item = &'a VcpuFd>,
    ) -> Result<Self, TrackError> {
        let mut first_page = 0;
        let mut regions = Vec::new();
        for pages in slots.region_pages() {
            let words = usize::try_from(pages.div_ceil(64)).expect("64-bit hosts only");
            regions.push(Region {
                first_page,
                log: vec![0; words],
            });
            first_page += pages;
        }
        let mode = match tracking {
            Tracking::Log => Mode::Log,
            Tracking::Manual(rule) => Mode::Manual {
                hot: regions
                    .iter()
                    .map(|region| HotPages::new(rule, region.log.len()))
                    .collect(),
                clear: Vec::new(),
            },
            Tracking::Ring { entries } => {
                let entries = usize::try_from(entries).expect("64-bit hosts only");
                let rings = vcpus.into_iter().map(|vcpu| DirtyRing::map(vcpu, entries));
                Mode::Ring {
                    rings: rings.collect::<Result<_, _>>()?,
                    taken: 0,
                }
            }
        };
        Ok(Self {
            slots,
            regions,
            mode,
            armed: false,
            broken: false,
            owed: None,
        })
    }

    /// Begins afresh: every write from here on will be told of, and nothing from before. The guest may run.
    ///
    /// # Errors
    /// The kernel's; tracking is then off.
    pub fn arm(&mut self) -> Result<(), TrackError> {
        self.disarm()?;
        self.slots.set_logging(true)?;
        self.armed = true;
        self.broken = false;
        if let Mode::Manual { hot, .. } = &mut self.mode {
            hot.iter_mut().for_each(HotPages::forget);
            let begun = self.clear_everything();
            if begun.is_err() {
                self.disarm()?;
            }
            return begun;
        }
        Ok(())
    }

    /// Ends tracking. The guest runs at full speed from here on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn disarm(&mut self) -> Result<(), TrackError> {
        if self.armed {
            self.slots.set_logging(false)?;
            self.owed = None;
            // Nothing of this time may be told of later.
            self.empty_rings()?;
            self.armed = false;
        }
        Ok(())
    }

    /// How it tracks, in the protocol's words.
    pub fn mode(&self) -> proto::Tracking {
        match self.mode {
            Mode::Log => proto::Tracking::Log,
            Mode::Manual { .. } => proto::Tracking::Manual,
            Mode::Ring { .. } => proto::Tracking::Ring,
        }
    }

    /// Empties full rings after a harvest that failed, so that the guest runs on; what they told of is lost, and the next
    /// harvest says so.
    pub(super) fn drain(&mut self) {
        self.broken = true;
        self.owed = None;
        if let Err(error) = self.empty_rings() {
            tracing::warn!(%error, "a dirty ring could not be emptied; the guest runs slowly");
        }
    }

    /// Whether tracking is on.
    pub fn armed(&self) -> bool {
        self.armed
    }

    /// Adds the pages that were written since the last harvest to `into`. With the guest standing still the bitmap
    /// is complete afterwards.
    ///
    /// # Errors
    /// The kernel's. Pages may have been lost with it, so there is no other harvest before tracking is armed again.
    pub fn harvest(&mut self, moment: Moment, into: &DirtyBitmap) -> Result<(), TrackError> {
        self.gather(moment)?;
        self.protect()?;
        self.tell(into);
        Ok(())
    }

    /// The same of a guest that stands still, without protecting the pages again: that takes longest, and they can be copied
    /// meanwhile. [`DirtyTracker::protect`] comes next, before the guest runs.
    ///
    /// # Errors
    /// As [`DirtyTracker::harvest`].
    pub fn harvest_still(&mut self, into: &DirtyBitmap) -> Result<(), TrackError> {
        self.gather(Moment::Paused)?;
        self.tell(into);
        Ok(())
    }

    /// Protects again what [`DirtyTracker::harvest_still`] told of, if that has not been done.
    ///
    /// # Errors
    /// As [`DirtyTracker::harvest`].
    pub fn protect(&mut self) -> Result<(), TrackError> {
        let Some(moment) = self.owed.take() else {
            return Ok(());
        };
        self.broken = true;
        match &mut self.mode {
            Mode::Log => {}
            Mode::Manual { hot, clear } => {
                for (slot, (region, hot)) in self.regions.iter().zip(hot).enumerate() {
                    hot.choose(moment, &region.log, clear);
                    clear_chosen(&self.slots, slot, clear)?;
                }
            }
            Mode::Ring { .. } => self.hand_rings_back()?,
        }
        self.broken = false;
        Ok(())
    }

    /// Reads what was written into the regions' bits.
    fn gather(&mut self, moment: Moment) -> Result<(), TrackError> {
        if !self.armed || self.broken {
            return Err(TrackError::NotArmed);
        }
        self.broken = true;
        match &self.mode {
            Mode::Ring { .. } => self.take_rings(),
            Mode::Log | Mode::Manual { .. } => {
                for (slot, region) in self.regions.iter_mut().enumerate() {
                    self.slots.dirty_log(slot, &mut region.log)?;
                }
            }
        }
        self.broken = false;
        self.owed = Some(moment);
        Ok(())
    }

    fn tell(&self, into: &DirtyBitmap) {
        for region in &self.regions {
            into.merge(region.first_page, &region.log);
        }
    }

    /// Empties the rings into the regions' bits.
    fn take_rings(&mut self) {
        let Mode::Ring { rings, taken } = &mut self.mode else {
            return;
        };
        if self.owed.is_none() {
            self.regions.iter_mut().for_each(|region| region.log.fill(0));
        }
        for ring in rings {
            *taken += ring.harvest(|slot, page| {
                let word = usize::try_from(page / 64).expect("64-bit hosts only");
                let slot = usize::try_from(slot).expect("64-bit hosts only");
                // The kernel knows our slots only, and only the pages in them.
                self.regions[slot].log[word] |= 1 << (page % 64);
            });
        }
    }

    /// Hands back what was taken out of the rings: the kernel protects those pages again.
    fn hand_rings_back(&mut self) -> Result<(), TrackError> {
        let Mode::Ring { taken, .. } = &mut self.mode else {
            return Ok(());
        };
        let taken = std::mem::take(taken);
        let reset = if taken > 0 {
            self.slots.reset_dirty_rings()?
        } else {
            0
        };
        // What was not handed back is not protected again: writes to it would not be told of.
        let reset = usize::try_from(reset).expect("64-bit hosts only");
        if reset < taken {
            return Err(TrackError::RingReset { taken, reset });
        }
        Ok(())
    }

    fn empty_rings(&mut self) -> Result<(), TrackError> {
        self.take_rings();
        self.hand_rings_back()
    }

    /// The log begins with all pages dirty and none protected: protects them all.
    fn clear_everything(&mut self) -> Result<(), TrackError> {
        for (slot, region) in self.regions.iter_mut().enumerate() {
            self.slots.dirty_log(slot, &mut region.log)?;
            for (part, words) in (0u64..).zip(region.log.chunks(ARM_WORDS)) {
                let first_page = part * ARM_WORDS as u64 * 64;
                self.slots.clear_dirty_log(slot, first_page, words)?;
            }
        }
        Ok(())
    }
}

/// Protects the chosen pages of a slot again: from the first word with a bit to the last, as the call costs time for
/// each word that it looks at.
fn clear_chosen(slots: &KvmSlots, slot: usize, chosen: &[u64]) -> Result<(), SysError> {
    let Some(first) = chosen.iter().position(|word| *word != 0) else {
        return Ok(());
    };
    let last = chosen.iter().rposition(|word| *word != 0).expect("there is one");
    slots.clear_dirty_log(slot, first as u64 * 64, &chosen[first..=last])
}
