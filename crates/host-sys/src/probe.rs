//! What the running kernel can do, by name, so that a refusal can say what is missing.

use std::fmt;

use crate::userfault::create_here;
use crate::{Pagemap, SysError, UserFault};

/// A feature that dirty tracking from outside needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelFeature {
    /// `userfaultfd` itself (CONFIG_USERFAULTFD).
    UserFault,
    /// `UFFD_FEATURE_WP_ASYNC`, Linux 6.7.
    WpAsync,
    /// `PAGEMAP_SCAN`, Linux 6.7.
    PagemapScan,
}

impl fmt::Display for KernelFeature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UserFault => "userfaultfd (CONFIG_USERFAULTFD)",
            Self::WpAsync => "userfaultfd WP_ASYNC (Linux 6.7)",
            Self::PagemapScan => "PAGEMAP_SCAN (Linux 6.7)",
        })
    }
}

/// The features of dirty tracking that this kernel does *not* have; empty when all are there.
pub fn probe_kernel() -> Vec<KernelFeature> {
    let mut missing = Vec::new();
    match create_here().map(UserFault::enable) {
        Ok(Ok(_)) => {}
        Ok(Err(_)) => missing.push(KernelFeature::WpAsync),
        Err(_) => missing.push(KernelFeature::UserFault),
    }
    if scan_is_missing() {
        missing.push(KernelFeature::PagemapScan);
    }
    missing
}

fn scan_is_missing() -> bool {
    let Ok(mut pagemap) = Pagemap::open(std::process::id()) else {
        return true;
    };
    // An unknown ioctl is ENOTTY; a known one complains that this page is not registered (EPERM).
    let page = (&raw const missing_page_marker as u64) & !4095;
    match pagemap.count_written(page, page + 4096) {
        Ok(_) => false,
        Err(SysError::Call { source, .. }) => source.raw_os_error() == Some(libc::ENOTTY),
        Err(_) => true,
    }
}

#[allow(
    non_upper_case_globals,
    reason = "an address to look at, not a constant of the API"
)]
static missing_page_marker: u8 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernel_can_do_all_that_the_tests_need() {
        assert_eq!(
            probe_kernel(),
            Vec::new(),
            "the tests need Linux 6.7 or later with userfaultfd"
        );
    }
}
