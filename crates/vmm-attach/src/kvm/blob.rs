//! The bytes of a saved machine: a fixed header, then sections. Pure; everything that is read is checked first.
//!
//! ```text
//!   0   4  magic "RVMS"            all numbers little-endian
//!   4   2  version
//!   6   2  vCPUs
//!   8   4  bytes of the sections
//!   12  4  CRC-32 of the 12 bytes before and of the sections
//!   16     sections: kind u16, index u16, bytes u32, then the bytes; no padding
//! ```
//!
//! A section appears once. A kind that is not known is refused: there are no optional ones.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The first bytes of every blob.
pub const MAGIC: [u8; 4] = *b"RVMS";
/// The version that is written, and the only one that is read.
pub const VERSION: u16 = 1;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 16;
/// Most bytes of a whole blob.
pub const BLOB_BYTES_MAX: usize = 4 << 20;
/// Most vCPUs of a machine.
pub const VCPUS_MAX: u16 = 64;
/// Most bytes of what the VMM's devices save.
pub const DEVICE_BYTES_MAX: usize = 1 << 20;

const SECTION_HEADER_BYTES: usize = 8;

/// What a section holds: a struct of the kernel's API as it is, or what is said here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// `kvm_regs`; the index of this and the next is the vCPU.
    Registers = 1,
    /// `kvm_sregs`.
    SpecialRegisters = 2,
    /// The XSAVE area.
    Xsave = 3,
    /// `kvm_xcrs`.
    Xcrs = 4,
    /// `kvm_msr_entry`, many.
    Msrs = 5,
    /// `kvm_lapic_state`.
    Lapic = 6,
    /// `kvm_vcpu_events`.
    Events = 7,
    /// `kvm_mp_state`.
    MpState = 8,
    /// `kvm_debugregs`.
    DebugRegisters = 9,
    /// Frequency and offset of the TSC.
    Tsc = 10,
    /// `kvm_cpuid_entry2`, many.
    Cpuid = 11,
    /// `kvm_irqchip`; the index is the chip.
    Irqchip = 32,
    /// `kvm_pit_state2`.
    Pit = 33,
    /// The VM's clock and the wall clock.
    Clock = 34,
    /// What the VMM's devices saved, theirs to understand.
    Devices = 64,
}

const KINDS: [Kind; 15] = [
    Kind::Registers,
    Kind::SpecialRegisters,
    Kind::Xsave,
    Kind::Xcrs,
    Kind::Msrs,
    Kind::Lapic,
    Kind::Events,
    Kind::MpState,
    Kind::DebugRegisters,
    Kind::Tsc,
    Kind::Cpuid,
    Kind::Irqchip,
    Kind::Pit,
    Kind::Clock,
    Kind::Devices,
];

/// Most bytes of one section of this kind.
fn bytes_max(kind: Kind) -> usize {
    match kind {
        Kind::Xsave => 64 << 10,
        Kind::Cpuid => 256 * 40,
        Kind::Devices => DEVICE_BYTES_MAX,
        _ => 4096,
    }
}

/// What is wrong with a blob.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlobError {
    /// It is longer than any of ours, or than it says.
    #[error("the machine's state has {bytes} bytes, {limit} are allowed")]
    TooLong {
        /// What it has or would have.
        bytes: usize,
        /// What is allowed.
        limit: usize,
    },
    /// It ends in the middle of something.
    #[error("the machine's state ends too early, at byte {0}")]
    Truncated(usize),
    /// It does not begin as a blob does.
    #[error("these bytes are not a machine's state")]
    Magic,
    /// Another version wrote it.
    #[error(
        "the machine's state has version {0}, this program reads {VERSION}; use the same version on both sides"
    )]
    Version(u16),
    /// It was damaged on the way.
    #[error("the machine's state is damaged (its CRC-32 does not fit)")]
    Checksum,
    /// No machine of ours has so many.
    #[error("the machine's state is of {0} vCPUs, 1 to {VCPUS_MAX} are possible")]
    Vcpus(u16),
    /// A newer program wrote a section that has to be understood.
    #[error("the machine's state has a section of unknown kind {0}; use the same version on both sides")]
    UnknownSection(u16),
    /// A section that appears twice.
    #[error("the machine's state has section {kind:?} {index} twice")]
    Repeated {
        /// Its kind.
        kind: Kind,
        /// Its index.
        index: u16,
    },
    /// A section that has to be there and is not.
    #[error("the machine's state has no section {kind:?} {index}")]
    Missing {
        /// Its kind.
        kind: Kind,
        /// Its index.
        index: u16,
    },
    /// A section that does not have the length of what it holds.
    #[error("section {kind:?} {index} of the machine's state has {bytes} bytes, which is no length for it")]
    Length {
        /// Its kind.
        kind: Kind,
        /// Its index.
        index: u16,
        /// Its length.
        bytes: usize,
    },
}

