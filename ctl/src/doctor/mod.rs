//! `romulus doctor`: looks at what protection needs on this host, and says what to do about what is missing.
//!
//! Nothing is changed, and no daemon is asked to do anything. Each check says what it found; one that fails says what to do.

mod host;
mod peers;

use std::path::Path;

use romulus_config::{BackupAgent, Replicator, Settings, Witness, load};
use serde_json::{Value, json};

use crate::args::{DoctorOptions, Role};
use crate::exit;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Grade {
    /// As it should be.
    Good,
    /// Protection works; something should be looked at.
    Warning,
    /// Protection does not work like this.
    Bad,
}

impl Grade {
    fn word(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Warning => "warning",
            Self::Bad => "bad",
        }
    }
}

/// What a check found.
#[derive(Clone, Debug)]
pub(crate) struct Finding {
    /// The check's name, stable.
    pub(crate) check: &'static str,
    /// How bad it is.
    pub(crate) grade: Grade,
    /// What was found.
    pub(crate) found: String,
    /// What to do; empty when it is good.
    pub(crate) remedy: String,
}

impl Finding {
    pub(crate) fn good(check: &'static str, found: impl Into<String>) -> Self {
        Self {
            check,
            grade: Grade::Good,
            found: found.into(),
            remedy: String::new(),
        }
    }

    pub(crate) fn warning(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            check,
            grade: Grade::Warning,
            found: found.into(),
            remedy: remedy.into(),
        }
    }

    pub(crate) fn bad(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            grade: Grade::Bad,
            ..Self::warning(check, found, remedy)
        }
    }
}

/// The daemons' settings, or their defaults where a file is missing or wrong.
pub(crate) struct AllSettings {
    pub(crate) replicator: Replicator,
    pub(crate) agent: BackupAgent,
    pub(crate) witness: Witness,
}

/// Runs all checks.
pub(crate) async fn run(options: DoctorOptions) -> anyhow::Result<u8> {
    let mut findings = Vec::new();
    let dir = &options.config_dir;
    let settings = AllSettings {
        replicator: settings(dir, &mut findings),
        agent: settings(dir, &mut findings),
        witness: settings(dir, &mut findings),
    };
    let roles = roles(&options);
    findings.extend(host::checks(&roles, &settings));
    findings.extend(peers::checks(&options, &roles, &settings).await);
    let bad = findings.iter().any(|finding| finding.grade == Grade::Bad);
    if options.json {
        let one = |f: &Finding| json!({"check": f.check, "grade": f.grade.word(), "found": f.found, "remedy": f.remedy});
        let all: Vec<Value> = findings.iter().map(one).collect();
        println!(
            "{}",
            serde_json::to_string_pretty(&json!({"schema": 1, "good": !bad, "checks": all}))?
        );
    } else {
        print!("{}", render(&findings));
    }
    Ok(if bad { exit::TO_MEND } else { exit::OK })
}

fn roles(options: &DoctorOptions) -> Vec<Role> {
    if !options.roles.is_empty() {
        return options.roles.clone();
    }
    let has = |name: &str| options.config_dir.join(format!("{name}.toml")).exists();
    let by_file = [
        (Role::Primary, has(Replicator::NAME)),
        (Role::Backup, has(BackupAgent::NAME)),
        (Role::Witness, has(Witness::NAME)),
    ];
    let found: Vec<Role> = by_file
        .iter()
        .filter(|(_, there)| *there)
        .map(|(role, _)| *role)
        .collect();
    if found.is_empty() {
        vec![Role::Primary, Role::Backup]
    } else {
        found
    }
}

/// A daemon's settings from the folder; a file that is not good is a finding, and the defaults are gone on with.
fn settings<S: Settings>(dir: &Path, findings: &mut Vec<Finding>) -> S {
    let file = dir.join(format!("{}.toml", S::NAME));
    if !file.exists() {
        return S::default();
    }
    match load::<S>(Some(&file)) {
        Ok(settings) => {
            findings.push(Finding::good("settings", format!("{} is good", file.display())));
            settings
        }
        Err(error) => {
            let remedy = format!("correct {}; `romulus validate` checks it again", file.display());
            findings.push(Finding::bad("settings", error.to_string(), remedy));
            S::default()
        }
    }
}

fn render(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let mark = match finding.grade {
            Grade::Good => "good   ",
            Grade::Warning => "warning",
            Grade::Bad => "BAD    ",
        };
        text.push_str(&format!("{mark} {:<14}{}\n", finding.check, finding.found));
        if !finding.remedy.is_empty() {
            text.push_str(&format!("        {:<14}-> {}\n", "", finding.remedy));
        }
    }
    let count = |grade| findings.iter().filter(|finding| finding.grade == grade).count();
    text.push_str(&format!(
        "{} bad, {} warnings\n",
        count(Grade::Bad),
        count(Grade::Warning)
    ));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_bad_comes_with_what_to_do() {
        let findings = [
            Finding::good("kernel", "6.8"),
            Finding::bad("tun", "no /dev/net/tun", "modprobe tun"),
        ];
        let text = render(&findings);
        assert!(text.contains("BAD     tun           no /dev/net/tun"), "{text}");
        assert!(
            text.contains("-> modprobe tun") && text.ends_with("1 bad, 0 warnings\n"),
            "{text}"
        );
    }

    #[test]
    fn settings_that_are_not_good_are_a_finding_and_the_other_checks_go_on() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("witness.toml"), "vms_max = 0").unwrap();
        let mut findings = Vec::new();
        let settings: Witness = settings(dir.path(), &mut findings);
        assert_eq!(settings, Witness::default());
        assert_eq!(findings[0].grade, Grade::Bad);
        assert!(findings[0].found.contains("line 1"), "{}", findings[0].found);
    }
}
