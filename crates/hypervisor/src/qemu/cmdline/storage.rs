//! Disks and firmware flash.
//!
//! | what | becomes |
//! |---|---|
//! | empty drive, null device | kept |
//! | read-only disk, CD, firmware code | kept, read-only; the file must have the same content |
//! | writable firmware flash | a private file; its content is a RAM block, so it comes with the checkpoint |
//! | writable disk, declared disposable | an empty one of the same size |
//! | any other writable disk | refused until disks are replicated |

use std::collections::BTreeMap;

use super::{CmdlineError, Derivation, Given, PrivateFile, Props};

/// Backends that are no file of the host.
const EMPTY_DRIVERS: &[&str] = &["null-co", "null-aio"];

/// What is known of all disks before the first is looked at.
pub(super) struct Drives {
    blockdevs: Vec<Props>,
    /// Nodes that are firmware flash, by `-machine pflashN=`, and the files under them.
    flash: Vec<String>,
    /// How many drives of each interface there were, for the names that QEMU gives.
    counted: BTreeMap<String, usize>,
}

impl Drives {
    pub(super) fn new(machine: &Props, blockdevs: Vec<Props>) -> Self {
        let mut flash: Vec<String> = ["pflash0", "pflash1"]
            .iter()
            .filter_map(|key| machine.get(key))
            .map(str::to_owned)
            .collect();
        // Follow each flash node down to its file.
        let mut at = 0;
        while at < flash.len() && flash.len() < 64 {
            let below = blockdevs
                .iter()
                .find(|b| b.get("node-name") == Some(flash[at].as_str()));
            flash.extend(below.and_then(|b| b.get("file")).map(str::to_owned));
            at += 1;
        }
        Self {
            blockdevs,
            flash,
            counted: BTreeMap::new(),
        }
    }

    /// The name of the node that uses `name`.
    fn above(&self, name: &str) -> Option<&str> {
        self.blockdevs
            .iter()
            .find(|b| b.get("file") == Some(name))?
            .get("node-name")
    }

    /// Whether a node above `name` makes it read-only.
    fn is_read_only(&self, name: &str) -> bool {
        let above: Vec<&Props> = self
            .blockdevs
            .iter()
            .filter(|b| b.get("file") == Some(name))
            .collect();
        !above.is_empty() && above.iter().all(|b| b.is_on("read-only"))
    }
}

