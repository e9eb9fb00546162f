//! The backup's image on a disk of the simulator, which outlives the agent and can fail in the middle of a write.

use bytes::Bytes;
use romulus_image::{Crashing, Fuse, Image, ImageError, ImageState, Limits, MemFiles};
use romulus_page_codec::{Page, PageHasher};
use romulus_protocol::ImageStatus;
use romulus_types::{PAGE_BYTES, PageIndex, RamBlock, RamLayout, Session, VmId};
use romulus_wire::HeldPagesWriter;

use crate::guest::{Memory, PAGES};

/// Files that survive the agent.
pub(crate) type SimFiles = Crashing<MemFiles>;

const LIMITS: Limits = Limits {
    staging_bytes_max: 1 << 20,
    device_state_bytes_max: 4096,
    staging_bytes_kept: 1 << 16,
};

/// What lies on the backup's disk, and the image in the hands of the present agent.
pub(crate) struct Store {
    vm: VmId,
    files: MemFiles,
    fuse: Fuse,
    made: bool,
    /// A guest was started from it.
    consumed: bool,
    image: Option<Image<SimFiles>>,
    /// What the image held when the last session began, for a planted mistake.
    held: Vec<(PageIndex, Page)>,
}

impl Store {
    pub(crate) fn new(vm: VmId) -> Self {
        Self {
            vm,
            files: MemFiles::new(),
            fuse: Fuse::never(),
            made: false,
            consumed: false,
            image: None,
            held: Vec::new(),
        }
    }

    /// The agent dies.
    pub(crate) fn drop_image(&mut self) {
        self.image = None;
    }

    /// The host dies, and its tmpfs with it.
    pub(crate) fn lose(&mut self) {
        *self = Self::new(self.vm.clone());
    }

    /// The agent starts and looks at what there is.
    pub(crate) fn open(&mut self) -> Result<ImageStatus, ImageError> {
        self.fuse = Fuse::never();
        self.image = None;
        if self.consumed {
            return Ok(ImageStatus::Consumed);
        }
        if self.made {
            let files = Crashing::new(self.files.clone(), self.fuse.clone());
            match Image::open(files, LIMITS) {
                Ok(image) => self.image = Some(image),
                // The agent died while it made the files: nothing was promised yet.
                Err(_) => self.made = false,
            }
        }
        Ok(self.status())
    }

    pub(crate) fn status(&self) -> ImageStatus {
        match self.image.as_ref().map(Image::state) {
            _ if self.consumed => ImageStatus::Consumed,
            Some(ImageState::Committed { session, epoch, .. }) => ImageStatus::Committed { session, epoch },
            _ => ImageStatus::Unusable,
        }
    }

    /// Makes it ready for a session. The frames tell the primary what it holds from an earlier one.
    pub(crate) fn begin(
        &mut self,
        session: Session,
        mark: bool,
        old_list: bool,
    ) -> Result<Vec<Bytes>, ImageError> {
        self.consumed = false;
        if self.image.is_none() {
            self.files = MemFiles::new();
            self.made = true;
            let bytes = PAGES * PAGE_BYTES as u64;
            let layout = RamLayout::new(vec![RamBlock {
                name: "ram".to_owned(),
                bytes,
            }])
            .expect("a layout");
            let files = Crashing::new(self.files.clone(), self.fuse.clone());
            self.image = Some(Image::create(files, &self.vm, layout, LIMITS)?);
        }
        let image = self.image.as_mut().expect("made above");
        if mark {
            image.mark_unusable()?;
        }
        image.begin_sync(session)?;
        let mut held = Vec::new();
        image.survey(|index, page| held.push((index, *page)))?;
        let before = std::mem::replace(&mut self.held, held);
        let told = if old_list { &before } else { &self.held };
        let hasher = PageHasher::new(session);
        let mut writer = HeldPagesWriter::new(session);
        let mut frames: Vec<_> = told
            .iter()
            .filter_map(|(index, page)| writer.push(*index, hasher.hash(page)))
            .collect();
        frames.extend(writer.finish());
        Ok(frames)
    }

    pub(crate) fn image(&mut self) -> Option<&mut Image<SimFiles>> {
        self.image.as_mut()
    }

    pub(crate) fn mark_unusable(&mut self) -> Result<(), ImageError> {
        self.image.as_mut().map_or(Ok(()), Image::mark_unusable)
    }

    pub(crate) fn mark_consumed(&mut self) {
        self.consumed = true;
    }

    /// The disk fails after this many further steps, in the middle of a write.
    pub(crate) fn set_fuse(&mut self, steps: u64, cut_permille: u16) {
        self.fuse.set(steps, cut_permille);
    }

    pub(crate) fn is_blown(&self) -> bool {
        self.fuse.is_blown()
    }

    /// The memory as a guest that is started from it would find it.
    pub(crate) fn memory(&self) -> Option<Memory> {
        let image = self.image.as_ref()?;
        let mut pages = Vec::new();
        for index in (0..PAGES).map(PageIndex) {
            let mut page: Page = [0; PAGE_BYTES];
            image.read_page(index, &mut page).ok()?;
            pages.push(page);
        }
        Some(Memory::of(pages))
    }

    /// The planted mistake of a commit that is applied twice: writes straight into the memory file.
    pub(crate) fn overwrite(&mut self, index: PageIndex, page: &Page) {
        use romulus_image::{FileName, Files};
        let name = FileName::Ram(romulus_types::BlockId(0));
        let mut files = self.files.clone();
        let _ = files.write_at(name, index.0 * PAGE_BYTES as u64, page);
    }
}
