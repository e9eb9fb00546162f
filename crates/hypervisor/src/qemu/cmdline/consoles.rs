//! Character devices, serial lines and sound: the guest's side stays, the other side is connected to nothing.

use super::{CmdlineError, Derivation, Given, Props};

impl Derivation<'_> {
    pub(super) fn chardev(&mut self, given: &Given) -> Result<(), CmdlineError> {
        let props = Props::parse(given.value(), Some("backend"))?;
        let (backend, id) = (
            props.get("backend").unwrap_or_default(),
            props.get("id").unwrap_or_default(),
        );
        let mut null = Props::default();
        null.set("backend", "null");
        null.set("id", id);
        // Two devices may share a multiplexed one.
        if props.is_on("mux") {
            null.set("mux", "on");
        }
        if backend != "null" {
            self.changes
                .push(format!("chardev {id} ({backend}) is connected to nothing"));
        }
        self.put("chardev", null.to_string());
        Ok(())
    }

    pub(super) fn console(&mut self, given: &Given) {
        let first_serial = given.name == "serial" && self.serials == 0;
        if given.name == "serial" {
            self.serials += 1;
        }
        let value = given.value();
        if value == "none" {
            return self.keep(given);
        }
        match (&self.plan.serial_log, first_serial) {
            (Some(log), true) => {
                let log = log.display().to_string();
                self.put("serial", format!("file:{log}"));
                self.changes
                    .push(format!("the first serial line is logged to {log}"));
            }
            _ if value.starts_with("chardev:") => self.keep(given),
            _ => {
                self.put(&given.name.clone(), "null");
                if value != "null" {
                    self.changes
                        .push(format!("-{} {value} is connected to nothing", given.name));
                }
            }
        }
    }

    pub(super) fn audio(&mut self, given: &Given) -> Result<(), CmdlineError> {
        let props = Props::parse(given.value(), Some("driver"))?;
        let id = props.get("id").unwrap_or_default().to_owned();
        let mut silent = Props::default();
        silent.set("driver", "none");
        silent.set("id", &id);
        self.changes.push(format!("audio {id} is silent"));
        self.put("audiodev", silent.to_string());
        Ok(())
    }
}
