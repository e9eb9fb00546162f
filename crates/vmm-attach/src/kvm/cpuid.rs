//! Whether a host has the processor features that a guest was shown.

use kvm_bindings::kvm_cpuid_entry2;

use super::StateError;

/// The registers of a leaf, as bits that a guest may rely on.
struct Leaf {
    function: u32,
    index: u32,
    /// Bits of eax, ebx, ecx, edx that name features of the processor. Others are numbers, or say what the VMM and
    /// the kernel emulate anyhow.
    features: [u32; 4],
}

/// Feature leaves (Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E). Of leaf 1, not: OSXSAVE and the APIC
/// bit, which follow the guest's registers; x2APIC, TSC deadline, hypervisor; hyper-threading, which is topology.
const LEAVES: [Leaf; 5] = [
    Leaf {
        function: 1,
        index: 0,
        features: [
            0,
            0,
            !(1 << 3 | 1 << 21 | 1 << 24 | 1 << 27 | 1 << 31),
            !(1 << 9 | 1 << 28),
        ],
    },
    Leaf {
        function: 7,
        index: 0,
        features: [0, u32::MAX, !(1 << 4), u32::MAX],
    },
    Leaf {
        function: 7,
        index: 1,
        features: [u32::MAX, 0, 0, 0],
    },
    Leaf {
        function: 0xd,
        index: 0,
        features: [u32::MAX, 0, 0, u32::MAX],
    },
    Leaf {
        function: 0x8000_0001,
        index: 0,
        features: [0, 0, u32::MAX, !(1 << 9)],
    },
];

/// Refuses what the guest has and the host lacks. The host has what the kernel says that it supports, and what a vCPU of this
/// host shows: a backend that leaves CPUID to the processor shows more than it says.
pub(super) fn check(
    guest: &[kvm_cpuid_entry2],
    supported: &[kvm_cpuid_entry2],
    shown: &[kvm_cpuid_entry2],
) -> Result<(), StateError> {
    for leaf in &LEAVES {
        let (guest, supported, shown) = (
            registers(guest, leaf),
            registers(supported, leaf),
            registers(shown, leaf),
        );
        for register in 0..4 {
            let host = supported[register] | shown[register];
            let missing = guest[register] & !host & leaf.features[register];
            if missing != 0 {
                return Err(StateError::Cpuid {
                    function: leaf.function,
                    index: leaf.index,
                    missing,
                });
            }
        }
    }
    Ok(())
}

fn registers(cpuid: &[kvm_cpuid_entry2], leaf: &Leaf) -> [u32; 4] {
    cpuid
        .iter()
        .find(|entry| (entry.function, entry.index) == (leaf.function, leaf.index))
        .map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, ebx: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            ebx,
            ecx,
            ..Default::default()
        }
    }

    #[test]
    fn a_feature_that_the_host_lacks_is_refused_by_its_leaf() {
        let guest = [leaf(1, 0, 0), leaf(7, 1 << 16 | 1 << 5, 0)];
        let host = [leaf(1, 0, 0), leaf(7, 1 << 5, 0)];
        let refused = check(&guest, &host, &[]).unwrap_err();
        assert!(matches!(
            refused,
            StateError::Cpuid {
                function: 7,
                index: 0,
                missing: 0x1_0000
            }
        ));
        check(&host, &guest, &[]).unwrap();
        assert!(
            check(&guest, &[], &[]).is_err(),
            "a leaf that is not there has no features"
        );
        check(&guest, &host, &[leaf(7, 1 << 16, 0)]).unwrap();
    }

    #[test]
    fn what_is_not_the_processors_is_not_compared() {
        check(&[leaf(1, 0x0700_0800, 1 << 31 | 1 << 27)], &[leaf(1, 0, 0)], &[]).unwrap();
    }
}
