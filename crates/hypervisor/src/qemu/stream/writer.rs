//! Writing the stream that wakes a standby.
//!
//! The blocks that the standby shares with us by a file are listed and not sent: their pages are in place. The others
//! are sent whole, zero pages too, since a standby has ROMs of its own in them.

use std::io::{self, Write};

use romulus_types::PAGE_BYTES;

use super::{CAPABILITIES, MAGIC, RAM_VERSION, StreamError, Template, flag, mark};

/// Checks a state that `xen-save-devices-state` wrote and returns what goes into a stream: the device sections and their
/// end.
///
/// # Errors
/// [`StreamError::DeviceState`] when it is not such a state, or was cut short.
pub fn device_sections(saved: &[u8]) -> Result<&[u8], StreamError> {
    let sections = saved
        .strip_prefix(&MAGIC)
        .ok_or(StreamError::DeviceState("it has no header of version 3"))?;
    if sections.first() != Some(&mark::FULL) {
        return Err(StreamError::DeviceState(
            "it does not begin with a device section",
        ));
    }
    match sections {
        [.., mark::FOOTER, _, _, _, _, mark::END] => Ok(sections),
        _ => Err(StreamError::DeviceState(
            "it does not end with a section's footer and the end mark",
        )),
    }
}

/// What the stream says of one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockContent {
    /// Nothing: the standby shares it with us by a file.
    InPlace,
    /// These pieces, ascending, each of whole pages; between them zeros.
    Pieces {
        /// Offset in bytes, and content.
        pieces: Vec<(u64, Vec<u8>)>,
        /// Leave the zeros out, too: the standby's block holds nothing but zeros.
        zeros_in_place: bool,
    },
}

/// Writes the stream. `contents` has one entry for each block of the template. `saved` is what `xen-save-devices-state` wrote.
///
/// # Errors
/// A [`StreamError`] as an [`io::Error`] of kind `InvalidData`, or whatever `out` says.
pub fn write_activation(
    template: &Template,
    contents: &[BlockContent],
    saved: &[u8],
    out: &mut impl Write,
) -> io::Result<()> {
    let invalid = |error: StreamError| io::Error::new(io::ErrorKind::InvalidData, error);
    assert_eq!(contents.len(), template.blocks.len(), "one entry for each block");
    for (block, content) in template.blocks.iter().zip(contents) {
        if !fits(content, block.bytes) {
            return Err(invalid(StreamError::BlockContent(block.name.clone())));
        }
    }
    let sections = device_sections(saved).map_err(invalid)?;
    write_head(template, out)?;
    out.write_all(&[mark::LAST])?;
    out.write_all(&template.ram_section.to_be_bytes())?;
    for (block, content) in template.blocks.iter().zip(contents) {
        if let BlockContent::Pieces {
            pieces,
            zeros_in_place,
        } = content
        {
            let mut pages = Pages {
                block: &block.name,
                named: false,
                zeros: !zeros_in_place,
                out,
            };
            let mut at = 0;
            for (offset, piece) in pieces {
                pages.zeros(at, *offset)?;
                at = pages.piece(*offset, piece)?;
            }
            pages.zeros(at, block.bytes)?;
        }
    }
    write_ram_end(template, out)?;
    out.write_all(sections)?;
    out.write_all(&[mark::VMDESC])?;
    out.write_all(&length_u32(template.vmdesc.len())?.to_be_bytes())?;
    out.write_all(template.vmdesc.as_bytes())
}

fn fits(content: &BlockContent, block_bytes: u64) -> bool {
    let BlockContent::Pieces { pieces, .. } = content else {
        return true;
    };
    let page = PAGE_BYTES as u64;
    let mut at = 0;
    pieces.iter().all(|(offset, piece)| {
        let bytes = piece.len() as u64;
        let fits = *offset >= at && offset.is_multiple_of(page) && bytes.is_multiple_of(page);
        at = offset.saturating_add(bytes);
        fits && at <= block_bytes
    })
}

