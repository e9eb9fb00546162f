//! What a backup must know of the primary's machine to run it: sent once a session, kept beside the image.
//!
//! A spec comes from a peer or from a file, so it is decoded with a size limit and checked before anything uses it.
//! It says what the primary *has*; what the standby is started with follows from it by written rules
//! (`qemu::cmdline`; the agent's settings for a VMM), never from the peer's words directly.
//!
//! [`MachineSpec`] holds what every machine has; [`Hypervisor`] what only one kind of hypervisor has.

mod kvm;
mod qemu;

use romulus_types::{BlockId, RamLayout};
use serde::{Deserialize, Serialize};

pub use kvm::{CONFIG_BYTES_MAX, KvmMachine, NAME_BYTES_MAX};
pub use qemu::{ARGUMENTS_MAX, FileUse, QemuMachine};

/// Largest encoded spec, in bytes.
pub const SPEC_BYTES_MAX: usize = 4 << 20;
/// The version of the encoding; another one is refused.
pub const SPEC_FORMAT: u32 = 2;
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

/// Who runs the machine, and what only that hypervisor has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hypervisor {
    /// Stock QEMU.
    Qemu(QemuMachine),
    /// A VMM that embeds the attach library.
    Kvm(KvmMachine),
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
    /// The hypervisor's version, such as `7.2.22`.
    pub version: String,
    /// The model name of the primary's processor, for guests that see it.
    pub host_cpu: String,
    /// How many vCPUs it has.
    pub vcpus: u32,
    /// Its memory, in the hypervisor's order.
    pub layout: RamLayout,
    /// The main block. A QEMU standby maps the image's file of it as its RAM and gets the others through the stream; a
    /// VMM's maps them all.
    pub main: BlockId,
    /// Its network cards.
    pub nics: Vec<Nic>,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// Ids of network, character and block backends whose content the operator declared disposable.
    pub disposable: Vec<String>,
    /// Who runs it, and what is that one's alone.
    pub hypervisor: Hypervisor,
}

