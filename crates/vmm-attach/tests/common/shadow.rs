//! What a client that takes checkpoints has.

use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use romulus_host_sys::SharedWords;
use romulus_vmm_attach::client::{Attachment, Client};

use super::{LONG, Vmm};

const PAGE: usize = 4096;

/// A copy of the guest's memory that is kept up with checkpoints.
pub struct Shadow {
    bitmap: SharedWords,
    files: Vec<(std::fs::File, usize)>,
    pub bytes: Vec<u8>,
}

impl Shadow {
    fn new(attachment: Attachment) -> Self {
        let bitmap_bytes = usize::try_from(attachment.welcome.bitmap_bytes).unwrap();
        let bitmap = SharedWords::map(attachment.bitmap.unwrap(), bitmap_bytes / 8).unwrap();
        let regions = attachment.welcome.machine.unwrap().regions;
        let sizes = regions
            .iter()
            .map(|region| usize::try_from(region.bytes).unwrap());
        let files: Vec<_> = attachment
            .regions
            .into_iter()
            .map(std::fs::File::from)
            .zip(sizes)
            .collect();
        let bytes = vec![0xaa; files.iter().map(|(_, bytes)| bytes).sum()];
        Self { bitmap, files, bytes }
    }

    fn copy_all(&mut self) {
        for page in 0..self.bytes.len() / PAGE {
            self.copy(page);
        }
    }

    pub fn copy_dirty(&mut self) -> usize {
        let mut pages = 0;
        for word in 0..self.bitmap.len() {
            let mut bits = self.bitmap[word].swap(0, Ordering::SeqCst);
            while bits != 0 {
                self.copy(word * 64 + bits.trailing_zeros() as usize);
                pages += 1;
                bits &= bits - 1;
            }
        }
        pages
    }

    fn copy(&mut self, page: usize) {
        let into = &mut self.bytes[page * PAGE..][..PAGE];
        let mut at = page * PAGE;
        for (file, bytes) in &self.files {
            if at < *bytes {
                file.read_exact_at(into, at as u64).unwrap();
                return;
            }
            at -= bytes;
        }
        panic!("the bitmap has a bit for page {page}, which is not there");
    }
}

/// A client after its first full copy.
pub fn armed(vmm: &Vmm) -> (Client, Shadow) {
    let (mut client, attachment) = vmm.client();
    client.arm().unwrap();
    let mut shadow = Shadow::new(attachment);
    shadow.copy_all();
    (client, shadow)
}

/// A pause that is not answered any more.
pub fn paused(vmm: &Vmm) -> Client {
    let (mut client, _) = armed(vmm);
    client.pause(LONG).unwrap();
    client
}
