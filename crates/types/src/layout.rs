//! The layout of a guest's memory: RAM blocks in a fixed order, and one page numbering across all of them.
//!
//! ```text
//!   block 0 "pc.ram"            block 1 "vga.vram"   block 2 "pc.bios" ...
//!   |page 0 | 1 | ... | N0-1 |N0 | ... | N0+N1-1 | ...
//! ```
//!
//! A block whose length is not a multiple of the page size is refused: QEMU rounds its blocks up.

use serde::{Deserialize, Serialize};

/// Bytes of a guest page.
pub const PAGE_BYTES: usize = 4096;
/// Most RAM blocks in one guest.
pub const BLOCKS_MAX: usize = 256;
/// Longest name of a RAM block, in bytes (QEMU's own limit is one length byte).
pub const BLOCK_NAME_BYTES_MAX: usize = 255;
/// Most memory of one guest, in bytes: 16 TiB.
pub const RAM_BYTES_MAX: u64 = 16 << 40;

/// Position of a page in the guest's page numbering, across all blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PageIndex(pub u64);

/// Position of a block in its [`RamLayout`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BlockId(pub u16);

/// One contiguous piece of guest memory as the hypervisor names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamBlock {
    /// The hypervisor's name, as it stands in the migration stream.
    pub name: String,
    /// Length in bytes, a multiple of [`PAGE_BYTES`].
    pub bytes: u64,
}

/// Why a layout was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// No block, or more than [`BLOCKS_MAX`].
    #[error("a guest has 1 to {BLOCKS_MAX} RAM blocks, this one has {0}")]
    BlockCount(usize),
    /// A name that is empty, too long or used twice.
    #[error("the RAM block name {0:?} is empty, too long or used twice")]
    BlockName(String),
    /// A length of zero or one that is not a whole number of pages.
    #[error("RAM block {name:?} has {bytes} bytes, which is not a positive whole number of pages")]
    BlockBytes {
        /// The block.
        name: String,
        /// Its length.
        bytes: u64,
    },
    /// More than [`RAM_BYTES_MAX`] in all.
    #[error("the guest's memory is over the limit of {RAM_BYTES_MAX} bytes")]
    TooLarge,
}

/// All RAM blocks of a guest, in a fixed order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<RamBlock>", into = "Vec<RamBlock>")]
pub struct RamLayout {
    blocks: Vec<RamBlock>,
    first_page: Vec<u64>,
    page_count: u64,
}

impl RamLayout {
    /// Checks the blocks and numbers their pages.
    ///
    /// # Errors
    /// [`LayoutError`] names the first thing that is not allowed.
    pub fn new(blocks: Vec<RamBlock>) -> Result<Self, LayoutError> {
        if blocks.is_empty() || blocks.len() > BLOCKS_MAX {
            return Err(LayoutError::BlockCount(blocks.len()));
        }
        let mut first_page = Vec::with_capacity(blocks.len());
        let mut page_count = 0u64;
        for (position, block) in blocks.iter().enumerate() {
            let repeated = blocks[..position].iter().any(|b| b.name == block.name);
            if block.name.is_empty() || block.name.len() > BLOCK_NAME_BYTES_MAX || repeated {
                return Err(LayoutError::BlockName(block.name.clone()));
            }
            if block.bytes == 0 || !block.bytes.is_multiple_of(PAGE_BYTES as u64) {
                return Err(LayoutError::BlockBytes {
                    name: block.name.clone(),
                    bytes: block.bytes,
                });
            }
            first_page.push(page_count);
            page_count = page_count
                .checked_add(block.bytes / PAGE_BYTES as u64)
                .filter(|pages| *pages <= RAM_BYTES_MAX / PAGE_BYTES as u64)
                .ok_or(LayoutError::TooLarge)?;
        }
        Ok(Self {
            blocks,
            first_page,
            page_count,
        })
    }

    /// The blocks, in order.
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// Pages in all blocks together.
    pub fn page_count(&self) -> u64 {
        self.page_count
    }

    /// Bytes in all blocks together.
    pub fn bytes(&self) -> u64 {
        self.page_count * PAGE_BYTES as u64
    }

    /// The first page of a block.
    ///
    /// # Panics
    /// When the block is not of this layout.
    pub fn first_page(&self, block: BlockId) -> PageIndex {
        PageIndex(self.first_page[usize::from(block.0)])
    }

    /// The block that holds `page` and the page's byte offset in it, or `None` past the end.
    pub fn locate(&self, page: PageIndex) -> Option<(BlockId, u64)> {
        if page.0 >= self.page_count {
            return None;
        }
        let block = self.first_page.partition_point(|first| *first <= page.0) - 1;
        let id = u16::try_from(block).expect("BLOCKS_MAX fits in 16 bits");
        Some((BlockId(id), (page.0 - self.first_page[block]) * PAGE_BYTES as u64))
    }

    /// The block with this name.
    pub fn find(&self, name: &str) -> Option<BlockId> {
        let position = self.blocks.iter().position(|b| b.name == name)?;
        Some(BlockId(
            u16::try_from(position).expect("BLOCKS_MAX fits in 16 bits"),
        ))
    }
}

impl TryFrom<Vec<RamBlock>> for RamLayout {
    type Error = LayoutError;
    fn try_from(blocks: Vec<RamBlock>) -> Result<Self, LayoutError> {
        Self::new(blocks)
    }
}

impl From<RamLayout> for Vec<RamBlock> {
    fn from(layout: RamLayout) -> Self {
        layout.blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(name: &str, pages: u64) -> RamBlock {
        RamBlock {
            name: name.into(),
            bytes: pages * PAGE_BYTES as u64,
        }
    }

    #[test]
    fn every_page_is_located_in_the_block_that_holds_it() {
        let layout = RamLayout::new(vec![block("ram", 3), block("vram", 2)]).unwrap();
        assert_eq!(layout.page_count(), 5);
        assert_eq!(layout.locate(PageIndex(2)), Some((BlockId(0), 8192)));
        assert_eq!(layout.locate(PageIndex(3)), Some((BlockId(1), 0)));
        assert_eq!(layout.locate(PageIndex(5)), None);
        assert_eq!(layout.first_page(BlockId(1)), PageIndex(3));
    }

    #[test]
    fn layouts_that_lie_about_lengths_are_refused() {
        assert!(RamLayout::new(vec![]).is_err());
        assert!(RamLayout::new(vec![block("a", 1), block("a", 1)]).is_err());
        assert!(
            RamLayout::new(vec![RamBlock {
                name: "a".into(),
                bytes: 100
            }])
            .is_err()
        );
        assert!(
            RamLayout::new(vec![RamBlock {
                name: "a".into(),
                bytes: u64::MAX - 4095
            }])
            .is_err()
        );
    }
}
