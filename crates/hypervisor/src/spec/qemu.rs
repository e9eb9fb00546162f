//! What is QEMU's alone in the description of a machine.

use std::path::PathBuf;

use romulus_types::{Digest, RamBlock};
use serde::{Deserialize, Serialize};

use super::{ITEMS_MAX, SpecError, refuse_if};
use crate::qemu::cpu::CpuFeatures;
use crate::qemu::stream::{MACHINE_NAME_BYTES_MAX, Template};

/// Most arguments of a command line.
pub const ARGUMENTS_MAX: usize = 4096;

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

/// A machine of stock QEMU's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuMachine {
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// The type of its vCPUs, such as `qemu64-x86_64-cpu`.
    pub cpu_model: String,
    /// What these have; `None` from a primary that does not say.
    #[serde(default)]
    pub cpu_features: Option<CpuFeatures>,
    /// The command line of the primary's process, the program's name first.
    pub argv: Vec<String>,
    /// The working directory of that process, to which relative paths refer.
    pub cwd: PathBuf,
    /// The files that it needs.
    pub files: Vec<FileUse>,
    /// What a stream to a standby holds besides memory and device state.
    pub template: Template,
}

impl QemuMachine {
    pub(super) fn check(&self, blocks: &[RamBlock]) -> Result<(), SpecError> {
        let same = blocks.len() == self.template.blocks.len()
            && blocks
                .iter()
                .zip(&self.template.blocks)
                .all(|(a, b)| a.name == b.name && a.bytes == b.bytes);
        refuse_if(!same, "the stream's blocks are not the layout's")?;
        let name_bytes = self.template.machine.len();
        refuse_if(
            name_bytes == 0 || name_bytes > MACHINE_NAME_BYTES_MAX,
            "the machine's name",
        )?;
        refuse_if(self.argv.len() > ARGUMENTS_MAX, "too many arguments")?;
        refuse_if(self.argv.is_empty(), "it has no command line")?;
        refuse_if(self.files.len() > ITEMS_MAX, "too many files")?;
        refuse_if(
            self.cpu_features
                .as_ref()
                .is_some_and(|features| !features.is_sane()),
            "too many or too long CPU features",
        )?;
        refuse_if(
            self.argv.iter().any(|a| a.contains('\0')),
            "an argument holds a zero byte",
        )
    }
}
