//! The guest's memory files: pages in, pages out, and what they hold.

use std::collections::BTreeSet;

use romulus_page_codec::{Page, page_digest};
use romulus_types::{BlockId, Digest, PAGE_BYTES, PageIndex, RamLayout};

use crate::ImageError;
use crate::digests::DigestTable;
use crate::error::Named;
use crate::files::{FileName, Files};
use crate::staging::StagedPage;
use crate::window::Window;

const SCAN_BYTES: usize = 1 << 20;
const PAGE: u64 = PAGE_BYTES as u64;

pub(crate) fn block_ids(layout: &RamLayout) -> impl Iterator<Item = BlockId> {
    (0..layout.blocks().len()).map(|block| BlockId(u16::try_from(block).expect("BLOCKS_MAX fits in 16 bits")))
}

/// The block and the byte offset of a page, or the error that names it.
pub(crate) fn locate(layout: &RamLayout, page: PageIndex) -> Result<(BlockId, u64), ImageError> {
    layout.locate(page).ok_or(ImageError::PageOutOfRange {
        page,
        page_count: layout.page_count(),
    })
}

/// Writes one page; a page of zeros becomes a hole.
pub(crate) fn write_page<F: Files>(
    files: &mut F,
    place: (BlockId, u64),
    digest: Digest,
    bytes: &[u8],
) -> Result<(), ImageError> {
    let (block, offset) = place;
    let file = FileName::Ram(block);
    if digest == Digest(0) {
        files
            .punch(file, offset..offset + PAGE)
            .named("punch a hole into", file)
    } else {
        files.write_at(file, offset, bytes).named("write", file)
    }
}

/// Writes staged pages to their places and notes the blocks that were touched. May be repeated.
pub(crate) fn apply_pages<F: Files>(
    files: &mut F,
    layout: &RamLayout,
    pages: &[StagedPage],
    window: &mut Window,
    file: FileName,
    touched: &mut BTreeSet<BlockId>,
) -> Result<(), ImageError> {
    for staged in pages {
        let place = locate(layout, staged.index)?;
        let length = if staged.digest == Digest(0) { 0 } else { PAGE_BYTES };
        let damaged = ImageError::StagingDamaged {
            file,
            offset: staged.offset,
        };
        let Some(bytes) = window.read(files, staged.offset, length)? else {
            return Err(damaged);
        };
        if let Ok(page) = <&Page>::try_from(bytes)
            && page_digest(staged.index, page) != staged.digest
        {
            return Err(damaged);
        }
        write_page(files, place, staged.digest, bytes)?;
        touched.insert(place.0);
    }
    Ok(())
}

/// Makes pages durable that were written to `blocks`.
pub(crate) fn sync_blocks<F: Files>(
    files: &mut F,
    blocks: impl IntoIterator<Item = BlockId>,
) -> Result<(), ImageError> {
    for block in blocks {
        files
            .sync(FileName::Ram(block))
            .named("sync", FileName::Ram(block))?;
    }
    Ok(())
}

/// Computes the digest of every page from the files. Holes are not read.
pub(crate) fn digest_all<F: Files>(files: &F, layout: &RamLayout) -> Result<DigestTable, ImageError> {
    survey(files, layout, &mut |_, _| ())
}

/// Reads every page that is not a hole, in ascending order, and computes the digests. `visit` sees those that are not all
/// zeros.
pub(crate) fn survey<F: Files>(
    files: &F,
    layout: &RamLayout,
    visit: &mut dyn FnMut(PageIndex, &Page),
) -> Result<DigestTable, ImageError> {
    let mut table = DigestTable::new(layout.page_count());
    let mut buffer = vec![0; SCAN_BYTES];
    for (id, block) in block_ids(layout).zip(layout.blocks()) {
        let file = FileName::Ram(id);
        let first = layout.first_page(id).0;
        let mut from = 0;
        while let Some(data) = files.next_data(file, from).named("look for data in", file)? {
            // Data may begin or end inside a page on file systems with small blocks.
            from = data.start / PAGE * PAGE;
            let end = data.end.next_multiple_of(PAGE).min(block.bytes);
            while from < end {
                let length = usize::try_from(end - from).unwrap_or(usize::MAX).min(SCAN_BYTES);
                files
                    .read_at(file, from, &mut buffer[..length])
                    .named("read", file)?;
                for (position, page) in buffer[..length].chunks_exact(PAGE_BYTES).enumerate() {
                    let index = PageIndex(first + from / PAGE + position as u64);
                    let page: &Page = page.try_into().expect("a chunk is a page");
                    let digest = page_digest(index, page);
                    table.set(index, digest);
                    if digest != Digest(0) {
                        visit(index, page);
                    }
                }
                from += length as u64;
            }
            if from >= block.bytes {
                break;
            }
        }
    }
    Ok(table)
}
