//! A monitor of the guest's own QEMU, to ask from outside what the daemons have done to it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::Lab;
use crate::guest::second_qmp;

/// A connection to the second monitor.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to the second monitor of the lab's guest.
    ///
    /// # Errors
    /// When the guest has none, or QEMU does not answer.
    pub fn connect(lab: &Lab) -> Result<Qmp> {
        let path = second_qmp(lab);
        let stream =
            UnixStream::connect(&path).with_context(|| format!("cannot connect to {}", path.display()))?;
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .context("cannot set a timeout")?;
        let mut qmp = Qmp {
            stream: BufReader::new(stream),
        };
        qmp.read()?;
        qmp.execute("qmp_capabilities")?;
        Ok(qmp)
    }

    /// Runs a command without arguments and returns its result.
    ///
    /// # Errors
    /// What QEMU says, or that it says nothing for 10 s.
    pub fn execute(&mut self, command: &str) -> Result<Value> {
        self.execute_with(command, &json!({}))
    }

    /// Runs a command.
    ///
    /// # Errors
    /// What QEMU says, or that it says nothing for 10 s.
    pub fn execute_with(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let line = json!({"execute": command, "arguments": arguments}).to_string() + "\n";
        self.stream
            .get_mut()
            .write_all(line.as_bytes())
            .context("cannot write to the monitor")?;
        loop {
            let answer = self.read()?;
            if let Some(result) = answer.get("return") {
                return Ok(result.clone());
            }
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {command}: {error}");
            }
        }
    }

    /// The state of the guest: `running`, `paused`, …
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn status(&mut self) -> Result<String> {
        let status = self.execute("query-status")?;
        Ok(status
            .get("status")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned())
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self
            .stream
            .read_line(&mut line)
            .context("the monitor does not answer")?
            == 0
        {
            bail!("QEMU closed its monitor");
        }
        serde_json::from_str(&line).context("the monitor sent no JSON")
    }
}
