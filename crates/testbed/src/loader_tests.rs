use vm_memory::GuestMemoryMmap;

use super::*;
use crate::elf::sample;

const ENTRY: u64 = abi::IMAGE + 0x900;

fn memory(bytes: usize) -> GuestMemoryMmap<()> {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).unwrap()
}

fn guest() -> Vec<u8> {
    let mut contents = ImageHeader::MAGIC.to_le_bytes().to_vec();
    contents.extend(abi::ABI_VERSION.to_le_bytes());
    contents.extend([0; 4]);
    contents.extend(ENTRY.to_le_bytes());
    for vector in 0..256u64 {
        contents.extend((abi::IMAGE + 0x1000 + vector * 16).to_le_bytes());
    }
    sample::image(abi::IMAGE, &contents, 0x10000)
}

fn boot<'a>(image: &'a [u8], cmdline: &'a str) -> Boot<'a> {
    Boot {
        image,
        vcpus: 2,
        ram_low_bytes: 32 << 20,
        ram_high_bytes: 0,
        tsc_khz: 2_000_000,
        cmdline,
        devices: &[],
    }
}

fn word(memory: &GuestMemoryMmap<()>, at: u64) -> u64 {
    memory.read_obj(GuestAddress(at)).unwrap()
}

#[test]
fn a_guest_finds_its_image_tables_and_command_line() {
    let (memory, image) = (memory(32 << 20), guest());
    // What an earlier life left behind the image's file.
    memory
        .write_obj(0x55u8, GuestAddress(abi::IMAGE + 0xfff0))
        .unwrap();
    assert_eq!(load(&memory, &boot(&image, "dirty=off")).unwrap(), ENTRY);
    assert_eq!(word(&memory, abi::IMAGE), ImageHeader::MAGIC);
    assert_eq!(
        memory.read_obj::<u8>(GuestAddress(abi::IMAGE + 0xfff0)).unwrap(),
        0
    );
    let mut text = [0; 10];
    memory.read_slice(&mut text, GuestAddress(abi::CMDLINE)).unwrap();
    assert_eq!(&text, b"dirty=off\0");
    let mut info = [0; BootInfo::BYTES];
    memory
        .read_slice(&mut info, GuestAddress(abi::BOOT_INFO))
        .unwrap();
    assert_eq!(BootInfo::from_bytes(&info).unwrap().vcpus, 2);
}

#[test]
fn addresses_are_mapped_to_themselves_up_to_four_gib() {
    let (memory, image) = (memory(32 << 20), guest());
    load(&memory, &boot(&image, "")).unwrap();
    for address in [0, abi::IMAGE, 0xbfff_ffff, abi::VIRTIO_MMIO, abi::LAPIC] {
        let pdpt = word(&memory, abi::PML4) & !0xfff;
        let directory = word(&memory, pdpt + (address >> 30) * 8) & !0xfff;
        let entry = word(&memory, directory + (address >> 21 & 511) * 8);
        assert_eq!(entry, address & !0x1f_ffff | abi::PDE_FLAGS, "{address:#x}");
    }
}

#[test]
fn memory_above_four_gib_has_its_tables() {
    let (memory, image) = (memory(32 << 20), guest());
    let boot = Boot {
        ram_low_bytes: abi::RAM_LOW_END,
        ram_high_bytes: 3 << 29,
        ..boot(&image, "")
    };
    load(&memory, &boot).unwrap();
    let directory = word(&memory, abi::PDPT + 5 * 8) & !0xfff;
    assert_eq!(word(&memory, directory), 5 << 30 | abi::PDE_FLAGS);
    assert_eq!(word(&memory, abi::PDPT + 6 * 8), 0);
}

#[test]
fn gates_lead_to_the_images_handlers_and_may_be_used_from_ring_three() {
    let (memory, image) = (memory(32 << 20), guest());
    load(&memory, &boot(&image, "")).unwrap();
    let gate = word(&memory, abi::IDT + 0x30 * 16);
    let handler = gate & 0xffff | (gate >> 48) << 16;
    assert_eq!(handler, abi::IMAGE + 0x1000 + 0x30 * 16);
    assert_eq!(gate >> 16 & 0xffff, u64::from(abi::KERNEL_CODE));
    assert_eq!(gate >> 40 & 0xff, 0xee);
}

#[test]
fn a_reset_leaves_nothing_of_an_earlier_life() {
    let memory = memory(4 << 20);
    for at in [0u64, 0x1fff, (4 << 20) - 1] {
        memory.write_obj(0x55u8, GuestAddress(at)).unwrap();
    }
    forget(&memory, [(0, 4 << 20)]).unwrap();
    let mut all = vec![1; 4 << 20];
    memory.read_slice(&mut all, GuestAddress(0)).unwrap();
    assert!(all.iter().all(|byte| *byte == 0));
    assert!(forget(&memory, [(0, 8 << 20)]).is_err());
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let image = guest();
    assert!(matches!(
        load(&memory(4 << 20), &boot(&image, "")),
        Err(LoadError::Room { .. })
    ));
    let low = sample::image(0x1000, b"over the tables", 0x1000);
    assert!(matches!(
        load(&memory(32 << 20), &boot(&low, "")),
        Err(LoadError::Room { .. })
    ));
    let huge = sample::image(abi::IMAGE, b"x", u64::MAX);
    assert!(matches!(
        load(&memory(32 << 20), &boot(&huge, "")),
        Err(LoadError::Room { .. })
    ));
    let long = "x".repeat(4096);
    assert!(matches!(
        load(&memory(32 << 20), &boot(&image, &long)),
        Err(LoadError::CommandLine(4096))
    ));
    let other = sample::image(abi::IMAGE, &[0; 3000], 3000);
    assert!(matches!(
        load(&memory(32 << 20), &boot(&other, "")),
        Err(LoadError::Abi(AbiError::Magic(0)))
    ));
}