/// Writes a blob into a buffer that is kept from one time to the next.
#[derive(Debug)]
pub struct BlobWriter<'a> {
    out: &'a mut Vec<u8>,
}

impl<'a> BlobWriter<'a> {
    /// Empties `out` and begins a blob for a machine with `vcpus` vCPUs.
    pub fn begin(out: &'a mut Vec<u8>, vcpus: u16) -> Self {
        out.clear();
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&vcpus.to_le_bytes());
        out.extend_from_slice(&[0; 8]);
        Self { out }
    }

    /// Writes a section.
    pub fn section(&mut self, kind: Kind, index: u16, bytes: &[u8]) {
        self.section_with(kind, index, |out| out.extend_from_slice(bytes));
    }

    /// Writes a struct of the kernel's as a section.
    pub fn plain<T: IntoBytes + Immutable>(&mut self, kind: Kind, index: u16, value: &T) {
        self.section(kind, index, value.as_bytes());
    }

    /// Writes a section whose bytes `fill` appends. Returns what `fill` returns.
    pub fn section_with<R>(&mut self, kind: Kind, index: u16, fill: impl FnOnce(&mut Vec<u8>) -> R) -> R {
        self.out.extend_from_slice(&(kind as u16).to_le_bytes());
        self.out.extend_from_slice(&index.to_le_bytes());
        self.out.extend_from_slice(&[0; 4]);
        let start = self.out.len();
        let result = fill(self.out);
        let bytes = u32::try_from(self.out.len() - start).expect("sections are far below 4 GiB");
        self.out[start - 4..start].copy_from_slice(&bytes.to_le_bytes());
        result
    }

    /// Completes the header.
    ///
    /// # Errors
    /// [`BlobError::TooLong`].
    pub fn finish(self) -> Result<(), BlobError> {
        if self.out.len() > BLOB_BYTES_MAX {
            return Err(BlobError::TooLong {
                bytes: self.out.len(),
                limit: BLOB_BYTES_MAX,
            });
        }
        let bytes = u32::try_from(self.out.len() - HEADER_BYTES).expect("checked above");
        self.out[8..12].copy_from_slice(&bytes.to_le_bytes());
        let crc = checksum(self.out);
        self.out[12..16].copy_from_slice(&crc.to_le_bytes());
        Ok(())
    }
}

type Section<'a> = (Kind, u16, &'a [u8]);

/// A blob that was read: where each section lies.
#[derive(Debug)]
pub struct Blob<'a> {
    vcpus: u16,
    sections: Vec<Section<'a>>,
}