fn refuse_if(wrong: bool, what: &'static str) -> Result<(), SpecError> {
    if wrong {
        Err(SpecError::Invalid(what))
    } else {
        Ok(())
    }
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

    /// What is QEMU's, of a machine of QEMU's.
    pub fn qemu(&self) -> Option<&QemuMachine> {
        match &self.hypervisor {
            Hypervisor::Qemu(qemu) => Some(qemu),
            _ => None,
        }
    }

    /// The same, to be changed.
    pub fn qemu_mut(&mut self) -> Option<&mut QemuMachine> {
        match &mut self.hypervisor {
            Hypervisor::Qemu(qemu) => Some(qemu),
            _ => None,
        }
    }

    /// Checks what the types do not.
    ///
    /// # Errors
    /// [`SpecError::Invalid`] names the contradiction.
    pub fn check(&self) -> Result<(), SpecError> {
        let blocks = self.layout.blocks();
        refuse_if(
            usize::from(self.main.0) >= blocks.len(),
            "the main block is not in the layout",
        )?;
        refuse_if(self.vcpus == 0, "it has no vCPU")?;
        let many = [self.nics.len(), self.disks.len(), self.disposable.len()];
        refuse_if(
            many.iter().any(|count| *count > ITEMS_MAX),
            "too many NICs or disks",
        )?;
        match &self.hypervisor {
            Hypervisor::Qemu(qemu) => qemu.check(blocks),
            Hypervisor::Kvm(kvm) => kvm.check(blocks),
            Hypervisor::Fake => Ok(()),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use romulus_types::RamBlock;
    use romulus_vmm_attach::proto::Tracking;

    use super::*;
    use crate::qemu::cpu::CpuFeatures;
    use crate::qemu::stream::{StreamBlock, Template};

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
            version: "7.2.22".into(),
            host_cpu: "AMD EPYC".into(),
            vcpus: 1,
            layout: RamLayout::new(layout).unwrap(),
            main: BlockId(0),
            nics: vec![],
            disks: vec![],
            disposable: vec![],
            hypervisor: Hypervisor::Qemu(QemuMachine {
                accelerator: "tcg".into(),
                cpu_model: "qemu64-x86_64-cpu".into(),
                cpu_features: Some(CpuFeatures {
                    words: [("CPUID.01H:EDX".into(), 0x781_abfd)].into(),
                    lacking: ["pni".into()].into(),
                }),
                argv: argv.iter().map(|a| (*a).to_owned()).collect(),
                cwd: "/srv".into(),
                files: vec![],
                template: Template {
                    machine: "pc-q35-7.2".into(),
                    subsections: vec![],
                    ram_section: 2,
                    blocks: blocks.iter().map(listed).collect(),
                    vmdesc: "{}".into(),
                },
            }),
        }
    }

    /// The part of `spec` that is QEMU's, to be changed by a test.
    pub(crate) fn own(spec: &mut MachineSpec) -> &mut QemuMachine {
        spec.qemu_mut().expect("the tests' machine is QEMU's")
    }

    /// A machine of 5 GiB around the hole below 4 GiB.
    fn kvm() -> MachineSpec {
        let blocks = [("low", 3 << 30), ("high", 2 << 30)];
        MachineSpec {
            version: "0.1.0".into(),
            hypervisor: Hypervisor::Kvm(KvmMachine {
                vmm: "testbed".into(),
                tracking: Tracking::Manual,
                gpas: vec![0, 4 << 30],
                config: vec![1, 2, 255],
            }),
            ..spec(&["none"], &blocks)
        }
    }

    fn own_kvm(spec: &mut MachineSpec) -> &mut KvmMachine {
        match &mut spec.hypervisor {
            Hypervisor::Kvm(own) => own,
            _ => panic!("it is a VMM's"),
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
        for spec in [plain(), kvm()] {
            assert_eq!(MachineSpec::from_json(&spec.to_json()).unwrap(), spec);
        }
    }

    /// An agent that is upgraded reads what the earlier one kept, and hears primaries that are not upgraded yet.
    #[test]
    fn a_spec_of_a_release_that_knew_no_cpu_features_is_read() {
        let mut older: serde_json::Value = serde_json::from_slice(&plain().to_json()).unwrap();
        let mut parts = older["hypervisor"].as_object_mut().unwrap().values_mut();
        let of_qemu = parts.next().unwrap().as_object_mut().unwrap();
        assert!(of_qemu.remove("cpu_features").is_some());
        let read = MachineSpec::from_json(&serde_json::to_vec(&older).unwrap()).unwrap();
        let mut without = plain();
        own(&mut without).cpu_features = None;
        assert_eq!(read, without);
    }

    #[test]
    fn a_spec_that_contradicts_itself_is_refused() {
        let changed = |spec: MachineSpec, change: &dyn Fn(&mut MachineSpec)| {
            let mut spec = spec;
            change(&mut spec);
            spec
        };
        let contradictions = [
            changed(plain(), &|spec| spec.main = BlockId(2)),
            changed(plain(), &|spec| drop(own(spec).template.blocks.pop())),
            changed(plain(), &|spec| own(spec).argv.clear()),
            changed(plain(), &|spec| {
                own(spec).cpu_features = Some(CpuFeatures {
                    lacking: ["x".repeat(1000)].into(),
                    ..CpuFeatures::default()
                });
            }),
            changed(kvm(), &|spec| own_kvm(spec).vmm.clear()),
            changed(kvm(), &|spec| own_kvm(spec).gpas.truncate(1)),
            changed(kvm(), &|spec| own_kvm(spec).gpas[1] = 2 << 30),
            changed(kvm(), &|spec| own_kvm(spec).gpas[1] = u64::MAX),
            changed(kvm(), &|spec| {
                own_kvm(spec).config = vec![0; CONFIG_BYTES_MAX + 1];
            }),
        ];
        for bad in contradictions {
            assert!(matches!(
                MachineSpec::from_json(&bad.to_json()),
                Err(SpecError::Invalid(_))
            ));
        }
    }

    #[test]
    fn another_format_and_too_many_bytes_are_named() {
        let mut newer = plain();
        newer.format = SPEC_FORMAT + 1;
        assert!(matches!(
            MachineSpec::from_json(&newer.to_json()),
            Err(SpecError::Format(format)) if format == newer.format
        ));
        assert!(matches!(
            MachineSpec::from_json(&vec![b' '; SPEC_BYTES_MAX + 1]),
            Err(SpecError::TooLarge(_))
        ));
        assert!(matches!(MachineSpec::from_json(b"{"), Err(SpecError::Json(_))));
    }

    proptest! {
        #[test]
        fn damaged_specs_never_panic(of_qemu: bool, at in any::<prop::sample::Index>(), byte: u8) {
            let mut bytes = if of_qemu { plain() } else { kvm() }.to_json();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = MachineSpec::from_json(&bytes);
        }
    }
}
