//! What is a rust-vmm VMM's alone in the description of a machine.

use romulus_types::RamBlock;
use romulus_vmm_attach::proto::Tracking;
pub use romulus_vmm_attach::proto::{CONFIG_BYTES_MAX, NAME_BYTES_MAX};
use serde::{Deserialize, Serialize};

use super::{SpecError, refuse_if};

/// A machine of a VMM that embeds the attach library.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmMachine {
    /// The kind of VMM. It chooses among the commands that the backup's operator has set; nothing else of a peer's words does.
    pub vmm: String,
    /// How it tracks dirty pages.
    pub tracking: Tracking,
    /// Where each block of the layout begins in the guest's physical address space, in bytes.
    pub gpas: Vec<u64>,
    /// What a VMM of this kind needs to build the same machine; opaque to us.
    pub config: Vec<u8>,
}

impl KvmMachine {
    pub(super) fn check(&self, blocks: &[RamBlock]) -> Result<(), SpecError> {
        refuse_if(
            self.vmm.is_empty() || self.vmm.len() > NAME_BYTES_MAX,
            "the name of its VMM",
        )?;
        refuse_if(
            self.config.len() > CONFIG_BYTES_MAX,
            "its configuration is too large",
        )?;
        refuse_if(
            self.gpas.len() != blocks.len(),
            "as many addresses as blocks of memory",
        )?;
        let mut end = 0u64;
        for (gpa, block) in self.gpas.iter().zip(blocks) {
            refuse_if(*gpa < end, "its blocks of memory overlap or are out of order")?;
            let next = gpa.checked_add(block.bytes);
            end = next.ok_or(SpecError::Invalid(
                "a block of memory ends past the address space",
            ))?;
        }
        Ok(())
    }
}