impl<'a> Blob<'a> {
    /// Checks a blob. Costs memory for no more than the sections that a machine of this many vCPUs can have.
    ///
    /// # Errors
    /// [`BlobError`] says what is wrong.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, BlobError> {
        if bytes.len() > BLOB_BYTES_MAX {
            return Err(BlobError::TooLong {
                bytes: bytes.len(),
                limit: BLOB_BYTES_MAX,
            });
        }
        if bytes.len() < HEADER_BYTES {
            return Err(BlobError::Truncated(bytes.len()));
        }
        if bytes[..4] != MAGIC {
            return Err(BlobError::Magic);
        }
        let version = u16_at(bytes, 4);
        if version != VERSION {
            return Err(BlobError::Version(version));
        }
        let length = usize::try_from(u32_at(bytes, 8)).expect("64-bit hosts only");
        match bytes.len() - HEADER_BYTES {
            have if have < length => return Err(BlobError::Truncated(bytes.len())),
            have if have > length => {
                return Err(BlobError::TooLong {
                    bytes: have,
                    limit: length,
                });
            }
            _ => {}
        }
        if u32_at(bytes, 12) != checksum(bytes) {
            return Err(BlobError::Checksum);
        }
        let vcpus = u16_at(bytes, 6);
        if !(1..=VCPUS_MAX).contains(&vcpus) {
            return Err(BlobError::Vcpus(vcpus));
        }
        let sections = sections(bytes)?;
        Ok(Self { vcpus, sections })
    }

    /// vCPUs of the machine.
    pub fn vcpus(&self) -> u16 {
        self.vcpus
    }

    /// All sections, in the order in which they were written.
    pub fn sections(&self) -> impl Iterator<Item = (Kind, u16, &'a [u8])> + '_ {
        self.sections.iter().copied()
    }

    /// The bytes of a section.
    ///
    /// # Errors
    /// [`BlobError::Missing`].
    pub fn section(&self, kind: Kind, index: u16) -> Result<&'a [u8], BlobError> {
        self.sections
            .iter()
            .find(|(k, i, _)| (*k, *i) == (kind, index))
            .map(|(_, _, bytes)| *bytes)
            .ok_or(BlobError::Missing { kind, index })
    }

    /// A section that holds one struct.
    ///
    /// # Errors
    /// [`BlobError::Missing`], [`BlobError::Length`].
    pub fn plain<T: FromBytes>(&self, kind: Kind, index: u16) -> Result<T, BlobError> {
        let bytes = self.section(kind, index)?;
        T::read_from_bytes(bytes).map_err(|_| BlobError::Length {
            kind,
            index,
            bytes: bytes.len(),
        })
    }

    /// A section that holds structs one behind the other, at most `limit`.
    ///
    /// # Errors
    /// [`BlobError::Missing`], [`BlobError::Length`].
    pub fn list<T: FromBytes>(&self, kind: Kind, index: u16, limit: usize) -> Result<Vec<T>, BlobError> {
        let bytes = self.section(kind, index)?;
        if !bytes.len().is_multiple_of(size_of::<T>()) || bytes.len() / size_of::<T>() > limit {
            return Err(BlobError::Length {
                kind,
                index,
                bytes: bytes.len(),
            });
        }
        Ok(bytes
            .chunks_exact(size_of::<T>())
            .map(|item| T::read_from_bytes(item).expect("chunks of just this size"))
            .collect())
    }
}

fn sections(bytes: &[u8]) -> Result<Vec<Section<'_>>, BlobError> {
    let mut sections: Vec<Section<'_>> = Vec::new();
    let mut at = HEADER_BYTES;
    while at < bytes.len() {
        if bytes.len() - at < SECTION_HEADER_BYTES {
            return Err(BlobError::Truncated(at));
        }
        let number = u16_at(bytes, at);
        let kind = KINDS.into_iter().find(|kind| *kind as u16 == number);
        let kind = kind.ok_or(BlobError::UnknownSection(number))?;
        let index = u16_at(bytes, at + 2);
        let length = usize::try_from(u32_at(bytes, at + 4)).expect("64-bit hosts only");
        at += SECTION_HEADER_BYTES;
        if length > bytes_max(kind) || index >= VCPUS_MAX {
            return Err(BlobError::Length {
                kind,
                index,
                bytes: length,
            });
        }
        if length > bytes.len() - at {
            return Err(BlobError::Truncated(at));
        }
        if sections.iter().any(|(k, i, _)| (*k, *i) == (kind, index)) {
            return Err(BlobError::Repeated { kind, index });
        }
        sections.push((kind, index, &bytes[at..at + length]));
        at += length;
    }
    Ok(sections)
}

