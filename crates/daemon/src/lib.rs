//! What `replicator`, `backup-agent` and `witness` have in common and no library below them can know: settings, certificates and
//! the service manager at once.

mod allow_list;
mod bad_settings;
mod certificates;
mod record_file;
mod reload;
mod runtime;

pub use allow_list::AllowList;
pub use bad_settings::{BadSettings, exit_code};
pub use certificates::reload_certificates;
pub use record_file::{RecordError, RecordFile};
pub use reload::Reload;
pub use runtime::runtime;
