//! The guest's command line: words of the form `name=value`, separated by blanks. Each has a default.

use core::fmt;
use core::net::{Ipv4Addr, Ipv6Addr};
use core::str::FromStr;

use crate::dirty::Dirtying;

/// How busy the self-checks keep a vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Check {
    /// Not at all: only interrupts and clocks are watched.
    Off,
    /// A round now and then; the vCPU sleeps in between.
    On,
    /// Round after round, without sleep: also the measure of the guest's speed.
    Busy,
}

/// What the command line says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// `ip=ADDRESS/PREFIX`.
    pub ip: (Ipv4Addr, u8),
    /// `ip6=ADDRESS/PREFIX`.
    pub ip6: Option<(Ipv6Addr, u8)>,
    /// `gw=ADDRESS`, the default router.
    pub gateway: Option<Ipv4Addr>,
    /// `port=N`, of the service by TCP and of the echo by UDP.
    pub port: u16,
    /// `dirty=PATTERN[/CONTENT]:PAGES:PERIOD_MS[:SET_MIB]` or `dirty=off`.
    pub dirty: Option<Dirtying>,
    /// `log=on|off`: whether a disk, where there is one, is written.
    pub log: bool,
    /// `check=on|off|busy`.
    pub check: Check,
    /// `work=on|off`: whether time that is left over is spent on countable arithmetic instead of sleep.
    pub work: bool,
    /// `progress=on|off`: whether [`crate::abi::Progress`] is written every millisecond.
    pub progress: bool,
    /// `keys=MIB`, memory for keys; an eighth of the RAM, at most 64 MiB, if not given.
    pub keys_mib: Option<u32>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            ip: (Ipv4Addr::new(10, 77, 0, 2), 24),
            ip6: None,
            gateway: None,
            port: 6379,
            dirty: None,
            log: true,
            check: Check::On,
            work: false,
            progress: false,
            keys_mib: None,
        }
    }
}

/// A word of the command line that is not understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SettingsError<'a> {
    /// The word.
    pub word: &'a str,
    /// What would be right.
    pub why: &'static str,
}

impl fmt::Display for SettingsError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "command line: {:?}: {}", self.word, self.why)
    }
}

impl Settings {
    /// Reads a command line.
    ///
    /// # Errors
    /// The first word that is not understood.
    pub fn parse(cmdline: &str) -> Result<Self, SettingsError<'_>> {
        let mut settings = Settings::default();
        for word in cmdline.split_ascii_whitespace() {
            settings.take(word).map_err(|why| SettingsError { word, why })?;
        }
        Ok(settings)
    }

    fn take(&mut self, word: &str) -> Result<(), &'static str> {
        let (name, value) = word.split_once('=').ok_or("name=value is wanted")?;
        match name {
            "ip" => self.ip = address(value, 32).ok_or("ADDRESS/PREFIX is wanted, as in 10.77.0.2/24")?,
            "ip6" => {
                self.ip6 = Some(address(value, 128).ok_or("ADDRESS/PREFIX is wanted, as in fd77::2/64")?);
            }
            "gw" => self.gateway = Some(value.parse().map_err(|_| "an IPv4 address is wanted")?),
            "port" => {
                self.port = value
                    .parse()
                    .ok()
                    .filter(|&port| port > 0)
                    .ok_or("a port from 1 to 65535 is wanted")?;
            }
            "dirty" => self.dirty = Dirtying::parse(value)?,
            "log" => self.log = switch(value)?,
            "work" => self.work = switch(value)?,
            "progress" => self.progress = switch(value)?,
            "check" => {
                self.check = match value {
                    "on" => Check::On,
                    "off" => Check::Off,
                    "busy" => Check::Busy,
                    _ => return Err("on, off or busy is wanted"),
                }
            }
            "keys" => self.keys_mib = Some(value.parse().map_err(|_| "a number of MiB is wanted")?),
            _ => return Err("known are ip, ip6, gw, port, dirty, log, check, work, progress, keys"),
        }
        Ok(())
    }
}

fn switch(text: &str) -> Result<bool, &'static str> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("on or off is wanted"),
    }
}

fn address<A: FromStr>(text: &str, prefix_max: u8) -> Option<(A, u8)> {
    let (address, prefix) = text.split_once('/')?;
    let prefix = prefix.parse().ok().filter(|&prefix| prefix <= prefix_max)?;
    Some((address.parse().ok()?, prefix))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_empty_command_line_gives_the_defaults() {
        assert_eq!(Settings::parse("  "), Ok(Settings::default()));
    }

    #[test]
    fn every_word_is_understood() {
        let line = "ip=10.1.2.3/16 ip6=fd77::2/64 gw=10.1.0.1 port=7 dirty=hotcold/text:10:25:8 log=off check=busy work=on progress=on keys=4";
        let settings = Settings::parse(line).unwrap();
        assert_eq!(settings.ip, (Ipv4Addr::new(10, 1, 2, 3), 16));
        assert_eq!(settings.ip6, Some(("fd77::2".parse().unwrap(), 64)));
        assert_eq!(settings.gateway, Some(Ipv4Addr::new(10, 1, 0, 1)));
        assert_eq!(
            (settings.port, settings.log, settings.check),
            (7, false, Check::Busy)
        );
        assert_eq!(settings.dirty.unwrap().to_string(), "hotcold/text:10:25:8");
        assert_eq!(
            (settings.work, settings.progress, settings.keys_mib),
            (true, true, Some(4))
        );
    }

    #[test]
    fn a_word_that_is_not_understood_is_named() {
        for word in [
            "ip=10.0.0.1",
            "ip=10.0.0.1/33",
            "port=0",
            "dirty=random",
            "log=1",
            "work=2",
            "check",
        ] {
            assert_eq!(Settings::parse(word).unwrap_err().word, word);
        }
    }

    proptest! {
        #[test]
        fn no_command_line_makes_it_panic(line in ".{0,80}") {
            let _ = Settings::parse(&line);
        }
    }
}
