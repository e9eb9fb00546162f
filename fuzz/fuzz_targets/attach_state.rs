//! Any bytes at the reader of a saved machine: no panic, bounded memory, and whatever is accepted is written back as the same
//! bytes.
//!
//! The first byte chooses: even, the rest is a blob as it is; odd, it is the sections of a blob that gets the right header, as
//! random bytes would never get past its checksum.
#![no_main]
#![forbid(unsafe_code)]

use kvm_bindings::{kvm_irqchip, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_xcrs};
use libfuzzer_sys::fuzz_target;
use romulus_vmm_attach::kvm::blob::{BLOB_BYTES_MAX, Blob, BlobWriter, HEADER_BYTES, Kind, MAGIC, VERSION};

fuzz_target!(|data: &[u8]| {
    match data {
        [mode, rest @ ..] if mode % 2 == 0 => read(rest),
        [_, vcpus, sections @ ..] => read(&with_header(u16::from(*vcpus) % 70, sections)),
        _ => {}
    }
});

fn with_header(vcpus: u16, sections: &[u8]) -> Vec<u8> {
    let mut blob = Vec::with_capacity(HEADER_BYTES + sections.len());
    blob.extend_from_slice(&MAGIC);
    blob.extend_from_slice(&VERSION.to_le_bytes());
    blob.extend_from_slice(&vcpus.to_le_bytes());
    blob.extend_from_slice(
        &u32::try_from(sections.len())
            .expect("inputs are short")
            .to_le_bytes(),
    );
    let mut crc = crc32fast::Hasher::new();
    crc.update(&blob);
    crc.update(sections);
    blob.extend_from_slice(&crc.finalize().to_le_bytes());
    blob.extend_from_slice(sections);
    blob
}

fn read(bytes: &[u8]) {
    let blob = match Blob::parse(bytes) {
        Ok(blob) => blob,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    assert!(bytes.len() <= BLOB_BYTES_MAX);
    for index in 0..blob.vcpus() {
        let _ = blob.plain::<kvm_regs>(Kind::Registers, index);
        let _ = blob.plain::<kvm_sregs>(Kind::SpecialRegisters, index);
        let _ = blob.plain::<kvm_xcrs>(Kind::Xcrs, index);
        let _ = blob.plain::<kvm_lapic_state>(Kind::Lapic, index);
        let _ = blob.list::<kvm_msr_entry>(Kind::Msrs, index, 256);
    }
    let _ = blob.plain::<kvm_irqchip>(Kind::Irqchip, 2);
    let mut again = Vec::new();
    let mut writer = BlobWriter::begin(&mut again, blob.vcpus());
    for (kind, index, section) in blob.sections() {
        assert_eq!(blob.section(kind, index).expect("it is there"), section);
        writer.section(kind, index, section);
    }
    writer.finish().expect("it was short enough");
    assert_eq!(again, bytes);
}
