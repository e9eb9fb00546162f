//! The welcome, and the files that come with it.

use std::os::fd::OwnedFd;

use super::{Attachment, Client, ClientError};
use crate::channel::ChannelError;
use crate::memfd::{self, Seals};
use crate::proto::{ErrorCode, Reply, Request, Welcome};

impl Client {
    pub(super) fn greet(&mut self, hello: &Request) -> Result<Attachment, ClientError> {
        // A VMM that has no place for us says so and hangs up, perhaps before it has read this.
        match self.post(hello, &[]) {
            Ok(()) | Err(ClientError::Channel(ChannelError::Closed)) => {}
            Err(error) => return Err(error),
        }
        let (reply, files) = match self.answer(hello.name(), self.number, self.reply_limit) {
            Ok(answer) => answer,
            Err(ClientError::Refused {
                code: ErrorCode::Busy,
                text,
                ..
            }) => {
                return Err(ClientError::Busy {
                    pid: self.vmm_pid,
                    text,
                });
            }
            Err(error) => return Err(error),
        };
        let Reply::Welcome(welcome) = reply else {
            return Err(self.unexpected(hello.name(), &reply));
        };
        self.take_files(welcome, files)
    }

    fn take_files(&mut self, welcome: Welcome, files: Vec<OwnedFd>) -> Result<Attachment, ClientError> {
        let mut files = files.into_iter();
        let no_regions = Vec::new();
        let regions = welcome
            .machine
            .as_ref()
            .map_or(&no_regions, |machine| &machine.regions);
        let region_files: Vec<OwnedFd> = files.by_ref().take(regions.len()).collect();
        for (region, file) in regions.iter().zip(&region_files) {
            let needed = region.fd_offset.saturating_add(region.bytes);
            let what = format!("memory region {:?}", region.name);
            memfd::check(file, &what, needed, Seals::IfPossible)?;
        }
        let bitmap = if welcome.bitmap_bytes > 0 {
            files.next()
        } else {
            None
        };
        if let Some(file) = &bitmap {
            memfd::check(file, "the dirty bitmap", welcome.bitmap_bytes, Seals::Needed)?;
        }
        let state = files.next().expect("the number of files was checked");
        memfd::check(&state, "the state", welcome.state_bytes_max, Seals::NotNeeded)?;
        self.state = Some(state.into());
        Ok(Attachment {
            welcome,
            regions: region_files,
            bitmap,
        })
    }
}
