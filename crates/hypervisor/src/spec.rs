//! What a backup must know of the primary's machine to run it: sent once a session, kept beside the image.
//!
//! A spec comes from a peer or from a file, so it is decoded with a size limit and checked before anything uses it.
//! It says what the primary *has*; what the standby is started with follows from it by written rules
//! (`qemu::cmdline`), never from the peer's words directly.

use std::path::PathBuf;

use romulus_types::{BlockId, Digest, RamLayout};
use serde::{Deserialize, Serialize};

use crate::qemu::stream::{MACHINE_NAME_BYTES_MAX, Template};

/// Largest encoded spec, in bytes.
pub const SPEC_BYTES_MAX: usize = 4 << 20;
/// The version of the encoding; another one is refused.
pub const SPEC_FORMAT: u32 = 1;
/// Most arguments of a command line.
pub const ARGUMENTS_MAX: usize = 4096;
/// Most NICs, files and disks, each.
pub const ITEMS_MAX: usize = 256;

/// Why a spec was refused.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Over the limit.
    #[error("the machine's description has {0} bytes, over the limit of {SPEC_BYTES_MAX}")]
    TooLarge(usize),
    /// Not what this version writes.
    #[error("the machine's description cannot be read; are both hosts on the same release?")]
    Json(#[from] serde_json::Error),
    /// Another version of the encoding.
    #[error("the machine's description has format {0}, this release knows {SPEC_FORMAT}: upgrade both hosts")]
    Format(u32),
    /// Parts that contradict each other or pass a limit.
    #[error("the machine's description contradicts itself: {0}")]
    Invalid(&'static str),
}

/// Who runs the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hypervisor {
    /// Stock QEMU.
    Qemu,
    /// The fake of `fake`, for tests of what is above.
    Fake,
}

/// One network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// The hypervisor's name of the card.
    pub name: String,
    /// Its hardware address.
    pub mac: [u8; 6],
}

/// One file that the command line names and the machine needs: kernel, initrd, firmware, ROM, read-only disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileUse {
    /// Its path, absolute; the backup looks for it at the same place.
    pub path: PathBuf,
    /// Its length in bytes.
    pub bytes: u64,
    /// XXH3-128 of its content; `None` for one too large to be read at attach, which is compared by its length only.
    pub digest: Option<Digest>,
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The id on the command line, or the node's name.
    pub id: String,
    /// What the guest sees, in bytes.
    pub bytes: u64,
}

/// A machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSpec {
    /// [`SPEC_FORMAT`].
    pub format: u32,
    /// Who runs it.
    pub hypervisor: Hypervisor,
    /// The hypervisor's version, such as `7.2.22`.
    pub version: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// The type of its vCPUs, such as `qemu64-x86_64-cpu`.
    pub cpu_model: String,
    /// The model name of the primary's processor, which `-cpu host` shows to the guest.
    pub host_cpu: String,
    /// How many vCPUs it has.
    pub vcpus: u32,
    /// Its memory, in the order of the stream.
    pub layout: RamLayout,
    /// The main block: a standby maps the image's file of it as its RAM. The others go through the stream.
    pub main: BlockId,
    /// The command line of the primary's process, the program's name first.
    pub argv: Vec<String>,
    /// The working directory of that process, to which relative paths refer.
    pub cwd: PathBuf,
    /// Its network cards.
    pub nics: Vec<Nic>,
    /// The files that it needs.
    pub files: Vec<FileUse>,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// Ids of network, character and block backends whose content the operator declared disposable.
    pub disposable: Vec<String>,
    /// What a stream to a standby holds besides memory and device state.
    pub template: Template,
}

impl MachineSpec {
    /// Decodes and checks a spec.
    ///
    /// # Errors
    /// [`SpecError`] names the limit or the contradiction.
    pub fn from_json(bytes: &[u8]) -> Result<Self, SpecError> {
        if bytes.len() > SPEC_BYTES_MAX {
            return Err(SpecError::TooLarge(bytes.len()));
        }
        #[derive(Deserialize)]
        struct Head {
            format: u32,
        }
        // The version first: a newer spec may not decode as ours at all.
        let head: Head = serde_json::from_slice(bytes)?;
        if head.format != SPEC_FORMAT {
            return Err(SpecError::Format(head.format));
        }
        let spec: Self = serde_json::from_slice(bytes)?;
        spec.check()?;
        Ok(spec)
    }

