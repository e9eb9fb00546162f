//! What is made from the command line's own description: completion scripts and man pages.

use std::path::Path;

use anyhow::Context;
use clap::CommandFactory as _;

use crate::args::Args;
use crate::exit;

/// `romulus completions`.
pub(crate) fn completions(shell: clap_complete::Shell) -> anyhow::Result<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "romulus", &mut script);
    std::io::Write::write_all(&mut std::io::stdout(), &script)?;
    Ok(exit::OK)
}

/// `romulus man`: `romulus.1` and a page for each verb.
pub(crate) fn man_pages(dir: &Path) -> anyhow::Result<u8> {
    std::fs::create_dir_all(dir).with_context(|| format!("could not make {}", dir.display()))?;
    clap_mangen::generate_to(Args::command(), dir)
        .with_context(|| format!("could not write into {}", dir.display()))?;
    Ok(exit::OK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_contradicts_itself_nowhere() {
        Args::command().debug_assert();
    }

    #[test]
    fn every_verb_that_is_shown_has_a_man_page_and_a_place_in_the_reference() {
        let dir = tempfile::tempdir().unwrap();
        man_pages(dir.path()).unwrap();
        let reference = include_str!("../../docs/src/commands.md");
        let mut verbs = 0;
        for verb in Args::command()
            .get_subcommands()
            .filter(|verb| !verb.is_hide_set())
        {
            let name = verb.get_name();
            let mut names = vec![name.to_owned()];
            names.extend(
                verb.get_subcommands()
                    .map(|inner| format!("{name} {}", inner.get_name())),
            );
            for name in names.iter().filter(|name| *name != "pki") {
                assert!(
                    reference.contains(&format!("`romulus {name}")),
                    "{name} is not in docs/src/commands.md"
                );
                let page = dir.path().join(format!("romulus-{}.1", name.replace(' ', "-")));
                assert!(page.exists(), "{}", page.display());
                verbs += 1;
            }
        }
        assert!(verbs > 10, "{verbs}");
        let page = std::fs::read_to_string(dir.path().join("romulus.1")).unwrap();
        assert!(page.contains("Exit codes"), "{page}");
    }
}