impl Derivation<'_> {
    /// `-drive` and the short forms that stand for one.
    pub(super) fn drive(&mut self, given: &Given) -> Result<(), CmdlineError> {
        let mut props = match given.name.as_str() {
            "drive" => Props::parse(given.value(), None)?,
            short => {
                let mut props = Props::default();
                match short {
                    "cdrom" => {
                        props.set("media", "cdrom");
                        props.set("index", "2");
                    }
                    "pflash" => {
                        props.set("if", "pflash");
                        props.set("format", "raw");
                    }
                    "fda" | "fdb" => props.set("if", "floppy"),
                    "sd" | "mtdblock" => props.set("if", short.trim_end_matches("block")),
                    _ => props.set("index", (short.as_bytes()[2] - b'a').to_string()),
                }
                props.set("file", given.value());
                props
            }
        };
        let interface = props.get("if").unwrap_or("ide").to_owned();
        let number = self.drives.counted.entry(interface.clone()).or_default();
        let names = drive_names(&props, &interface, *number);
        *number += 1;
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let is_cd = props.get("media") == Some("cdrom");
        let driver = props
            .get("driver")
            .or(props.get("file.driver"))
            .unwrap_or_default();
        let file_key = ["file", "file.filename", "filename"]
            .into_iter()
            .find(|key| props.get(key).is_some());
        let read_only = is_cd || props.is_on("readonly") || props.is_on("read-only");
        if EMPTY_DRIVERS.contains(&driver) || (file_key.is_none() && driver.is_empty()) {
            self.put("drive", props.to_string());
        } else if props.is_on("snapshot") && !self.is_disposable(&names) {
            return Err(given.refuse("the temporary overlay is not replicated; declare the disk disposable"));
        } else if read_only {
            if let Some(key) = file_key {
                let path = props.get(key).unwrap_or_default().to_owned();
                let path = self.disk_file(given, &path)?;
                props.set(key, path);
            }
            props.set("read-only", "on");
            props.remove("readonly");
            self.put("drive", props.to_string());
        } else if interface == "pflash" {
            let path = self.private_flash(&names)?;
            props.set(file_key.unwrap_or("file"), path);
            self.put("drive", props.to_string());
        } else {
            self.disposable_drive(given, props, &names)?;
        }
        Ok(())
    }

    fn disposable_drive(
        &mut self,
        given: &Given,
        mut props: Props,
        names: &[&str],
    ) -> Result<(), CmdlineError> {
        if !self.is_disposable(names) {
            return Err(given.refuse(format!(
                "the disk {} is writable and disks are not replicated yet; make it read-only or declare it disposable",
                names[0]
            )));
        }
        let bytes = self.disk_bytes(names)?;
        props.retain(&[
            "if", "id", "index", "bus", "unit", "media", "serial", "werror", "rerror",
        ]);
        props.set("driver", "null-co");
        props.set("size", bytes.to_string());
        props.set("read-zeroes", "on");
        self.changes
            .push(format!("disk {} is empty: it was declared disposable", names[0]));
        self.put("drive", props.to_string());
        Ok(())
    }

    pub(super) fn blockdev(&mut self, given: &Given) -> Result<(), CmdlineError> {
        let mut props = Props::parse(given.value(), None)?;
        let node = props.get("node-name").unwrap_or_default().to_owned();
        let driver = props.get("driver").unwrap_or_default().to_owned();
        let refers_below = props.get("file").is_some();
        let key = ["filename", "file.filename"]
            .into_iter()
            .find(|key| props.get(key).is_some());
        let read_only = props.is_on("read-only") || self.drives.is_read_only(&node);
        if EMPTY_DRIVERS.contains(&driver.as_str()) {
            self.put("blockdev", props.to_string());
        } else if read_only {
            if let Some(key) = key {
                let path = props.get(key).unwrap_or_default().to_owned();
                let path = self.disk_file(given, &path)?;
                props.set(key, path);
            }
            // The nodes below, which the same option can describe, are no more writable than this one.
            let below: Vec<String> = props
                .keys()
                .filter(|key| key.ends_with(".read-only") || key.ends_with(".auto-read-only"))
                .map(str::to_owned)
                .collect();
            for key in below {
                props.remove(&key);
            }
            if key == Some("file.filename") {
                props.set("file.read-only", "on");
            }
            props.set("read-only", "on");
            self.put("blockdev", props.to_string());
        } else if self.drives.flash.contains(&node) {
            if let Some(key) = key {
                // QEMU tells the size of the node that the machine uses, above the file.
                let above = self.drives.above(&node).unwrap_or_default().to_owned();
                let path = self.private_flash(&[&node, &above])?;
                props.set(key, path);
            }
            self.put("blockdev", props.to_string());
        } else if self.is_disposable(&[&node]) {
            let bytes = self.disk_bytes(&[&node])?;
            self.changes
                .push(format!("disk {node} is empty: it was declared disposable"));
            self.put(
                "blockdev",
                format!("driver=null-co,node-name={node},size={bytes},read-zeroes=on"),
            );
        } else if refers_below {
            return Err(given.refuse("the disk is writable and disks are not replicated yet"));
        } else {
            return self.blockdev_below(given, &node);
        }
        Ok(())
    }

    /// A writable file node: left out when the node above it became an empty disk, refused otherwise.
    fn blockdev_below(&mut self, given: &Given, node: &str) -> Result<(), CmdlineError> {
        if self
            .drives
            .above(node)
            .is_some_and(|name| self.is_disposable(&[name]))
        {
            return Ok(());
        }
        Err(given.refuse(format!(
            "the disk {node} is writable and disks are not replicated yet; make it read-only or declare it disposable"
        )))
    }

    fn disk_file(&mut self, given: &Given, path: &str) -> Result<String, CmdlineError> {
        let is_url = path.split('/').next().is_some_and(|first| first.contains(':'));
        if is_url {
            return Err(given.refuse("only files are supported; -blockdev names other drivers"));
        }
        Ok(self.file(path))
    }

    fn private_flash(&mut self, names: &[&str]) -> Result<String, CmdlineError> {
        let bytes = self.disk_bytes(names)?;
        let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
        let name: String = names[0].chars().map(plain).collect();
        let path = self.plan.private_dir.join(format!("{name}.flash"));
        self.changes.push(format!(
            "flash {} is {}, filled from the checkpoint",
            names[0],
            path.display()
        ));
        let text = path.display().to_string();
        self.private_files.push(PrivateFile { path, bytes });
        Ok(text)
    }

    fn disk_bytes(&self, names: &[&str]) -> Result<u64, CmdlineError> {
        let disk = self
            .spec
            .disks
            .iter()
            .find(|disk| names.contains(&disk.id.as_str()));
        Ok(disk
            .ok_or_else(|| CmdlineError::DiskSize(names[0].to_owned()))?
            .bytes)
    }
}

/// The drive's id, or the names that QEMU makes up when it has none.
fn drive_names(props: &Props, interface: &str, number: usize) -> Vec<String> {
    if let Some(id) = props.get("id") {
        return vec![id.to_owned()];
    }
    let index = props
        .get("unit")
        .or(props.get("index"))
        .and_then(|n| n.parse().ok())
        .unwrap_or(number);
    let kind = if props.get("media") == Some("cdrom") {
        "cd"
    } else {
        "hd"
    };
    if interface == "ide" || interface == "scsi" {
        // One or two units on a bus, by machine.
        return vec![
            format!("{interface}{}-{kind}{}", index / 2, index % 2),
            format!("{interface}{index}-{kind}0"),
        ];
    }
    vec![format!("{interface}{index}")]
}
