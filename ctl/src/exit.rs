//! Exit codes: part of the interface. `docs/src/status.md` has the same table; a test holds them together.

/// The command did what it says.
pub(crate) const OK: u8 = 0;
/// It failed; the message says why.
pub(crate) const FAILED: u8 = 1;
/// `status`, `wait`: reachable, and not protected.
pub(crate) const NOT_PROTECTED: u8 = 3;
/// The daemon could not be reached.
pub(crate) const UNREACHABLE: u8 = 4;
/// `may-run`: the record names another host.
pub(crate) const MUST_NOT_RUN: u8 = 5;
/// `may-run`: the witness does not answer, or is not to be believed.
pub(crate) const UNKNOWN: u8 = 6;
/// `doctor`, `validate`, `pki check`: something has to be mended.
pub(crate) const TO_MEND: u8 = 7;

/// Every code, with what `romulus --help` says of it. 2 is what the command line's parser ends with.
pub(crate) const TABLE: [(u8, &str); 8] = [
    (OK, "done"),
    (FAILED, "failed"),
    (2, "wrong usage"),
    (NOT_PROTECTED, "not protected (status, wait)"),
    (UNREACHABLE, "daemon unreachable"),
    (MUST_NOT_RUN, "must not run here (may-run)"),
    (UNKNOWN, "not known (may-run)"),
    (
        TO_MEND,
        "something has to be mended (doctor, validate, pki check)",
    ),
];

/// The table as the last paragraph of the help.
pub(crate) fn help() -> String {
    let codes = TABLE.map(|(code, meaning)| format!("{code} {meaning}"));
    format!("Exit codes: {}.", codes.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_exit_codes_are_those_of_the_command() {
        let text = include_str!("../../docs/src/status.md");
        let (_, section) = text
            .split_once("## Exit codes of `romulus`")
            .expect("the section is there");
        let (section, _) = section.split_once("\n## ").expect("another one follows");
        let code = |line: &str| line.strip_prefix("| ")?.split(' ').next()?.parse::<u8>().ok();
        let documented: Vec<u8> = section.lines().filter_map(code).collect();
        assert_eq!(documented, TABLE.map(|(code, _)| code));
    }
}
