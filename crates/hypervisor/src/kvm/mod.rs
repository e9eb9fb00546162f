//! A VMM of the rust-vmm kind that embeds the attach library, as a source of checkpoints and as a standby.
//!
//! KVM's calls work only in the VMM's own process, so all that is done to the guest is asked of the VMM over its attach
//! socket (docs/src/attach-protocol.md); memory and dirty bitmap are shared.

pub mod source;
pub mod standby;