    /// Encodes it.
    ///
    /// # Panics
    /// Never: every field has a JSON form. (Paths were read as text.)
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a spec has a JSON form")
    }

    /// The name of the main block.
    pub fn main_name(&self) -> &str {
        &self.layout.blocks()[usize::from(self.main.0)].name
    }

    /// Length of the main block, in bytes.
    pub fn main_bytes(&self) -> u64 {
        self.layout.blocks()[usize::from(self.main.0)].bytes
    }

    /// Checks what the types do not.
    ///
    /// # Errors
    /// [`SpecError::Invalid`] names the contradiction.
    pub fn check(&self) -> Result<(), SpecError> {
        let invalid = |yes: bool, what| {
            if yes {
                Err(SpecError::Invalid(what))
            } else {
                Ok(())
            }
        };
        let blocks = self.layout.blocks();
        let same = blocks.len() == self.template.blocks.len()
            && blocks
                .iter()
                .zip(&self.template.blocks)
                .all(|(a, b)| a.name == b.name && a.bytes == b.bytes);
        invalid(
            usize::from(self.main.0) >= blocks.len(),
            "the main block is not in the layout",
        )?;
        invalid(!same, "the stream's blocks are not the layout's")?;
        let name_bytes = self.template.machine.len();
        invalid(
            name_bytes == 0 || name_bytes > MACHINE_NAME_BYTES_MAX,
            "the machine's name",
        )?;
        invalid(self.vcpus == 0, "it has no vCPU")?;
        invalid(self.argv.len() > ARGUMENTS_MAX, "too many arguments")?;
        let no_program = self.hypervisor == Hypervisor::Qemu && self.argv.is_empty();
        invalid(no_program, "it has no command line")?;
        let many = [
            self.nics.len(),
            self.files.len(),
            self.disks.len(),
            self.disposable.len(),
        ];
        invalid(
            many.iter().any(|count| *count > ITEMS_MAX),
            "too many NICs, files or disks",
        )?;
        invalid(
            self.argv.iter().any(|a| a.contains('\0')),
            "an argument holds a zero byte",
        )
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use romulus_types::RamBlock;

    use super::*;
    use crate::qemu::stream::StreamBlock;

    pub(crate) fn spec(argv: &[&str], blocks: &[(&str, u64)]) -> MachineSpec {
        let layout = blocks
            .iter()
            .map(|(name, bytes)| RamBlock {
                name: (*name).into(),
                bytes: *bytes,
            })
            .collect();
        let listed = |(name, bytes): &(&str, u64)| StreamBlock {
            name: (*name).into(),
            bytes: *bytes,
            gpa: None,
        };
        MachineSpec {
            format: SPEC_FORMAT,
            hypervisor: Hypervisor::Qemu,
            version: "7.2.22".into(),
            accelerator: "tcg".into(),
            cpu_model: "qemu64-x86_64-cpu".into(),
            host_cpu: "AMD EPYC".into(),
            vcpus: 1,
            layout: RamLayout::new(layout).unwrap(),
            main: BlockId(0),
            argv: argv.iter().map(|a| (*a).to_owned()).collect(),
            cwd: "/srv".into(),
            nics: vec![],
            files: vec![],
            disks: vec![],
            disposable: vec![],
            template: Template {
                machine: "pc-q35-7.2".into(),
                subsections: vec![],
                ram_section: 2,
                blocks: blocks.iter().map(listed).collect(),
                vmdesc: "{}".into(),
            },
        }
    }

    fn plain() -> MachineSpec {
        spec(
            &["qemu-system-x86_64", "-m", "128"],
            &[("pc.ram", 128 << 20), ("pc.bios", 1 << 18)],
        )
    }

    #[test]
    fn a_spec_survives_its_encoding() {
        assert_eq!(MachineSpec::from_json(&plain().to_json()).unwrap(), plain());
    }

    #[test]
    fn a_spec_that_contradicts_itself_is_refused() {
        let mut other_main = plain();
        other_main.main = BlockId(2);
        let mut other_blocks = plain();
        other_blocks.template.blocks.pop();
        let mut no_argv = plain();
        no_argv.argv.clear();
        for bad in [other_main, other_blocks, no_argv] {
            assert!(matches!(
                MachineSpec::from_json(&bad.to_json()),
                Err(SpecError::Invalid(_))
            ));
        }
    }

    #[test]
    fn another_format_and_too_many_bytes_are_named() {
        let mut newer = plain();
        newer.format = 2;
        assert!(matches!(
            MachineSpec::from_json(&newer.to_json()),
            Err(SpecError::Format(2))
        ));
        assert!(matches!(
            MachineSpec::from_json(&vec![b' '; SPEC_BYTES_MAX + 1]),
            Err(SpecError::TooLarge(_))
        ));
        assert!(matches!(MachineSpec::from_json(b"{"), Err(SpecError::Json(_))));
    }

    proptest! {
        #[test]
        fn damaged_specs_never_panic(at in any::<prop::sample::Index>(), byte: u8) {
            let mut bytes = plain().to_json();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = MachineSpec::from_json(&bytes);
        }
    }
}
