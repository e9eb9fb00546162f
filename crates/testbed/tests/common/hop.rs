//! Taking a machine from one process into another, as a replicator and an agent do: a live copy of all memory, some
//! checkpoints of what has changed, a last one; then the first process is killed and the second one goes on.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::time::Duration;

use romulus_host_sys::SharedWords;
use romulus_vmm_attach::client::{Attachment, Client};
use romulus_vmm_attach::memfd;
use romulus_vmm_attach::proto::{MachineInfo, Region};

use super::vmm::Vmm;

const PAGE_BYTES: usize = 4096;
const PIECE_BYTES: usize = 1 << 20;
/// How long a pause may last. Long, as the test's machine may be busy.
const PAUSE: Duration = Duration::from_secs(1);

/// A replicator's view of a machine, and a backup's image of it.
pub struct Session {
    client: Client,
    /// What the machine is.
    pub info: MachineInfo,
    memory: Vec<File>,
    bitmap: SharedWords,
    image: Vec<File>,
    state: Vec<u8>,
}

impl Session {
    /// Attaches, begins to track, and copies all memory while the guest runs.
    pub fn begin(vmm: &mut Vmm) -> Session {
        let (
            client,
            Attachment {
                welcome,
                regions,
                bitmap,
            },
        ) = vmm.attach();
        let info = welcome.machine.expect("a machine runs there");
        let words = usize::try_from(welcome.bitmap_bytes / 8).unwrap();
        let bitmap = SharedWords::map(bitmap.expect("it has a bitmap"), words).unwrap();
        let image = |region: &Region| File::from(memfd::sealed(&region.name, region.bytes).unwrap());
        let image = info.regions.iter().map(image).collect();
        let memory = regions.into_iter().map(File::from).collect();
        let mut session = Session {
            client,
            info,
            memory,
            bitmap,
            image,
            state: Vec::new(),
        };
        session.client.arm().unwrap();
        let mut piece = vec![0; PIECE_BYTES];
        for (index, region) in session.info.regions.iter().enumerate() {
            for at in (0..region.bytes).step_by(PIECE_BYTES) {
                let piece = &mut piece[..PIECE_BYTES.min(usize::try_from(region.bytes - at).unwrap())];
                session.memory[index]
                    .read_exact_at(piece, region.fd_offset + at)
                    .unwrap();
                session.image[index].write_all_at(piece, at).unwrap();
            }
        }
        session
    }

    /// One checkpoint, after which the guest runs on. Returns the pages that were copied.
    pub fn checkpoint(&mut self) -> usize {
        let pages = self.capture();
        self.client.resume().unwrap();
        pages
    }

    /// The last checkpoint, after which the guest never runs on there.
    pub fn last_checkpoint(&mut self) -> usize {
        let pages = self.capture();
        self.client.halt(true).unwrap();
        pages
    }

    fn capture(&mut self) -> usize {
        self.client.pause(PAUSE).unwrap();
        let pages = self.copy_dirty(|_| true);
        let captured = self.client.captured().unwrap();
        self.client.read_state(&captured, &mut self.state).unwrap();
        pages
    }

    /// Copies what the bitmap says. `wanted` can leave pages out, to see that it is noticed.
    fn copy_dirty(&mut self, wanted: impl Fn(usize) -> bool) -> usize {
        let mut page = vec![0; PAGE_BYTES];
        let mut copied = 0;
        for index in 0..self.bitmap.len() {
            let mut word = self.bitmap[index].swap(0, Ordering::SeqCst);
            while word != 0 {
                let number = index * 64 + word.trailing_zeros() as usize;
                word &= word - 1;
                if !wanted(number) {
                    continue;
                }
                let (region, at) = place(&self.info, number);
                self.memory[region]
                    .read_exact_at(&mut page, self.info.regions[region].fd_offset + at)
                    .unwrap();
                self.image[region].write_all_at(&page, at).unwrap();
                copied += 1;
            }
        }
        copied
    }

    /// Numbers of the pages in which the image is not what the memory, which stands still, is.
    pub fn differences(&self) -> Vec<u64> {
        let (mut ours, mut theirs) = (vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]);
        let mut wrong = Vec::new();
        for (index, region) in self.info.regions.iter().enumerate() {
            for at in (0..region.bytes).step_by(PIECE_BYTES) {
                let bytes = PIECE_BYTES.min(usize::try_from(region.bytes - at).unwrap());
                self.memory[index]
                    .read_exact_at(&mut theirs[..bytes], region.fd_offset + at)
                    .unwrap();
                self.image[index].read_exact_at(&mut ours[..bytes], at).unwrap();
                let pages = theirs[..bytes].chunks(PAGE_BYTES).zip(ours.chunks(PAGE_BYTES));
                let differ = pages.enumerate().filter(|(_, (theirs, ours))| theirs != ours);
                wrong.extend(differ.map(|(page, _)| (region.gpa + at) / 4096 + page as u64));
            }
        }
        wrong
    }

    /// Has a standby build this machine on the image.
    pub fn prepare(&self, standby: &mut Vmm) -> Client {
        let (mut client, attachment) = standby.attach();
        assert!(attachment.welcome.machine.is_none(), "a standby is empty");
        let image: Vec<OwnedFd> = self
            .image
            .iter()
            .map(|file| file.as_fd().try_clone_to_owned().unwrap())
            .collect();
        let image: Vec<_> = image.iter().map(AsFd::as_fd).collect();
        client.prepare(&self.info, &image, false).unwrap();
        client
    }

    /// Has the standby go on from the last checkpoint.
    pub fn activate(self, mut standby: Client) {
        standby.restore(&self.state).unwrap();
        standby.activate().unwrap();
        standby.detach().unwrap();
    }
}

/// Region and offset of a page of the bitmap.
fn place(info: &MachineInfo, page: usize) -> (usize, u64) {
    let mut at = page as u64 * PAGE_BYTES as u64;
    for (index, region) in info.regions.iter().enumerate() {
        if at < region.bytes {
            return (index, at);
        }
        at -= region.bytes;
    }
    panic!("page {page} is in no region");
}
