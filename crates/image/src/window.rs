//! Reads a file forwards in large pieces, so that small records cost no system call each.

use crate::ImageError;
use crate::error::Named;
use crate::files::{FileName, Files};

const WINDOW_BYTES: usize = 256 << 10;

pub(crate) struct Window {
    file: FileName,
    /// Nothing is read at or after this offset.
    end: u64,
    start: u64,
    bytes: Vec<u8>,
}

impl Window {
    pub(crate) fn new(file: FileName, end: u64) -> Self {
        Self {
            file,
            end,
            start: 0,
            bytes: Vec::new(),
        }
    }

    /// A window that uses the memory of an earlier one.
    pub(crate) fn with_buffer(file: FileName, end: u64, mut bytes: Vec<u8>) -> Self {
        bytes.clear();
        Self {
            file,
            end,
            start: 0,
            bytes,
        }
    }

    /// The buffer, to be used again.
    pub(crate) fn into_buffer(self) -> Vec<u8> {
        self.bytes
    }

    /// The `length` bytes at `offset`; `None` when they do not end before the window's end.
    pub(crate) fn read<F: Files>(
        &mut self,
        files: &F,
        offset: u64,
        length: usize,
    ) -> Result<Option<&[u8]>, ImageError> {
        assert!(length <= WINDOW_BYTES, "records are smaller than the window");
        if offset.checked_add(length as u64).is_none_or(|end| end > self.end) {
            return Ok(None);
        }
        if offset < self.start || offset + length as u64 > self.start + self.bytes.len() as u64 {
            let rest = usize::try_from(self.end - offset).unwrap_or(usize::MAX);
            self.bytes.resize(rest.min(WINDOW_BYTES), 0);
            self.start = offset;
            if let Err(error) = files.read_at(self.file, offset, &mut self.bytes) {
                self.bytes.clear();
                return Err(error).named("read", self.file);
            }
        }
        let at = usize::try_from(offset - self.start).expect("inside the window");
        Ok(Some(&self.bytes[at..at + length]))
    }
}
