//! Taking a machine from one process into another, as a replicator and an agent do: a live copy of all memory, some
//! checkpoints of what has changed, a last one; then the first process is killed and the second one goes on.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::time::Duration;

use romulus_host_sys::SharedWords;
use romulus_vmm_attach::client::{Attachment, Client, ClientError};
use romulus_vmm_attach::memfd;
use romulus_vmm_attach::proto::{MachineInfo, Region};
use rustix::fs::{SeekFrom, seek};

use super::vmm::Vmm;

const PAGE_BYTES: usize = 4096;
const PIECE_BYTES: usize = 1 << 20;
/// How long a pause may last: as long as the VMM allows.
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
    /// Pages of each region that checkpoints have copied.
    pub copied: Vec<usize>,
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
            copied: vec![0; info.regions.len()],
            info,
            memory,
            bitmap,
            image,
            state: Vec::new(),
        };
        session.client.arm().unwrap();
        session.copy_all();
        session
    }

    /// What holds data of all memory, piece by piece: most of a large guest's is not even there.
    fn copy_all(&self) {
        let mut piece = vec![0; PIECE_BYTES];
        for (index, region) in self.info.regions.iter().enumerate() {
            for (at, bytes) in pieces(&self.memory[index], region.fd_offset, region.bytes) {
                let piece = &mut piece[..bytes];
                self.memory[index]
                    .read_exact_at(piece, region.fd_offset + at)
                    .unwrap();
                self.image[index].write_all_at(piece, at).unwrap();
            }
        }
    }

    /// One checkpoint, after which the guest runs on.
    pub fn checkpoint(&mut self) {
        self.capture(|client| client.resume().map(drop));
    }

    /// The last checkpoint, after which the guest never runs on there.
    pub fn last_checkpoint(&mut self) {
        // For good only when it did not run meanwhile: the other word is never refused.
        self.capture(|client| client.halt(false));
        self.client.halt(true).unwrap();
    }

    /// Captures, and then has the guest do what `end` says; again when the VMM let the guest go before, as it does on a
    /// machine that is so busy that a pause lasts too long.
    fn capture(&mut self, end: impl Fn(&mut Client) -> Result<(), ClientError>) {
        loop {
            match self.try_capture(&end) {
                Err(ClientError::PauseExpired(_)) => {}
                captured => return captured.unwrap(),
            }
        }
    }

    fn try_capture(
        &mut self,
        end: impl Fn(&mut Client) -> Result<(), ClientError>,
    ) -> Result<(), ClientError> {
        self.client.pause(PAUSE)?;
        self.copy_dirty();
        let captured = self.client.captured()?;
        self.client.read_state(&captured, &mut self.state)?;
        end(&mut self.client)
    }

    /// Copies what the bitmap says.
    fn copy_dirty(&mut self) {
        let mut page = vec![0; PAGE_BYTES];
        for index in 0..self.bitmap.len() {
            let mut word = self.bitmap[index].swap(0, Ordering::SeqCst);
            while word != 0 {
                let number = index * 64 + word.trailing_zeros() as usize;
                word &= word - 1;
                let (region, at) = place(&self.info, number);
                self.memory[region]
                    .read_exact_at(&mut page, self.info.regions[region].fd_offset + at)
                    .unwrap();
                self.image[region].write_all_at(&page, at).unwrap();
                self.copied[region] += 1;
            }
        }
    }

    /// Numbers of the pages in which the image is not what the memory, which stands still, is.
    pub fn differences(&self) -> Vec<u64> {
        let (mut ours, mut theirs) = (vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]);
        let mut wrong = BTreeSet::new();
        for (index, region) in self.info.regions.iter().enumerate() {
            // What neither of them holds is zeros in both.
            let held = pieces(&self.memory[index], region.fd_offset, region.bytes);
            let also = pieces(&self.image[index], 0, region.bytes);
            for (at, bytes) in held.into_iter().chain(also) {
                self.memory[index]
                    .read_exact_at(&mut theirs[..bytes], region.fd_offset + at)
                    .unwrap();
                self.image[index].read_exact_at(&mut ours[..bytes], at).unwrap();
                let pages = theirs[..bytes].chunks(PAGE_BYTES).zip(ours.chunks(PAGE_BYTES));
                let differ = pages.enumerate().filter(|(_, (theirs, ours))| theirs != ours);
                wrong.extend(differ.map(|(page, _)| (region.gpa + at) / 4096 + page as u64));
            }
        }
        wrong.into_iter().collect()
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

/// The parts of a region of a file that hold data: offset in the region and size, at most [`PIECE_BYTES`].
fn pieces(file: &File, start: u64, bytes: u64) -> Vec<(u64, usize)> {
    let (mut at, end, mut pieces) = (start, start + bytes, Vec::new());
    while let Ok(data) = seek(file, SeekFrom::Data(at)) {
        let hole = seek(file, SeekFrom::Hole(data)).unwrap().min(end);
        for from in (data..hole).step_by(PIECE_BYTES) {
            let bytes = usize::try_from(hole - from).unwrap().min(PIECE_BYTES);
            pieces.push((from - start, bytes));
        }
        at = hole;
        if at >= end {
            break;
        }
    }
    pieces
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