fn checksum(blob: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&blob[..12]);
    hasher.update(&blob[HEADER_BYTES..]);
    hasher.finalize()
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    fn blob(sections: &[(Kind, u16, &[u8])]) -> Vec<u8> {
        let mut out = vec![1, 2, 3];
        let mut writer = BlobWriter::begin(&mut out, 2);
        for (kind, index, bytes) in sections {
            writer.section(*kind, *index, bytes);
        }
        writer.finish().unwrap();
        out
    }

    /// Changes a blob and makes its checksum fit again.
    fn forged(mut bytes: Vec<u8>, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        change(&mut bytes);
        let crc = checksum(&bytes);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn error(bytes: &[u8]) -> BlobError {
        Blob::parse(bytes).unwrap_err()
    }

    #[test]
    fn what_was_written_is_read() {
        let bytes = blob(&[
            (Kind::Pit, 0, b"pit"),
            (Kind::Msrs, 1, &[7; 32]),
            (Kind::Devices, 0, b""),
        ]);
        let read = Blob::parse(&bytes).unwrap();
        assert_eq!(read.vcpus(), 2);
        assert_eq!(read.section(Kind::Pit, 0).unwrap(), b"pit");
        assert_eq!(read.list::<[u8; 16]>(Kind::Msrs, 1, 2).unwrap(), [[7; 16]; 2]);
        assert_eq!(read.section(Kind::Devices, 0).unwrap(), b"");
        let missing = BlobError::Missing {
            kind: Kind::Msrs,
            index: 0,
        };
        assert_eq!(read.section(Kind::Msrs, 0).unwrap_err(), missing);
        assert!(matches!(
            read.plain::<u64>(Kind::Pit, 0),
            Err(BlobError::Length { bytes: 3, .. })
        ));
        assert!(matches!(
            read.list::<[u8; 16]>(Kind::Msrs, 1, 1),
            Err(BlobError::Length { .. })
        ));
        assert!(matches!(
            read.list::<[u8; 5]>(Kind::Msrs, 1, 9),
            Err(BlobError::Length { .. })
        ));
    }

    #[test]
    fn each_way_of_being_wrong_has_its_name() {
        let good = blob(&[(Kind::Pit, 0, b"pit")]);
        assert_eq!(error(&good[..10]), BlobError::Truncated(10));
        assert_eq!(
            error(&good[..good.len() - 1]),
            BlobError::Truncated(good.len() - 1)
        );
        assert!(matches!(
            error(&[&good[..], &[0]].concat()),
            BlobError::TooLong { .. }
        ));
        assert!(matches!(
            error(&vec![0; BLOB_BYTES_MAX + 1]),
            BlobError::TooLong { .. }
        ));
        assert_eq!(error(&forged(good.clone(), |b| b[0] = b'X')), BlobError::Magic);
        assert_eq!(error(&forged(good.clone(), |b| b[4] = 2)), BlobError::Version(2));
        assert_eq!(error(&forged(good.clone(), |b| b[6] = 0)), BlobError::Vcpus(0));
        assert_eq!(error(&forged(good.clone(), |b| b[6] = 65)), BlobError::Vcpus(65));
        assert_eq!(
            error(&forged(good.clone(), |b| b[16] = 200)),
            BlobError::UnknownSection(200)
        );
        assert!(matches!(
            error(&forged(good.clone(), |b| b[18] = 64)),
            BlobError::Length { .. }
        ));
        assert_eq!(
            error(&forged(good.clone(), |b| b[20] = 4)),
            BlobError::Truncated(24)
        );
        assert!(matches!(
            error(&forged(good, |b| b[22] = 9)),
            BlobError::Length { .. }
        ));
        let twice = blob(&[(Kind::Pit, 0, b"a"), (Kind::Pit, 0, b"b")]);
        assert!(matches!(error(&twice), BlobError::Repeated { .. }));
    }

    #[test]
    fn a_single_wrong_bit_is_found() {
        let good = blob(&[(Kind::Pit, 0, b"pit"), (Kind::Devices, 0, &[9; 100])]);
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Blob::parse(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_blob_over_the_limit_is_not_written() {
        let mut out = Vec::new();
        let mut writer = BlobWriter::begin(&mut out, 1);
        writer.section(Kind::Devices, 0, &vec![0; BLOB_BYTES_MAX]);
        assert!(matches!(writer.finish(), Err(BlobError::TooLong { .. })));
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_read_but_never_panic(bytes in prop::collection::vec(any::<u8>(), 16..200), vcpus in 0u8..4) {
            let length = u32::try_from(bytes.len() - HEADER_BYTES).unwrap();
            let bytes = forged(bytes, |b| {
                b[..4].copy_from_slice(&MAGIC);
                b[4..8].copy_from_slice(&[1, 0, vcpus, 0]);
                b[8..12].copy_from_slice(&length.to_le_bytes());
            });
            let _ = Blob::parse(&bytes);
        }
    }
}