/// Header, configuration and the block list.
fn write_head(template: &Template, out: &mut impl Write) -> io::Result<()> {
    out.write_all(&MAGIC)?;
    out.write_all(&[mark::CONFIGURATION])?;
    out.write_all(&length_u32(template.machine.len())?.to_be_bytes())?;
    out.write_all(template.machine.as_bytes())?;
    // The capabilities say how *that* stream was made; the standby would compare them with its own.
    for subsection in template.subsections.iter().filter(|s| s.name != CAPABILITIES) {
        out.write_all(&[mark::SUBSECTION])?;
        write_name(&subsection.name, out)?;
        out.write_all(&subsection.version.to_be_bytes())?;
        out.write_all(&subsection.data)?;
    }
    out.write_all(&[mark::START])?;
    out.write_all(&template.ram_section.to_be_bytes())?;
    write_name("ram", out)?;
    out.write_all(&0u32.to_be_bytes())?;
    out.write_all(&RAM_VERSION.to_be_bytes())?;
    let total: u64 = template.blocks.iter().map(|b| b.bytes).sum();
    out.write_all(&(total | flag::BLOCKS).to_be_bytes())?;
    for block in &template.blocks {
        write_name(&block.name, out)?;
        out.write_all(&block.bytes.to_be_bytes())?;
    }
    write_ram_end(template, out)
}

fn write_ram_end(template: &Template, out: &mut impl Write) -> io::Result<()> {
    out.write_all(&flag::END.to_be_bytes())?;
    out.write_all(&[mark::FOOTER])?;
    out.write_all(&template.ram_section.to_be_bytes())
}

/// Writes the pages of one block.
struct Pages<'a, W> {
    block: &'a str,
    /// Whether the block was named already; later pages refer to it.
    named: bool,
    zeros: bool,
    out: &'a mut W,
}

impl<W: Write> Pages<'_, W> {
    /// Writes a piece's pages; returns the offset behind it.
    fn piece(&mut self, offset: u64, piece: &[u8]) -> io::Result<u64> {
        let mut at = offset;
        for page in piece.as_chunks::<PAGE_BYTES>().0 {
            if !is_zero(page) {
                self.head(at, flag::PAGE)?;
                self.out.write_all(page)?;
            } else if self.zeros {
                self.zero(at)?;
            }
            at += PAGE_BYTES as u64;
        }
        Ok(at)
    }

    fn zeros(&mut self, from: u64, to: u64) -> io::Result<()> {
        if self.zeros {
            for at in (from..to).step_by(PAGE_BYTES) {
                self.zero(at)?;
            }
        }
        Ok(())
    }

    fn zero(&mut self, at: u64) -> io::Result<()> {
        self.head(at, flag::ZERO)?;
        self.out.write_all(&[0])
    }

    fn head(&mut self, at: u64, kind: u64) -> io::Result<()> {
        let same_block = if self.named { flag::CONTINUE } else { 0 };
        self.out.write_all(&(at | kind | same_block).to_be_bytes())?;
        if !self.named {
            write_name(self.block, self.out)?;
            self.named = true;
        }
        Ok(())
    }
}

fn is_zero(page: &[u8; PAGE_BYTES]) -> bool {
    let (words, _) = page.as_chunks::<16>();
    words
        .iter()
        .fold(0u128, |all, word| all | u128::from_ne_bytes(*word))
        == 0
}

fn write_name(name: &str, out: &mut impl Write) -> io::Result<()> {
    let length = u8::try_from(name.len()).map_err(|_| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            StreamError::Name("a block or section"),
        )
    })?;
    out.write_all(&[length])?;
    out.write_all(name.as_bytes())
}

fn length_u32(length: usize) -> io::Result<u32> {
    u32::try_from(length).map_err(|_| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            StreamError::TooLarge {
                what: "a length",
                value: length as u64,
            },
        )
    })
}
