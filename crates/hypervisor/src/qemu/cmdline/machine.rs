//! The machine itself: type, memory, processor, objects, devices.

use super::{CmdlineError, Derivation, Given, Props};

/// Drivers, by prefix, whose state lies outside guest memory and device state, and why that matters.
const DEVICES_REFUSED: &[(&str, &str)] = &[
    (
        "vfio-",
        "a passed-through device writes to memory unseen; use a virtio device",
    ),
    (
        "vhost-user-",
        "its back end is another process that writes to memory unseen; use QEMU's own device",
    ),
    (
        "vhost-scsi",
        "the kernel writes to memory unseen; use virtio-scsi-pci",
    ),
    (
        "vhost-vdpa",
        "a vDPA device writes to memory unseen; use a virtio device",
    ),
    (
        "vhost-vsock",
        "vsock connections are not gated; remove the device",
    ),
    ("ivshmem", "memory shared with others is not replicated"),
    ("virtio-9p", "a shared folder is not replicated"),
    ("usb-host", "a passed-through device cannot follow the guest"),
    ("usb-redir", "a redirected device cannot follow the guest"),
    ("tpm-", "the TPM's state is outside the guest and not replicated"),
    (
        "pc-dimm",
        "plugged memory is not supported; give all memory with -m",
    ),
    ("nvdimm", "persistent memory is not supported"),
    (
        "virtio-mem",
        "resizable memory is not supported; give all memory with -m",
    ),
    ("virtio-pmem", "persistent memory is not supported"),
    ("cxl-", "CXL memory is not supported"),
    ("usb-mtp", "a shared folder is not replicated"),
    ("u2f-", "a security key's state is outside the guest"),
    ("scsi-generic", "a passed-through device cannot follow the guest"),
    ("scsi-block", "a passed-through device cannot follow the guest"),
];

/// Properties that name a file which QEMU writes: a command line comes from another host, and must not name any.
const PROPERTIES_REFUSED: &[&str] = &["pcap"];

/// Objects that are kept as they are.
const OBJECTS_KEPT: &[&str] = &[
    "iothread",
    "main-loop",
    "rng-random",
    "rng-builtin",
    "throttle-group",
    "cryptodev-backend-builtin",
    "secret",
    "can-bus",
];

/// Objects that only the primary needs.
const OBJECTS_DROPPED: &[&str] = &[
    "tls-creds-x509",
    "tls-creds-anon",
    "tls-creds-psk",
    "tls-cipher-suites",
    "thread-context",
    "filter-dump",
];

impl Derivation<'_> {
    pub(super) fn memory(&mut self, given: &Given) -> Result<(), CmdlineError> {
        let props = Props::parse(given.value(), Some("size"))?;
        if props.keys().any(|key| key != "size") {
            return Err(given.refuse("memory cannot be plugged while protected; give -m a size only"));
        }
        self.keep(given);
        Ok(())
    }

    pub(super) fn cpu(&mut self, given: &Given) -> Result<(), CmdlineError> {
        let model = given.value().split(',').next().unwrap_or_default();
        let of_the_host = matches!(model, "host" | "max") && self.own.accelerator == "kvm";
        if of_the_host && self.spec.host_cpu != self.plan.host_cpu {
            return Err(given.refuse(format!(
                "the primary's processor is {:?} and the backup's {:?}; use a named CPU model that both have",
                self.spec.host_cpu, self.plan.host_cpu
            )));
        }
        self.keep(given);
        Ok(())
    }

    pub(super) fn object(&mut self, given: &Given) -> Result<(), CmdlineError> {
        let props = Props::parse(given.value(), Some("qom-type"))?;
        let (kind, id) = (
            props.get("qom-type").unwrap_or_default(),
            props.get("id").unwrap_or_default(),
        );
        if kind.starts_with("memory-backend-") {
            return if self.machine.get("memory-backend") == Some(id) {
                // `finish_machine` writes it anew.
                Ok(())
            } else {
                Err(given.refuse("memory besides the main one is not supported"))
            };
        }
        if OBJECTS_DROPPED.contains(&kind) || kind.starts_with("authz-") {
            self.changes
                .push(format!("-object {kind} {id} left out: only the primary needs it"));
            return Ok(());
        }
        if !OBJECTS_KEPT.contains(&kind) {
            return Err(given.refuse("no rule for this type of object"));
        }
        if kind == "secret" && props.get("file").is_some() {
            return Err(given.refuse("a secret in a file is not carried to the backup"));
        }
        self.keep(given);
        Ok(())
    }

    pub(super) fn global(&mut self, given: &Given) -> Result<(), CmdlineError> {
        let names = |property: &&&str| given.value().contains(**property);
        if let Some(property) = PROPERTIES_REFUSED.iter().find(names) {
            return Err(given.refuse(format!(
                "{property} names a file that QEMU would write; leave it out"
            )));
        }
        self.keep(given);
        Ok(())
    }

    pub(super) fn device(&mut self, given: &Given) -> Result<(), CmdlineError> {
        let mut props = Props::parse(given.value(), Some("driver"))?;
        let driver = props.get("driver").unwrap_or_default().to_owned();
        if let Some((_, why)) = DEVICES_REFUSED
            .iter()
            .find(|(prefix, _)| driver.starts_with(prefix))
        {
            return Err(given.refuse(*why));
        }
        if let Some(key) = props.keys().find(|key| PROPERTIES_REFUSED.contains(key)) {
            return Err(given.refuse(format!("{key} names a file that QEMU would write; leave it out")));
        }
        let key = if driver == "loader" { "file" } else { "romfile" };
        match props.get(key).filter(|file| !file.is_empty()).map(str::to_owned) {
            // A bare name is one of QEMU's own ROMs, not a path.
            Some(file) if file.contains('/') => {
                let file = self.file(&file);
                props.set(key, file);
                self.put("device", props.to_string());
            }
            _ => self.keep(given),
        }
        Ok(())
    }

    /// The merged `-machine` and the main memory.
    pub(super) fn finish_machine(&mut self) -> Result<(), CmdlineError> {
        for key in ["confidential-guest-support", "memory-encryption"] {
            if self.machine.get(key).is_some() {
                let option = format!("machine {key}");
                return Err(CmdlineError::Refused {
                    option,
                    why: "encrypted memory cannot be copied".into(),
                });
            }
        }
        let block = self.spec.main_name().to_owned();
        let (id, canonical) = match self.machine.get("memory-backend").map(str::to_owned) {
            Some(id) if block == id => (id, false),
            Some(id) if block == format!("/objects/{id}") => (id, true),
            Some(backend) => return Err(CmdlineError::MainBlock { block, backend }),
            None => {
                self.changes.push(format!(
                    "the memory {block} becomes a memory backend of that name"
                ));
                (block, false)
            }
        };
        let mut memory = Props::default();
        memory.set("qom-type", "memory-backend-file");
        memory.set("id", &id);
        memory.set("size", self.spec.main_bytes().to_string());
        memory.set("mem-path", self.plan.main_ram.display().to_string());
        memory.set("share", if self.plan.share { "on" } else { "off" });
        memory.set(
            "x-use-canonical-path-for-ramblock-id",
            if canonical { "on" } else { "off" },
        );
        self.put("object", memory.to_string());
        self.machine.set("type", &self.own.template.machine);
        self.machine.set("memory-backend", id);
        let machine = self.machine.to_string();
        self.put("machine", machine);
        self.changes
            .push(format!("the main memory is {}", self.plan.main_ram.display()));
        Ok(())
    }
}
